/* Convolution by 3x3 taps with stride 1 in a quarter of the multiplications, and its gradients: ops/conv.py.

   In one dimension, for 6 numbers x, 3 taps w and 4 numbers y, the trilinear form of ops/conv.py is

       F(x, w, y) = sum over i, u of x[i + u] w[u] y[i] = sum over m of x[m] p[m],   p[m] = sum over i + u = m of w[u] y[i]

   p has the coefficients of the product of two polynomials, p(t) = w(t) y(t) with w(t) = w[0] + w[1] t + w[2] t^2 and
   y(t) = y[0] + ... + y[3] t^3. Its degree is 5, so it is known from its values at five points and its last coefficient:

       p(a) = w(a) y(a)  at  a = 0, 1, -1, 2, -2,        p[5] = w[2] y[3]

   These are 6 products where F has 12. With M(t) = t (t^2 - 1) (t^2 - 4), which is 0 at all five points, and its
   derivative M', the coefficients follow from them by Lagrange's formula,

       p(t) = sum over a of p(a) M(t) / ((t - a) M'(a)) + p[5] M(t)

   where M(t) / ((t - a) M'(a)) is 1 at a, and 0 at the other points. So F is a sum of six products, F = sum over k of
   X[k] W[k] Y[k], of

       Y = y(0), y(1), y(-1), y(2), y(-2), y[3]
       W = w(0) / 4, -w(1) / 6, -w(-1) / 6, w(2) / 24, w(-2) / 24, w[2]                  (4, -6 and 24 are M'(a))
       X[k] = sum over m of x[m] times the coefficient of t^m in M(t) / (t - a), and, last, in M(t)

   For example M(t) / t = t^4 - 5 t^2 + 4, so X[0] = 4 x[0] - 5 x[2] + x[4]. The convolution is the derivative of F by y,
   and the gradient by the weight that by w. The gradient by the input is a convolution again, of ȳ with the taps turned
   round and the channels exchanged. In two dimensions all this is done along the columns, then along the rows: a tile has
   6x6 numbers of x, 3x3 of w, 4x4 of y, and 36 products where F has 144. The channels c of x and o of y are summed over
   as before, so for each of the 36 points there is a product of matrices, tiles by c by o.

   The price: a sum of large numbers may cancel, so the rounding errors are four to five times those of the plain sum (root
   mean square); and an Inf or NaN in x may reach every pixel of y whose tile sees it.

   Source: Winograd 1980, "Arithmetic complexity of computations"; for convolutional nets Lavin and Gray 2016. */

#include "vector.h"
#include <stdlib.h>

#define LANES (2 * WIDTH)               /* channels of y in a block */
#define ROWS (REGISTERS == 32 ? 12 : 6) /* of a block: its sums, two vectors and a number fill the registers */
#define GROUP (1 << 15) /* weights of a point that stay in the second cache, in numbers */
#define FEW 252         /* tiles at a time with those */
#define CHUNK (1 << 20) /* bytes of X and Y at a time: they fit the second cache, unless the channels are very many */

/* ---------------------------------------------------------------- from numbers to points, and the transposed maps */

INLINE void points_of_x(const vec *x, vec *X)
{
    vec p = x[4] - 4 * x[2], q = x[3] - 4 * x[1], r = x[4] - x[2], s = 2 * (x[3] - x[1]);
    X[0] = 4 * x[0] - 5 * x[2] + x[4];
    X[1] = p + q, X[2] = p - q, X[3] = r + s, X[4] = r - s;
    X[5] = 4 * x[1] - 5 * x[3] + x[5];
}

INLINE void points_of_y(const vec *y, vec *Y)
{
    vec p = y[0] + y[2], q = y[1] + y[3], r = y[0] + 4 * y[2], s = 2 * y[1] + 8 * y[3];
    Y[0] = y[0], Y[1] = p + q, Y[2] = p - q, Y[3] = r + s, Y[4] = r - s, Y[5] = y[3];
}

INLINE void y_of_points(const vec *Y, vec *y)
{
    vec p = Y[1] + Y[2], q = Y[1] - Y[2], r = Y[3] + Y[4], s = Y[3] - Y[4];
    y[0] = Y[0] + p + r, y[1] = q + 2 * s, y[2] = p + 4 * r, y[3] = q + 8 * s + Y[5];
}

