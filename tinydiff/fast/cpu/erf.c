/* erf, and gelu with its rule: ops/activation.py. n numbers each.

   erf(x) = x p(x^2) / q(x^2) for |x| <= 0.46875,   1 - e^(-x^2) p(x) / q(x) for 0.46875 < x <= 6,   1 beyond.

   Both are computed, and one is taken, so that the loop has no branches. The coefficients, the highest power first, are
   those of Cody 1969, "Rational Chebyshev approximations for the error function". He uses the second up to x = 4, and
   another beyond; there 1 - erf is below 2e-8, and the second still has more of its digits right than are seen in erf. */

#include "real.h"

static const double NEAR_P[] = {1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
    3.77485237685302021e2, 3.20937758913846947e3};
static const double NEAR_Q[] = {
    1, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3};
static const double FAR_P[] = {2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
    6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
    1.23033935479799725e3};
static const double FAR_Q[] = {1, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
    1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3,
    1.23033935480374942e3};

/* c[0] t^(n-1) + ... + c[n-1] */
static inline __attribute__((always_inline)) real polynomial(const double *c, const int n, real t)
{
    real sum = (real)c[0];
#pragma GCC unroll 9
    for (int i = 1; i < n; i++)
        sum = sum * t + (real)c[i];
    return sum;
}

static inline real erf_of(real x)
{
    real r = x < 0 ? -x : x;
    r = r > 6 ? 6 : r;
    real square = r * r;
    real near = r * (polynomial(NEAR_P, 5, square) / polynomial(NEAR_Q, 5, square));
    real far = 1 - exponential_to_zero(-square) * (polynomial(FAR_P, 9, r) / polynomial(FAR_Q, 9, r));
    return copysign(r > (real)0.46875 ? far : near, x);
}

int erf_of_all(const real *restrict x, real *restrict y, int64_t n, int64_t part, int64_t parts)
{
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++)
        y[i] = erf_of(x[i]);
    return 0;
}

/* y = x F,  F = (1 + erf(x / sqrt 2)) / 2 */
int gelu(const real *restrict x, real *restrict y, int64_t n, int64_t part, int64_t parts)
{
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++)
        y[i] = x[i] * ((real)0.5 + (real)0.5 * erf_of(x[i] * (real)0.70710678118654752));
    return 0;
}

/* dx = g (F + x f),  f = e^(-x^2 / 2) / sqrt(2 pi) */
int gelu_vjp(const real *restrict g, const real *restrict x, real *restrict dx, int64_t n, int64_t part, int64_t parts)
{
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++) {
        real F = (real)0.5 + (real)0.5 * erf_of(x[i] * (real)0.70710678118654752);
        real f = exponential_to_zero((real)-0.5 * x[i] * x[i]) * (real)0.39894228040143268;
        dx[i] = g[i] * (F + x[i] * f);
    }
    return 0;
}
