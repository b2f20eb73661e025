/* The closing step of a truncation, one pass each; what the names mean: closing.py, the twins. */
#include "common.h"

#define JUDGE(name, word, signed_word)                                                                              \
    BODY void name##_body(const word *words, long count, int k, int bits, uint8_t *out) {                           \
        for (long i = 0; i < count; i++) {                                                                          \
            signed_word top = (signed_word)(words[i] - (bits != 0)) >> (k - 2);                                     \
            uint8_t p = top == 1, a = p | (top < -1);                                                               \
            out[i] = (uint8_t)(a | p << 1);                                                                         \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const word *words, long count, int k, int bits, uint8_t *out), (words, count, k, bits, out))
JUDGE(judge_64, uint64_t, int64_t)
JUDGE(judge_32, uint32_t, int32_t)

/* signed_word is the source's; word is the result's, and that of the dealt words. */
#define SIGN(bit) ((bit) & 1 ? -dealt[i] : dealt[i])
#define ROUNDED_UP(name, source, signed_word, word)                                                                 \
    BODY void name##_body(const source *words, long count, int k, int bits, const uint8_t *judged,                  \
                          const uint8_t *both, const uint8_t *other, const word *dealt, word *out) {                \
        const source less = bits != 0;                                                                              \
        for (long i = 0; i < count; i++) {                                                                          \
            word wrap = (word)(judged[i] >> 1) - (word)(judged[i] & other[i] & 1) - SIGN(both[i]);                  \
            out[i] = (word)((signed_word)(words[i] - less) >> bits) - (wrap << (k - bits)) + (word)less;            \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const source *words, long count, int k, int bits, const uint8_t *judged, const uint8_t *both,   \
                    const uint8_t *other, const word *dealt, word *out),                                            \
             (words, count, k, bits, judged, both, other, dealt, out))
ROUNDED_UP(rounded_up_64_64, uint64_t, int64_t, uint64_t)
ROUNDED_UP(rounded_up_32_64, uint32_t, int32_t, uint64_t)
ROUNDED_UP(rounded_up_64_32, uint64_t, int64_t, uint32_t)
ROUNDED_UP(rounded_up_32_32, uint32_t, int32_t, uint32_t)

#define ROUNDED_DOWN(name, signed_word, word)                                                                       \
    BODY void name##_body(const signed_word *words, long count, int k, int bits, const uint8_t *own,                \
                          const uint8_t *other, const uint8_t *rb, const word *dealt, word *out) {                  \
        for (long i = 0; i < count; i++) {                                                                          \
            word product = (word)(other[i] & rb[i] & 1);                                                            \
            word wrap = SIGN(own[i] ^ other[i]) + (own[i] & 1 ? -product : product);                                \
            out[i] = (word)(words[i] >> bits) + (wrap << (k - bits));                                               \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const signed_word *words, long count, int k, int bits, const uint8_t *own,                      \
                    const uint8_t *other, const uint8_t *rb, const word *dealt, word *out),                         \
             (words, count, k, bits, own, other, rb, dealt, out))
ROUNDED_DOWN(rounded_down_64_64, int64_t, uint64_t)
ROUNDED_DOWN(rounded_down_32_64, int32_t, uint64_t)
ROUNDED_DOWN(rounded_down_64_32, int64_t, uint32_t)
ROUNDED_DOWN(rounded_down_32_32, int32_t, uint32_t)

/* (word + add) >> drop, of which 32 bits are kept: a component of a value shortened to Z32. */
BODY void shorten_body(const int64_t *words, long count, int64_t add, int drop, int32_t *out) {
    for (long i = 0; i < count; i++) out[i] = (int32_t)((words[i] + add) >> drop);
}
VARIANTS(shorten, (const int64_t *words, long count, int64_t add, int drop, int32_t *out),
         (words, count, add, drop, out))
