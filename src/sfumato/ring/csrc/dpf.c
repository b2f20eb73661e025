/* Words of point function keys, with the processor's own AES; dpf.py has the twin and the argument. */
#include "common.h"

#if X86
#include <immintrin.h>

#define AES __attribute__((target("aes,sse4.1")))
#define ROUNDS 10
#define SEED 16
#define LEVEL 17
#define SOME 8 /* blocks under way at once: as many as a round takes cycles */

#define NEXT(k, i, constant)                                                                                        \
    do {                                                                                                            \
        __m128i turned = _mm_shuffle_epi32(_mm_aeskeygenassist_si128(k[(i) - 1], constant), 0xff), key = k[(i) - 1]; \
        key = _mm_xor_si128(key, _mm_slli_si128(key, 4));                                                           \
        key = _mm_xor_si128(key, _mm_slli_si128(key, 8));                                                           \
        k[i] = _mm_xor_si128(key, turned);                                                                          \
    } while (0)

AES static void schedule(const uint8_t *key, __m128i *k) {
    k[0] = _mm_loadu_si128((const __m128i *)key);
    NEXT(k, 1, 0x01); NEXT(k, 2, 0x02); NEXT(k, 3, 0x04); NEXT(k, 4, 0x08); NEXT(k, 5, 0x10);
    NEXT(k, 6, 0x20); NEXT(k, 7, 0x40); NEXT(k, 8, 0x80); NEXT(k, 9, 0x1b); NEXT(k, 10, 0x36);
}

/* block[i] becomes AES(block[i]) ^ block[i]; even blocks under one key, odd ones under the other. */
AES BODY void hashed(__m128i *block, int n, const __m128i *even, const __m128i *odd) {
    __m128i before[SOME];
    for (int i = 0; i < n; i++) before[i] = block[i], block[i] = _mm_xor_si128(block[i], (i & 1 ? odd : even)[0]);
    for (int r = 1; r < ROUNDS; r++)
        for (int i = 0; i < n; i++) block[i] = _mm_aesenc_si128(block[i], (i & 1 ? odd : even)[r]);
    for (int i = 0; i < n; i++)
        block[i] = _mm_xor_si128(_mm_aesenclast_si128(block[i], (i & 1 ? odd : even)[ROUNDS]), before[i]);
}

/* Both children of n seeds, corrected where the control bit is set. */
AES static void grown(const __m128i *seed, const uint8_t *control, long n, const uint8_t *correction,
                      const __m128i *left, const __m128i *right, __m128i *child, uint8_t *told) {
    const __m128i fix = _mm_loadu_si128((const __m128i *)correction), one = _mm_set_epi64x(0, 1);
    const uint8_t sides[2] = {correction[SEED] & 1, correction[SEED] >> 1 & 1};
    for (long first = 0; first < n; first += SOME / 2) {
        const int some = n - first < SOME / 2 ? (int)(n - first) : SOME / 2;
        __m128i block[SOME];
        for (int i = 0; i < SOME; i++) block[i] = i / 2 < some ? seed[first + i / 2] : one;
        hashed(block, SOME, left, right);
        for (int i = 0; i < 2 * some; i++) {
            const uint8_t set = control[first + i / 2];
            const __m128i mask = _mm_set1_epi64x(-(int64_t)set);
            told[2 * first + i] = (uint8_t)(_mm_cvtsi128_si64(block[i]) & 1) ^ (sides[i & 1] & set);
            child[2 * first + i] = _mm_xor_si128(_mm_andnot_si128(one, block[i]), _mm_and_si128(mask, fix));
        }
    }
}

/* Words of the leaves: the hash of each seed, corrected, with the holder's sign. */
AES static void written(const __m128i *seed, const uint8_t *control, long leaves, const uint8_t *correction, int bits,
                        const __m128i *leaf, int first_holder, uint8_t *out, long size) {
    const __m128i fix = _mm_loadu_si128((const __m128i *)correction), zero = _mm_setzero_si128();
    for (long first = 0; first < leaves; first += SOME) {
        const int some = leaves - first < SOME ? (int)(leaves - first) : SOME;
        __m128i block[SOME];
        for (int i = 0; i < SOME; i++) block[i] = i < some ? seed[first + i] : zero;
        hashed(block, SOME, leaf, leaf);
        for (int i = 0; i < some; i++) {
            const __m128i more = _mm_and_si128(_mm_set1_epi64x(-(int64_t)control[first + i]), fix);
            __m128i word = bits == 64 ? _mm_add_epi64(block[i], more) : _mm_add_epi32(block[i], more);
            if (!first_holder) word = bits == 64 ? _mm_sub_epi64(zero, word) : _mm_sub_epi32(zero, word);
            const long at = (first + i) * SEED, left = size - at;
            if (left >= SEED)
                _mm_storeu_si128((__m128i *)(out + at), word);
            else
                memcpy(out + at, &word, (size_t)left);
        }
    }
}

AES static int expanded(const uint8_t *keys, long count, long levels, long leaves, long rows, int bits,
                        const uint8_t *fixed, int first_holder, uint8_t *out) {
    const long length = 2 * SEED + LEVEL * levels, size = rows * (bits / 8), room = leaves + 2;
    __m128i round[3][ROUNDS + 1], *seed[2];
    uint8_t *control[2], *scratch = sf_scratch((size_t)room * 2 * (SEED + 1));
    if (scratch == NULL) return 0;
    for (int i = 0; i < 3; i++) schedule(fixed + i * SEED, round[i]);
    for (int i = 0; i < 2; i++) {
        seed[i] = (__m128i *)scratch + i * room;
        control[i] = scratch + 2 * SEED * room + i * room;
    }
    for (long k = 0; k < count; k++, keys += length, out += size) {
        long some = 1;
        int now = 0;
        seed[0][0] = _mm_loadu_si128((const __m128i *)keys);
        control[0][0] = (uint8_t)!first_holder;
        for (long level = 0; level < levels; level++, now = !now) {
            const long wanted = ((leaves - 1) >> (levels - 1 - level)) + 1;
            grown(seed[now], control[now], some, keys + SEED + level * LEVEL, round[0], round[1], seed[!now],
                  control[!now]);
            some = wanted;
        }
        written(seed[now], control[now], leaves, keys + length - SEED, bits, round[2], first_holder, out, size);
    }
    free(scratch);
    return 1;
}

/* Words (count, rows) of count keys; 0 where this processor has no AES or there is no memory. */
EXPORT int sf_dpf(const uint8_t *keys, long count, long levels, long leaves, long rows, int bits,
                  const uint8_t *fixed, int first_holder, uint8_t *out) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("aes") || !__builtin_cpu_supports("sse4.1")) return 0;
    return expanded(keys, count, levels, leaves, rows, bits, fixed, first_holder, out);
}
#else
EXPORT int sf_dpf(const uint8_t *keys, long count, long levels, long leaves, long rows, int bits,
                  const uint8_t *fixed, int first_holder, uint8_t *out) {
    (void)keys, (void)count, (void)levels, (void)leaves, (void)rows, (void)bits, (void)fixed, (void)first_holder;
    (void)out;
    return 0;
}
#endif
