/* Convolution without patches, and its gradient by the input: ops/conv.py.

   Both give each channel o of each pixel p of the output as a sum over taps t of the kernel and channels c of the input,

       y[p, o] = b[o] + sum over t, c of x[q(p) + d(t), c] w[t, c, o]

   q(p) is the pixel of the input under the first tap of p, and d(t) how far from there the pixel under tap t lies. conv.py
   lists both. Pixels over which the same taps meet the image are a class; at a border the other taps are left out, so no
   zeros are multiplied. Taps that are neighbours in x and in w are a run: with its channels one piece of memory.

   A tile is P pixels and V vectors of channels of the output, P V sums, which stay in registers. For each tap and each
   channel of the input, V vectors of weights and P numbers of x are read, and P V products added. So there are more
   multiply-adds than reads, and they take the time. */

#include "vector.h"
#include <stdlib.h>

#define LANES (2 * WIDTH)               /* channels of a tile */
#define TILE (REGISTERS == 32 ? 12 : 6) /* pixels of a tile: its sums, two vectors and a number fill the registers */
#define FEW 4                           /* so few channels of the output do not fill a vector: see dots */
#define STEPS 288                       /* taps and channels added at a time, or one run: their weights stay in a cache */
#define MANY (1 << 20)  /* weights, of which each part should pack its own */
#define CHUNK (1 << 18)                 /* bytes of x and y that are worked on at a time; they fit the second cache */

typedef struct {
    const real *w, *b;                   /* w[t, c, o] for the channels o of the tile; for dots w[o, t, c] */
    const int64_t *start, *tap, *length; /* of each run: the place in x of its first tap, that tap, how many they are */
    int64_t runs, T, C, I;               /* of runs, taps, channels of x in a group, channels of x */
    int begun;                           /* y has a sum already, to which this is added */
} Taps;

/* x[p]: the pixel under the first tap. y[p]: the first channel of the output. */
INLINE void tile(const int P, const int V, const real *const *x, real *const *y, const Taps *taps)
{
    vec sum[TILE][2];
    const real *at[TILE];
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) {
        at[p] = x[p];
        for (int v = 0; v < V; v++)
            sum[p][v] = load((taps->begun ? y[p] : taps->b) + v * WIDTH);
    }
    for (int64_t run = 0; run < taps->runs; run++) {
        const real *w = taps->w + taps->tap[run] * taps->C * LANES;
        int64_t c = taps->start[run] * taps->I, end = c + taps->length[run] * taps->C;
        for (; c < end; c++, w += LANES) {
            vec weight[2];
            for (int v = 0; v < V; v++)
                weight[v] = load(w + v * WIDTH);
#pragma GCC unroll 12
            for (int p = 0; p < P; p++)
                for (int v = 0; v < V; v++)
                    sum[p][v] += at[p][c] * weight[v];
        }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int v = 0; v < V; v++)
            store(y[p] + v * WIDTH, sum[p][v]);
}

/* sum[p][o] += x[p] w[o] in each of n channels of the input, at most WIDTH. */
INLINE void add_products(const int P, const int O, vec (*sum)[FEW], const real *const *x, int64_t from, const real *w,
                         int64_t w_step, int64_t n)
{
    vec weight[FEW];
    for (int o = 0; o < O; o++)
        weight[o] = load_some(w + o * w_step, n);
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) {
        vec of_x = load_some(x[p] + from, n);
        for (int o = 0; o < O; o++)
            sum[p][o] += of_x * weight[o];
    }
}

/* P pixels and O channels, at most FEW. Here a vector is of channels of the input, and its elements are added at the
   end. */
INLINE void dots(const int P, const int O, const real *const *x, real *const *y, const Taps *taps)
{
    vec sum[TILE][FEW];
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int o = 0; o < O; o++)
            sum[p][o] = (vec){0};
    for (int64_t run = 0; run < taps->runs; run++) {
        const real *w = taps->w + taps->tap[run] * taps->C;
        int64_t start = taps->start[run] * taps->I, length = taps->length[run] * taps->C, c = 0;
        for (; c + WIDTH <= length; c += WIDTH)
            add_products(P, O, sum, x, start + c, w + c, taps->T * taps->C, WIDTH);
        if (c < length)
            add_products(P, O, sum, x, start + c, w + c, taps->T * taps->C, length - c);
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int o = 0; o < O; o++)
            y[p][o] = taps->b[o] + sum_of_elements(sum[p][o]);
}

