/* Depthwise convolution, and its gradients: ops/conv.py, with as many groups as there are channels of x and of y.

   Each channel c is a convolution by itself, over the taps t that meet the image,

       y[p, c] = b[c] + sum over t of x[q(p) + d(t), c] w[t, c],        w[t, c] = sum over p of x[q(p) + d(t), c] y[p, c]

   so a vector is of channels. The lists of pixels and taps are those of conv.c, with one tap in each run. A number is
   multiplied only once when it is read, so reading takes the time: PIXELS pixels share the weights of a tap, and TAPS taps
   share a pixel of y. */

#include "vector.h"

#define PIXELS 8
#define TAPS 8

typedef struct {
    const int64_t *start, *tap; /* of each tap: the place in x, and its number */
    int64_t taps, C;
} Taps;

/* P pixels, n channels from c on. */
INLINE void sums(const int P, const real *const *x, const real *w, const real *b, real *const *y, const Taps *at,
                 int64_t c, int64_t n)
{
    vec sum[PIXELS], bias = {0};
    if (b)
        bias = load_some(b + c, n);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
        sum[p] = bias;
    for (int64_t t = 0; t < at->taps; t++) {
        vec weight = load_some(w + at->tap[t] * at->C + c, n);
#pragma GCC unroll 8
        for (int p = 0; p < P; p++)
            sum[p] += load_some(x[p] + at->start[t] * at->C + c, n) * weight;
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
        if (n >= WIDTH)
            store(y[p] + c, sum[p]);
        else
            memcpy(y[p] + c, &sum[p], n * sizeof(real));
}

INLINE void all_channels(const int P, const real *const *x, const real *w, const real *b, real *const *y, const Taps *at)
{
    int64_t c = 0;
    for (; c + WIDTH <= at->C; c += WIDTH)
        sums(P, x, w, b, y, at, c, WIDTH);
    if (c < at->C)
        sums(P, x, w, b, y, at, c, at->C - c);
}

/* The lists are those of conv. N images; S, D pixels of x, y; T taps; C channels. */
int depthwise(const real *restrict x, const real *restrict w, const real *restrict b, real *restrict y,
              const int64_t *restrict lists, int64_t K, int64_t P, int64_t R, int64_t N, int64_t S, int64_t T, int64_t D,
              int64_t C, int64_t part, int64_t parts)
{
    const int64_t *pixels = lists, *source = pixels + K, *target = source + P, *runs = target + P, *start = runs + K;
    (void)T;
    for (int64_t n = N * part / parts; n < N * (part + 1) / parts; n++)
        for (int64_t q = 0; q + 1 < K; q++) {
            Taps at = {start + runs[q], start + R + runs[q], runs[q + 1] - runs[q], C};
            for (int64_t p = pixels[q]; p < pixels[q + 1];) {
                const real *xs[PIXELS];
                real *ys[PIXELS];
                int count = pixels[q + 1] - p < PIXELS ? 1 : PIXELS;
                for (int i = 0; i < count; i++, p++) {
                    xs[i] = x + (n * S + source[p]) * C;
                    ys[i] = y + (n * D + target[p]) * C;
                }
                if (count == PIXELS)
                    all_channels(PIXELS, xs, w, b, ys, &at);
                else
                    all_channels(1, xs, w, b, ys, &at);
            }
        }
    return 0;
}

/* w[tap[t]] += the sum over so many pixels, for each of K taps t and the n channels that begin at x, y and w. */
INLINE void add_sums(const int K, const real *x, const real *y, real *w, const int64_t *source, const int64_t *target,
                     int64_t pixels, const Taps *at, int64_t n)
{
    vec sum[TAPS];
    const real *of_x[TAPS];
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        sum[k] = (vec){0};
        of_x[k] = x + at->start[k] * at->C;
    }
    for (int64_t p = 0; p < pixels; p++) {
        vec of_y = load_some(y + target[p] * at->C, n);
#pragma GCC unroll 8
        for (int k = 0; k < K; k++)
            sum[k] += load_some(of_x[k] + source[p] * at->C, n) * of_y;
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
        real *to = w + at->tap[k] * at->C;
        vec total = load_some(to, n) + sum[k];
        memcpy(to, &total, n * sizeof(real));
    }
}

/* The sums of an image are added to w, which keeps those of many images accurate. A part has whole vectors of channels. */
int depthwise_weight_grad(const real *restrict x, const real *restrict y, real *restrict w, const int64_t *restrict lists,
                          int64_t K, int64_t P, int64_t R, int64_t N, int64_t S, int64_t T, int64_t D, int64_t C,
                          int64_t part, int64_t parts)
{
    const int64_t *pixels = lists, *source = pixels + K, *target = source + P, *runs = target + P, *start = runs + K;
    int64_t vectors = (C + WIDTH - 1) / WIDTH, first = vectors * part / parts * WIDTH;
    int64_t end = vectors * (part + 1) / parts * WIDTH, last = end < C ? end : C;
    for (int64_t t = 0; t < T && first < last; t++)
        memset(w + t * C + first, 0, (last - first) * sizeof(real));
    for (int64_t n = 0; n < N; n++)
        for (int64_t c = first; c < last; c += WIDTH)
            for (int64_t q = 0; q + 1 < K; q++)
                for (int64_t run = runs[q]; run < runs[q + 1];) {
                    const real *of_x = x + n * S * C + c, *of_y = y + n * D * C + c;
                    const int64_t *from = source + pixels[q], *to = target + pixels[q];
                    Taps at = {start + run, start + R + run, 0, C};
                    int64_t count = pixels[q + 1] - pixels[q];
                    if (last - c < WIDTH)
                        add_sums(1, of_x, of_y, w + c, from, to, count, &at, last - c), run++;
                    else if (runs[q + 1] - run < TAPS)
                        add_sums(1, of_x, of_y, w + c, from, to, count, &at, WIDTH), run++;
                    else
                        add_sums(TAPS, of_x, of_y, w + c, from, to, count, &at, WIDTH), run += TAPS;
                }
    return 0;
}
