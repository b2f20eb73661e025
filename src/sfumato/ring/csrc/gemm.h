/* C = A B, blocked as in GotoBLAS: panels of A (ROWS rows) and of B (VECTORS vectors of columns) are packed so that
 * the innermost loop reads both in order, and a tile of C stays in registers. AHEAD rows of products are made before
 * they are added: in pairs, sums would take the multipliers' turns. 16 sums, 8 products, two vectors of B and a word of
 * A spread over a vector make 27 of the 32 registers.
 *
 * Included once for every word: WORD, LANES (words in 64 bytes), FN (names). Strides count words. */

#define VECTOR FN(vector)
#define LOOSE FN(loose)
typedef WORD VECTOR __attribute__((vector_size(64)));
typedef WORD LOOSE __attribute__((vector_size(64), aligned(sizeof(WORD)), may_alias));

#ifndef ROWS
#define ROWS 8
#define VECTORS 2
#define AHEAD 4
#define DEPTH 256 /* of a block: a panel of B is 32 KB, one of A 16 KB or less */
#define TALL 128  /* rows of A packed at a time */
#define BROAD 24  /* panels of B packed at a time */
#endif
#define COLUMNS (VECTORS * LANES)

/* A tile of C, rows x vectors: set, or added to. B's row k is at b + k * b_row, or at b + place[k]. */
BODY WIDE void FN(tile)(const int rows, const int vectors, const int placed, long depth, const WORD *a, const WORD *b,
                        long b_row, const long *place, WORD *c, long c_row, int add) {
    VECTOR sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[i][j] = (VECTOR){0};
    for (long k = 0; k < depth; k++) {
        const WORD *row = placed ? b + place[k] : b + k * b_row;
        VECTOR right[VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) right[j] = *(const LOOSE *)(row + j * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i += AHEAD) {
            VECTOR product[AHEAD][VECTORS];
#pragma GCC unroll 4
            for (int g = 0; g < AHEAD; g++)
#pragma GCC unroll 2
                for (int j = 0; j < vectors; j++)
                    if (i + g < rows) {
                        product[g][j] = ((VECTOR){0} + a[k * ROWS + i + g]) * right[j];
                        __asm__ volatile("" : "+v"(product[g][j]));
                    }
#pragma GCC unroll 4
            for (int g = 0; g < AHEAD; g++)
#pragma GCC unroll 2
                for (int j = 0; j < vectors; j++)
                    if (i + g < rows) sum[i + g][j] += product[g][j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            LOOSE *at = (LOOSE *)(c + i * c_row + j * LANES);
            *at = add ? (LOOSE)(sum[i][j] + *at) : (LOOSE)sum[i][j];
        }
}

#define TILE_ARGUMENTS depth, a, b, b_row, place, c, c_row, add
#define TILE_OF(rows)                                                                                                \
    case rows:                                                                                                       \
        if (vectors == 2) FN(tile)(rows, 2, placed, TILE_ARGUMENTS);                                                 \
        else FN(tile)(rows, 1, placed, TILE_ARGUMENTS);                                                              \
        break;
#define TILES                                                                                                        \
    switch (rows) {                                                                                                  \
        TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6) TILE_OF(7) TILE_OF(8)                      \
    }

WIDE static void FN(tile_rows)(int rows, int vectors, long depth, const WORD *a, const WORD *b, long b_row, WORD *c,
                               long c_row, int add) {
    enum { placed = 0 };
    const long *place = NULL;
    TILES
}

WIDE static void FN(tile_placed)(int rows, int vectors, long depth, const WORD *a, const WORD *b, const long *place,
                                 WORD *c, long c_row, int add) {
    enum { placed = 1 };
    const long b_row = 0;
    TILES
}
#undef TILE_ARGUMENTS
#undef TILE_OF
#undef TILES

/* LANES x LANES words, a vector a row, turned: in step s, lanes with bit s change places with rows with bit s. */
BODY WIDE void FN(turn)(VECTOR v[LANES]) {
#pragma GCC unroll 4
    for (int s = 1; s < LANES; s *= 2) {
        VECTOR low, high;
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = (WORD)(lane & s ? LANES + lane - s : lane);
            high[lane] = (WORD)(lane & s ? LANES + lane : lane + s);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & s)) {
                VECTOR first = v[i], second = v[i + s];
                v[i] = __builtin_shuffle(first, second, low);
                v[i + s] = __builtin_shuffle(first, second, high);
            }
    }
}

/* rows x depth of A as panels of ROWS rows, k outermost in a panel. */
WIDE static void FN(pack_left)(const WORD *a, long a_row, long a_step, long rows, long depth, WORD *to) {
    enum { panels = LANES / ROWS };
    long first = 0;
    for (; a_step == 1 && first + LANES <= rows; first += LANES, to += LANES * depth) {
        const WORD *from = a + first * a_row;
        long k = 0;
        for (; k + LANES <= depth; k += LANES) {
            VECTOR v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = *(const LOOSE *)(from + i * a_row + k);
            FN(turn)(v);
            for (int i = 0; i < LANES; i++)
                for (int panel = 0; panel < panels; panel++)
                    memcpy(to + panel * ROWS * depth + (k + i) * ROWS, (WORD *)&v[i] + panel * ROWS, ROWS * sizeof(WORD));
        }
        for (; k < depth; k++)
            for (int i = 0; i < LANES; i++) to[i / ROWS * ROWS * depth + k * ROWS + i % ROWS] = from[i * a_row + k];
    }
    for (; first < rows; first += ROWS, to += ROWS * depth) {
        const WORD *from = a + first * a_row;
        long some = rows - first < ROWS ? rows - first : ROWS;
        if (a_row == 1 && some == ROWS)
            for (long k = 0; k < depth; k++) memcpy(to + k * ROWS, from + k * a_step, ROWS * sizeof(WORD));
        else
            for (long k = 0; k < depth; k++)
                for (int i = 0; i < some; i++) to[k * ROWS + i] = from[i * a_row + k * a_step];
    }
}

