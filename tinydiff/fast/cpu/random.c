/* Random numbers by counter: the words of rng.py bit for bit, and the numbers made from them, in one pass.

   Philox4x64-10 (Salmon et al. 2011, section 3.3): the counter (block, step, 0, 0) under the key (seed, stream) gives
   eight words of 32 bits. A row of `columns` numbers begins on a new block; what it does not need of its last block is
   dropped. source = seed, stream, step. first = the number of the first block.

   Blocks are made in groups of GROUP, always a whole one: then the loops below have a length that is known, without a
   rest that a processor would compute in another way, and a number does not depend on how many are drawn with it. */

#include "real.h"

#define GROUP 16
#define WORDS (8 * GROUP)
#define PAIRS (4 * GROUP)

static void draw(const uint64_t *restrict source, uint64_t first, uint32_t *restrict words)
{
    for (int i = 0; i < GROUP; i++) {
        uint64_t a = first + i, b = source[2], c = 0, d = 0, key_0 = source[0], key_1 = source[1];
        for (int round = 0; round < 10; round++) {
            unsigned __int128 p = (unsigned __int128)0xD2E7470EE14C6C93u * a;
            unsigned __int128 q = (unsigned __int128)0xCA5A826395121157u * c;
            a = (uint64_t)(q >> 64) ^ b ^ key_0, b = (uint64_t)q;
            c = (uint64_t)(p >> 64) ^ d ^ key_1, d = (uint64_t)p;
            key_0 += 0x9E3779B97F4A7C15u, key_1 += 0xBB67AE8584CAA73Bu;
        }
        const uint64_t block[4] = {a, b, c, d};
        for (int j = 0; j < 4; j++)
            words[8 * i + 2 * j] = (uint32_t)block[j], words[8 * i + 2 * j + 1] = (uint32_t)(block[j] >> 32);
    }
}

/* log u for 0 < u <= 1:   u = 2^n m with m in [0.7, 1.4],   log u = n ln 2 + log m.
   n is the exponent of u / 0.7, read from its bits. With s = (m - 1) / (m + 1), so |s| <= 0.18, and m = (1 + s) / (1 - s),

       log m = 2 (s + s^3/3 + s^5/5 + s^7/7 + s^9/9 + ...);   what is left out is below 2^-28 of it. */
static inline float logarithm(float u)
{
    const uint32_t least = 0x3F333333; /* the bits of 0.7 */
    uint32_t bits_of_u, bits_of_m;
    float m;
    memcpy(&bits_of_u, &u, 4);
    const int32_t n = (int32_t)(bits_of_u - least) >> 23;
    bits_of_m = bits_of_u - ((uint32_t)n << 23);
    memcpy(&m, &bits_of_m, 4);
    const float s = (m - 1) / (m + 1), t = s * s;
    float sum = 1 / 7.f + t * (1 / 9.f);
    sum = 1 / 5.f + t * sum;
    sum = 1 / 3.f + t * sum;
    sum = 1 + t * sum;
    return n * 0.693145751953125f + (2 * s * sum + n * 1.428606820309417e-6f); /* ln 2 in two parts, as in real.h */
}

/* Cosine and sine of x in [0, 2 pi]:   x = n pi/2 + r with |r| <= pi/4, and their series in r; what is left out is below
   2^-28. pi/2 is in two parts, the first with so few bits that n times it is exact. A turn by n right angles exchanges
   the two if n is odd; the cosine is negative for n = 1 and 2, the sine for n = 2 and 3. */
static inline void cosine_and_sine(float x, float *restrict cosine, float *restrict sine)
{
    const int32_t n = (int32_t)(x * 0.63661977f + 0.5f);
    const float r = (x - n * 1.57073974609375f) - n * 5.6580703e-5f, t = r * r;
    const float s = r * (1 + t * (-1 / 6.f + t * (1 / 120.f + t * (-1 / 5040.f + t * (1 / 362880.f)))));
    const float c = 1 + t * (-1 / 2.f + t * (1 / 24.f + t * (-1 / 720.f + t * (1 / 40320.f + t * (-1 / 3628800.f)))));
    const float x_part = n & 1 ? s : c, y_part = n & 1 ? c : s;
    *cosine = (n + 1) & 2 ? -x_part : x_part;
    *sine = n & 2 ? -y_part : y_part;
}

/* Box and Muller 1958: for uniform u and v, sqrt(-2 log u) (cos 2 pi v, sin 2 pi v) are two normals. Every operation
   but the three functions is that of rng.py, in float. */
int normals(const uint32_t *restrict words, float *restrict z)
{
    for (int i = 0; i < PAIRS; i++) {
        const float radius = sqrtf(-2 * logarithm(((float)words[2 * i] + 0.5f) * 0x1p-32f));
        float cosine, sine;
        cosine_and_sine((float)words[2 * i + 1] * (6.283185307179586f * 0x1p-32f), &cosine, &sine);
        z[2 * i] = radius * cosine;
        z[2 * i + 1] = radius * sine;
    }
    return 0;
}

/* The rows of z from the numbers of the groups, which FILL makes of the words. */
#define ROWS_FROM(NUMBER, FILL)                                                                                        \
    const int64_t width = (columns + 7) / 8 * 8, blocks = rows * (width / 8);                                          \
    int64_t column = 0;                                                                                                \
    for (int64_t block = 0; block < blocks; block += GROUP) {                                                          \
        uint32_t words[WORDS];                                                                                         \
        NUMBER numbers[WORDS];                                                                                         \
        draw(source, (uint64_t)(first + block), words);                                                                \
        FILL;                                                                                                          \
        for (int64_t i = 0; i < GROUP && block + i < blocks; i++) {                                                    \
            const int64_t n = columns - column;                                                                        \
            if (n >= 8)                                                                                                \
                memcpy(z, numbers + 8 * i, 8 * sizeof(NUMBER)), z += 8;                                                \
            else                                                                                                       \
                for (int64_t j = 0; j < n; j++)                                                                        \
                    *z++ = numbers[8 * i + j];                                                                         \
            column = n > 8 ? column + 8 : 0;                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
    return 0;

int random_normal(const uint64_t *restrict source, float *restrict z, int64_t rows, int64_t columns, int64_t first)
{
    ROWS_FROM(float, normals(words, numbers))
}

/* The upper 24 bits of a word, as many as a float holds: on [0, 1), in steps of 2^-24. */
int random_uniform(const uint64_t *restrict source, float *restrict z, int64_t rows, int64_t columns, int64_t first)
{
    ROWS_FROM(float, for (int i = 0; i < WORDS; i++) numbers[i] = (float)(words[i] >> 8) * 0x1p-24f)
}

/* 0 to n - 1: the whole part of n word / 2^32. */
int random_integers(const uint64_t *restrict source, int64_t *restrict z, int64_t rows, int64_t columns, int64_t first,
    int64_t most)
{
    ROWS_FROM(int64_t, for (int i = 0; i < WORDS; i++) numbers[i] = (int64_t)((uint64_t)words[i] * (uint64_t)most >> 32))
}
