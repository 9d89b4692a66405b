/* Vectors of WIDTH numbers, as wide as the processor's registers: the compiler's vector extension. `a * v` with a number
   a and a vector v multiplies each of its elements. A vector may lie at any address that is right for a number. */

#include "real.h"

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define WIDTH ((int)(BYTES / sizeof(real)))

#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const real *p) { return *(const vec *)p; }
INLINE void store(real *p, vec v) { *(vec *)p = v; }

/* The first n numbers, if there are no more; the others are 0. */
INLINE vec load_some(const real *p, int64_t n)
{
    vec v = {0};
    if (n >= WIDTH)
        return load(p);
    if (n > 0)
        memcpy(&v, p, n * sizeof(real));
    return v;
}

INLINE void store_some(real *p, vec v, int64_t n)
{
    if (n >= WIDTH)
        store(p, v);
    else if (n > 0)
        memcpy(p, &v, n * sizeof(real));
}

/* The sum of the elements: of both halves, of the quarters of that, and so on. */
INLINE real sum_of(vec v)
{
    real a[WIDTH];
    store(a, v);
#pragma GCC unroll 8
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a[i] += a[i + half];
    return a[0];
}