/* Each size is a function of its own, so that the compiler plans its registers for it alone. */
typedef void Sums(const real *const *x, real *const *y, const Taps *taps);
#define SUMS(name, kind, P, channels)                                                                                  \
    static void name(const real *const *x, real *const *y, const Taps *taps) { kind(P, channels, x, y, taps); }
#define THIRD (TILE / 3)
SUMS(tile_1_1, tile, 1, 1)
SUMS(tile_third_1, tile, THIRD, 1)
SUMS(tile_most_1, tile, 2 * THIRD, 1)
SUMS(tile_all_1, tile, TILE, 1)
SUMS(tile_1_2, tile, 1, 2)
SUMS(tile_third_2, tile, THIRD, 2)
SUMS(tile_most_2, tile, 2 * THIRD, 2)
SUMS(tile_all_2, tile, TILE, 2)
SUMS(dots_1, dots, TILE, 1)
SUMS(dots_2, dots, TILE, 2)
SUMS(dots_3, dots, THIRD, 3)
SUMS(dots_4, dots, THIRD, 4)
static const int SIZES[] = {1, THIRD, 2 * THIRD, TILE};
static Sums *const OF_TILE[2][4] = {{tile_1_1, tile_third_1, tile_most_1, tile_all_1},
                                    {tile_1_2, tile_third_2, tile_most_2, tile_all_2}};
static const int OF_FEW[FEW] = {TILE, TILE, THIRD, THIRD}; /* pixels, for as many sums as there are registers */
static Sums *const OF_DOTS[FEW] = {dots_1, dots_2, dots_3, dots_4};

/* Of at most TILE pixels and LANES channels. x and y have room for TILE pixels. */
static void sums(int pixels, const real **x, real **y, const Taps *taps, int64_t lanes, int few)
{
    real rows[TILE][LANES], *wanted[TILE]; /* rows: in place of y, for sums that are computed but not wanted */
    int size = 0, partial = !few && lanes % WIDTH;
    while (SIZES[size] < pixels)
        size++;
    int P = few ? TILE : SIZES[size];
    if (partial || P > pixels)
        for (int p = 0; p < P; p++) {
            wanted[p] = y[p < pixels ? p : 0];
            if (p >= pixels)
                x[p] = x[0];
            if (partial || p >= pixels)
                y[p] = memcpy(rows[p], wanted[p], lanes * sizeof(real));
        }
    if (few)
        for (int p = 0; p < P; p += OF_FEW[lanes - 1])
            OF_DOTS[lanes - 1](x + p, y + p, taps);
    else
        OF_TILE[lanes > WIDTH][size](x, y, taps);
    if (partial)
        for (int p = 0; p < pixels; p++)
            memcpy(wanted[p], rows[p], lanes * sizeof(real));
}

/* Of the weights of group g the channels from `first` to `last`, of `out`, in the order in which tiles read them:
   packed[k, t, c, o] in blocks k of LANES channels, or, few, packed[o, t, c]. transposed: w is [t, o, c], else [t, c, o];
   `row` is its number of columns, all groups together. */
static void pack(const real *restrict w, real *restrict packed, int64_t T, int64_t C, int64_t first, int64_t last,
                 int64_t out, int64_t g, int64_t row, int64_t transposed, int few)
{
    for (; first < last; first += LANES, packed += T * C * LANES) {
        int64_t lanes = last - first < LANES ? last - first : LANES;
        int64_t c_step = few ? 1 : LANES, o_step = few ? T * C : 1;
        for (int64_t t = 0; t < T; t++) {
            real *to = packed + t * C * c_step;
            if (transposed)
                for (int64_t o = 0; o < lanes; o++)
                    for (int64_t c = 0; c < C; c++)
                        to[c * c_step + o * o_step] = w[(t * out + first + o) * row + g * C + c];
            else if (few)
                for (int64_t c = 0; c < C; c++)
                    for (int64_t o = 0; o < lanes; o++)
                        to[c * c_step + o * o_step] = w[(t * C + c) * row + g * out + first + o];
            else
                for (int64_t c = 0; c < C; c++)
                    memcpy(to + c * LANES, w + (t * C + c) * row + g * out + first, lanes * sizeof(real));
        }
    }
}

