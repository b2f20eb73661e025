/* Convolutions with two spatial axes. Included once for every word, after gemm.h.
 *
 * direct: the input is copied with its padding, one plane for every phase of the stride. A tap's input to consecutive
 * outputs is then consecutive memory, wherever the tap is, so the product of weights and patches reads patches in place.
 * Outputs keep the planes' row length; the columns too many are dropped at the end.
 *
 * threes: 3x3 kernels at stride 1 by Karatsuba's three-term product on both axes, turned into a filter: nine outputs
 * from 36 products instead of 81, with no division, so exact in any ring (Winograd's filters divide by two). */

#ifndef SHAPE_DEFINED
#define SHAPE_DEFINED
typedef struct {
    long images, channels, height, width, outputs, tall, wide; /* channels and outputs of all groups; kernel tall x wide */
    long stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups, out_height, out_width;
} Shape;
#define TAPS_DEPTH 576
#define U_BYTES ((long)4 << 20)
#define FILTER_COST 200 /* in products per channel and output */
#define V_BYTES ((size_t)32 << 20)
static inline long up(long n, long unit) { return (n + unit - 1) / unit * unit; }
/* The next piece of scratch memory; pieces begin at multiples of 64 bytes. */
static inline void *piece(char **at, size_t bytes) {
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}
#endif

/* One image's channels, padded and split into phases: plane (channel, y mod stride, x mod stride) is tall x wide. */
WIDE static void FN(phases)(const Shape *s, const WORD *x, long channels, long tall, long wide, WORD *to) {
    for (long c = 0; c < channels; c++)
        for (long py = 0; py < s->stride_y; py++)
            for (long px = 0; px < s->stride_x; px++)
                for (long y = 0; y < tall; y++, to += wide) {
                    long from = y * s->stride_y + py - s->pad_y, first = px - s->pad_x, j = 0;
                    if (from < 0 || from >= s->height) {
                        memset(to, 0, (size_t)wide * sizeof(WORD));
                        continue;
                    }
                    const WORD *row = x + (c * s->height + from) * s->width;
                    for (; j < wide && first + j * s->stride_x < 0; j++) to[j] = 0;
                    if (s->stride_x == 1)
                        for (; j < wide && first + j < s->width; j++) to[j] = row[first + j];
                    else
                        for (; j < wide && first + j * s->stride_x < s->width; j++) to[j] = row[first + j * s->stride_x];
                    for (; j < wide; j++) to[j] = 0;
                }
}

