/* Normalisation, with the shift before it and silu after it: ops/norm.py.

   x and y are (A, L, C), C = G D. A sample and a group share a mean and a variance, over L positions and D channels:

       y = u or silu(u),   u = xhat w + b,   xhat = (x + shift - mean) rstd,   rstd = 1 / sqrt(var + eps)

   shift is (A, C); w and b are (W, C) with W = 1, the same for all samples, or W = A; shift, w and b may be NULL.
   mean (of x + shift) and rstd are (A, G).

   A position is a row of C channels. The loops take a vector of channels at a time over all positions, so that what belongs
   to a channel, and the sums over the positions, stay in registers; the sums of a group are then sums over D of those. If C
   is no multiple of a vector, the rows of some positions are taken together, so that it is. A sample is read three times,
   and is in the cache from the second time on. Long sums are double, so that they lose no digits. */

#include "row.h"
#include <stdlib.h>

#define ROWS 32 /* positions that are summed in `real` before they are added to the sum in double */

/* totals[c] += sums[c] for n channels */
INLINE void add_to(double *restrict totals, vec sums, int64_t n)
{
    real each[WIDTH];
    store(each, sums);
    for (int64_t c = 0; c < n && c < WIDTH; c++)
        totals[c] += each[c];
}

INLINE vec sigmoid_of(vec x)
{
    real each[WIDTH];
    store(each, x);
    for (int i = 0; i < WIDTH; i++)
        each[i] = sigmoid(each[i]);
    return load(each);
}

/* The positions of a sample: `rows` of `width` numbers, in which those of `together` positions lie one after the other, and
   what remains, one row of `rest` numbers. */
typedef struct {
    int64_t together, rows, width, rest;
} Rows;

static Rows rows_of(int64_t L, int64_t C)
{
    int64_t together = 1;
    while (together * C % WIDTH)
        together *= 2;
    return (Rows){together, L / together, together * C, L % together * C};
}

#define FETCHED (1 << 19) /* bytes of a sample in all arrays, so that it and the next one fit the second cache */

/* How far on the next of the samples that end there lies; 0 if there is none, or if it is too large to be fetched. */
static int64_t to_the_next(int64_t sample, int64_t end, int64_t numbers, int64_t arrays)
{
    return sample + 1 < end && numbers * arrays * (int64_t)sizeof(real) <= FETCHED ? numbers : 0;
}

/* Once in each position of a row what is there in the first. */
static void repeat(real *a, int64_t C, const Rows *rows)
{
    for (int64_t c = C; c < rows->width; c++)
        a[c] = a[c - C];
}

/* The sums of all positions of a row in the place of the first. */
static void fold(double *totals, int64_t C, const Rows *rows)
{
    for (int64_t c = C; c < rows->width; c++)
        totals[c % C] += totals[c];
}

/* CALL for each vector c of channels, of n channels from `at` on in `length` rows. Whether n is WIDTH is known when this is
   compiled: then nothing is masked. */
#define FOR_CHANNELS(rows, CALL)                                                                                       \
    for (int64_t c = 0; c < (rows).width; c += WIDTH) {                                                                \
        const int64_t n = WIDTH, at = c, length = (rows).rows;                                                         \
        CALL;                                                                                                          \
    }                                                                                                                  \
    for (int64_t c = 0; c < (rows).rest; c += WIDTH) {                                                                 \
        const int64_t n = (rows).rest - c, at = (rows).rows * (rows).width + c, length = 1;                            \
        CALL;                                                                                                          \
    }

/* The first n numbers, if there are no more; the others are 0. */
INLINE vec first_of(vec v, int64_t n)
{
    real each[WIDTH];
    store(each, v);
    return load_some(each, n);
}

INLINE void store_some(real *p, vec v, int64_t n)
{
    if (n >= WIDTH)
        store(p, v);
    else
        memcpy(p, &v, n * sizeof(real));
}

/* ---------------------------------------------------------------- loops over the positions, for n channels */

