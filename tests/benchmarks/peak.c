/* Twelve sums that do not wait for each other: as many multiply-adds as the processor can do in n turns. */

#include "vector.h"

real peak(long n)
{
    vec sum[12], half = {0}, one = {0};
    half += (real)0.5, one += 1;
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++)
        sum[i] = one * (real)i;
    for (long k = 0; k < n; k++)
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++)
            sum[i] = sum[i] * half + one;
    real total = 0;
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++)
        total += sum_of_elements(sum[i]);
    return total;
}

int width(void) { return WIDTH; }
