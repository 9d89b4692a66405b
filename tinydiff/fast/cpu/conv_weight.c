/* The gradient of convolution by the weight: conv2d_weight_grad of ops/conv.py.

       w[u, v, c, o] = sum over n, i, j of x[n, s i + d u - p, s j + d v - p, c] y[n, i, j, o]

   A tile is K rows of w, each a tap (u, v) and a channel c, and V vectors of channels of y: K V sums, which stay in
   registers, over the pixels of y at which the tap meets x. For each pixel V vectors of y and K numbers of x are read, and
   K V products added. Some pixels are worked on at a time, for all tiles, so that they stay in the cache. */

#include "vector.h"
#include <stdlib.h>

#define LANES (2 * WIDTH)               /* channels of a tile */
#define TILE (REGISTERS == 32 ? 12 : 6) /* rows of w in a tile */
#define PIXELS 256 /* at a time; their sums are then added to w, which keeps the sums of many pixels accurate */
#define OFTEN 256  /* rows of w that are worth a copy of y */

typedef struct {
    int64_t *in_x, *in_y; /* where in x the tap meets each pixel of y, and where that pixel begins */
    int64_t pixels;
} Places;

/* x[k]: for row k of w where in x its channel and tap are, from a pixel's place on; if the rows are not `apart`, they
   are neighbours there, and x[0] is enough. */
INLINE void tile(const int K, const int V, const int apart, const Places *at, const real *const *x, const real *y,
                 real *w, int64_t w_step)
{
    vec sum[TILE][2];
    const real *of_x[TILE];
#pragma GCC unroll 12
    for (int k = 0; k < K; k++) {
        of_x[k] = apart ? x[k] : x[0] + k; /* twelve addresses would not fit the registers */
        for (int v = 0; v < V; v++)
            sum[k][v] = (vec){0};
    }
    const int64_t *in_x = at->in_x, *in_y = at->in_y, *end = in_x + at->pixels;
    for (; in_x < end; in_x++, in_y++) {
        int64_t m = *in_x;
        vec of_y[2];
        for (int v = 0; v < V; v++)
            of_y[v] = load(y + *in_y + v * WIDTH);
#pragma GCC unroll 12
        for (int k = 0; k < K; k++)
            for (int v = 0; v < V; v++)
                sum[k][v] += of_x[k][m] * of_y[v];
    }
#pragma GCC unroll 12
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++)
            store(w + k * w_step + v * WIDTH, load(w + k * w_step + v * WIDTH) + sum[k][v]);
}

/* Each size is a function of its own, so that the compiler plans its registers for it alone. */
typedef void Sums(const Places *at, const real *const *x, const real *y, real *w, int64_t w_step);
#define SUMS(name, K, V, apart)                                                                                        \
    static void name(const Places *at, const real *const *x, const real *y, real *w, int64_t w_step)                   \
    {                                                                                                                  \
        tile(K, V, apart, at, x, y, w, w_step);                                                                        \
    }