/* The first loop over a sample fetches the next one into the cache, `ahead` numbers further on. The processor does not
   guess it: the rows of a vector of channels lie apart. With it, norms in a training step take 0.8 of the time. */
INLINE void sums_of_x(int64_t n, const real *x, int64_t length, int64_t width, double *totals, int64_t ahead)
{
    for (int64_t first = 0; first < length; first += ROWS) {
        int64_t last = first + ROWS < length ? first + ROWS : length;
        vec sum = {0};
        for (int64_t l = first; l < last; l++) {
            __builtin_prefetch(x + l * width + ahead);
            sum += load_some(x + l * width, n);
        }
        add_to(totals, sum, n);
    }
}

INLINE void sums_of_squares(int64_t n, const real *x, int64_t length, int64_t width, const real *centre, double *totals)
{
    const vec middle = load_some(centre, n);
    for (int64_t first = 0; first < length; first += ROWS) {
        int64_t last = first + ROWS < length ? first + ROWS : length;
        vec sum = {0};
        for (int64_t l = first; l < last; l++) {
            vec z = load_some(x + l * width, n) - middle;
            sum += z * z;
        }
        add_to(totals, sum, n);
    }
}

INLINE void outputs(int64_t n, const real *x, int64_t length, int64_t width, const real *centre, const real *scale,
    const real *offset, int silu, real *y)
{
    const vec middle = load_some(centre, n), factor = load_some(scale, n), added = load_some(offset, n);
    for (int64_t l = 0; l < length; l++) {
        vec u = (load_some(x + l * width, n) - middle) * factor + added;
        store_some(y + l * width, silu ? u * sigmoid_of(u) : u, n);
    }
}

typedef struct {
    double *h, *hx, *x; /* sums over the positions of h, h xhat and xhat, for each channel */
} Sums;

/* h, and the sums. */
INLINE void sums_of_h(int64_t n, const real *g, const real *x, int64_t length, int64_t width, const real *centre,
    const real *r, const real *w, const real *b, int silu, real *h, Sums sums, int64_t ahead)
{
    const vec middle = load_some(centre, n), factor = load_some(r, n), weight = load_some(w, n), bias = load_some(b, n);
    for (int64_t first = 0; first < length; first += ROWS) {
        int64_t last = first + ROWS < length ? first + ROWS : length;
        vec of_h = {0}, of_hx = {0}, of_x = {0};
        for (int64_t l = first; l < last; l++) {
            const int64_t next = l * width + ahead;
            __builtin_prefetch(x + next), __builtin_prefetch(g + next), __builtin_prefetch(h + next, 1);
            vec xhat = (load_some(x + l * width, n) - middle) * factor, value = load_some(g + l * width, n);
            if (silu) {
                vec u = xhat * weight + bias, s = sigmoid_of(u);
                value *= s * (1 + u * (1 - s));
            }
            store_some(h + l * width, value, n);
            of_h += value, of_hx += value * xhat, of_x += xhat;
        }
        add_to(sums.h, of_h, n), add_to(sums.hx, of_hx, n), add_to(sums.x, of_x, n);
    }
}

/* h becomes x̄. */
INLINE void adjoints(int64_t n, const real *x, int64_t length, int64_t width, const real *centre, const real *r,
    const real *w, const real *mean_h, const real *mean_hx, real *h)
{
    const vec middle = load_some(centre, n), factor = load_some(r, n), weight = load_some(w, n);
    const vec of_h = load_some(mean_h, n), of_hx = load_some(mean_hx, n);
    for (int64_t l = 0; l < length; l++) {
        vec xhat = (load_some(x + l * width, n) - middle) * factor;
        store_some(h + l * width, factor * (load_some(h + l * width, n) * weight - of_h - xhat * of_hx), n);
    }
}

