/* A step of Adam for a parameter of n numbers, in one pass: optim.adam_step.

       p = shrink p;   g = g + decay p;   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
       p = p - rate m / (sqrt(v) + eps)

   The corrections for the number of steps are in rate and eps. */

#include "real.h"

int adam(real *restrict p, const real *restrict g, real *restrict m, real *restrict v, int64_t n, real rate, real eps,
    real shrink, real decay, real b1, real b2)
{
    for (int64_t i = 0; i < n; i++) {
        real shrunk = shrink * p[i], h = g[i] + decay * shrunk;
        m[i] = b1 * m[i] + (1 - b1) * h;
        v[i] = b2 * v[i] + (1 - b2) * (h * h);
        p[i] = shrunk - rate * (m[i] / ((real)sqrt(v[i]) + eps));
    }
    return 0;
}
