/* Matrix products and convolutions mod 2^64 and 2^32 (AVX-512, gcc): the same text for both words. */
#include "common.h"

#if PRODUCTS
#define WORD uint64_t
#define LANES 8
#define FN(name) name##_64
#include "gemm.h"
#include "conv.h"
#undef WORD
#undef LANES
#undef FN

#define WORD uint32_t
#define LANES 16
#define FN(name) name##_32
#include "gemm.h"
#include "conv.h"
#endif