/* lists has seven lists one after the other, of K, P, P, K, R, R and R numbers; there are K - 1 classes. Class q has the
   pixels from pixels[q] to pixels[q + 1] of source (places in x) and target (in y), and the runs from runs[q] to
   runs[q + 1]. N images; S, D pixels and I, O channels of x, y; T taps.

   A part is some of the images. But if there are fewer images than parts, or so many weights that to pack them takes as
   long as to use them, it is some blocks of channels of y, for all images, packed one after the other. */
int conv(const real *restrict x, const real *restrict w, const real *restrict b, real *restrict y,
         const int64_t *restrict lists, int64_t K, int64_t P, int64_t R, int64_t N, int64_t S, int64_t I, int64_t T,
         int64_t D, int64_t O, int64_t groups, int64_t transposed, int64_t part, int64_t parts)
{
    const int64_t *pixels = lists, *source = pixels + K, *target = source + P, *runs = target + P, *start = runs + K;
    const int64_t *tap = start + R, *length = tap + R;
    int64_t C = I / groups, out = O / groups, blocks = (out + LANES - 1) / LANES, block = T * C * LANES;
    int64_t images = CHUNK / (int64_t)sizeof(real) / (S * I + D * O + 1) + 1;
    int few = out <= FEW && C >= WIDTH;
    int by_channels = blocks >= parts && (N < parts || blocks * block > MANY);
    int64_t at_once = by_channels ? 1 : blocks, of_images = by_channels ? 0 : part, image_parts = by_channels ? 1 : parts;
    real *memory = calloc(at_once * block + blocks * LANES + WIDTH, sizeof(real));
    if (!memory)
        return 1;
    real *packed = aligned(memory), *bias = packed + at_once * block;
    for (int64_t j = 0; j < groups * blocks; j += at_once) {
        int64_t g = j / blocks, from = j % blocks, to = from + at_once;
        if (by_channels && (from < blocks * part / parts || from >= blocks * (part + 1) / parts))
            continue;
        pack(w, packed, T, C, from * LANES, to * LANES < out ? to * LANES : out, out, g, transposed ? I : O, transposed,
             few);
        if (b)
            memcpy(bias, b + g * out, out * sizeof(real));
        for (int64_t first = N * of_images / image_parts, last = N * (of_images + 1) / image_parts; first < last;
             first += images)
            for (int64_t k = from; k < to; k++)
                for (int64_t q = 0; q + 1 < K; q++) {
                    int64_t lanes = out - k * LANES < LANES ? out - k * LANES : LANES, run = runs[q], end = runs[q + 1];
                    do { /* some of the runs, for all pixels of the class */
                        Taps taps = {packed + (k - from) * block, bias + k * LANES, start + run, tap + run, length + run, 0,
                                     T, C, I, run > runs[q]};
                        int64_t steps = 0;
                        while (run < end && (few || taps.runs == 0 || steps + length[run] * C <= STEPS))
                            steps += length[run++] * C, taps.runs++;
                        const real *xs[TILE];
                        real *ys[TILE];
                        int waiting = 0;
                        for (int64_t n = first; n < first + images && n < last; n++)
                            for (int64_t p = pixels[q]; p < pixels[q + 1]; p++) {
                                xs[waiting] = x + (n * S + source[p]) * I + g * C;
                                ys[waiting++] = y + (n * D + target[p]) * O + g * out + k * LANES;
                                if (waiting == TILE) {
                                    sums(TILE, xs, ys, &taps, lanes, few);
                                    waiting = 0;
                                }
                            }
                        if (waiting)
                            sums(waiting, xs, ys, &taps, lanes, few);
                    } while (run < end);
                }
    }
    free(memory);
    return 0;
}
