/* Steps of optimisers, averages of weights and clipping, each for all parameters in one call: optim.py.

   p, g, m and v are lists of `count` arrays; array k of each list has n[k] numbers. One call does one part of `parts`: an
   equal share of all these numbers, in a row. The parts may run at the same time. */

#include "real.h"
#include <float.h>

#if KIND(REAL) == FLOAT
#define SMALLEST FLT_MIN
#else
#define SMALLEST DBL_MIN
#endif

/* Where this part begins and ends, of the numbers of all arrays in a row. */
typedef struct {
    int64_t begin, end;
} share;

static share share_of(const int64_t *n, int64_t count, int64_t part, int64_t parts)
{
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++)
        total += n[k];
    return (share){total / parts * part, part == parts - 1 ? total : total / parts * (part + 1)};
}

/* The same within one array of n numbers, with `before` numbers in the arrays before it. It is divided at multiples of
   64: no vector is cut, so that a number has the same bits in any number of parts. */
static int64_t cut(int64_t at, int64_t n) { return at <= 0 ? 0 : at >= n ? n : at / 64 * 64; }

static share within(share all, int64_t before, int64_t n)
{
    return (share){cut(all.begin - before, n), cut(all.end - before, n)};
}

/* p = shrink p;   g = g + decay p;   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
   p = p - rate m / (sqrt(v) + eps)

   numbers[k] = rate, eps, shrink, decay, b1, b2; the corrections for the number of steps are in rate and eps.

   A parameter without a gradient has an m that shrinks by b1 at each step, until it is a number below SMALLEST, with
   which processors compute a hundred times more slowly, and it stays there for ever. Such an m becomes 0, and so does
   such a v: they move nothing, unless eps is 0 or nearly so. */
int adam(real *const *restrict p, const real *const *restrict g, real *const *restrict m, real *const *restrict v,
    const double *restrict numbers, const int64_t *restrict n, int64_t count, int64_t part, int64_t parts)
{
    const share all = share_of(n, count, part, parts);
    for (int64_t k = 0, before = 0; k < count; before += n[k++]) {
        const share here = within(all, before, n[k]);
        const double *a = numbers + 6 * k;
        const real rate = a[0], eps = a[1], shrink = a[2], decay = a[3];
        const real b1 = a[4], b2 = a[5], c1 = 1 - a[4], c2 = 1 - a[5];
        const real least = eps > 1e-12 ? SMALLEST : 0;
        real *restrict pk = p[k], *restrict mk = m[k], *restrict vk = v[k];
        const real *restrict gk = g[k];
#pragma GCC ivdep
        for (int64_t i = here.begin; i < here.end; i++) {
            real shrunk = shrink * pk[i];
            real h = decay == 0 ? gk[i] : gk[i] + decay * shrunk; /* 0 times an infinite p would be NaN */
            real mean = b1 * mk[i] + c1 * h;
            real square = b2 * vk[i] + c2 * (h * h);
            mean = mean < least && -mean < least ? 0 : mean;
            square = square < least ? 0 : square;
            mk[i] = mean;
            vk[i] = square;
            pk[i] = shrunk - rate * (mean / ((real)sqrt(square) + eps));
        }
    }
    return 0;
}

/* g = g + decay p;   p = p - lr g */
int sgd(real *const *restrict p, const real *const *restrict g, const int64_t *restrict n, int64_t count, real lr,
    real decay, int64_t part, int64_t parts)
{
    const share all = share_of(n, count, part, parts);
    for (int64_t k = 0, before = 0; k < count; before += n[k++]) {
        const share here = within(all, before, n[k]);
        real *restrict pk = p[k];
        const real *restrict gk = g[k];
#pragma GCC ivdep
        for (int64_t i = here.begin; i < here.end; i++)
            pk[i] -= lr * (decay == 0 ? gk[i] : gk[i] + decay * pk[i]);
    }
    return 0;
}

/* g = g + decay p;   v = momentum v + g;   p = p - lr v, or p - lr (g + momentum v) with nesterov */
int sgd_momentum(real *const *restrict p, const real *const *restrict g, real *const *restrict v,
    const int64_t *restrict n, int64_t count, real lr, real decay, real momentum, int64_t nesterov, int64_t part,
    int64_t parts)
{
    const real of_g = nesterov ? lr : 0, of_v = nesterov ? lr * momentum : lr;
    const share all = share_of(n, count, part, parts);
    for (int64_t k = 0, before = 0; k < count; before += n[k++]) {
        const share here = within(all, before, n[k]);
        real *restrict pk = p[k], *restrict vk = v[k];
        const real *restrict gk = g[k];
#pragma GCC ivdep
        for (int64_t i = here.begin; i < here.end; i++) {
            real h = decay == 0 ? gk[i] : gk[i] + decay * pk[i];
            real speed = momentum * vk[i] + h;
            vk[i] = speed;
            pk[i] -= nesterov ? of_g * h + of_v * speed : of_v * speed;
        }
    }
    return 0;
}

/* average = average + rest (p - average) */
int average(real *const *restrict averages, const real *const *restrict p, const int64_t *restrict n, int64_t count,
    real rest, int64_t part, int64_t parts)
{
    const share all = share_of(n, count, part, parts);
    for (int64_t k = 0, before = 0; k < count; before += n[k++]) {
        const share here = within(all, before, n[k]);
        real *restrict mean = averages[k];
        const real *restrict pk = p[k];
#pragma GCC ivdep
        for (int64_t i = here.begin; i < here.end; i++)
            mean[i] += rest * (pk[i] - mean[i]);
    }
    return 0;
}

/* norm = the root of the sum of all squares;   g = g max / norm where norm (and a millionth) is above max.
   Squares and their sum are double, in 16 sums side by side: long sums lose no digits, and large squares stay finite. */
int clip(real *const *restrict g, double *restrict norm, const int64_t *restrict n, int64_t count, double most)
{
    double sum = 0;
    for (int64_t k = 0; k < count; k++) {
        const real *restrict gk = g[k];
        double sums[16] = {0};
        int64_t i = 0;
        for (; i + 16 <= n[k]; i += 16)
            for (int j = 0; j < 16; j++)
                sums[j] += (double)gk[i + j] * gk[i + j];
        for (; i < n[k]; i++)
            sums[0] += (double)gk[i] * gk[i];
        for (int j = 0; j < 16; j++)
            sum += sums[j];
    }
    norm[0] = sqrt(sum);
    const real scale = most / (norm[0] + 1e-6);
    if (scale >= 1)
        return 0;
    for (int64_t k = 0; k < count; k++) {
        real *restrict gk = g[k];
        for (int64_t i = 0; i < n[k]; i++)
            gk[i] *= scale;
    }
    return 0;
}
