/* Sums and the largest number along a row of n numbers. A compiler does not reorder a sum, so two vectors of sums stand
   side by side here. After SHORT numbers they are added to a sum in double, so that a long row loses no digits. */

#pragma once
#include "vector.h"

#define SHORT 1024

typedef bits places __attribute__((vector_size(BYTES), aligned(sizeof(bits))));

/* The last n % WIDTH of n numbers, which may be at any places, and zeros. */
INLINE vec rest_of(const real *p, int64_t n)
{
    static const bits last[2 * WIDTH] = {[WIDTH... 2 * WIDTH - 1] = -1};
    if (n < WIDTH)
        return load_some(p, n);
    return (vec)((places)load(p + n - WIDTH) & *(const places *)(last + n % WIDTH));
}

/* The sum of a[i] b[i], or of a[i] if b is NULL. */
INLINE double sum_along(const real *restrict a, const real *restrict b, int64_t n)
{
    double sum = 0;
    for (; n > 0; a += SHORT, b += b ? SHORT : 0, n -= SHORT) {
        const int64_t m = n < SHORT ? n : SHORT;
        vec left = {0}, right = {0};
        int64_t i = 0;
        for (; i + 2 * WIDTH <= m; i += 2 * WIDTH) {
            left += b ? load(a + i) * load(b + i) : load(a + i);
            right += b ? load(a + i + WIDTH) * load(b + i + WIDTH) : load(a + i + WIDTH);
        }
        if (i + WIDTH <= m)
            left += b ? load(a + i) * load(b + i) : load(a + i);
        if (m % WIDTH)
            right += b ? rest_of(a, m) * rest_of(b, m) : rest_of(a, m);
        sum += sum_of_elements(left + right);
    }
    return sum;
}

/* At each place the larger of both, and b's where a's is NaN. */
INLINE vec larger(vec a, vec b)
{
    const places is = (places)(a > b);
    return (vec)(((places)a & is) | ((places)b & ~is));
}

/* The largest of those that are not NaN; -INFINITY if there is none. */
INLINE real largest_along(const real *restrict a, int64_t n)
{
    real top = -INFINITY;
    if (n < WIDTH) {
        for (int64_t i = 0; i < n; i++)
            top = a[i] > top ? a[i] : top;
        return top;
    }
    vec left = broadcast(top), right = left;
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH)
        left = larger(load(a + i), left), right = larger(load(a + i + WIDTH), right);
    if (i + WIDTH <= n)
        left = larger(load(a + i), left);
    left = larger(load(a + n - WIDTH), larger(left, right)); /* the rest, with some of those before */
#pragma GCC unroll 8
    for (int half = WIDTH / 2; half > 0; half /= 2)
        left = larger(left, turned(left, half));
    return left[0];
}
