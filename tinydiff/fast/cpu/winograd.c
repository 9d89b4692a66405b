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

   A side of 7 numbers y is not two tiles of 4, one of them in part, but 4 + 3, and 14 are 4 + 4 + 3 + 3. For 3 numbers y
   the degree of p is 4, so the point -2 is left out, and M(t) is t (t^2 - 1) (t - 2). Then M' has lost the factor a + 2,
   by which X[k] is multiplied, so that W stays the same:

       X[k] = sum over m of x[m] times the coefficient of t^m in (a + 2) M(t) / (t - a), and, last, in M(t)
       Y = y(0), y(1), y(-1), y(2), nothing, y[2]

   A tile of 4x3 takes 30 products, and one of 3x3 takes 25. An image of 7x7 has one of each kind, and 121 products in
   place of 144.

   The price: a sum of large numbers may cancel, so the rounding errors are three to five times those of the plain sum (root
   mean square); and an Inf or NaN in x may reach every pixel of y whose tile sees it.

   Source: Winograd 1980, "Arithmetic complexity of computations"; for convolutional nets Lavin and Gray 2016. */

#include "vector.h"
#include <stdlib.h>

#define LANES (2 * WIDTH)               /* channels of y in a block */
#define ROWS (REGISTERS == 32 ? 12 : 6) /* of a block: its sums, two vectors and a number fill the registers */
#define GROUP (1 << 15) /* weights of a point that stay in the second cache, in numbers */
#define MOST 252        /* tiles at a time */
#define AHEAD (1 << 13) /* bytes between what is read or written and what is fetched into the cache */
#define CHUNK (1 << 20) /* bytes of X and Y at a time: they fit the second cache, unless the channels are very many */

/* ---------------------------------------------------------------- from numbers to points, and the transposed maps */

INLINE void points_of_x(const int side, const vec *x, vec *X)
{
    vec p = x[4] - 4 * x[2], q = x[3] - 4 * x[1], r = x[4] - x[2], s = 2 * (x[3] - x[1]);
    if (side == 4) {
        X[0] = 4 * x[0] - 5 * x[2] + x[4];
        X[1] = p + q, X[2] = p - q, X[3] = r + s, X[4] = r - s;
        X[5] = 4 * x[1] - 5 * x[3] + x[5];
    } else {
        X[0] = 4 * (x[0] - x[2]) + s;
        X[1] = 3 * (x[3] - x[2] - 2 * x[1]), X[2] = x[3] - 3 * x[2] + 2 * x[1], X[3] = 2 * s;
        X[4] = (vec){0}; /* which no tile has */
        X[5] = r - s;
    }
}

INLINE void points_of_y(const int side, const vec *y, vec *Y)
{
    vec p = y[0] + y[2], r = y[0] + 4 * y[2];
    vec q = side == 4 ? y[1] + y[3] : y[1], s = side == 4 ? 2 * y[1] + 8 * y[3] : 2 * y[1];
    Y[0] = y[0], Y[1] = p + q, Y[2] = p - q, Y[3] = r + s, Y[4] = r - s, Y[5] = y[side - 1];
}

INLINE void y_of_points(const int side, const vec *Y, vec *y)
{
    vec p = Y[1] + Y[2], q = Y[1] - Y[2], r = Y[3], s = Y[3];
    if (side == 4)
        r += Y[4], s -= Y[4];
    y[0] = Y[0] + p + r, y[1] = q + 2 * s, y[2] = p + 4 * r, y[3] = q + 8 * s;
    y[side - 1] += Y[5];
}

INLINE void points_of_w(const int side, const vec *w, vec *W)
{
    (void)side;
    const real sixth = (real)1 / 6;
    vec p = -sixth * (w[0] + w[2]), q = -sixth * w[1], r = sixth * (w[0] / 4 + w[2]), s = sixth / 2 * w[1];
    W[0] = w[0] / 4, W[1] = p + q, W[2] = p - q, W[3] = r + s, W[4] = r - s, W[5] = w[2];
}

INLINE void w_of_points(const int side, const vec *W, vec *w)
{
    (void)side;
    const real sixth = (real)1 / 6;
    vec p = sixth * (W[1] + W[2]), q = sixth * (W[1] - W[2]), r = sixth * (W[3] + W[4]), s = sixth * (W[3] - W[4]);
    w[0] = W[0] / 4 - p + r / 4, w[1] = s / 2 - q, w[2] = r - p + W[5];
}

