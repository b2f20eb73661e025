/* The library about itself: the digest of the sources it was made from, the CPU's level, scratch memory. */
#include "common.h"

EXPORT const char *sf_digest(void) { return SFUMATO_DIGEST; }

static int most = 2;

EXPORT void sf_limit(int level) { most = level; }

EXPORT int sf_level(void) {
#if X86
    static int level = -1;
    if (level < 0) {
        __builtin_cpu_init();
        int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        level = wide ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
    }
    return level < most ? level : most;
#else
    return 0;
#endif
}

void *sf_scratch(size_t bytes) {
    void *base;
    return posix_memalign(&base, 64, bytes) ? NULL : base;
}