/* ---------------------------------------------------------------- the norms */

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
    const Rows rows = rows_of(L, C);
    double *restrict totals = malloc(rows.width * sizeof(double));
    real *space = malloc(3 * rows.width * sizeof(real));
    real *restrict centre = space, *restrict scale = space + rows.width, *restrict offset = space + 2 * rows.width;
    if (!totals || !space) {
        free(totals), free(space);
        return 1;
    }
    for (int64_t a = A * part / parts; a < A * (part + 1) / parts; a++) {
        const real *xs = x + a * L * C;
        real *ys = y + a * L * C;
        const int64_t row = W == 1 ? 0 : a * C; /* of weight and bias */
        const int64_t ahead = to_the_next(a, A * (part + 1) / parts, L * C, 1);

        memset(totals, 0, rows.width * sizeof(double));
        FOR_CHANNELS(rows, sums_of_x(n, xs + at, length, rows.width, totals + c, ahead))
        fold(totals, C, &rows);
        for (int64_t g = 0; g < G; g++) {
            if (shift)
                for (int64_t c = g * D; c < (g + 1) * D; c++)
                    totals[c] += L * (double)shift[a * C + c];
            real m = mean[a * G + g] = sum_of(totals + g * D, D) / (L * D);
            for (int64_t c = g * D; c < (g + 1) * D; c++) /* x + shift - mean = x - centre */
                centre[c] = m - (shift ? shift[a * C + c] : 0);
        }

        repeat(centre, C, &rows);
        memset(totals, 0, rows.width * sizeof(double));
        FOR_CHANNELS(rows, sums_of_squares(n, xs + at, length, rows.width, centre + c, totals + c))
        fold(totals, C, &rows);
        for (int64_t g = 0; g < G; g++) {
            real r = rstd[a * G + g] = 1 / sqrt(sum_of(totals + g * D, D) / (L * D) + eps);
            for (int64_t c = g * D; c < (g + 1) * D; c++) {
                scale[c] = weight ? r * weight[row + c] : r;
                offset[c] = bias ? bias[row + c] : 0;
            }
        }

        repeat(scale, C, &rows), repeat(offset, C, &rows);
#define OUTPUTS(silu) outputs(n, xs + at, length, rows.width, centre + c, scale + c, offset + c, silu, ys + at)
        if (silu) {
            FOR_CHANNELS(rows, OUTPUTS(1))
        } else {
            FOR_CHANNELS(rows, OUTPUTS(0))
        }
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
    const Rows rows = rows_of(L, C);
    const int64_t width = rows.width;
    double *totals = malloc(5 * width * sizeof(double));
    real *space = malloc(6 * width * sizeof(real));
    if (!totals || !space) {
        free(totals), free(space);
        return 1;
    }
    double *restrict h_sum = totals, *restrict hx_sum = totals + width, *restrict x_sum = totals + 2 * width;
    double *restrict hw = totals + 3 * width, *restrict hwx = totals + 4 * width;
    real *restrict centre = space, *restrict r = space + width, *restrict w = space + 2 * width,
         *restrict b = space + 3 * width,
         *restrict m1 = space + 4 * width, *restrict m2 = space + 5 * width;
    for (int64_t a = A * part / parts; a < A * (part + 1) / parts; a++) {
        const real *xs = x + a * L * C, *gs = g + a * L * C;
        real *ds = dx + a * L * C;
        const int64_t row = W == 1 ? 0 : a * C, ahead = to_the_next(a, A * (part + 1) / parts, L * C, 3);
        for (int64_t k = 0; k < G; k++)
            for (int64_t c = k * D; c < (k + 1) * D; c++) {
                centre[c] = mean[a * G + k] - (shift ? shift[a * C + c] : 0);
                r[c] = rstd[a * G + k];
                w[c] = weight ? weight[row + c] : 1;
                b[c] = bias ? bias[row + c] : 0;
            }

        repeat(centre, C, &rows), repeat(r, C, &rows), repeat(w, C, &rows), repeat(b, C, &rows);
        memset(totals, 0, 3 * width * sizeof(double));
#define SUMS_OF_H(silu)                                                                                                \
    sums_of_h(n, gs + at, xs + at, length, width, centre + c, r + c, w + c, b + c, silu, ds + at,                      \
        (Sums){h_sum + c, hx_sum + c, x_sum + c}, ahead)
        if (silu) {
            FOR_CHANNELS(rows, SUMS_OF_H(1))
        } else {
            FOR_CHANNELS(rows, SUMS_OF_H(0))
        }
        fold(h_sum, C, &rows), fold(hx_sum, C, &rows), fold(x_sum, C, &rows);
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

        repeat(m1, C, &rows), repeat(m2, C, &rows);
        FOR_CHANNELS(rows, adjoints(n, xs + at, length, width, centre + c, r + c, w + c, m1 + c, m2 + c, ds + at))
    }
    free(totals), free(space);
    return 0;
}

