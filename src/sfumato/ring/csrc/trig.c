/* Integer harmonics of opened phases and what is made of them; trig.py has the twins and the argument. */
#include "common.h"

#define SCALE 30
#define SOME 256 /* phases at a time: what is kept of them stays in the first cache */
/* How a word's phase splits: period and low bits, low bits dropped, places that a short period lacks in the table, and
 * the small angle's unit. */
typedef struct {
    long period, low, spare, lift, unit;
} Phase;

/* cos and sin of each phase, scaled by 2^30; some <= SOME. */
BODY void first_harmonic(const int64_t *words, long some, const Phase *p, const int64_t *cosines, const int64_t *sines,
                         int64_t *cos, int64_t *sin) {
    const int64_t half = (int64_t)1 << (SCALE - 1), period = ((int64_t)1 << p->period) - 1,
                  low = ((int64_t)1 << p->low) - 1;
    for (long i = 0; i < some; i++) {
        int64_t phase = words[i] & period, at = phase >> p->low << p->lift;
        int64_t c = cosines[at], s = sines[at];
        int64_t a = ((phase & low) >> p->spare) * p->unit >> 32, square = a * a >> SCALE;
        int64_t near_cos = ((int64_t)1 << SCALE) - (square >> 1);
        int64_t near_sin = a - (int64_t)((uint32_t)(square * a >> SCALE) / 6);
        cos[i] = (c * near_cos - s * near_sin + half) >> SCALE;
        sin[i] = (s * near_cos + c * near_sin + half) >> SCALE;
    }
}

/* On to the next harmonic. */
BODY void rotate(long some, const int64_t *cos_one, const int64_t *sin_one, int64_t *cos, int64_t *sin) {
    const int64_t half = (int64_t)1 << (SCALE - 1);
    for (long i = 0; i < some; i++) {
        int64_t c = cos[i], s = sin[i];
        cos[i] = (c * cos_one[i] - s * sin_one[i] + half) >> SCALE;
        sin[i] = (s * cos_one[i] + c * sin_one[i] + half) >> SCALE;
    }
}

#define DEALT(name, word)                                                                                           \
    BODY void name##_body(const int64_t *mask, long n, const Phase *p, const int64_t *cosines, const int64_t *sines, \
                          long count, int drop, word *out) {                                                        \
        const int64_t nearest = ((int64_t)1 << drop) >> 1;                                                          \
        int64_t cos_one[SOME], sin_one[SOME], cos[SOME], sin[SOME];                                                 \
        for (long first = 0; first < n; first += SOME) {                                                            \
            long some = n - first < SOME ? n - first : SOME;                                                        \
            first_harmonic(mask + first, some, p, cosines, sines, cos_one, sin_one);                                \
            for (long i = 0; i < some; i++) cos[i] = cos_one[i], sin[i] = sin_one[i];                               \
            for (long k = 0; k < count; k++) {                                                                      \
                word *row = out + 2 * k * n + first;                                                                \
                if (k) rotate(some, cos_one, sin_one, cos, sin);                                                    \
                for (long i = 0; i < some; i++) row[i] = (word)((cos[i] + nearest) >> drop);                        \
                for (long i = 0; i < some; i++) row[n + i] = (word)((sin[i] + nearest) >> drop);                    \
            }                                                                                                       \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const int64_t *mask, long n, const Phase *p, const int64_t *cosines, const int64_t *sines,      \
                    long count, int drop, word *out),                                                               \
             (mask, n, p, cosines, sines, count, drop, out))
DEALT(dealt_64, int64_t)
DEALT(dealt_32, int32_t)

#define WEIGHTED(name, word)                                                                                        \
    BODY void name##_body(const int64_t *delta, long n, const Phase *p, const int64_t *cosines,                     \
                          const int64_t *sines, const word *table, long count, const int64_t *by_cos,               \
                          const int64_t *by_sin, int drop, word *out) {                                             \
        const int64_t nearest = (int64_t)1 << (drop - 1);                                                           \
        int64_t cos_one[SOME], sin_one[SOME], cos[SOME], sin[SOME], total[SOME];                                    \
        for (long first = 0; first < n; first += SOME) {                                                            \
            long some = n - first < SOME ? n - first : SOME;                                                        \
            first_harmonic(delta + first, some, p, cosines, sines, cos_one, sin_one);                               \
            for (long i = 0; i < some; i++) cos[i] = cos_one[i], sin[i] = sin_one[i], total[i] = 0;                 \
            for (long k = 0; k < count; k++) {                                                                      \
                const word *row = table + 2 * k * n + first;                                                        \
                const int64_t u = by_cos[k], v = by_sin[k];                                                         \
                if (k) rotate(some, cos_one, sin_one, cos, sin);                                                    \
                for (long i = 0; i < some; i++)                                                                     \
                    total[i] += ((cos[i] * u + sin[i] * v + nearest) >> drop) * row[i] +                            \
                                ((cos[i] * v - sin[i] * u + nearest) >> drop) * row[n + i];                         \
            }                                                                                                       \
            for (long i = 0; i < some; i++) out[first + i] = (word)total[i];                                        \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const int64_t *delta, long n, const Phase *p, const int64_t *cosines, const int64_t *sines,     \
                    const word *table, long count, const int64_t *by_cos, const int64_t *by_sin, int drop,          \
                    word *out),                                                                                     \
             (delta, n, p, cosines, sines, table, count, by_cos, by_sin, drop, out))
WEIGHTED(weighted_64, int64_t)
WEIGHTED(weighted_32, int32_t)
