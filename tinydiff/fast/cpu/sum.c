/* Sums over neighbouring axes: x is (A, M, R), z is (A, R), the sum over M.

   Rows of R numbers are added up by vector instructions along a row. A short row would waste them, so k rows are taken
   as one of k R numbers, and their k sums are added at the end, the upper half to the lower, until one is left. ROWS of
   these are summed in `real` before they are added to the sum in double, so that long sums lose no digits. */

#include "real.h"
#include <stdlib.h>

#define ROWS 32
#define WIDE 128

int sum_over(const real *restrict x, real *restrict z, int64_t A, int64_t M, int64_t R)
{
    if (A * R == 0)
        return 0;
    if (M == 0) {
        memset(z, 0, A * R * sizeof(real));
        return 0;
    }
    const int64_t most = R < WIDE ? WIDE / R : 1, K = most < M ? most : M, width = K * R;
    double *restrict totals = malloc(width * sizeof(double));
    real *restrict part = malloc(width * sizeof(real));
    if (!totals || !part) {
        free(totals), free(part);
        return 1;
    }
    for (int64_t a = 0; a < A; a++) {
        const real *restrict xs = x + a * M * R, *const end = xs + M * R;
        memset(totals, 0, width * sizeof(double));
        while (end - xs >= width) {
            memset(part, 0, width * sizeof(real));
            for (int64_t l = 0; l < ROWS && end - xs >= width; l++, xs += width)
                for (int64_t c = 0; c < width; c++)
                    part[c] += xs[c];
            for (int64_t c = 0; c < width; c++)
                totals[c] += part[c];
        }
        for (; xs < end; xs += R) /* fewer than k rows */
            for (int64_t c = 0; c < R; c++)
                totals[c] += xs[c];
        for (int64_t k = K; k > 1; k = (k + 1) / 2)
            for (int64_t c = 0; c < k / 2 * R; c++)
                totals[c] += totals[(k + 1) / 2 * R + c];
        for (int64_t c = 0; c < R; c++)
            z[a * R + c] = totals[c];
    }
    free(totals), free(part);
    return 0;
}

/* z[index] += x for rows of D numbers, one after the other, so that a row may come several times: scatter_add of
   ops/index.py. z is (n, D); a negative number counts from the end. The numbers have been checked: -n <= index < n. */
int add_rows(const int64_t *restrict index, const real *restrict x, real *restrict z, int64_t N, int64_t n, int64_t D)
{
    for (int64_t i = 0; i < N; i++) {
        const real *restrict from = x + i * D;
        real *restrict to = z + (index[i] < 0 ? index[i] + n : index[i]) * D;
        for (int64_t c = 0; c < D; c++)
            to[c] += from[c];
    }
    return 0;
}

/* y += b for each of the R rows of y (R, C): the bias of a linear layer. */
int add_to_rows(real *restrict y, const real *restrict b, int64_t R, int64_t C, int64_t part, int64_t parts)
{
    for (int64_t r = R * part / parts; r < R * (part + 1) / parts; r++)
        for (int64_t c = 0; c < C; c++)
            y[r * C + c] += b[c];
    return 0;
}
