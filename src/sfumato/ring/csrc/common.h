/* What every kernel file needs: words, lanes, and one body compiled for several instruction sets.
 *
 * Arithmetic is on unsigned words, so it wraps mod 2^64 or 2^32. Kernels that matter are written as a plain body
 * (always inlined) and made once per instruction set by VARIANTS; which one runs is decided by the CPU at hand. */
#ifndef SFUMATO_COMMON_H
#define SFUMATO_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define BODY static inline __attribute__((always_inline))

/* -DSFUMATO_PLAIN: as on another processor. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(SFUMATO_PLAIN)
#define X86 1
#ifdef __clang__ /* it has another builtin for shuffles, which products need */
#define PRODUCTS 0
#define WIDE __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
#else
#define PRODUCTS 1
#define WIDE __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#endif
#define MIDDLE __attribute__((target("avx2")))
#else
#define X86 0
#define PRODUCTS 0
#endif

/* 0: whatever the compiler takes for granted; 1: AVX2; 2: AVX-512 F, DQ, BW and VL. */
int sf_level(void);
/* No higher level than this from now on: for tests of the others. */
void sf_limit(int level);

/* VARIANTS(name, (parameters), (arguments)): the exported sf_<name> runs <name>_body in the widest form. */
#if X86
#define VARIANTS(name, parameters, arguments)                                                                      \
    WIDE static void name##_wide parameters { name##_body arguments; }                                             \
    MIDDLE static void name##_middle parameters { name##_body arguments; }                                         \
    static void name##_plain parameters { name##_body arguments; }                                                 \
    EXPORT void sf_##name parameters {                                                                             \
        switch (sf_level()) {                                                                                      \
        case 2: name##_wide arguments; break;                                                                      \
        case 1: name##_middle arguments; break;                                                                    \
        default: name##_plain arguments;                                                                           \
        }                                                                                                          \
    }
#else
#define VARIANTS(name, parameters, arguments)                                                                      \
    EXPORT void sf_##name parameters { name##_body arguments; }
#endif

/* Memory for a call, aligned to 64; NULL if there is none to be had. The caller frees it. */
void *sf_scratch(size_t bytes);

#endif