INLINE void points_of_w(const vec *w, vec *W)
{
    const real sixth = (real)1 / 6;
    vec p = -sixth * (w[0] + w[2]), q = -sixth * w[1], r = sixth * (w[0] / 4 + w[2]), s = sixth / 2 * w[1];
    W[0] = w[0] / 4, W[1] = p + q, W[2] = p - q, W[3] = r + s, W[4] = r - s, W[5] = w[2];
}

INLINE void w_of_points(const vec *W, vec *w)
{
    const real sixth = (real)1 / 6;
    vec p = sixth * (W[1] + W[2]), q = sixth * (W[1] - W[2]), r = sixth * (W[3] + W[4]), s = sixth * (W[3] - W[4]);
    w[0] = W[0] / 4 - p + r / 4, w[1] = s / 2 - q, w[2] = r - p + W[5];
}

/* A map of `from` numbers to `to`, along the columns of a matrix, then along its rows. */
#define IN_TWO_DIMENSIONS(name, map, from, to)                                                                         \
    INLINE void name(vec (*a)[from], vec (*b)[to])                                                                     \
    {                                                                                                                  \
        vec half[to][from];                                                                                            \
        for (int j = 0; j < from; j++) {                                                                               \
            vec column[from], mapped[to];                                                                              \
            for (int i = 0; i < from; i++)                                                                             \
                column[i] = a[i][j];                                                                                   \
            map(column, mapped);                                                                                       \
            for (int i = 0; i < to; i++)                                                                               \
                half[i][j] = mapped[i];                                                                                \
        }                                                                                                              \
        for (int i = 0; i < to; i++)                                                                                   \
            map(half[i], b[i]);                                                                                        \
    }
IN_TWO_DIMENSIONS(all_points_of_x, points_of_x, 6, 6)
IN_TWO_DIMENSIONS(all_points_of_y, points_of_y, 4, 6)
IN_TWO_DIMENSIONS(all_of_y, y_of_points, 6, 4)
IN_TWO_DIMENSIONS(all_points_of_w, points_of_w, 3, 6)
IN_TWO_DIMENSIONS(all_of_w, w_of_points, 6, 3)

/* ---------------------------------------------------------------- tiles of images */

typedef struct {
    int64_t height, width, channels; /* of an image */
    int64_t top, left;               /* how far the first tile begins above it, and to its left */
} Images;

/* The pixels of a tile with `side` rows and columns that begin at (i, j); where there is no image, zeros. */
INLINE void pixels_of(const int side, const real *image, const Images *all, int64_t i, int64_t j, const real *zeros,
                      const real **at)
{
    for (int r = 0; r < side; r++)
        for (int q = 0; q < side; q++) {
            int64_t row = i + r - all->top, column = j + q - all->left;
            int inside = row >= 0 && row < all->height && column >= 0 && column < all->width;
            at[r * side + q] = inside ? image + (row * all->width + column) * all->channels : zeros;
        }
}

/* Points of a tile of x (side 6) or y (4): of channel c at to[k * step + c], for each point k. */
#define POINTS_OF(name, map, side)                                                                                     \
    static void name(const real *const *at, int64_t channels, real *to, int64_t step)                                  \
    {                                                                                                                  \
        for (int64_t c = 0; c < channels; c += WIDTH) {                                                                \
            vec a[side][side], points[6][6];                                                                           \
            for (int i = 0; i < side * side; i++)                                                                      \
                a[i / side][i % side] = load_some(at[i] + c, channels - c);                                            \
            map(a, points);                                                                                            \
            _Pragma("GCC unroll 36") for (int k = 0; k < 36; k++)                                                      \
                store(to + k * step + c, points[k / 6][k % 6]);                                                        \
        }                                                                                                              \
    }
POINTS_OF(points_of_tile_of_x, all_points_of_x, 6)
POINTS_OF(points_of_tile_of_y, all_points_of_y, 4)

/* ---------------------------------------------------------------- products of matrices */

/* y[p, o] = sum over c of x[p, c] w[c, o], for ROWS rows p and V vectors of channels o. */
INLINE void product(const int V, const real *x, int64_t x_step, const real *w, int64_t C, real *y, int64_t y_step)
{
    vec sum[ROWS][2];
    const real *at[ROWS];
#pragma GCC unroll 12
    for (int p = 0; p < ROWS; p++) {
        at[p] = x + p * x_step;
        for (int v = 0; v < V; v++)
            sum[p][v] = (vec){0};
    }
    for (int64_t c = 0; c < C; c++, w += LANES) {
        vec weight[2];
        for (int v = 0; v < V; v++)
            weight[v] = load(w + v * WIDTH);
#pragma GCC unroll 12
        for (int p = 0; p < ROWS; p++)
            for (int v = 0; v < V; v++)
                sum[p][v] += at[p][c] * weight[v];
    }
#pragma GCC unroll 12
    for (int p = 0; p < ROWS; p++)
        for (int v = 0; v < V; v++)
            store(y + p * y_step + v * WIDTH, sum[p][v]);
}

