/* silu and erf, and their rules: ops/activation.py. n numbers each. */

#include "real.h"

/* silu(x) = x s,  s = sigmoid(x) */
int silu(const real *restrict x, real *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i] * sigmoid(x[i]);
    return 0;
}

/* dx = g silu'(x) = g s (1 + x (1 - s)) */
int silu_vjp(const real *restrict g, const real *restrict x, real *restrict dx, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        real s = sigmoid(x[i]);
        dx[i] = g[i] * s * (1 + x[i] * (1 - s));
    }
    return 0;
}

/* erf(x), after Cody 1969, "Rational Chebyshev approximations for the error function": up to 0.46875 it is x times a
   ratio of polynomials in x^2, beyond 1 - e^(-x^2) times a ratio of polynomials in |x|. Cody has a third ratio for
   |x| > 4, where this one has fewer digits; but e^(-x^2) is so small there that 1 less it has all of them. At 6 it is 1.
   Both are computed for every number, so that the loop has no branches. Coefficients: of the highest power first. */
static inline real erf_of(real x)
{
    real r = x < 0 ? -x : x;
    r = r > 6 ? 6 : r;
    const real t = r * r;
    real p = (real)1.85777706184603153e-1, q = 1;
    p = p * t + (real)3.16112374387056560e0, q = q * t + (real)2.36012909523441209e1;
    p = p * t + (real)1.13864154151050156e2, q = q * t + (real)2.44024637934444173e2;
    p = p * t + (real)3.77485237685302021e2, q = q * t + (real)1.28261652607737228e3;
    p = p * t + (real)3.20937758913846947e3, q = q * t + (real)2.84423683343917062e3;
    const real near = x * (p / q);
    p = (real)2.15311535474403846e-8, q = 1;
    p = p * r + (real)5.64188496988670089e-1, q = q * r + (real)1.57449261107098347e1;
    p = p * r + (real)8.88314979438837594e0, q = q * r + (real)1.17693950891312499e2;
    p = p * r + (real)6.61191906371416295e1, q = q * r + (real)5.37181101862009858e2;
    p = p * r + (real)2.98635138197400131e2, q = q * r + (real)1.62138957456669019e3;
    p = p * r + (real)8.81952221241769090e2, q = q * r + (real)3.29079923573345963e3;
    p = p * r + (real)1.71204761263407058e3, q = q * r + (real)4.36261909014324716e3;
    p = p * r + (real)2.05107837782607147e3, q = q * r + (real)3.43936767414372164e3;
    p = p * r + (real)1.23033935479799725e3, q = q * r + (real)1.23033935480374942e3;
    const real far = 1 - exponential(-t) * (p / q);
    return r <= (real)0.46875 ? near : x < 0 ? -far : far;
}

int erf_forward(const real *restrict x, real *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = erf_of(x[i]);
    return 0;
}

/* dx = g 2 / sqrt(pi) e^(-x^2), which is 0 from |x| = 9 on: numbers below 1e-38 are slow. */
int erf_vjp(const real *restrict g, const real *restrict x, real *restrict dx, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const real e = exponential(-x[i] * x[i]);
        dx[i] = g[i] * ((real)1.1283791670955126 * (x[i] * x[i] > 81 ? 0 : e));
    }
    return 0;
}
