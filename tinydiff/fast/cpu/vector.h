/* Vectors of WIDTH numbers, as wide as the processor's registers: the compiler's vector extension. `a * v` with a number
   a and a vector v multiplies each of its elements. A vector may lie at any address that is right for a number. */

#pragma once
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

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real))));

#define LINE (64 / (int)sizeof(real)) /* numbers of a line of the cache */

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vec load(const real *p) { return *(const vec *)p; }
INLINE void store(real *p, vec v) { *(vec *)p = v; }

/* The first place from p on at which a vector does not lie in two lines of the cache; less than WIDTH numbers on. */
INLINE real *aligned(real *p) { return (real *)(((uintptr_t)p + BYTES - 1) / BYTES * BYTES); }

/* The same number at every place; x - 0 is x, also for -0. */
INLINE vec broadcast(real x) { return x - (vec){0}; }

/* The first halves of a and b with their elements in turns, a0 b0 a1 b1 ..., and the second halves likewise. */
INLINE void interleave(vec a, vec b, vec *first, vec *second)
{
#ifdef __clang__ /* which makes one instruction of such a loop; GCC does not, but has a function for it */
    vec p = a, q = b;
    for (int i = 0; i < WIDTH / 2; i++) {
        p[2 * i] = a[i], p[2 * i + 1] = b[i];
        q[2 * i] = a[i + WIDTH / 2], q[2 * i + 1] = b[i + WIDTH / 2];
    }
    *first = p, *second = q;
#else
    typedef bits places __attribute__((vector_size(BYTES)));
    places of_first, of_second;
    for (int i = 0; i < WIDTH; i++) {
        of_first[i] = i / 2 + i % 2 * WIDTH;
        of_second[i] = of_first[i] + WIDTH / 2;
    }
    *first = __builtin_shuffle(a, b, of_first);
    *second = __builtin_shuffle(a, b, of_second);
#endif
}

/* Rows and columns of a square change places. To interleave the upper half of the rows with the lower half moves the
   first bit of a number's place, (row, column), to the end. Done for every bit of the row, it brings the row to where
   the column was. */
INLINE void transpose(vec square[WIDTH])
{
    vec next[WIDTH];
#pragma GCC unroll 4
    for (int bit = 1; bit < WIDTH; bit *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; i++)
            interleave(square[i], square[i + WIDTH / 2], next + 2 * i, next + 2 * i + 1);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++)
            square[i] = next[i];
    }
}

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

/* square[j][i] = p[i * step + j] for i < rows and j < columns; elsewhere 0. */
INLINE void load_transposed(const real *p, int64_t step, int64_t rows, int64_t columns, vec square[WIDTH])
{
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        square[i] = i < rows ? load_some(p + i * step, columns) : (vec){0};
    transpose(square);
}

/* The elements from `by` on, and then those before. */
INLINE vec turned(vec v, const int by)
{
#ifdef __clang__ /* as above */
    vec t = v;
    for (int i = 0; i < WIDTH; i++)
        t[i] = v[(i + by) % WIDTH];
    return t;
#else
    typedef bits places __attribute__((vector_size(BYTES), aligned(sizeof(bits))));
    static const bits from[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};
    return __builtin_shuffle(v, *(const places *)(from + by)); /* modulo WIDTH */
#endif
}

/* The sum of the elements: of both halves, of the quarters of that, and so on. */
INLINE real sum_of_elements(vec v)
{
#pragma GCC unroll 8
    for (int half = WIDTH / 2; half > 0; half /= 2)
        v += turned(v, half);
    return v[0];
}
