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
#define AHEAD (2 * TILE)                /* then a pixel is fetched into the cache so many pixels before it is read */
#define STEPS 288                       /* taps and channels added at a time, or one run: their weights stay in a cache */
#define MANY (1 << 20)                  /* weights, of which each part should pack its own */
#define PACKED (1 << 18)                /* so many weights of one tap fit the second cache */
#define CHUNK (1 << 17)                 /* numbers of images of x and y, worked on at a time, that fit it too */
#define MOST (1 << 18)                  /* and of some pixels of large images */

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
   `row` is its number of columns, all groups together. A row is read at one go, so that the next one is fetched early.
   If w is transposed, squares are read, so that whole vectors are written. */
static void pack(const real *restrict w, real *restrict packed, int64_t T, int64_t C, int64_t first, int64_t last,
                 int64_t out, int64_t g, int64_t row, int64_t transposed, int few)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < C && !transposed; c++) {
            const real *from = w + (t * C + c) * row + g * out;
            for (int64_t o = first; o < last; o += few ? 1 : LANES) {
                real *to = packed + (few ? (o * T + t) * C + c : ((o - first) * T + t * LANES) * C + c * LANES);
                if (few)
                    *to = from[o];
                else if (last - o >= LANES)
                    store(to, load(from + o)), store(to + WIDTH, load(from + o + WIDTH));
                else
                    memcpy(to, from + o, (last - o) * sizeof(real));
            }
        }
    for (int64_t t = 0; t < T && transposed && few; t++)
        for (int64_t o = first; o < last; o++)
            memcpy(packed + (o * T + t) * C, w + (t * out + o) * row + g * C, C * sizeof(real));
    for (int64_t t = 0; t < T && transposed && !few; t++)
        for (int64_t o = first; o < last; o += WIDTH)
            for (int64_t c = 0; c < C; c += WIDTH) {
                int64_t lane = (o - first) % LANES;
                real *to = packed + ((o - first - lane) * T + t * LANES) * C + c * LANES + lane;
                vec square[WIDTH];
                load_transposed(w + (t * out + o) * row + g * C + c, row, last - o, C - c, square);
                for (int64_t i = 0; i < WIDTH && c + i < C; i++)
                    store(to + i * LANES, square[i]);
            }
}

/* The run in which tap t is, or -1. */
static int64_t run_of(const int64_t *tap, const int64_t *length, int64_t runs, int64_t t)
{
    for (int64_t run = 0; run < runs; run++)
        if (tap[run] <= t && t < tap[run] + length[run])
            return run;
    return -1;
}

typedef struct {
    int64_t K; /* one more than there are classes */
    const int64_t *pixels, *source, *target, *runs, *start, *tap, *length;
} Lists;

typedef struct {
    const real *x;      /* the first channel of the group */
    real *y;            /* the first channel whose weights are packed */
    int64_t S, I, D, O; /* pixels and channels of an image of x and of y */
} Images;

/* Add all runs in `taps` for the pixels from `pixel` to `end` of the images from `image` to `last`, at most LANES
   channels. */
static void add_runs(Taps taps, const Lists *lists, const Images *of, int64_t image, int64_t last, int64_t pixel,
                     int64_t end, int64_t lanes, int few)
{
    int64_t left = taps.runs;
    do { /* some of the runs, for all pixels */
        int64_t steps = 0;
        for (taps.runs = 0; taps.runs < left; taps.runs++) {
            steps += taps.length[taps.runs] * taps.C;
            if (!few && taps.runs && steps > STEPS)
                break;
        }
        const real *x[TILE];
        real *y[TILE];
        int waiting = 0;
        for (int64_t n = image; n < last; n++)
            for (int64_t p = pixel; p < end; p++) {
                x[waiting] = of->x + (n * of->S + lists->source[p]) * of->I;
                /* Few channels of y give too few products to hide how long it takes to read x. An address behind its
                   end does no harm. */
                for (int64_t c = 0; few && c < taps.C; c += LINE)
                    __builtin_prefetch(x[waiting] + AHEAD * of->I + c);
                y[waiting++] = of->y + (n * of->D + lists->target[p]) * of->O;
                if (waiting == TILE) {
                    sums(TILE, x, y, &taps, lanes, few);
                    waiting = 0;
                }
            }
        if (waiting)
            sums(waiting, x, y, &taps, lanes, few);
        taps.start += taps.runs, taps.tap += taps.runs, taps.length += taps.runs, left -= taps.runs;
        taps.begun = 1;
    } while (left);
}

/* The same for all pixels of these images, so many at once, and for `channels` channels. w, b: packed. only: -1, or
   the one tap that is packed, which is added to y. */