/* A map of `from` numbers to `to`, along the columns of a matrix, then along its rows, for a tile of so many rows and
   columns. Of a tile of 3, what is not used is not computed. */
#define IN_TWO_DIMENSIONS(name, map, from, to)                                                                         \
    INLINE void name(const int rows, const int columns, vec (*a)[from], vec (*b)[to])                                  \
    {                                                                                                                  \
        vec half[to][from];                                                                                            \
        for (int j = 0; j < from; j++) {                                                                               \
            vec column[from], mapped[to];                                                                              \
            for (int i = 0; i < from; i++)                                                                             \
                column[i] = a[i][j];                                                                                   \
            map(rows, column, mapped);                                                                                 \
            for (int i = 0; i < to; i++)                                                                               \
                half[i][j] = mapped[i];                                                                                \
        }                                                                                                              \
        for (int i = 0; i < to; i++)                                                                                   \
            map(columns, half[i], b[i]);                                                                               \
    }
IN_TWO_DIMENSIONS(all_points_of_x, points_of_x, 6, 6)
IN_TWO_DIMENSIONS(all_points_of_y, points_of_y, 4, 6)
IN_TWO_DIMENSIONS(all_of_y, y_of_points, 6, 4)
IN_TWO_DIMENSIONS(all_points_of_w, points_of_w, 3, 6)
IN_TWO_DIMENSIONS(all_of_w, w_of_points, 6, 3)

/* Does a tile have point k? */
INLINE int has_point(const int rows, const int columns, const int k)
{
    return (rows == 4 || k / 6 != 4) && (columns == 4 || k % 6 != 4);
}