#define THIRD (TILE / 3)
#define SIZES_OF(name, V, apart)                                                                                       \
    SUMS(name##_1, 1, V, apart)                                                                                        \
    SUMS(name##_third, THIRD, V, apart)                                                                                \
    SUMS(name##_most, 2 * THIRD, V, apart)                                                                             \
    SUMS(name##_all, TILE, V, apart)                                                                                   \
    static Sums *const name[] = {name##_1, name##_third, name##_most, name##_all};
SIZES_OF(tile_1, 1, 0)
SIZES_OF(tile_2, 2, 0)
SIZES_OF(apart_1, 1, 1)
SIZES_OF(apart_2, 2, 1)
static const int SIZES[] = {1, THIRD, 2 * THIRD, TILE};
static Sums *const *const OF_TILE[2][2] = {{tile_1, tile_2}, {apart_1, apart_2}};

/* The number of the size of the next tile, where `rows` are left. With tiles of at most 12 rows, 16 are 8 and 8, not 12
   and 4: the few sums of 4 rows do not hide how long an addition takes. */
static int next_size(int64_t rows)
{
    int size = 3;
    while (SIZES[size] > rows || rows == SIZES[size] + THIRD)
        size--;
    return size;
}

/* Whole tiles, as nearly the same number in each part as they can be; what is left over is in the last. */
static int64_t first_of_part(int64_t rows, int64_t part, int64_t parts)
{
    int64_t first = (rows * part / parts + TILE / 2) / TILE * TILE;
    return part == parts || first > rows ? rows : first;
}

typedef struct {
    int64_t H, W, I, OH, OW;           /* rows, columns and channels of x, rows and columns of y */
    int64_t sh, sw, top, left, dh, dw; /* stride, padding, dilation */
} Geometry;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Writes into `at` those of the pixels of y from `first` on at which tap (u, v) meets x, a row of y at a time. */
static void find_places(const Geometry *f, int64_t first, int64_t pixels, int64_t u, int64_t v, int64_t y_step,
                        Places *at)
{
    /* Under column j of y the tap meets column s j - before of x; that is from 0 to W - 1 if j is from `begin` to
       `end` - 1. */
    int64_t before = f->left - f->dw * v, begin = before > 0 ? (before + f->sw - 1) / f->sw : 0;
    int64_t end = f->W + before > 0 ? (f->W + before - 1) / f->sw + 1 : 0;
    int64_t j = first % f->OW, i = first / f->OW % f->OH, n = first / f->OW / f->OH, found = 0;
    for (int64_t p = -j; p < pixels; p += f->OW, j = 0) { /* p: the first pixel of the row */
        int64_t from = larger(j, begin), to = smaller(end, smaller(f->OW, pixels - p));
        int64_t row = f->sh * i + f->dh * u - f->top, start = ((n * f->H + row) * f->W - before) * f->I;
        for (j = from; j < to && row >= 0 && row < f->H; j++, found++) {
            at->in_x[found] = start + f->sw * f->I * j;
            at->in_y[found] = (p + j) * y_step;
        }
        if (++i == f->OH)
            i = 0, n++;
    }
    at->pixels = found;
}

/* together: all taps meet x everywhere, and the rows of one tile may belong to several taps. For few channels. */
int conv_weight_grad(const real *restrict x, const real *restrict y, real *restrict w, int64_t N, int64_t H, int64_t W,
                     int64_t I, int64_t OH, int64_t OW, int64_t O, int64_t KH, int64_t KW, int64_t C, int64_t sh,
                     int64_t sw, int64_t top, int64_t left, int64_t dh, int64_t dw, int64_t together, int64_t part,
                     int64_t parts)
{
    int64_t groups = I / C, out = O / groups, columns = (out + LANES - 1) / LANES * LANES, all = KH * KW * C;
    /* A part has the rows of w, a tap and a channel each, from `begin` to `end`. */
    int64_t begin = first_of_part(all, part, parts), own = first_of_part(all, part + 1, parts) - begin, end = begin + own;
    if (own <= 0)
        return 0;
    /* Blocks of LANES channels are copied so that each lies in one piece: where out is no whole number of vectors, and
       where they are read so often that it is worth while, because they then stay in the first cache. */
    int copied = out % WIDTH || all >= OFTEN;
    int64_t y_step = copied ? LANES : O, y_block = copied ? PIXELS * LANES : LANES;
    int64_t y_group = copied ? PIXELS * columns : out;
    real *memory = calloc(groups * own * columns + PIXELS * groups * columns + WIDTH, sizeof(real));
    if (!memory)
        return 1;
    real *sums = aligned(memory), *copy = sums + groups * own * columns;
    const Geometry geometry = {H, W, I, OH, OW, sh, sw, top, left, dh, dw};
    int64_t in_x[PIXELS], in_y[PIXELS], each = together ? all : C; /* rows that are worked on together */
    for (int64_t first = 0; first < N * OH * OW; first += PIXELS) {
        int64_t pixels = N * OH * OW - first < PIXELS ? N * OH * OW - first : PIXELS;
        const real *of_y = y + first * O;
        if (copied) {
            for (int64_t g = 0; g < groups; g++)
                for (int64_t o = 0; o < out; o += LANES)
                    for (int64_t p = 0; p < pixels; p++) {
                        const real *from = of_y + p * O + g * out + o;
                        real *to = copy + g * y_group + o / LANES * y_block + p * LANES;
                        if (out - o < LANES)
                            for (int64_t l = 0; l < out - o; l++) /* quicker than a memcpy of few bytes */
                                to[l] = from[l];
                        else
                            store(to, load(from)), store(to + WIDTH, load(from + WIDTH));
                    }
            of_y = copy;
        }
        for (int64_t t = begin / each; t * each < end; t++) {
            Places at = {in_x, in_y, 0};
            find_places(&geometry, first, pixels, t / KW, t % KW, y_step, &at);
            int64_t from = begin > t * each ? begin - t * each : 0, to = end - t * each < each ? end - t * each : each;
            for (int64_t g = 0; g < groups; g++)
                for (int64_t o = 0; o < out; o += LANES)
                    for (int64_t c = from; c < to;) {
                        const real *of_x[TILE];
                        int size = next_size(to - c);
                        for (int64_t k = c; k < c + SIZES[size]; k++) /* tap (u, v), if it is not the first, and channel */
                            of_x[k - c] = x + (dh * (k / C / KW) * W + dw * (k / C % KW)) * I + g * C + k % C;
                        OF_TILE[together][out - o > WIDTH][size](
                            &at, of_x, of_y + g * y_group + o / LANES * y_block,
                            sums + (g * own + t * each + c - begin) * columns + o, columns);
                        c += SIZES[size];
                    }
        }
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t r = begin; r < end; r++)
            memcpy(w + r * O + g * out, sums + (g * own + r - begin) * columns, out * sizeof(real));
    free(memory);
    return 0;
}