/* w[k, o] += sum over t of x[t, k] y[t, o], for K channels k of x and V vectors of channels o of y. */
INLINE void transposed_product(const int K, const int V, const real *x, int64_t x_step, const real *y, int64_t y_step,
                               int64_t T, real *w, int64_t w_step)
{
    vec sum[ROWS][2];
#pragma GCC unroll 12
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++)
            sum[k][v] = (vec){0};
    for (int64_t t = 0; t < T; t++, x += x_step, y += y_step) {
        vec of_y[2];
        for (int v = 0; v < V; v++)
            of_y[v] = load(y + v * WIDTH);
#pragma GCC unroll 12
        for (int k = 0; k < K; k++)
            for (int v = 0; v < V; v++)
                sum[k][v] += x[k] * of_y[v];
    }
#pragma GCC unroll 12
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++)
            store(w + k * w_step + v * WIDTH, load(w + k * w_step + v * WIDTH) + sum[k][v]);
}

/* Each size is a function of its own, so that the compiler plans its registers for it alone. */
typedef void Product(const real *x, int64_t x_step, const real *w, int64_t C, real *y, int64_t y_step);
#define PRODUCT(name, V)                                                                                               \
    static void name(const real *x, int64_t x_step, const real *w, int64_t C, real *y, int64_t y_step)                 \
    {                                                                                                                  \
        product(V, x, x_step, w, C, y, y_step);                                                                        \
    }
PRODUCT(product_1, 1)
PRODUCT(product_2, 2)
static Product *const PRODUCTS[] = {product_1, product_2};

#define THIRD (ROWS / 3)
typedef void Transposed(const real *x, int64_t x_step, const real *y, int64_t y_step, int64_t T, real *w,
                        int64_t w_step);
#define TRANSPOSED(name, K, V)                                                                                         \
    static void name(const real *x, int64_t x_step, const real *y, int64_t y_step, int64_t T, real *w, int64_t w_step) \
    {                                                                                                                  \
        transposed_product(K, V, x, x_step, y, y_step, T, w, w_step);                                                  \
    }
TRANSPOSED(transposed_1_1, 1, 1)
TRANSPOSED(transposed_third_1, THIRD, 1)
TRANSPOSED(transposed_all_1, ROWS, 1)
TRANSPOSED(transposed_1_2, 1, 2)
TRANSPOSED(transposed_third_2, THIRD, 2)
TRANSPOSED(transposed_all_2, ROWS, 2)
static const int SIZES[] = {1, THIRD, ROWS};
static Transposed *const TRANSPOSEDS[2][3] = {{transposed_1_1, transposed_third_1, transposed_all_1},
                                              {transposed_1_2, transposed_third_2, transposed_all_2}};

/* ---------------------------------------------------------------- convolution */

static int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* The distance of the numbers of two points: they must not all fall on the same place of the cache, as they would at a
   distance of 4096 bytes. */
static int64_t apart(int64_t n) { return whole(n, WIDTH) + WIDTH; }

/* How many tiles are worked on at a time, for so many channels of X and Y. */
static int64_t tiles_at_a_time(int64_t channels, int64_t tiles)
{
    int64_t room = CHUNK / (36 * channels * (int64_t)sizeof(real)) / ROWS * ROWS, least = 4 * ROWS;
    int64_t most = whole(tiles, ROWS);
    room = room < least ? least : room;
    return room < most ? room : most;
}

/* WIDTH numbers, so far apart; the others of the n, if there are fewer, are 0. */
INLINE vec load_apart(const real *p, int64_t step, int64_t n)
{
    real a[WIDTH];
    for (int64_t l = 0; l < WIDTH; l++)
        a[l] = l < n ? p[l * step] : 0;
    return load(a);
}

/* The points of the weights w[u, v, c, o] of the channels o from `first` to `last`, for each point k and block of them:
   W[k, block, c, lane]. transposed: of those of the gradient by the input, in which the taps are turned round, and c and
   o exchanged. Both vectors of a block are made one after the other, as they are neighbours in w, too. */
