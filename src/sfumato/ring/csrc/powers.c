/* Integer exponentials from digit tables; powers.py has the twins and the argument. */
#include "common.h"

#define MANTISSA 29
#define MOST_RIGHT 40
#define MOST_LEFT 30
#define SOME 256 /* words at a time: what is kept of them stays in the first cache */

/* words * 2^shift: rounded to nearest where it goes right. */
BODY int64_t shifted(int64_t word, int64_t shift) {
    int64_t right = shift < -MOST_RIGHT ? MOST_RIGHT : shift < 0 ? -shift : 0;
    int64_t left = shift > MOST_LEFT ? MOST_LEFT : shift > 0 ? shift : 0;
    return (word + (((int64_t)1 << right) >> 1)) >> right << left;
}

/* Digits from the lowest on, each with its width and a table of mantissas followed by exponents in ``tables``. Row v of
 * out is for the word turned by v + 1 blocks; with blocks = 0 the one row is for the word itself. */
BODY void powers_body(const int64_t *words, long n, int digits, const int *widths, int blocks, long scale,
                      const int64_t *tables, int64_t *out) {
    const int64_t half = (int64_t)1 << (MANTISSA - 1);
    int64_t near[SOME], power[SOME], top[SOME];
    for (long first = 0; first < n; first += SOME) {
        const long some = n - first < SOME ? n - first : SOME;
        const int64_t *word = words + first, *table = tables;
        int below = 0;
        for (long i = 0; i < some; i++) near[i] = (int64_t)1 << MANTISSA, power[i] = scale - MANTISSA;
        for (int d = 0; d < digits - 1; d++) {
            const int64_t size = (int64_t)1 << widths[d];
            for (long i = 0; i < some; i++) {
                int64_t at = word[i] >> below & (size - 1), value = (near[i] * table[at] + half) >> MANTISSA;
                int64_t more = value >> (MANTISSA + 1);
                near[i] = (value + more) >> more;
                power[i] += table[size + at] + more;
            }
            below += widths[d];
            table += 2 * size;
        }
        const int64_t size = (int64_t)1 << widths[digits - 1];
        for (long i = 0; i < some; i++) top[i] = word[i] >> below;
        for (long v = 0; v < (long)1 << blocks; v++) {
            const int64_t turn = blocks ? (int64_t)(v + 1) << (widths[digits - 1] - blocks) : 0;
            int64_t *row = out + v * n + first;
            for (long i = 0; i < some; i++) {
                int64_t at = (top[i] + turn) & (size - 1);
                row[i] = shifted((near[i] * table[at] + half) >> MANTISSA, power[i] + table[size + at]);
            }
        }
    }
}
VARIANTS(powers, (const int64_t *words, long n, int digits, const int *widths, int blocks, long scale,
                  const int64_t *tables, int64_t *out),
         (words, n, digits, widths, blocks, scale, tables, out))

/* The entry that the top bits of each word name, times a factor, sign-extended from the machine word's lower bits. */
#define CHOSEN(name, word, unsigned_word)                                                                           \
    BODY void name##_body(const int64_t *words, long n, int block, int spare, const int64_t *factor,                \
                          const word *table, word *out) {                                                           \
        for (long i = 0; i < n; i++) {                                                                              \
            unsigned_word entry = (unsigned_word)table[(words[i] >> block) * n + i];                                \
            out[i] = (word)(entry * (unsigned_word)factor[i] << spare) >> spare;                                    \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const int64_t *words, long n, int block, int spare, const int64_t *factor, const word *table,   \
                    word *out),                                                                                     \
             (words, n, block, spare, factor, table, out))
CHOSEN(chosen_64, int64_t, uint64_t)
CHOSEN(chosen_32, int32_t, uint32_t)
