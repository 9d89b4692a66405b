/* The gradient of convolution by the weight: conv2d_weight_grad of ops/conv.py.

       w[u, v, c, o] = sum over n, i, j of x[n, s i + d u - p, s j + d v - p, c] y[n, i, j, o]

   A tile is K rows of w, each a tap (u, v) and a channel c, and V vectors of channels of y: K V sums, which stay in
   registers, over the pixels of y over which the tap meets x. For each pixel V vectors of y and K numbers of x are read,
   and K V products added. Some rows of pixels are worked on at a time, for all tiles, so that they stay in the cache. */

#include "vector.h"
#include <stdlib.h>

#define LANES (2 * WIDTH)
#define TILE (REGISTERS == 32 ? 12 : 6)
#ifndef PIXELS
#define PIXELS 256 /* at a time; their sums are then added to w, which keeps the sums of many pixels accurate */
#endif

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    int64_t first, last;    /* the rows of y, those of all images counted through */
    int64_t left, right;    /* its columns */
    int64_t down, across;   /* pixel (i, j) of y meets (s i + down, s j + across) of x */
    int64_t H, W, I, OH, OW, sh, sw, y_step; /* y_step: from one pixel of y to the next */
} Pixels;

/* x[k]: of row k of w the channel, in the first image at (0, 0). */
INLINE void tile(const int K, const int V, const Pixels *at, const real *const *x, const real *y, real *w,
                 int64_t w_step)
{
    vec sum[TILE][2];
    const real *of_x[TILE];
    for (int k = 0; k < K; k++) {
        of_x[k] = x[k];
        for (int v = 0; v < V; v++)
            sum[k][v] = (vec){0};
    }
    int64_t n = at->first / at->OH, i = at->first % at->OH, step = at->sw * at->I, y_step = at->y_step;
    for (int64_t row = 0; row < at->last - at->first; row++) {
        int64_t h = at->sh * i + at->down;
        if (h >= 0 && h < at->H) {
            int64_t m = ((n * at->H + h) * at->W + at->sw * at->left + at->across) * at->I;
            const real *of_y = y + (row * at->OW + at->left) * y_step;
            for (int64_t j = at->left; j < at->right; j++, m += step, of_y += y_step) {
                vec row_of_y[2];
                for (int v = 0; v < V; v++)
                    row_of_y[v] = load(of_y + v * WIDTH);
#pragma GCC unroll 12
                for (int k = 0; k < K; k++)
                    for (int v = 0; v < V; v++)
                        sum[k][v] += of_x[k][m] * row_of_y[v];
            }
        }
        if (++i == at->OH)
            i = 0, n++;
    }
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++)
            store(w + k * w_step + v * WIDTH, load(w + k * w_step + v * WIDTH) + sum[k][v]);
}

/* Each size is a function of its own, so that the compiler plans its registers for it alone. */
typedef void Sums(const Pixels *at, const real *const *x, const real *y, real *w, int64_t w_step);
#define SUMS(name, K, V)                                                                                               \
    static void name(const Pixels *at, const real *const *x, const real *y, real *w, int64_t w_step)                   \
    {                                                                                                                  \
        tile(K, V, at, x, y, w, w_step);                                                                               \
    }
#define THIRD (TILE / 3)
SUMS(tile_1_1, 1, 1)
SUMS(tile_third_1, THIRD, 1)
SUMS(tile_most_1, 2 * THIRD, 1)
SUMS(tile_all_1, TILE, 1)
SUMS(tile_1_2, 1, 2)
SUMS(tile_third_2, THIRD, 2)
SUMS(tile_most_2, 2 * THIRD, 2)
SUMS(tile_all_2, TILE, 2)
static const int SIZES[] = {1, THIRD, 2 * THIRD, TILE};
static Sums *const OF_TILE[2][4] = {{tile_1_1, tile_third_1, tile_most_1, tile_all_1},
                                    {tile_1_2, tile_third_2, tile_most_2, tile_all_2}};

/* together: all taps meet x everywhere, and the rows of one tile may belong to several taps. For few channels. */
int conv_weight_grad(const real *restrict x, const real *restrict y, real *restrict w, int64_t N, int64_t H, int64_t W,
                     int64_t I, int64_t OH, int64_t OW, int64_t O, int64_t KH, int64_t KW, int64_t C, int64_t sh,
                     int64_t sw, int64_t top, int64_t left, int64_t dh, int64_t dw, int64_t together)
{
    int64_t groups = I / C, out = O / groups, columns = (out + LANES - 1) / LANES * LANES, all = KH * KW * C;
    int64_t rows = PIXELS / OW + 1;
    real *sums = calloc(groups * all * columns + rows * OW * LANES, sizeof(real)), *copy = sums + groups * all * columns;
    if (!sums)
        return 1;
    for (int64_t first = 0; first < N * OH; first += rows)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t o = 0; o < out; o += LANES) {
                int64_t lanes = least(out - o, LANES), last = least(first + rows, N * OH);
                const real *from = y + first * OW * O + g * out + o;
                if (lanes % WIDTH) /* no whole vectors: read from a copy that has */
                    for (int64_t p = 0; p < (last - first) * OW; p++)
                        memcpy(copy + p * LANES, from + p * O, lanes * sizeof(real));
                for (int64_t t = 0; t < KH * KW; t += together ? KH * KW : 1) {
                    Pixels at = {first, last, 0, OW, dh * (t / KW) - top, dw * (t % KW) - left, H, W, I, OH, OW, sh, sw,
                                 lanes % WIDTH ? LANES : O};
                    while (at.left < OW && sw * at.left + at.across < 0)
                        at.left++;
                    while (at.right > at.left && sw * (at.right - 1) + at.across >= W)
                        at.right--;
                    for (int64_t c = 0, n = together ? all : C; c < n;) {
                        const real *of_x[TILE];
                        for (int64_t k = 0; k < least(TILE, n - c); k++) {
                            int64_t u = (c + k) / C / KW, v = (c + k) / C % KW;
                            of_x[k] = x + g * C + (c + k) % C + (dh * u * W + dw * v) * I;
                        }
                        int size = 3;
                        while (SIZES[size] > n - c)
                            size--;
                        OF_TILE[lanes > WIDTH][size](&at, of_x, lanes % WIDTH ? copy : from,
                                                     sums + ((g * KH * KW + t) * C + c) * columns + o, columns);
                        c += SIZES[size];
                    }
                }
            }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t r = 0; r < all; r++)
            memcpy(w + r * O + g * out, sums + (g * all + r) * columns, out * sizeof(real));
    free(sums);
    return 0;
}
