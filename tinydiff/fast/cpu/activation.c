/* silu(x) = x s,  s = sigmoid(x), and its rule: ops/activation.py. n numbers each. */

#include "real.h"

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
