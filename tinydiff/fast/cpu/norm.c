/* Normalisation, with the shift before it and silu after it: ops/norm.py.

   x and y are (A, L, C), C = G D. A sample and a group share a mean and a variance, over L positions and D channels:

       y = u or silu(u),   u = xhat w + b,   xhat = (x + shift - mean) rstd,   rstd = 1 / sqrt(var + eps)

   shift is (A, C); w and b are (W, C) with W = 1, the same for all samples, or W = A; shift, w and b may be NULL.
   mean (of x + shift) and rstd are (A, G).

   A position is a row of C channels, and every loop runs along a row. Sums over the positions are kept for each channel;
   the sums of a group are then sums over D of those. A sample is read three times, and is in the cache from the second
   time on. Long sums are double, so that they lose no digits. */

#include "row.h"
#include <stdlib.h>

#define ROWS 32 /* positions that are summed in `real` before they are added to the sum in double */

/* totals[c] += sum over l of the values of a row, which BODY gives for channel c as `value` */
#define SUM_OVER_POSITIONS(totals, sums, BODY)                                                                         \
    for (int64_t first = 0; first < L; first += ROWS) {                                                                \
        int64_t last = first + ROWS < L ? first + ROWS : L;                                                            \
        memset(sums, 0, C * sizeof(real));                                                                             \
        for (int64_t l = first; l < last; l++) {                                                                       \
            BODY                                                                                                       \
        }                                                                                                              \
        for (int64_t c = 0; c < C; c++)                                                                                \
            totals[c] += sums[c];                                                                                      \
    }

/* The sum of n numbers, in eight sums side by side, which a processor can add at the same time. */
static double sum_of(const double *restrict v, int64_t n)
{
    double sums[8] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++)
            sums[k] += v[i + k];
    for (; i < n; i++)
        sum += v[i];
    for (int k = 0; k < 8; k++)
        sum += sums[k];
    return sum;
}

int norm(const real *restrict x, const real *restrict shift, const real *restrict weight, const real *restrict bias,
    real *restrict y, real *restrict mean, real *restrict rstd, int64_t A, int64_t L, int64_t C, int64_t G, int64_t W,
    real eps, int64_t silu, int64_t part, int64_t parts)
{
    const int64_t D = C / G;
    double *restrict totals = malloc(C * sizeof(double));
    real *space = malloc(4 * C * sizeof(real));
    real *restrict sums = space, *restrict centre = space + C, *restrict scale = space + 2 * C,
                  *restrict offset = space + 3 * C;
    if (!totals || !space) {
        free(totals), free(space);
        return 1;
    }
    for (int64_t a = A * part / parts; a < A * (part + 1) / parts; a++) {
        const real *xs = x + a * L * C;
        real *ys = y + a * L * C;
        const int64_t row = W == 1 ? 0 : a * C; /* of weight and bias */

        memset(totals, 0, C * sizeof(double));
        SUM_OVER_POSITIONS(totals, sums, for (int64_t c = 0; c < C; c++) sums[c] += xs[l * C + c];)
        for (int64_t g = 0; g < G; g++) {
            if (shift)
                for (int64_t c = g * D; c < (g + 1) * D; c++)
                    totals[c] += L * (double)shift[a * C + c];
            real m = mean[a * G + g] = sum_of(totals + g * D, D) / (L * D);
            for (int64_t c = g * D; c < (g + 1) * D; c++) /* x + shift - mean = x - centre */
                centre[c] = m - (shift ? shift[a * C + c] : 0);
        }

        memset(totals, 0, C * sizeof(double));
        SUM_OVER_POSITIONS(totals, sums, for (int64_t c = 0; c < C; c++) {
            real z = xs[l * C + c] - centre[c];
            sums[c] += z * z;
        })
        for (int64_t g = 0; g < G; g++) {
            real r = rstd[a * G + g] = 1 / sqrt(sum_of(totals + g * D, D) / (L * D) + eps);
            for (int64_t c = g * D; c < (g + 1) * D; c++) {
                scale[c] = weight ? r * weight[row + c] : r;
                offset[c] = bias ? bias[row + c] : 0;
            }
        }

        for (int64_t l = 0; l < L; l++)
            if (silu)
                for (int64_t c = 0; c < C; c++) {
                    real u = (xs[l * C + c] - centre[c]) * scale[c] + offset[c];
                    ys[l * C + c] = u * sigmoid(u);
                }
            else
                for (int64_t c = 0; c < C; c++)
                    ys[l * C + c] = (xs[l * C + c] - centre[c]) * scale[c] + offset[c];
    }
    free(totals), free(space);
    return 0;
}

