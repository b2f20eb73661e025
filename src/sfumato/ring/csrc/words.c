/* Words to wire fields and bit planes, and back; reals to words. Little-endian machines only; the loader checks. */
#include "common.h"

#if X86
#include <immintrin.h>
#endif

/* Words worked on at a time, so that every plane finds them in the first cache; a multiple of 64. */
#define SOME 2048

typedef uint16_t loose16 __attribute__((aligned(1), may_alias));
typedef uint32_t loose32 __attribute__((aligned(1), may_alias));
typedef uint64_t loose64 __attribute__((aligned(1), may_alias));

#define ONES 0x0101010101010101u

/* Eight bytes 0 or 1 to one byte, the first lowest, and back. */
BODY uint8_t gather8(uint64_t bytes) { return (uint8_t)(bytes * 0x0102040810204080u >> 56); }
BODY uint64_t spread8(uint8_t byte) {
    return (((byte * ONES) & 0x8040201008040201u) + 0x7f7f7f7f7f7f7f7fu) >> 7 & ONES;
}

/* Fields of 4, 2 or 1 bits, a byte each, to packed bytes; the bytes go on to a multiple of eight with zeros. */
BODY void squeeze(const uint8_t *from, long count, int width, uint8_t *to) {
    long bytes = (count * width + 7) / 8;
    if (width == 4)
        for (long i = 0; i < bytes; i++) {
            unsigned t = ((const loose16 *)from)[i];
            to[i] = (uint8_t)(t | t >> 4);
        }
    else if (width == 2)
        for (long i = 0; i < bytes; i++) {
            uint32_t t = ((const loose32 *)from)[i];
            to[i] = (uint8_t)(t | t >> 6 | t >> 12 | t >> 18);
        }
    else
        for (long i = 0; i < bytes; i++) to[i] = gather8(((const loose64 *)from)[i]);
}

BODY void stretch(const uint8_t *from, long bytes, int width, uint8_t *to) {
    if (width == 4)
        for (long i = 0; i < bytes; i++) ((loose16 *)to)[i] = (uint16_t)((from[i] | from[i] << 4) & 0x0f0f);
    else if (width == 2)
        for (long i = 0; i < bytes; i++) {
            uint32_t t = from[i];
            ((loose32 *)to)[i] = (t | t << 6 | t << 12 | t << 18) & 0x03030303u;
        }
    else
        for (long i = 0; i < bytes; i++) ((loose64 *)to)[i] = spread8(from[i]);
}

/* Calls STEP(offset, width) for the planes of a field: widths 64 to 1, each at most once, lowest bits first. */
#define EACH_PLANE(bits, STEP)                                                                                      \
    for (int width = 64, offset = 0; width; width >>= 1)                                                            \
        if ((bits) - offset >= width) {                                                                             \
            STEP                                                                                                    \
            offset += width;                                                                                        \
        }

#define PACK(name, word)                                                                                            \
    BODY void name##_body(const word *words, long count, int bits, uint8_t *out) {                                  \
        uint8_t small[SOME + 8];                                                                                    \
        for (long first = 0; first < count; first += SOME) {                                                        \
            long some = count - first < SOME ? count - first : SOME;                                                \
            const word *w = words + first;                                                                          \
            uint8_t *plane = out;                                                                                   \
            EACH_PLANE(bits, {                                                                                      \
                uint8_t *to = plane + first * width / 8;                                                            \
                if (width == 32)                                                                                    \
                    for (long i = 0; i < some; i++) ((loose32 *)to)[i] = (uint32_t)(w[i] >> offset);                \
                else if (width == 16)                                                                               \
                    for (long i = 0; i < some; i++) ((loose16 *)to)[i] = (uint16_t)(w[i] >> offset);                \
                else if (width == 8)                                                                                \
                    for (long i = 0; i < some; i++) to[i] = (uint8_t)(w[i] >> offset);                              \
                else if (width < 8) {                                                                               \
                    uint8_t mask = (uint8_t)((1 << width) - 1);                                                     \
                    for (long i = 0; i < some; i++) small[i] = (uint8_t)(w[i] >> offset) & mask;                    \
                    for (long i = some; i % 8; i++) small[i] = 0;                                                   \
                    squeeze(small, some, width, to);                                                                \
                }                                                                                                   \
                plane += (count * width + 7) / 8;                                                                   \
            })                                                                                                      \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const word *words, long count, int bits, uint8_t *out), (words, count, bits, out))

#define PUT(i, field) w[i] = offset ? (w[i] | (field) << offset) : (field)
#define UNPACK(name, word)                                                                                          \
    BODY void name##_body(const uint8_t *in, long count, int bits, word *words) {                                   \
        uint8_t small[SOME + 8];                                                                                    \
        for (long first = 0; first < count; first += SOME) {                                                        \
            long some = count - first < SOME ? count - first : SOME;                                                \
            word *w = words + first;                                                                                \
            const uint8_t *plane = in;                                                                              \
            EACH_PLANE(bits, {                                                                                      \
                const uint8_t *from = plane + first * width / 8;                                                    \
                if (width == 32)                                                                                    \
                    for (long i = 0; i < some; i++) PUT(i, (word)((const loose32 *)from)[i]);                       \
                else if (width == 16)                                                                               \
                    for (long i = 0; i < some; i++) PUT(i, (word)((const loose16 *)from)[i]);                       \
                else if (width == 8)                                                                                \
                    for (long i = 0; i < some; i++) PUT(i, (word)from[i]);                                          \
                else if (width < 8) {                                                                               \
                    stretch(from, (some * width + 7) / 8, width, small);                                            \
                    for (long i = 0; i < some; i++) PUT(i, (word)small[i]);                                         \
                }                                                                                                   \
                plane += (count * width + 7) / 8;                                                                   \
            })                                                                                                      \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const uint8_t *in, long count, int bits, word *words), (in, count, bits, words))