/* Weights of one group (outputs, depth) by patches; see the top. 1 when done, 0 when there is no memory. */
WIDE static int FN(direct)(const Shape *s, const WORD *x, const WORD *w, WORD *out) {
    long channels = s->channels / s->groups, outputs = s->outputs / s->groups, taps = s->tall * s->wide;
    long depth = channels * taps, pixels = s->out_height * s->out_width, phases = s->stride_y * s->stride_x;
    long tall = s->out_height + (s->tall - 1) * s->dilation_y / s->stride_y;
    long wide = s->out_width + (s->wide - 1) * s->dilation_x / s->stride_x;
    long columns = (s->out_height - 1) * wide + s->out_width, c_row = up(columns, LANES);
    /* A kernel of one tap over the whole input needs no copy: its patches are the input. */
    int in_place = taps == 1 && phases == 1 && !s->pad_y && !s->pad_x && columns % LANES == 0;
    int exact = wide == s->out_width && c_row == columns;
    long block = taps > 1 ? TAPS_DEPTH : DEPTH;
    size_t weights = (size_t)(TALL * block) * sizeof(WORD);
    size_t copies = in_place ? 0 : (size_t)(channels * phases * tall * wide + COLUMNS) * sizeof(WORD);
    size_t results = exact ? 0 : (size_t)(outputs * c_row) * sizeof(WORD);
    char *scratch = sf_scratch(weights + copies + results + (size_t)depth * sizeof(long) + 256);
    if (!scratch) return 0;
    char *at = scratch;
    WORD *left = piece(&at, weights), *copy = piece(&at, copies), *spare = piece(&at, results);
    long *place = piece(&at, (size_t)depth * sizeof(long)), k = 0;
    for (long c = 0; c < channels; c++)
        for (long r = 0; r < s->tall; r++)
            for (long q = 0; q < s->wide; q++, k++) {
                long y = r * s->dilation_y, z = q * s->dilation_x;
                long phase = y % s->stride_y * s->stride_x + z % s->stride_x;
                place[k] = ((c * phases + phase) * tall + y / s->stride_y) * wide + z / s->stride_x;
            }
    for (long group = 0; group < s->groups; group++)
        for (long image = 0; image < s->images; image++) {
            const WORD *from = x + (image * s->channels + group * channels) * s->height * s->width;
            WORD *target = out + (image * s->outputs + group * outputs) * pixels, *result = exact ? target : spare;
            if (!in_place) FN(phases)(s, from, channels, tall, wide, copy);
            const WORD *patches = in_place ? from : copy;
            for (long first = 0; first < depth; first += block)
                for (long row = 0; row < outputs; row += TALL) {
                    long some = depth - first < block ? depth - first : block;
                    long rows = outputs - row < TALL ? outputs - row : TALL;
                    FN(pack_left)(w + (group * outputs + row) * depth + first, depth, 1, rows, some, left);
                    for (long j = 0; j < columns; j += COLUMNS) {
                        int vectors = (int)((columns - j < COLUMNS ? columns - j + LANES - 1 : COLUMNS) / LANES);
                        for (long i = 0; i < rows; i += ROWS)
                            FN(tile_placed)(rows - i < ROWS ? (int)(rows - i) : ROWS, vectors, some, left + i * some,
                                            patches + j, place + first, result + (row + i) * c_row + j, c_row, first > 0);
                    }
                }
            for (long i = 0; !exact && i < outputs; i++)
                for (long y = 0; y < s->out_height; y++)
                    memcpy(target + i * pixels + y * s->out_width, spare + i * c_row + y * wide,
                           (size_t)s->out_width * sizeof(WORD));
        }
    free(scratch);
    return 1;
}

/* The six sums of a filter of three taps, and of an input of five words, whose products make three outputs. */
#define SUMS_OF_THREE(e, g)                                                                                           \
    (e[0] = g[0], e[1] = g[1], e[2] = g[2], e[3] = g[0] + g[1], e[4] = g[0] + g[2], e[5] = g[1] + g[2])
#define SUMS_OF_FIVE(d, x)                                                                                            \
    (d[0] = x[0] - x[1] - x[2], d[1] = x[2] - x[1] - x[3], d[2] = x[4] - x[2] - x[3], d[3] = x[1], d[4] = x[2],        \
     d[5] = x[3])
#define THREE_OF_SIX(z, p) (z[0] = p[0] + p[3] + p[4], z[1] = p[1] + p[3] + p[5], z[2] = p[2] + p[4] + p[5])

/* Filters of some outputs as 36 packed left factors, `each` words apart: (36, panels, channels, ROWS). */
WIDE static void FN(filters)(const WORD *w, long outputs, long channels, WORD *to, long each) {
    for (long first = 0; first < outputs; first += ROWS)
        for (long c = 0; c < channels; c++, to += ROWS) {
            WORD taps[9][ROWS];
            for (int i = 0; i < ROWS; i++) {
                const WORD *from = w + ((first + i < outputs ? first + i : first) * channels + c) * 9;
                for (int k = 0; k < 9; k++) taps[k][i] = from[k];
            }
            typedef WORD PANEL __attribute__((vector_size(ROWS * sizeof(WORD)), aligned(sizeof(WORD)), may_alias));
            PANEL across[3][6], g[3], e[6];
            for (int y = 0; y < 3; y++) {
                for (int i = 0; i < 3; i++) g[i] = *(PANEL *)taps[3 * y + i];
                SUMS_OF_THREE(across[y], g);
            }
            for (int v = 0; v < 6; v++) {
                for (int i = 0; i < 3; i++) g[i] = across[i][v];
                SUMS_OF_THREE(e, g);
                for (int u = 0; u < 6; u++) *(PANEL *)(to + (6 * u + v) * each) = e[u];
            }
        }
}

