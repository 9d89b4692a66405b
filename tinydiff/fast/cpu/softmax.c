/* softmax(scale x), scale > 0, along rows of C numbers, and its rule: ops/softmax.py.

   The largest number of a row is subtracted first, so that no power overflows. A row is read three times, and is in the
   cache from the second time on. */

#include "row.h"

#define ROWS 4 /* at a time, so that one need not wait for the sum of another */

int softmax(const real *restrict x, real *restrict z, int64_t R, int64_t C, real scale, int64_t part, int64_t parts)
{
    int64_t first = R * part / parts, last = R * (part + 1) / parts;
    x += first * C, z += first * C;
    for (int64_t r = first, rows; r < last; r += rows, x += rows * C, z += rows * C) {
        real top[ROWS], factor[ROWS];
        rows = last - r < ROWS ? last - r : ROWS;
        for (int64_t i = 0; i < rows; i++)
            top[i] = largest_along(x + i * C, C);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < C; c++)
                z[i * C + c] = exponential_to_zero(scale * (x[i * C + c] - top[i])); /* never above 0, however large */
        for (int64_t i = 0; i < rows; i++)
            factor[i] = 1 / sum_along(z + i * C, NULL, C);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < C; c++)
                z[i * C + c] *= factor[i];
    }
    return 0;
}

/* dx = scale z (g - sum(g z)) */
int softmax_vjp(const real *restrict g, const real *restrict z, real *restrict dx, int64_t R, int64_t C, real scale,
    int64_t part, int64_t parts)
{
    int64_t first = R * part / parts, last = R * (part + 1) / parts;
    g += first * C, z += first * C, dx += first * C;
    for (int64_t r = first, rows; r < last; r += rows, g += rows * C, z += rows * C, dx += rows * C) {
        real mean[ROWS];
        rows = last - r < ROWS ? last - r : ROWS;
        for (int64_t i = 0; i < rows; i++)
            mean[i] = sum_along(g + i * C, z + i * C, C);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < C; c++)
                dx[i * C + c] = scale * z[i * C + c] * (g[i * C + c] - mean[i]);
    }
    return 0;
}