PACK(pack_64, uint64_t)
PACK(pack_32, uint32_t)
PACK(pack_8, uint8_t)
UNPACK(unpack_64, uint64_t)
UNPACK(unpack_32, uint32_t)
UNPACK(unpack_8, uint8_t)

/* Bit j of each byte, packed; some bytes, a multiple of eight that ends in zeros. */
BODY void bit_of_bytes(const uint8_t *bytes, long some, int j, uint8_t *to) {
    for (long i = 0; i < some / 8; i++) to[i] = gather8(((const loose64 *)bytes)[i] >> j & ONES);
}
#if X86
WIDE static void bit_of_bytes_wide(const uint8_t *bytes, long some, int j, uint8_t *to) {
    __m512i bit = _mm512_set1_epi8((char)(1 << j));
    long i = 0;
    for (; i + 64 <= some; i += 64)
        ((loose64 *)to)[i / 64] = _mm512_test_epi8_mask(_mm512_loadu_si512(bytes + i), bit);
    bit_of_bytes(bytes + i, some - i, j, to + i / 8);
}
#endif

/* Planes `shift` to `shift + bits - 1` of sign-extended words, `size` bytes each. */
#define PLANES(name, word, top)                                                                                     \
    BODY void name##_body(const word *words, long count, int bits, int shift, long size, uint8_t *out,              \
                          void (*bit)(const uint8_t *, long, int, uint8_t *)) {                                     \
        uint8_t bytes[SOME];                                                                                        \
        for (long first = 0; first < count; first += SOME) {                                                        \
            long some = count - first < SOME ? count - first : SOME;                                                \
            const word *w = words + first;                                                                          \
            for (int start = 0; start < bits; start += 8) {                                                         \
                int by = shift + start < top ? shift + start : top;                                                 \
                for (long i = 0; i < some; i++) bytes[i] = (uint8_t)(w[i] >> by);                                   \
                for (long i = some; i % 8; i++) bytes[i] = 0;                                                       \
                for (int j = 0; j < 8 && start + j < bits; j++)                                                     \
                    bit(bytes, (some + 7) / 8 * 8, j, out + (start + j) * size + first / 8);                        \
            }                                                                                                       \
        }                                                                                                           \
    }
PLANES(planes_64, int64_t, 63)
PLANES(planes_32, int32_t, 31)
#undef PLANES

static void bit_of_bytes_plain(const uint8_t *bytes, long some, int j, uint8_t *to) { bit_of_bytes(bytes, some, j, to); }
#if X86
#define PLANES(name, word)                                                                                          \
    WIDE static void name##_wide(const word *words, long count, int bits, int shift, long size, uint8_t *out) {     \
        name##_body(words, count, bits, shift, size, out, bit_of_bytes_wide);                                       \
    }                                                                                                               \
    EXPORT void sf_##name(const word *words, long count, int bits, int shift, long size, uint8_t *out) {            \
        if (sf_level() == 2) name##_wide(words, count, bits, shift, size, out);                                     \
        else name##_body(words, count, bits, shift, size, out, bit_of_bytes_plain);                                 \
    }
#else
#define PLANES(name, word)                                                                                          \
    EXPORT void sf_##name(const word *words, long count, int bits, int shift, long size, uint8_t *out) {            \
        name##_body(words, count, bits, shift, size, out, bit_of_bytes_plain);                                      \
    }
#endif
PLANES(planes_64, int64_t)
PLANES(planes_32, int32_t)

/* One packed plane as words 0 and 1. */
#define FROM_PLANE(name, word)                                                                                      \
    BODY void name##_body(const uint8_t *plane, long count, word *words) {                                          \
        uint8_t small[SOME];                                                                                        \
        for (long first = 0; first < count; first += SOME) {                                                        \
            long some = count - first < SOME ? count - first : SOME;                                                \
            stretch(plane + first / 8, (some + 7) / 8, 1, small);                                                   \
            for (long i = 0; i < some; i++) words[first + i] = small[i];                                            \
        }                                                                                                           \
    }                                                                                                               \
    VARIANTS(name, (const uint8_t *plane, long count, word *words), (plane, count, words))
FROM_PLANE(from_plane_64, uint64_t)
FROM_PLANE(from_plane_32, uint32_t)

/* round(x * 2^frac), ties to even, as words; *bad when one is not below the limit in size. The product with a power of
 * two is exact; added to 2^52 it loses its fraction, beyond that it has none. */
#define ENCODE(name, real, word)                                                                                    \
    BODY void name##_body(const real *x, long count, double factor, double limit, word *words, int *bad) {          \
        const double whole = 4503599627370496.0;                                                                    \
        int outside = 0;                                                                                            \
        for (long i = 0; i < count; i++) {                                                                          \
            double v = (double)x[i] * factor, size = __builtin_fabs(v), to = __builtin_copysign(whole, v);          \
            double rounded = size < whole ? (v + to) - to : v;                                                      \
            int fits = __builtin_fabs(rounded) < limit; /* not so for NaN */                                        \
            outside |= !fits;                                                                                       \
            words[i] = (word)(int64_t)(fits ? rounded : 0.0);                                                       \
        }                                                                                                           \
        *bad = outside;                                                                                             \
    }                                                                                                               \
    VARIANTS(name, (const real *x, long count, double factor, double limit, word *words, int *bad),                 \
             (x, count, factor, limit, words, bad))
ENCODE(encode_64_64, double, int64_t)
ENCODE(encode_64_32, double, int32_t)
ENCODE(encode_32_64, float, int64_t)
ENCODE(encode_32_32, float, int32_t)