static void points_of_weights(const real *w, int64_t C, int64_t O, int transposed, int64_t first, int64_t last, real *W,
                              int64_t step)
{
    int64_t rows = transposed ? O : C;
    for (int64_t block = first; block < last; block += LANES)
        for (int64_t c = 0; c < rows; c++)
            for (int64_t o = block; o < block + LANES && o < last; o += WIDTH) {
                vec taps[3][3], points[6][6];
                for (int t = 0; t < 9; t++)
                    taps[t / 3][t % 3] = transposed ? load_apart(w + ((8 - t) * C + o) * O + c, O, last - o)
                                                    : load_some(w + (t * C + c) * O + o, last - o);
                all_points_of_w(taps, points);
#pragma GCC unroll 36
                for (int k = 0; k < 36; k++)
                    store(W + k * step + ((block - first) / LANES * rows + c) * LANES + o - block,
                          points[k / 6][k % 6]);
            }
}

/* y[n, i, j, o] = b[o] + sum over u, v, c of x[n, i + u - top, j + v - left, c] w[u, v, c, o], or, transposed, with
   w[2 - u, 2 - v, o, c]. w is (3, 3, A, B): A = C and B = O, or, transposed, A = O and B = C. */
int winograd(const real *restrict x, const real *restrict w, const real *restrict b, real *restrict y, int64_t N,
             int64_t H, int64_t W, int64_t C, int64_t A, int64_t B, int64_t OH, int64_t OW, int64_t O, int64_t top,
             int64_t left, int64_t transposed, int64_t part, int64_t parts)
{
    int64_t x_step = whole(C, WIDTH), down = (OH + 3) / 4, across = (OW + 3) / 4, all = N * down * across;
    /* Each part has its own tiles, or, where there are fewer tiles than channels, so that most of the work is to make the
       points of the weights, its own channels, and then some of them at a time: their weights of a point stay in the
       second cache. */
    int few = all < O;
    int64_t blocks = whole(O, LANES) / LANES, first = few ? 0 : all * part / parts;
    int64_t last = few ? all : all * (part + 1) / parts, o_first = few ? blocks * part / parts * LANES : 0;
    int64_t o_last = few && part + 1 < parts ? blocks * (part + 1) / parts * LANES : O;
    int64_t group = few ? whole(GROUP / C + 1, LANES) : whole(O, LANES);
    int64_t T = few ? whole(all < FEW ? all : FEW, ROWS) : tiles_at_a_time(x_step + group, last - first);
    int64_t of_w_apart = apart(group * C), of_x_apart = apart(T * x_step), of_y_apart = apart(T * group);
    int64_t rest = x_step + whole(O, LANES);
    real *memory = malloc((36 * (of_w_apart + of_x_apart + of_y_apart) + rest + WIDTH) * sizeof(real));
    if (!memory)
        return 1;
    real *weights = aligned(memory), *X = weights + 36 * of_w_apart, *Y = X + 36 * of_x_apart;
    real *zeros = Y + 36 * of_y_apart, *bias = zeros + x_step;
    memset(X, 0, 36 * of_x_apart * sizeof(real)); /* rows that belong to no tile are multiplied too */
    memset(zeros, 0, rest * sizeof(real));
    if (b)
        memcpy(bias, b, O * sizeof(real));
    Images of_x = {H, W, C, top, left};
    for (int64_t start = first; start < last; start += T) {
        int64_t tiles = last - start < T ? last - start : T;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t n = (start + t) / across / down, i = (start + t) / across % down * 4, j = (start + t) % across * 4;
            const real *at[36];
            pixels_of(6, x + n * H * W * C, &of_x, i, j, zeros, at);
            points_of_tile_of_x(at, C, X + t * x_step, of_x_apart);
        }
        for (int64_t from = o_first; from < o_last; from += group) {
            int64_t to = o_last - from < group ? o_last : from + group;
            if (few || start == first)
                points_of_weights(w, A, B, (int)transposed, from, to, weights, of_w_apart);
            for (int64_t k = 0; k < 36; k++)
                for (int64_t o = from; o < to; o += LANES)
                    for (int64_t t = 0; t < tiles; t += ROWS)
                        PRODUCTS[to - o > WIDTH](X + k * of_x_apart + t * x_step, x_step,
                                                 weights + k * of_w_apart + (o - from) * C, C,
                                                 Y + k * of_y_apart + t * group + o - from, group);
            for (int64_t t = 0; t < tiles; t++) {
                int64_t n = (start + t) / across / down, i = (start + t) / across % down * 4;
                int64_t j = (start + t) % across * 4;
                for (int64_t o = from; o < to; o += WIDTH) {
                    vec points[6][6], sums[4][4];
#pragma GCC unroll 36
                    for (int k = 0; k < 36; k++)
                        points[k / 6][k % 6] = load(Y + k * of_y_apart + t * group + o - from);
                    all_of_y(points, sums);
                    for (int r = 0; r < 4 && i + r < OH; r++)
                        for (int q = 0; q < 4 && j + q < OW; q++) {
                            vec sum = sums[r][q] + load(bias + o);
                            real *at = y + ((n * OH + i + r) * OW + j + q) * O + o;
                            if (to - o >= WIDTH)
                                store(at, sum);
                            else
                                memcpy(at, &sum, (to - o) * sizeof(real));
                        }
                }
            }
        }
    }
    free(memory);
    return 0;
}

