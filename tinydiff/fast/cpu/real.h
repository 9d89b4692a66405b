/* What the kernels share. Each file is compiled twice: with REAL=float and with REAL=double.

   Loops over a row of channels are written plainly, so that the compiler turns them into vector instructions of whatever
   width the processor has. Arrays are in C order, and do not overlap (restrict).

   The exponential:  e^x = 2^n e^r,  n = round(x / ln 2),  r = x - n ln 2 in [-0.35, 0.35],  e^r by its series.
   Adding SHIFTER, 1.5 times 2^MANTISSA, leaves n in the lowest bits of the sum. Moved up to the place of the exponent,
   and added to the bits of 1, they are those of 2^n. x is cut at both ends, where 2^n would not fit, and a
   little earlier at the upper one: a sigmoid there would be below 1e-38, and such numbers are slow. NaN stays NaN. */

#pragma once

#if __FAST_MATH__ || __FINITE_MATH_ONLY__ || __ASSOCIATIVE_MATH__ /* -ffast-math, -Ofast, ... */
#error "NaN, Inf and the order of sums are to stay what they are: leave out -ffast-math and its like"
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#define FLOAT 1
#define DOUBLE 2
#define JOINED(a, b) a##b
#define KIND(real) JOINED(KIND_, real)
#define KIND_float FLOAT
#define KIND_double DOUBLE

typedef REAL real;

#if KIND(REAL) == FLOAT
typedef uint32_t bits;
#define MANTISSA 23
#define SHIFTER 12582912.0f
#define LOWEST -87.0f
#define HIGHEST 80.0f
#define LN2_HIGH 0.693145751953125f /* with so few bits that n times it is exact */
#define LN2_LOW 1.428606820309417e-6f
#else
typedef uint64_t bits;
#define MANTISSA 52
#define SHIFTER 6755399441055744.0
#define LOWEST -708.0
#define HIGHEST 700.0
#define LN2_HIGH 0.6931471803691238
#define LN2_LOW 1.9082149292705877e-10
#endif

static inline real exponential_within(real x) /* LOWEST <= x <= HIGHEST, or NaN */
{
    real shifted = x * (real)1.4426950408889634 + SHIFTER, n = shifted - SHIFTER;
    real r = (x - n * LN2_HIGH) - n * LN2_LOW, sum = 0; /* e^r = 1 + r (1 + r (1/2! + r (1/3! + ...))) */
#if KIND(REAL) == DOUBLE
    sum = (real)(1 / 6227020800.);
    sum = sum * r + (real)(1 / 479001600.);
    sum = sum * r + (real)(1 / 39916800.);
    sum = sum * r + (real)(1 / 3628800.);
    sum = sum * r + (real)(1 / 362880.);
    sum = sum * r + (real)(1 / 40320.);
#endif
    sum = sum * r + (real)(1 / 5040.);
    sum = sum * r + (real)(1 / 720.);
    sum = sum * r + (real)(1 / 120.);
    sum = sum * r + (real)(1 / 24.);
    sum = sum * r + (real)(1 / 6.);
    sum = sum * r + (real)(1 / 2.);
    sum = sum * r + 1;
    sum = sum * r + 1;
    real power = 1;
    bits lowest, exponent;
    memcpy(&lowest, &shifted, sizeof(real));
    memcpy(&exponent, &power, sizeof(real));
    exponent += lowest << MANTISSA;
    memcpy(&power, &exponent, sizeof(real));
    return sum * power;
}

static inline real exponential(real x)
{
    x = x < LOWEST ? LOWEST : x;
    return exponential_within(x > HIGHEST ? HIGHEST : x);
}

/* e^x for x <= 0; 0 where it would be below 1e-38 (1e-308 in double), and so for -inf: what is masked counts nothing. */
static inline real exponential_to_zero(real x)
{
    real y = exponential_within(x < LOWEST ? LOWEST : x);
    return x < LOWEST ? 0 : y;
}

static inline real sigmoid(real x) { return 1 / (1 + exponential(-x)); }