static void add_taps(const real *w, const real *b, int64_t T, int64_t C, int64_t only, const Lists *lists,
                     const Images *all, int64_t image, int64_t last, int64_t at_once, int64_t channels, int few)
{
    for (int64_t q = 0; q + 1 < lists->K; q++) {
        int64_t run = lists->runs[q], begin, zero = 0, one = 1;
        Taps of = {w, b, lists->start + run, lists->tap + run, lists->length + run, lists->runs[q + 1] - run,
                   T, C, all->I, 0};
        if (only >= 0) {
            if ((run = run_of(of.tap, of.length, of.runs, only)) < 0)
                continue;
            begin = of.start[run] + only - of.tap[run];
            of = (Taps){w, b, &begin, &zero, &one, 1, T, C, all->I, 1};
        }
        for (int64_t p = lists->pixels[q], end; p < lists->pixels[q + 1]; p = end) {
            end = smaller(lists->pixels[q + 1], p + at_once);
            for (int64_t o = 0; o < channels; o += LANES) {
                Images some = {all->x, all->y + o, all->S, all->I, all->D, all->O};
                of.w = w + o * T * C, of.b = b + o;
                add_runs(of, lists, &some, image, last, p, end, smaller(channels - o, LANES), few);
            }
        }
    }
}

/* lists has seven lists one after the other, of K, P, P, K, R, R and R numbers; there are K - 1 classes. Class q has the
   pixels from pixels[q] to pixels[q + 1] of source (places in x) and target (in y), and the runs from runs[q] to
   runs[q + 1]. N images; S, D pixels and I, O channels of x, y; T taps.

   A part is some of the images, and packs all weights. But if there are fewer images than parts, or so many weights that
   to pack them takes as long as to use them, a part is some channels of y, for all images. It begins with the bias, and
   adds one tap after the other, whose weights it packs for so many channels that they stay in the second cache. */
int conv(const real *restrict x, const real *restrict w, const real *restrict b, real *restrict y,
         const int64_t *restrict lists, int64_t K, int64_t P, int64_t R, int64_t N, int64_t S, int64_t I, int64_t T,
         int64_t D, int64_t O, int64_t groups, int64_t transposed, int64_t part, int64_t parts)
{
    const int64_t *target = lists + K + P, *start = target + P + K;
    const Lists all = {K, lists, lists + K, target, target + P, start, start + R, start + 2 * R};
    int64_t C = I / groups, out = O / groups, blocks = (out + LANES - 1) / LANES, row = transposed ? I : O;
    int few = out <= FEW && C >= WIDTH;
    int by_channels = !few && blocks >= parts && (N < parts || blocks * T * C * LANES > MANY);
    int64_t taps = by_channels ? 1 : T, block = taps * C * LANES, at_once = by_channels ? PACKED / block + 1 : blocks;
    int64_t images = by_channels ? TILE : CHUNK / (S * I + D * O + 1) + 1;
    int64_t pixels = (MOST / (I + O) / smaller(N + 1, images) / TILE + 1) * TILE; /* of an image, at once */
    int64_t n_from = by_channels ? 0 : N * part / parts, n_to = by_channels ? N : N * (part + 1) / parts;
    int64_t k_from = by_channels ? blocks * part / parts : 0, k_to = by_channels ? blocks * (part + 1) / parts : blocks;
    real *memory = calloc(smaller(at_once, blocks) * block + blocks * LANES + WIDTH, sizeof(real));
    if (!memory)
        return 1;
    real *bias = aligned(memory), *packed = bias + blocks * LANES;
    for (int64_t g = 0; g < groups; g++) {
        if (b)
            memcpy(bias, b + g * out, out * sizeof(real));
        for (int64_t k = k_from; k < k_to; k += at_once) {
            int64_t first = k * LANES, last = smaller(smaller(k_to, k + at_once) * LANES, out);
            Images of = {x + g * C, y + g * out + first, S, I, D, O};
            if (by_channels)
                for (int64_t p = 0; p < N * D; p++)
                    memcpy(of.y + p * O, bias + first, (last - first) * sizeof(real));
            for (int64_t t = 0; t < T; t += taps) {
                pack(w + t * (transposed ? out : C) * row, packed, taps, C, first, last, out, g, row, transposed, few);
                for (int64_t n = n_from; n < n_to; n += images)
                    add_taps(packed, bias + first, taps, C, by_channels ? t : -1, &all, &of, n,
                             smaller(n_to, n + images), pixels, last - first, few);
            }
        }
    }
    free(memory);
    return 0;
}
