/* softmax(scale x), scale > 0, along rows of C numbers, and its rule: ops/softmax.py.

   The largest number of a row is subtracted first, so that no power overflows. A row is read three times, and is in the
   cache from the second time on. */

#include "row.h"

int softmax(const real *restrict x, real *restrict z, int64_t R, int64_t C, real scale, int64_t part, int64_t parts)
{
    int64_t first = R * part / parts, last = R * (part + 1) / parts;
    x += first * C, z += first * C;
    for (int64_t r = first; r < last; r++, x += C, z += C) {
        const real top = largest_along(x, C);
        for (int64_t c = 0; c < C; c++)
            z[c] = exponential_to_zero(scale * (x[c] - top)); /* never above 0, however large */
        const real factor = 1 / sum_along(z, NULL, C);
        for (int64_t c = 0; c < C; c++)
            z[c] *= factor;
    }
    return 0;
}

/* dx = scale z (g - sum(g z)) */
int softmax_vjp(const real *restrict g, const real *restrict z, real *restrict dx, int64_t R, int64_t C, real scale,
    int64_t part, int64_t parts)
{
    int64_t first = R * part / parts, last = R * (part + 1) / parts;
    g += first * C, z += first * C, dx += first * C;
    for (int64_t r = first; r < last; r++, g += C, z += C, dx += C) {
        const real mean = sum_along(g, z, C);
        for (int64_t c = 0; c < C; c++)
            dx[c] = scale * z[c] * (g[c] - mean);
    }
    return 0;
}