/* The adjoints. With g for ȳ, h = g silu'(u) or g, and m = L D,

       x̄ = rstd (h w - mean(h w) - xhat mean(h w xhat)),   shift̄ = sum of x̄ over L,   w̄ = sum h xhat,   b̄ = sum h

   dshift, dweight and dbias are (A, C), one row per sample, or NULL. dx holds h until the sums are complete. */
int norm_vjp(const real *restrict g, const real *restrict x, const real *restrict mean, const real *restrict rstd,
    const real *restrict shift, const real *restrict weight, const real *restrict bias, real *restrict dx,
    real *restrict dshift, real *restrict dweight, real *restrict dbias, int64_t A, int64_t L, int64_t C, int64_t G,
    int64_t W, int64_t silu, int64_t part, int64_t parts)
{
    const int64_t D = C / G;
    double *totals = malloc(5 * C * sizeof(double));
    real *space = malloc(9 * C * sizeof(real));
    if (!totals || !space) {
        free(totals), free(space);
        return 1;
    }
    double *restrict h_sum = totals, *restrict hx_sum = totals + C, *restrict x_sum = totals + 2 * C;
    double *restrict hw = totals + 3 * C, *restrict hwx = totals + 4 * C;
    real *restrict centre = space, *restrict r = space + C, *restrict w = space + 2 * C, *restrict b = space + 3 * C,
         *restrict m1 = space + 4 * C, *restrict m2 = space + 5 * C;
    real *restrict h_part = space + 6 * C, *restrict hx_part = space + 7 * C, *restrict x_part = space + 8 * C;
    for (int64_t a = A * part / parts; a < A * (part + 1) / parts; a++) {
        const real *xs = x + a * L * C, *gs = g + a * L * C;
        real *ds = dx + a * L * C;
        const int64_t row = W == 1 ? 0 : a * C;
        for (int64_t k = 0; k < G; k++)
            for (int64_t c = k * D; c < (k + 1) * D; c++) {
                centre[c] = mean[a * G + k] - (shift ? shift[a * C + c] : 0);
                r[c] = rstd[a * G + k];
                w[c] = weight ? weight[row + c] : 1;
                b[c] = bias ? bias[row + c] : 0;
            }

        memset(totals, 0, 3 * C * sizeof(double));
        for (int64_t first = 0; first < L; first += ROWS) {
            int64_t last = first + ROWS < L ? first + ROWS : L;
            memset(h_part, 0, 3 * C * sizeof(real));
            for (int64_t l = first; l < last; l++) {
                const real *restrict xr = xs + l * C, *restrict gr = gs + l * C;
                real *restrict h = ds + l * C;
                if (silu)
                    for (int64_t c = 0; c < C; c++) {
                        real u = (xr[c] - centre[c]) * r[c] * w[c] + b[c], s = sigmoid(u);
                        h[c] = gr[c] * s * (1 + u * (1 - s));
                    }
                else
                    memcpy(h, gr, C * sizeof(real));
                for (int64_t c = 0; c < C; c++) {
                    real xhat = (xr[c] - centre[c]) * r[c];
                    h_part[c] += h[c];
                    hx_part[c] += h[c] * xhat;
                    x_part[c] += xhat;
                }
            }
            for (int64_t c = 0; c < C; c++)
                h_sum[c] += h_part[c], hx_sum[c] += hx_part[c], x_sum[c] += x_part[c];
        }
        for (int64_t c = 0; c < C; c++)
            hw[c] = h_sum[c] * w[c], hwx[c] = hx_sum[c] * w[c];
        for (int64_t k = 0; k < G; k++) {
            real of_h = sum_of(hw + k * D, D) / (L * D), of_hx = sum_of(hwx + k * D, D) / (L * D);
            for (int64_t c = k * D; c < (k + 1) * D; c++)
                m1[c] = of_h, m2[c] = of_hx;
        }
        for (int64_t c = 0; c < C; c++) {
            if (dshift)
                dshift[a * C + c] = r[c] * (w[c] * h_sum[c] - L * (double)m1[c] - m2[c] * x_sum[c]);
            if (dweight)
                dweight[a * C + c] = hx_sum[c], dbias[a * C + c] = h_sum[c];
        }

        for (int64_t l = 0; l < L; l++)
            for (int64_t c = 0; c < C; c++) {
                real xhat = (xs[l * C + c] - centre[c]) * r[c];
                ds[l * C + c] = r[c] * (ds[l * C + c] * w[c] - m1[c] - xhat * m2[c]);
            }
    }
    free(totals), free(space);
    return 0;
}