/* ---------------------------------------------------------------- rows with statistics of their own */

#define TOGETHER 4 /* rows, so that one need not wait for the sum of another */

/* The sum of (x[i] - mean)^2. */
INLINE double squares_along(const real *x, real mean, int64_t n)
{
    double sum = 0;
    for (; n > 0; x += SHORT, n -= SHORT) {
        const int64_t m = n < SHORT ? n : SHORT;
        vec left = {0}, right = {0};
        int64_t i = 0;
        for (; i + 2 * WIDTH <= m; i += 2 * WIDTH) {
            vec p = load(x + i) - mean, q = load(x + i + WIDTH) - mean;
            left += p * p, right += q * q;
        }
        if (i + WIDTH <= m) {
            vec p = load(x + i) - mean;
            left += p * p, i += WIDTH;
        }
        sum += sum_of_elements(left + right);
        for (; i < m; i++)
            sum += (x[i] - mean) * (x[i] - mean);
    }
    return sum;
}

/* Layer norm, y = xhat w + b, of A rows of C numbers: norm with L = G = 1, but without sums for each channel. */
int layer_norm(const real *restrict x, const real *restrict weight, const real *restrict bias, real *restrict y,
    real *restrict mean, real *restrict rstd, int64_t A, int64_t C, real eps, int64_t part, int64_t parts)
{
    const int64_t end = A * (part + 1) / parts;
    for (int64_t first = A * part / parts, last; first < end; first = last) {
        last = first + TOGETHER < end ? first + TOGETHER : end;
        for (int64_t a = first; a < last; a++)
            mean[a] = sum_along(x + a * C, NULL, C) / C;
        for (int64_t a = first; a < last; a++)
            rstd[a] = 1 / sqrt(squares_along(x + a * C, mean[a], C) / C + eps);
        for (int64_t a = first; a < last; a++) {
            const real *restrict xa = x + a * C;
            real *restrict ya = y + a * C;
            const real m = mean[a], r = rstd[a];
            if (weight)
                for (int64_t c = 0; c < C; c++)
                    ya[c] = (xa[c] - m) * r * weight[c] + bias[c];
            else
                for (int64_t c = 0; c < C; c++)
                    ya[c] = (xa[c] - m) * r;
        }
    }
    return 0;
}

typedef struct {
    const real *g, *x, *mean, *rstd; /* of some rows; the first of them */
    const real *weight;              /* it and the two sums have room for whole vectors */
    real *dx, *w_sums, *b_sums;
} RowsOfRule;

/* The sums of h and of h xhat, n channels from c on of R rows, and what these rows add to w̄ and b̄. */
INLINE void add_rows_at(const int R, int64_t c, int64_t n, const RowsOfRule *of, int64_t C, vec *h_sum, vec *hx_sum)
{
    vec w = load(of->weight + c), w_sum = load(of->w_sums + c), b_sum = load(of->b_sums + c);
#pragma GCC unroll 4
    for (int a = 0; a < R; a++) {
        vec g = load_some(of->g + a * C + c, n), h = g * w;
        vec xhat = first_of((load_some(of->x + a * C + c, n) - of->mean[a]) * of->rstd[a], n);
        w_sum += g * xhat, b_sum += g;
        h_sum[a] += h, hx_sum[a] += h * xhat;
    }
    store(of->w_sums + c, w_sum), store(of->b_sums + c, b_sum);
}

