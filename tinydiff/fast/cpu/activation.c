/* sigmoid; silu(x) = x s,  s = sigmoid(x), and its rule: ops/activation.py. n numbers each. */

#include "real.h"

/* The same to the smallest numbers: with e = e^-|x| it is e / (1 + e) for x < 0, and 1 / (1 + e) for the others. */
int sigmoid_of_all(const real *restrict x, real *restrict z, int64_t n, int64_t part, int64_t parts)
{
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++) {
        real e = exponential_to_zero(x[i] < 0 ? x[i] : -x[i]);
        z[i] = (x[i] < 0 ? e : 1) / (1 + e);
    }
    return 0;
}

int silu(const real *restrict x, real *restrict y, int64_t n, int64_t part, int64_t parts)
{
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++)
        y[i] = x[i] * sigmoid(x[i]);
    return 0;
}

/* dx = g silu'(x) = g s (1 + x (1 - s)) */
int silu_vjp(const real *restrict g, const real *restrict x, real *restrict dx, int64_t n, int64_t part, int64_t parts)
{
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++) {
        real s = sigmoid(x[i]);
        dx[i] = g[i] * s * (1 + x[i] * (1 - s));
    }
    return 0;
}