/* depth x columns of B as one panel, its last vector filled up with zeros. */
WIDE static void FN(pack_right)(const WORD *b, long b_row, long b_step, long depth, long columns, WORD *to) {
    long width = (columns + LANES - 1) / LANES * LANES, j = 0;
    for (; b_row == 1 && j + LANES <= columns; j += LANES) {
        long k = 0;
        for (; k + LANES <= depth; k += LANES) {
            VECTOR v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = *(const LOOSE *)(b + (j + i) * b_step + k);
            FN(turn)(v);
            for (int i = 0; i < LANES; i++) *(LOOSE *)(to + (k + i) * width + j) = v[i];
        }
        for (; k < depth; k++)
            for (int i = 0; i < LANES; i++) to[k * width + j + i] = b[(j + i) * b_step + k];
    }
    for (; b_step == 1 && j + LANES <= columns; j += LANES)
        for (long k = 0; k < depth; k++) *(LOOSE *)(to + k * width + j) = *(const LOOSE *)(b + k * b_row + j);
    for (; j < columns; j++)
        for (long k = 0; k < depth; k++) to[k * width + j] = b[k * b_row + j * b_step];
    for (; j < width; j++)
        for (long k = 0; k < depth; k++) to[k * width + j] = 0;
}

/* One tile into C at any strides, by way of `spare` where the tile does not fit there as it is. */
WIDE static void FN(tile_out)(int rows, long columns, long depth, const WORD *a, const WORD *b, long b_row, WORD *c,
                              long c_row, long c_step, int add, WORD *spare) {
    int vectors = (int)((columns + LANES - 1) / LANES);
    if (c_step == 1 && columns % LANES == 0) {
        FN(tile_rows)(rows, vectors, depth, a, b, b_row, c, c_row, add);
        return;
    }
    FN(tile_rows)(rows, vectors, depth, a, b, b_row, spare, COLUMNS, 0);
    for (int i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) {
            WORD *at = c + i * c_row + j * c_step;
            *at = add ? *at + spare[i * COLUMNS + j] : spare[i * COLUMNS + j];
        }
}

/* C (m, n) = A (m, k) B (k, n); scratch holds the packed blocks. */
WIDE static void FN(product)(long m, long n, long k, const WORD *a, long a_row, long a_step, const WORD *b, long b_row,
                             long b_step, WORD *c, long c_row, long c_step, WORD *scratch) {
    WORD *left = scratch, *right = left + TALL * DEPTH, *spare = right + BROAD * COLUMNS * DEPTH;
    int direct = b_step == 1 && m <= 2 * ROWS;
    for (long column = 0; column < n; column += BROAD * COLUMNS) {
        long columns = n - column < BROAD * COLUMNS ? n - column : BROAD * COLUMNS;
        for (long at = 0; at < k; at += DEPTH) {
            long depth = k - at < DEPTH ? k - at : DEPTH;
            for (long row = 0; row < m; row += TALL) {
                long rows = m - row < TALL ? m - row : TALL;
                FN(pack_left)(a + row * a_row + at * a_step, a_row, a_step, rows, depth, left);
                for (long j = 0; j < columns; j += COLUMNS) {
                    long some = columns - j < COLUMNS ? columns - j : COLUMNS;
                    const WORD *from = b + at * b_row + (column + j) * b_step;
                    WORD *panel = right + j * DEPTH;
                    int whole = direct && some % LANES == 0;
                    if (!whole && row == 0) FN(pack_right)(from, b_row, b_step, depth, some, panel);
                    long panel_row = whole ? b_row : (some + LANES - 1) / LANES * LANES;
                    for (long i = 0; i < rows; i += ROWS)
                        FN(tile_out)(rows - i < ROWS ? (int)(rows - i) : ROWS, some, depth, left + i * depth,
                                     whole ? from : panel, panel_row, c + (row + i) * c_row + (column + j) * c_step,
                                     c_row, c_step, at > 0, spare);
                }
            }
        }
    }
}

#define SCRATCH_WORDS ((size_t)(TALL * DEPTH + BROAD * COLUMNS * DEPTH + ROWS * COLUMNS))

/* Part of a last vector that is filled, of n columns. */
static double FN(filled)(long n) { return (double)n / (double)((n + LANES - 1) / LANES * LANES); }

/* A batch of products; 1 when done, 0 when there is no memory. C is (batch, m, n), rows together. */
EXPORT WIDE int FN(sf_gemm)(long batch, long m, long n, long k, const WORD *a, long a_each, long a_row, long a_step,
                            const WORD *b, long b_each, long b_row, long b_step, WORD *c) {
    WORD *scratch = sf_scratch(SCRATCH_WORDS * sizeof(WORD));
    if (!scratch) return 0;
    if (k == 0) memset(c, 0, (size_t)(batch * m * n) * sizeof(WORD));
    /* Columns are what vectors run over; where the rows fill them better, the product is made transposed. */
    int turned = FN(filled)(m) > 1.25 * FN(filled)(n);
    for (long i = 0; i < batch; i++, a += a_each, b += b_each, c += m * n)
        if (turned) FN(product)(n, m, k, b, b_step, b_row, a, a_step, a_row, c, 1, n, scratch);
        else FN(product)(m, n, k, a, a_row, a_step, b, b_row, b_step, c, n, 1, scratch);
    free(scratch);
    return 1;
}