/* w[u, v, c, o] = sum over n, i, j of x[n, i + u - top, j + v - left, c] y[n, i, j, o] */
int winograd_weight_grad(const real *restrict x, const real *restrict y, real *restrict w, int64_t N, int64_t H,
                         int64_t W, int64_t C, int64_t OH, int64_t OW, int64_t O, int64_t top, int64_t left,
                         int64_t part, int64_t parts)
{
    int64_t first = whole(C, WIDTH) / WIDTH * part / parts * WIDTH; /* the channels of x of this part: from here */
    int64_t end = whole(C, WIDTH) / WIDTH * (part + 1) / parts * WIDTH, own = (end < C ? end : C) - first;
    if (own <= 0)
        return 0;
    int64_t x_step = whole(own, WIDTH), y_step = whole(O, LANES), down = (OH + 3) / 4, across = (OW + 3) / 4;
    /* Of all channels C, not of those of this part, or the order of the sums would depend on the number of parts. */
    int64_t all = N * down * across, T = tiles_at_a_time(whole(C, WIDTH) + y_step, all);
    int64_t of_w_apart = apart(own * y_step), of_x_apart = apart(T * x_step), of_y_apart = apart(T * y_step);
    real *memory = calloc(36 * (of_w_apart + of_x_apart + of_y_apart) + whole(C, WIDTH) + y_step + WIDTH, sizeof(real));
    if (!memory)
        return 1;
    real *sums = aligned(memory), *X = sums + 36 * of_w_apart, *Y = X + 36 * of_x_apart, *zeros = Y + 36 * of_y_apart;
    Images of_x = {H, W, C, top, left}, of_y = {OH, OW, O, 0, 0};
    for (int64_t start = 0; start < all; start += T) {
        int64_t tiles = all - start < T ? all - start : T;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t n = (start + t) / across / down, i = (start + t) / across % down * 4, j = (start + t) % across * 4;
            const real *at[36];
            pixels_of(6, x + n * H * W * C + first, &of_x, i, j, zeros, at);
            points_of_tile_of_x(at, own, X + t * x_step, of_x_apart);
            pixels_of(4, y + n * OH * OW * O, &of_y, i, j, zeros, at);
            points_of_tile_of_y(at, O, Y + t * y_step, of_y_apart);
        }
        for (int64_t k = 0; k < 36; k++)
            for (int64_t o = 0; o < O; o += LANES)
                for (int64_t c = 0, size; c < own; c += SIZES[size]) {
                    for (size = 2; SIZES[size] > own - c;)
                        size--;
                    TRANSPOSEDS[O - o > WIDTH][size](X + k * of_x_apart + c, x_step, Y + k * of_y_apart + o, y_step,
                                                     tiles, sums + k * of_w_apart + c * y_step + o, y_step);
                }
    }
    for (int64_t c = 0; c < own; c++)
        for (int64_t o = 0; o < O; o += WIDTH) {
            vec points[6][6], taps[3][3];
#pragma GCC unroll 36
            for (int k = 0; k < 36; k++)
                points[k / 6][k % 6] = load(sums + k * of_w_apart + c * y_step + o);
            all_of_w(points, taps);
            for (int t = 0; t < 9; t++)
                memcpy(w + (t * C + first + c) * O + o, &taps[t / 3][t % 3],
                       (O - o < WIDTH ? O - o : WIDTH) * sizeof(real));
        }
    free(memory);
    return 0;
}