INLINE void dx_of_rows_at(const int R, int64_t c, int64_t n, const RowsOfRule *of, int64_t C, const real *m1,
    const real *m2)
{
    vec w = load(of->weight + c);
#pragma GCC unroll 4
    for (int a = 0; a < R; a++) {
        vec h = load_some(of->g + a * C + c, n) * w;
        vec xhat = (load_some(of->x + a * C + c, n) - of->mean[a]) * of->rstd[a];
        store_some(of->dx + a * C + c, of->rstd[a] * (h - m1[a] - xhat * m2[a]), n);
    }
}

/* The rule for R rows. They are read twice; what is between stays in registers. */
INLINE void rule_of_rows(const int R, const RowsOfRule *of, int64_t C)
{
    double of_h[TOGETHER] = {0}, of_hx[TOGETHER] = {0};
    for (int64_t c = 0; c < C;) {
        vec h_sum[TOGETHER], hx_sum[TOGETHER];
        for (int a = 0; a < R; a++)
            h_sum[a] = hx_sum[a] = (vec){0};
        for (int64_t end = c + SHORT; c + WIDTH <= C && c < end; c += WIDTH)
            add_rows_at(R, c, WIDTH, of, C, h_sum, hx_sum);
        if (c < C && C < c + WIDTH) {
            add_rows_at(R, c, C - c, of, C, h_sum, hx_sum);
            c = C;
        }
        for (int a = 0; a < R; a++)
            of_h[a] += sum_of_elements(h_sum[a]), of_hx[a] += sum_of_elements(hx_sum[a]);
    }
    real m1[TOGETHER], m2[TOGETHER];
    for (int a = 0; a < R; a++)
        m1[a] = of_h[a] / C, m2[a] = of_hx[a] / C;
    int64_t c = 0;
    for (; c + WIDTH <= C; c += WIDTH)
        dx_of_rows_at(R, c, WIDTH, of, C, m1, m2);
    if (c < C)
        dx_of_rows_at(R, c, C - c, of, C, m1, m2);
}

/* Of all rows. w̄ and b̄ are sums over them: for each of S sections of them, in `real` over ROWS, then in double. sums
   (S, 2, C) gets those of h xhat and of h. */
int layer_norm_vjp(const real *restrict g, const real *restrict x, const real *restrict mean,
    const real *restrict rstd, const real *restrict weight, real *restrict dx, double *restrict sums, int64_t A,
    int64_t C, int64_t S, int64_t part, int64_t parts)
{
    const int64_t width = (C + WIDTH - 1) / WIDTH * WIDTH;
    real *space = calloc(3 * width, sizeof(real));
    if (!space)
        return 1;
    real *restrict w = space, *restrict w_part = space + width, *restrict b_part = space + 2 * width;
    for (int64_t c = 0; c < C; c++)
        w[c] = weight ? weight[c] : 1;
    for (int64_t s = S * part / parts; s < S * (part + 1) / parts; s++) {
        double *restrict totals = sums + s * 2 * C;
        const int64_t end = A * (s + 1) / S;
        memset(totals, 0, 2 * C * sizeof(double));
        for (int64_t first = A * s / S, last, a; first < end; first = last) {
            last = first + ROWS < end ? first + ROWS : end;
            memset(w_part, 0, 2 * width * sizeof(real));
            for (a = first; a < last; a += last - a < TOGETHER ? 1 : TOGETHER) {
                RowsOfRule of = {g + a * C, x + a * C, mean + a, rstd + a, w, dx + a * C, w_part, b_part};
                if (last - a < TOGETHER)
                    rule_of_rows(1, &of, C);
                else
                    rule_of_rows(TOGETHER, &of, C);
            }
            for (int64_t c = 0; c < C; c++)
                totals[c] += w_part[c], totals[C + c] += b_part[c];
        }
    }
    free(space);
    return 0;
}
