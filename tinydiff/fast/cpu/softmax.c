/* softmax(scale x) along rows of C numbers, and its rule: ops/softmax.py.

   The largest number of a row is subtracted first. A row is read three times, and is in the cache from the second time
   on. LANES sums side by side can be added at the same time; a sum is double after SHORT of them, so that a long row
   loses no digits. */

#include "real.h"

#define LANES 16
#define SHORT 1024

static inline real largest(const real *restrict x, int64_t n)
{
    real lanes[LANES], found = -INFINITY;
    int64_t i = 0;
    for (int k = 0; k < LANES; k++)
        lanes[k] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
    for (; i < n; i++)
        found = x[i] > found ? x[i] : found;
    for (int k = 0; k < LANES; k++)
        found = lanes[k] > found ? lanes[k] : found;
    return found; /* of those that are not NaN */
}

/* The sum of a[i] b[i], or of a[i] if b is NULL. */
static inline double sum_of_products(const real *restrict a, const real *restrict b, int64_t n)
{
    double sum = 0;
    for (int64_t first = 0; first < n; first += SHORT) {
        real lanes[LANES] = {0}, rest = 0;
        int64_t last = first + SHORT < n ? first + SHORT : n, i = first;
        for (; i + LANES <= last; i += LANES)
            for (int k = 0; k < LANES; k++)
                lanes[k] += b ? a[i + k] * b[i + k] : a[i + k];
        for (; i < last; i++)
            rest += b ? a[i] * b[i] : a[i];
        for (int k = 0; k < LANES; k++)
            rest += lanes[k];
        sum += rest;
    }
    return sum;
}

int softmax(const real *restrict x, real *restrict z, int64_t R, int64_t C, real scale)
{
    for (int64_t r = 0; r < R; r++, x += C, z += C) {
        for (int64_t c = 0; c < C; c++)
            z[c] = scale * x[c];
        const real top = largest(z, C);
        for (int64_t c = 0; c < C; c++)
            z[c] = exponential_to_zero(z[c] - top);
        const real factor = 1 / sum_of_products(z, NULL, C);
        for (int64_t c = 0; c < C; c++)
            z[c] *= factor;
    }
    return 0;
}

/* dx = scale z (g - sum(g z)) */
int softmax_vjp(
    const real *restrict g, const real *restrict z, real *restrict dx, int64_t R, int64_t C, real scale)
{
    for (int64_t r = 0; r < R; r++, g += C, z += C, dx += C) {
        const real mean = sum_of_products(g, z, C);
        for (int64_t c = 0; c < C; c++)
            dx[c] = scale * z[c] * (g[c] - mean);
    }
    return 0;
}