/* One channel's tiles: (36, tiles) with the 36 `each` words apart. `planes` are its nine phases, `wide` words a row. */
WIDE static void FN(tiles_in)(const WORD *planes, long plane, long wide, long tall_tiles, long wide_tiles, WORD *to,
                              long each) {
    for (long ty = 0; ty < tall_tiles; ty++)
        for (long tx = 0; tx < wide_tiles; tx += LANES) {
            VECTOR across[5][6], x[5], d[6];
            for (int y = 0; y < 5; y++) {
                for (int i = 0; i < 5; i++)
                    x[i] = *(const LOOSE *)(planes + (y % 3 * 3 + i % 3) * plane + (ty + y / 3) * wide + tx + i / 3);
                SUMS_OF_FIVE(across[y], x);
            }
            for (int v = 0; v < 6; v++) {
                for (int i = 0; i < 5; i++) x[i] = across[i][v];
                SUMS_OF_FIVE(d, x);
                for (int u = 0; u < 6; u++) *(LOOSE *)(to + (6 * u + v) * each + ty * wide_tiles + tx) = d[u];
            }
        }
}

/* One output's tiles of products, 36 planes `each` words apart, to its image. */
WIDE static void FN(tiles_out)(const WORD *products, long each, const Shape *s, long tall_tiles, long wide_tiles,
                               WORD *image) {
    for (long ty = 0; ty < tall_tiles; ty++)
        for (long tx = 0; tx < wide_tiles; tx += LANES) {
            VECTOR down[3][6], p[6], z[3];
            WORD tile[3][3][LANES] __attribute__((aligned(64)));
            for (int v = 0; v < 6; v++) {
                for (int u = 0; u < 6; u++)
                    p[u] = *(const LOOSE *)(products + (6 * u + v) * each + ty * wide_tiles + tx);
                THREE_OF_SIX(z, p);
                for (int i = 0; i < 3; i++) down[i][v] = z[i];
            }
            for (int y = 0; y < 3; y++) {
                THREE_OF_SIX(z, down[y]);
                for (int i = 0; i < 3; i++) *(VECTOR *)tile[y][i] = z[i];
            }
            long some = s->out_width - 3 * tx < 3 * LANES ? s->out_width - 3 * tx : 3 * LANES;
            for (int y = 0; y < 3 && 3 * ty + y < s->out_height; y++) {
                WORD *row = image + (3 * ty + y) * s->out_width + 3 * tx;
                long j = 0;
                for (; 3 * j + 2 < some; j++)
                    for (int i = 0; i < 3; i++) row[3 * j + i] = tile[y][i][j];
                for (int i = 0; 3 * j + i < some; i++) row[3 * j + i] = tile[y][i][j];
            }
        }
}

