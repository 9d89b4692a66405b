/* Sums and the largest number along a row of n numbers; A compiler does not reorder a sum,
   so LANES sums, two vectors, stand side by side here; zeros fill up the last ones. After SHORT numbers
   they are added to a sum in double, so that a long row loses no digits. */

#pragma once
#include "vector.h"

#define LANES (2 * WIDTH)
#define SHORT 1024

/* The sum of a[i] b[i], or of a[i] if b is NULL. */
static inline __attribute__((always_inline)) double sum_along(
    const real *restrict a, const real *restrict b, int64_t n)
{
    double sum = 0;
    for (int64_t first = 0; first < n; first += SHORT) {
        vec left = {0}, right = {0};
        int64_t last = first + SHORT < n ? first + SHORT : n, i = first;
        for (; i + LANES <= last; i += LANES) {
            vec a0 = *(const vec *)(a + i), a1 = *(const vec *)(a + i + WIDTH);
            left += b ? a0 * *(const vec *)(b + i) : a0;
            right += b ? a1 * *(const vec *)(b + i + WIDTH) : a1;
        }
        real lanes[LANES] = {0};
        for (int k = 0; i + k < last; k++)
            lanes[k] = b ? a[i + k] * b[i + k] : a[i + k];
        *(vec *)lanes += left;
        *(vec *)(lanes + WIDTH) += right;
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int k = 0; k < half; k++)
                lanes[k] += lanes[k + half];
        sum += lanes[0];
    }
    return sum;
}

/* The largest of those that are not NaN; -INFINITY if there is none. */
static inline real largest_along(const real *restrict a, int64_t n)
{
    real lanes[LANES];
    int64_t i = 0;
    for (int k = 0; k < LANES; k++)
        lanes[k] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lanes[k] = a[i + k] > lanes[k] ? a[i + k] : lanes[k];
    for (int k = 0; i + k < n; k++)
        lanes[k] = a[i + k] > lanes[k] ? a[i + k] : lanes[k];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++)
            lanes[k] = lanes[k + half] > lanes[k] ? lanes[k + half] : lanes[k];
    return lanes[0];
}