/* ---------------------------------------------------------------- rows with statistics of their own */

/* Layer norm, y = xhat w + b, of A rows of C numbers: norm with L = G = 1, but without sums for each channel. */
int layer_norm(const real *restrict x, const real *restrict weight, const real *restrict bias, real *restrict y,
    real *restrict mean, real *restrict rstd, int64_t A, int64_t C, real eps, int64_t part, int64_t parts)
{
    x += A * part / parts * C, y += A * part / parts * C;
    for (int64_t a = A * part / parts; a < A * (part + 1) / parts; a++, x += C, y += C) {
        const real m = mean[a] = sum_along(x, NULL, C) / C;
        for (int64_t c = 0; c < C; c++)
            y[c] = x[c] - m;
        const real r = rstd[a] = 1 / sqrt(sum_along(y, y, C) / C + eps);
        if (weight)
            for (int64_t c = 0; c < C; c++)
                y[c] = y[c] * r * weight[c] + bias[c];
        else
            for (int64_t c = 0; c < C; c++)
                y[c] *= r;
    }
    return 0;
}

/* Its rule. w̄ and b̄ are sums over the rows: for each of S sections of them, in `real` over ROWS, then in double. sums (S, 2,
   C) gets those of h xhat and of h. */
int layer_norm_vjp(const real *restrict g, const real *restrict x, const real *restrict mean,
    const real *restrict rstd, const real *restrict weight, real *restrict dx, double *restrict sums, int64_t A,
    int64_t C, int64_t S, int64_t part, int64_t parts)
{
    real *space = malloc(4 * C * sizeof(real));
    if (!space)
        return 1;
    real *restrict h = space, *restrict xhat = space + C;
    real *restrict w_part = space + 2 * C, *restrict b_part = space + 3 * C;
    for (int64_t s = S * part / parts; s < S * (part + 1) / parts; s++) {
        double *restrict totals = sums + s * 2 * C;
        const int64_t end = A * (s + 1) / S;
        memset(totals, 0, 2 * C * sizeof(double));
        for (int64_t first = A * s / S, last; first < end; first = last) {
            last = first + ROWS < end ? first + ROWS : end;
            memset(w_part, 0, 2 * C * sizeof(real));
            for (int64_t a = first; a < last; a++) {
                const real *restrict gr = g + a * C, *restrict xr = x + a * C;
                const real m = mean[a], r = rstd[a];
                real *restrict dr = dx + a * C;
                for (int64_t c = 0; c < C; c++) {
                    xhat[c] = (xr[c] - m) * r;
                    h[c] = weight ? gr[c] * weight[c] : gr[c];
                    w_part[c] += gr[c] * xhat[c];
                    b_part[c] += gr[c];
                }
                const real of_h = sum_along(h, NULL, C) / C, of_hx = sum_along(h, xhat, C) / C;
                for (int64_t c = 0; c < C; c++)
                    dr[c] = r * (h[c] - of_h - xhat[c] * of_hx);
            }
            for (int64_t c = 0; c < C; c++)
                totals[c] += w_part[c], totals[C + c] += b_part[c];
        }
    }
    free(space);
    return 0;
}