WIDE static int FN(threes)(const Shape *s, const WORD *x, const WORD *w, WORD *out) {
    long channels = s->channels / s->groups, outputs = s->outputs / s->groups, pixels = s->out_height * s->out_width;
    long tall_tiles = (s->out_height + 2) / 3, wide_tiles = (s->out_width + 2) / 3, tiles = tall_tiles * wide_tiles;
    long together = V_BYTES / sizeof(WORD) / (size_t)(36 * channels * tiles);
    together = together < 1 ? 1 : together < s->images ? together : s->images;
    /* An odd number of vectors keeps rows off each other's cache sets. */
    long b_row = (up(together * tiles, LANES) / LANES | 1) * LANES, v_each = channels * b_row + 2 * LANES;
    long block = U_BYTES / (long)sizeof(WORD) / (36 * channels) / ROWS * ROWS;
    block = block < ROWS ? ROWS : block > 64 ? 64 : block;
    long u_each = block * channels + LANES, m_each = block * b_row + LANES;
    Shape thirds = *s;
    thirds.stride_y = thirds.stride_x = 3;
    long tall = tall_tiles + 1, wide = wide_tiles + 1, plane = tall * wide;
    size_t v_bytes = (size_t)(36 * v_each + COLUMNS) * sizeof(WORD), u_bytes = (size_t)(36 * u_each) * sizeof(WORD);
    size_t m_bytes = (size_t)(36 * m_each + LANES) * sizeof(WORD);
    size_t plane_bytes = (size_t)(9 * plane + 2 * LANES) * sizeof(WORD);
    char *scratch = sf_scratch(v_bytes + u_bytes + m_bytes + plane_bytes + 256);
    if (!scratch) return 0;
    char *at = scratch;
    WORD *v = piece(&at, v_bytes), *u = piece(&at, u_bytes), *m = piece(&at, m_bytes), *planes = piece(&at, plane_bytes);
    for (long group = 0; group < s->groups; group++)
        for (long image = 0; image < s->images; image += together) {
            long some = s->images - image < together ? s->images - image : together, columns = some * tiles;
            for (long c = 0; c < channels; c++)
                for (long n = 0; n < some; n++) {
                    const WORD *from = x + ((image + n) * s->channels + group * channels + c) * s->height * s->width;
                    FN(phases)(&thirds, from, 1, tall, wide, planes);
                    FN(tiles_in)(planes, plane, wide, tall_tiles, wide_tiles, v + c * b_row + n * tiles, v_each);
                }
            for (long first = 0; first < outputs; first += block) {
                long rows = outputs - first < block ? outputs - first : block;
                FN(filters)(w + (group * outputs + first) * channels * 9, rows, channels, u, u_each);
                for (long k = 0; k < 36; k++)
                    for (long c = 0; c < channels; c += DEPTH) {
                        long depth = channels - c < DEPTH ? channels - c : DEPTH;
                        for (long j = 0; j < columns; j += COLUMNS) {
                            int vectors = (int)((columns - j < COLUMNS ? columns - j + LANES - 1 : COLUMNS) / LANES);
                            for (long i = 0; i < rows; i += ROWS)
                                FN(tile_rows)(rows - i < ROWS ? (int)(rows - i) : ROWS, vectors, depth,
                                              u + k * u_each + i * channels + c * ROWS, v + k * v_each + c * b_row + j,
                                              b_row, m + k * m_each + i * b_row + j, b_row, c > 0);
                        }
                    }
                for (long n = 0; n < some; n++)
                    for (long i = 0; i < rows; i++)
                        FN(tiles_out)(m + i * b_row + n * tiles, m_each, s, tall_tiles, wide_tiles,
                                      out + ((image + n) * s->outputs + group * outputs + first + i) * pixels);
            }
        }
    free(scratch);
    return 1;
}

/* x (images, channels, height, width), w (outputs, channels / groups, tall, wide), out (images, outputs, ...), all rows
 * together; `shape` in the order of Shape. 1 when done, 0 when there is no memory. */
EXPORT WIDE int FN(sf_conv)(const long *shape, const WORD *x, const WORD *w, WORD *out) {
    Shape s;
    memcpy(&s, shape, sizeof s);
    long tiles = s.images * ((s.out_height + 2) / 3) * ((s.out_width + 2) / 3), wide = s.out_width + 2;
    long direct = s.images * 9 * up((s.out_height - 1) * wide + s.out_width, LANES);
    long threes = 36 * up(tiles, LANES) + FILTER_COST;
    int fits = s.tall == 3 && s.wide == 3 && s.stride_y == 1 && s.stride_x == 1 && s.dilation_y == 1 &&
               s.dilation_x == 1 && s.channels / s.groups >= 8 && s.outputs / s.groups >= 8;
    return fits && threes < direct ? FN(threes)(&s, x, w, out) : FN(direct)(&s, x, w, out);
}