/* A function for each kind of tile: name[rows == 4][columns == 4]. */
#define FOR_ALL_KINDS(KIND_OF, name, ...)                                                                              \
    KIND_OF(name##_3_3, 3, 3, __VA_ARGS__)                                                                             \
    KIND_OF(name##_3_4, 3, 4, __VA_ARGS__)                                                                             \
    KIND_OF(name##_4_3, 4, 3, __VA_ARGS__)                                                                             \
    KIND_OF(name##_4_4, 4, 4, __VA_ARGS__)
#define ALL_KINDS(name) {{name##_3_3, name##_3_4}, {name##_4_3, name##_4_4}}

/* ---------------------------------------------------------------- tiles of images */

typedef struct {
    int64_t height, width, channels; /* of an image */
    int64_t top, left;               /* how far the first tile begins above it, and to its left */
} Images;

typedef struct {
    int64_t image, i, j; /* its first row and column */
    int is_tall, is_wide; /* 4 rows or 3, and 4 columns or 3 */
    int64_t place;        /* among those that are worked on at the same time */
} Tile;

/* How many tiles of 4, and tiles at all, a side of n numbers has. The last one may go beyond its end. */
typedef struct {
    int64_t of_four, all;
} Side;

static Side side_of(int64_t n)
{
    int64_t all = (n + 3) / 4, of_three = 4 * all - n < all ? 4 * all - n : all;
    return (Side){all - of_three, all};
}

static int64_t beginning(Side side, int64_t i) { return 4 * i - (i > side.of_four ? i - side.of_four : 0); }

/* Only tall tiles have the points of row 4, and only wide ones those of column 4. Their places are such that the tiles
   of a point are neighbours: tall and narrow ones, tall and wide, low and wide, low and narrow. */
typedef struct {
    Tile tile[MOST]; /* in the order in which they are read */
    int64_t count, narrow, tall, wide; /* tall ones come before place `tall`, wide ones from place `narrow` to `wide` */
} Tiles;

/* The tiles number `start` to `start + count` of the images. */
static void find_tiles(Tiles *tiles, int64_t start, int64_t count, Side down, Side across)
{
    int64_t of_kind[2][2] = {{0}}, next[2][2];
    for (int64_t t = 0; t < count; t++) {
        int64_t row = (start + t) / across.all, i = row % down.all, j = (start + t) % across.all;
        int is_tall = i < down.of_four, is_wide = j < across.of_four;
        tiles->tile[t] = (Tile){row / down.all, beginning(down, i), beginning(across, j), is_tall, is_wide, 0};
        of_kind[is_tall][is_wide]++;
    }
    next[1][0] = 0;
    next[1][1] = tiles->narrow = of_kind[1][0];
    next[0][1] = tiles->tall = tiles->narrow + of_kind[1][1];
    next[0][0] = tiles->wide = tiles->tall + of_kind[0][1];
    tiles->count = count;
    for (Tile *tile = tiles->tile; tile < tiles->tile + count; tile++)
        tile->place = next[tile->is_tall][tile->is_wide]++;
}

/* The places of the tiles that have point k. */
static int64_t first_place(const Tiles *tiles, int64_t k) { return k % 6 == 4 ? tiles->narrow : 0; }
static int64_t last_place(const Tiles *tiles, int64_t k)
{
    return k / 6 == 4 ? tiles->tall : k % 6 == 4 ? tiles->wide : tiles->count;
}

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

/* Fetch into the cache what tiles will soon read or write of these pixels: for each of `all` tiles an equal share. The
   processor does not guess it, as the pixels of a tile lie apart; to write a line, it reads it first. (A function that
   does nothing else, and is not inlined, GCC takes for one without an effect, and leaves out.) */
INLINE void fetch(const int write, const real *x, int64_t pixels, int64_t channels, int64_t own, int64_t tile,
                  int64_t all)
{
    const int64_t ahead = AHEAD / (channels * (int64_t)sizeof(real)) + 1;
    const int64_t end = pixels * (tile + 1) / all + ahead;
    for (int64_t p = pixels * tile / all + ahead; p < end && p < pixels; p++)
        for (int64_t c = 0; c < own; c += LINE)
            if (write) /* clang wants a constant there */
                __builtin_prefetch(x + p * channels + c, 1);
            else
                __builtin_prefetch(x + p * channels + c, 0);
}

/* Points of a tile of x (6 pixels across, or 5) or y (4, or 3): of channel c at to[k * step + c], for each point k. */
typedef void Points(const real *const *at, int64_t channels, real *to, int64_t step);
#define POINTS_OF(name, rows, columns, map, side)                                                                      \
    static void name(const real *const *at, int64_t channels, real *to, int64_t step)                                  \
    {                                                                                                                  \
        for (int64_t c = 0; c < channels; c += WIDTH) {                                                                \
            vec a[side][side], points[6][6];                                                                           \
            _Pragma("GCC unroll 36") for (int i = 0; i < side * side; i++)                                             \
                if (i / side < rows + side - 4 && i % side < columns + side - 4)                                       \
                    a[i / side][i % side] = load_some(at[i] + c, channels - c);                                        \
                else                                                                                                   \
                    a[i / side][i % side] = (vec){0};                                                                  \
            map(rows, columns, a, points);                                                                             \
            _Pragma("GCC unroll 36") for (int k = 0; k < 36; k++)                                                      \
                if (has_point(rows, columns, k))                                                                       \
                    store(to + k * step + c, points[k / 6][k % 6]);                                                    \
        }                                                                                                              \
    }
FOR_ALL_KINDS(POINTS_OF, points_of_tile_of_x, all_points_of_x, 6)
FOR_ALL_KINDS(POINTS_OF, points_of_tile_of_y, all_points_of_y, 4)
static Points *const POINTS_OF_X[2][2] = ALL_KINDS(points_of_tile_of_x);
static Points *const POINTS_OF_Y[2][2] = ALL_KINDS(points_of_tile_of_y);

/* y = b + what the points give, of `channels` channels: of those pixels of the tile that belong to the image of so many
   rows and columns, and O channels, whose first pixel here is at y. */
typedef void Pixels(const real *Y, int64_t step, const real *b, int64_t channels, real *y, int64_t down, int64_t across,
                    int64_t width, int64_t O);
#define PIXELS_OF(name, rows, columns, map)                                                                            \
    static void name(const real *Y, int64_t step, const real *b, int64_t channels, real *y, int64_t down,              \
                     int64_t across, int64_t width, int64_t O)                                                         \
    {                                                                                                                  \
        for (int64_t o = 0; o < channels; o += WIDTH) {                                                                \
            vec points[6][6], sums[4][4];                                                                              \
            _Pragma("GCC unroll 36") for (int k = 0; k < 36; k++)                                                      \
                points[k / 6][k % 6] = has_point(rows, columns, k) ? load(Y + k * step + o) : (vec){0};                \
            map(rows, columns, points, sums);                                                                          \
            for (int r = 0; r < rows && r < down; r++)                                                                 \
                for (int q = 0; q < columns && q < across; q++) {                                                      \
                    vec sum = sums[r][q] + load(b + o);                                                                \
                    real *at = y + (r * width + q) * O + o;                                                            \
                    if (channels - o >= WIDTH)                                                                         \
                        store(at, sum);                                                                                \
                    else                                                                                               \
                        memcpy(at, &sum, (channels - o) * sizeof(real));                                               \
                }                                                                                                      \
        }                                                                                                              \
    }
FOR_ALL_KINDS(PIXELS_OF, pixels_of_tile_of_y, all_of_y)
static Pixels *const PIXELS_OF_Y[2][2] = ALL_KINDS(pixels_of_tile_of_y);

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
    room = room < least ? least : room < MOST ? room : MOST;
    return room < most ? room : most;
}

/* The points of the weights w[u, v, c, o] of the channels o from `first` to `last`, for each point k and block of them:
   W[k, block, c, lane]. transposed: of those of the gradient by the input, in which the taps are turned round, and c and
   o exchanged. Squares of WIDTH channels c and o are read at a time, of all taps. */
static void points_of_weights(const real *w, int64_t C, int64_t O, int transposed, int64_t first, int64_t last, real *W,
                              int64_t step)
{
    int64_t rows = transposed ? O : C;
    for (int64_t block = first; block < last; block += LANES)
        for (int64_t c = 0; c < rows; c += WIDTH)
            for (int64_t o = block; o < block + LANES && o < last; o += WIDTH) {
                vec squares[9][WIDTH], taps[3][3], points[6][6];
                for (int t = 0; t < 9; t++)
                    if (transposed)
                        load_transposed(w + ((8 - t) * C + o) * O + c, O, last - o, rows - c, squares[t]);
                    else
                        for (int i = 0; i < WIDTH && c + i < rows; i++)
                            squares[t][i] = load_some(w + (t * C + c + i) * O + o, last - o);
                for (int i = 0; i < WIDTH && c + i < rows; i++) {
                    for (int t = 0; t < 9; t++)
                        taps[t / 3][t % 3] = squares[t][i];
                    all_points_of_w(4, 4, taps, points);
#pragma GCC unroll 36
                    for (int k = 0; k < 36; k++)
                        store(W + k * step + ((block - first) / LANES * rows + c + i) * LANES + o - block,
                              points[k / 6][k % 6]);
                }
            }
}

/* y[n, i, j, o] = b[o] + sum over u, v, c of x[n, i + u - top, j + v - left, c] w[u, v, c, o], or, transposed, with
   w[2 - u, 2 - v, o, c]. w is (3, 3, A, B): A = C and B = O, or, transposed, A = O and B = C. */
int winograd(const real *restrict x, const real *restrict w, const real *restrict b, real *restrict y, int64_t N,
             int64_t H, int64_t W, int64_t C, int64_t A, int64_t B, int64_t OH, int64_t OW, int64_t O, int64_t top,
             int64_t left, int64_t transposed, int64_t part, int64_t parts)
{
    const Side down = side_of(OH), across = side_of(OW);
    int64_t x_step = whole(C, WIDTH), all = N * down.all * across.all;
    /* Each part has its own tiles, or, where there are fewer tiles than channels, so that most of the work is to make the
       points of the weights, its own channels, and then some of them at a time: their weights of a point stay in the
       second cache. */
    int few = all < O;
    int64_t blocks = whole(O, LANES) / LANES, first = few ? 0 : all * part / parts;
    int64_t last = few ? all : all * (part + 1) / parts, o_first = few ? blocks * part / parts * LANES : 0;
    int64_t o_last = few && part + 1 < parts ? blocks * (part + 1) / parts * LANES : O;
    int64_t group = few ? whole(GROUP / C + 1, LANES) : whole(O, LANES);
    int64_t T = few ? whole(all < MOST ? all : MOST, ROWS) : tiles_at_a_time(x_step + group, last - first);
    /* The products are of ROWS tiles, and may go beyond the last of those that have the point. */
    int64_t of_w_apart = apart(group * C), of_x_apart = apart((T + ROWS) * x_step);
    int64_t of_y_apart = apart((T + ROWS) * group);
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
        Tiles tiles;
        find_tiles(&tiles, start, last - start < T ? last - start : T, down, across);
        for (int64_t t = 0; t < tiles.count; t++) {
            const Tile *tile = tiles.tile + t;
            const real *at[36];
            fetch(0, x, N * H * W, C, C, start + t, all);
            pixels_of(6, x + tile->image * H * W * C, &of_x, tile->i, tile->j, zeros, at);
            POINTS_OF_X[tile->is_tall][tile->is_wide](at, C, X + tile->place * x_step, of_x_apart);
        }
        for (int64_t from = o_first; from < o_last; from += group) {
            int64_t to = o_last - from < group ? o_last : from + group;
            if (few || start == first)
                points_of_weights(w, A, B, (int)transposed, from, to, weights, of_w_apart);
            for (int64_t k = 0; k < 36; k++)
                for (int64_t o = from; o < to; o += LANES)
                    for (int64_t t = first_place(&tiles, k); t < last_place(&tiles, k); t += ROWS)
                        PRODUCTS[to - o > WIDTH](X + k * of_x_apart + t * x_step, x_step,
                                                 weights + k * of_w_apart + (o - from) * C, C,
                                                 Y + k * of_y_apart + t * group + o - from, group);
            for (int64_t t = 0; t < tiles.count; t++) {
                const Tile *tile = tiles.tile + t;
                fetch(1, y + from, N * OH * OW, O, to - from, start + t, all);
                PIXELS_OF_Y[tile->is_tall][tile->is_wide](
                    Y + tile->place * group, of_y_apart, bias + from, to - from,
                    y + ((tile->image * OH + tile->i) * OW + tile->j) * O + from, OH - tile->i, OW - tile->j, OW, O);
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
    const Side down = side_of(OH), across = side_of(OW);
    int64_t x_step = whole(own, WIDTH), y_step = whole(O, LANES);
    /* Of all channels C, not of those of this part, or the order of the sums would depend on the number of parts. */
    int64_t all = N * down.all * across.all, T = tiles_at_a_time(whole(C, WIDTH) + y_step, all);
    int64_t of_w_apart = apart(own * y_step), of_x_apart = apart(T * x_step), of_y_apart = apart(T * y_step);
    real *memory = calloc(36 * (of_w_apart + of_x_apart + of_y_apart) + whole(C, WIDTH) + y_step + WIDTH, sizeof(real));
    if (!memory)
        return 1;
    real *sums = aligned(memory), *X = sums + 36 * of_w_apart, *Y = X + 36 * of_x_apart, *zeros = Y + 36 * of_y_apart;
    Images of_x = {H, W, C, top, left}, of_y = {OH, OW, O, 0, 0};
    for (int64_t start = 0; start < all; start += T) {
        Tiles tiles;
        find_tiles(&tiles, start, all - start < T ? all - start : T, down, across);
        for (int64_t t = 0; t < tiles.count; t++) {
            const Tile *tile = tiles.tile + t;
            const real *at[36];
            fetch(0, x + first, N * H * W, C, own, start + t, all);
            pixels_of(6, x + tile->image * H * W * C + first, &of_x, tile->i, tile->j, zeros, at);
            POINTS_OF_X[tile->is_tall][tile->is_wide](at, own, X + tile->place * x_step, of_x_apart);
            pixels_of(4, y + tile->image * OH * OW * O, &of_y, tile->i, tile->j, zeros, at);
            POINTS_OF_Y[tile->is_tall][tile->is_wide](at, O, Y + tile->place * y_step, of_y_apart);
        }
        for (int64_t k = 0; k < 36; k++) {
            const int64_t place = first_place(&tiles, k), count = last_place(&tiles, k) - place;
            for (int64_t o = 0; o < O; o += LANES)
                for (int64_t c = 0, size; c < own; c += SIZES[size]) {
                    for (size = 2; SIZES[size] > own - c;)
                        size--;
                    TRANSPOSEDS[O - o > WIDTH][size](X + k * of_x_apart + place * x_step + c, x_step,
                                                     Y + k * of_y_apart + place * y_step + o, y_step, count,
                                                     sums + k * of_w_apart + c * y_step + o, y_step);
                }
        }
    }
    for (int64_t c = 0; c < own; c++)
        for (int64_t o = 0; o < O; o += WIDTH) {
            vec points[6][6], taps[3][3];
#pragma GCC unroll 36
            for (int k = 0; k < 36; k++)
                points[k / 6][k % 6] = load(sums + k * of_w_apart + c * y_step + o);
            all_of_w(4, 4, points, taps);
            for (int t = 0; t < 9; t++)
                memcpy(w + (t * C + first + c) * O + o, &taps[t / 3][t % 3],
                       (O - o < WIDTH ? O - o : WIDTH) * sizeof(real));
        }
    free(memory);
    return 0;
}
