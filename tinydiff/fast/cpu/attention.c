/* softmax(scale q k^T + mask) v and its rule (ops/attention.py), a block of QUERIES and a block of KEYS at a time, so
   that the matrix of all weights, L x S, never exists.

   Of the softmax of each query only its largest score `top` and 1 / sum are kept. A block with a larger score makes
   what was summed before it smaller, by e^(old top - new top). The rule computes the weights of a block again.

   In a block a score has the queries as its last axis, (key, query): the largest score and the sum of each query are
   then kept side by side. All products have one form, and one function, `product`.

   Sources: Milakov and Gimelshein 2018, the running softmax; Dao et al. 2022, FlashAttention: the blocks, and the rule
   without the matrix, where the sum over the keys of p p̄ is that of g y over the values' width. */

#include "row.h"
#include <stdlib.h>

#define QUERIES 32
#define KEYS 64
#define TILE (REGISTERS == 32 ? 8 : 6) /* rows whose sums, WIDE vectors each, stay in registers */
#define WIDE (REGISTERS == 32 ? 3 : 2)


/* ---------------------------------------------------------------- products of matrices */

/* Rows of c, `columns` vectors wide, = or += a b over `inner`; the element of a is a[row * a_row + i * a_inner]. */
static inline __attribute__((always_inline)) void tile(const int rows, const int columns, int add, real *restrict c,
    int64_t c_row, const real *restrict a, int64_t a_row, int64_t a_inner, const real *restrict b, int64_t b_row,
    int64_t inner)
{
    vec sums[8][3];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int k = 0; k < columns; k++)
            sums[r][k] = add ? *(vec *)(c + r * c_row + k * WIDTH) : (vec){0};
    for (int64_t i = 0; i < inner; i++) {
        vec right[3];
#pragma GCC unroll 3
        for (int k = 0; k < columns; k++)
            right[k] = *(const vec *)(b + i * b_row + k * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec left = broadcast(a[r * a_row + i * a_inner]);
#pragma GCC unroll 3
            for (int k = 0; k < columns; k++)
                sums[r][k] += left * right[k];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int k = 0; k < columns; k++)
            *(vec *)(c + r * c_row + k * WIDTH) = sums[r][k];
}

/* c (rows, columns) = or, if `add`, += a (rows, inner) b (inner, columns); columns is a multiple of WIDTH. The rows are
   divided evenly: three tiles of 6, 6 and 5 rows take less time than 8, 8 and a single one. */
static void product(int64_t rows, int64_t columns, int64_t inner, int add, real *restrict c, int64_t c_row,
    const real *restrict a, int64_t a_row, int64_t a_inner, const real *restrict b, int64_t b_row)
{
#define CASE(size)                                                                                                     \
    case size:                                                                                                         \
        if (WIDE == 3 && wide == 3)                                                                                    \
            tile(size, WIDE, add, c + r * c_row + k, c_row, a + r * a_row, a_row, a_inner, b + k, b_row, inner);       \
        else if (wide == 2)                                                                                              \
            tile(size, 2, add, c + r * c_row + k, c_row, a + r * a_row, a_row, a_inner, b + k, b_row, inner);          \
        else                                                                                                           \
            tile(size, 1, add, c + r * c_row + k, c_row, a + r * a_row, a_row, a_inner, b + k, b_row, inner);          \
        break;
    for (int64_t k = 0, wide; k < columns; k += wide * WIDTH) {
        int64_t left = (columns - k) / WIDTH;
        wide = left >= WIDE && (left % 2 || WIDE == 2) ? WIDE : left >= 2 ? 2 : 1; /* five as three and two */
        int tiles = (rows + TILE - 1) / TILE, size;
        for (int r = 0; r < rows; r += size, tiles--)
            switch (size = (rows - r + tiles - 1) / tiles) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            }
    }
#undef CASE
}

/* ---------------------------------------------------------------- the parts of a block */

/* What q, k, v and mask each head has. d: of the numbers in a row of q and k, the others are zeros. */
typedef struct {
    int64_t d;
    const real *q, *k, *v, *added;
    const uint8_t *allowed;
    int64_t mask_row; /* 0: one row for all queries */
} head;

/* rows (n, width), n <= QUERIES -> columns (width, QUERIES) times scale, with zeros for the queries that lack.

   Squares of WIDTH x WIDTH: to interleave the upper half of the rows with the lower half moves the first bit of a
   number's place, (row, column), to the end; done for every bit of the row, rows and columns have changed places. */
static void transpose(const real *restrict rows, real *restrict columns, int64_t n, int64_t width, real scale)
{
    for (int64_t first = 0; first < QUERIES; first += WIDTH)
        for (int64_t d = 0; d < width; d += WIDTH) {
            vec square[WIDTH], next[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                square[i] = first + i < n ? scale * *(const vec *)(rows + (first + i) * width + d) : (vec){0};
#pragma GCC unroll 4
            for (int bit = 1; bit < WIDTH; bit *= 2) {
#pragma GCC unroll 8
                for (int i = 0; i < WIDTH / 2; i++)
                    interleave(square[i], square[i + WIDTH / 2], next + 2 * i, next + 2 * i + 1);
#pragma GCC unroll 16
                for (int i = 0; i < WIDTH; i++)
                    square[i] = next[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                *(vec *)(columns + (d + i) * QUERIES + first) = square[i];
        }
}

/* The scores of n queries from `query` on and of m keys from `key` on: s (m, QUERIES). */
static void scores(const head *h, const real *restrict q_columns, real *restrict s, int64_t query, int64_t n,
    int64_t key, int64_t m, int64_t D)
{
    product(m, QUERIES, h->d, 0, s, QUERIES, h->k + key * D, D, 1, q_columns, QUERIES);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = (query + i) * h->mask_row + key;
        if (h->allowed)
            for (int64_t j = 0; j < m; j++)
                s[j * QUERIES + i] = h->allowed[at + j] ? s[j * QUERIES + i] : -INFINITY;
        if (h->added)
            for (int64_t j = 0; j < m; j++)
                s[j * QUERIES + i] += h->added[at + j];
    }
}

static head head_of(const int64_t *restrict which, const real *q, const real *k, const real *v, const uint8_t *allowed,
    const real *added, int64_t L, int64_t S, int64_t D, int64_t E, int64_t R, int64_t d)
{
    return (head){d, q + which[0] * L * D, k + which[1] * S * D, v + which[2] * S * E,
        added ? added + which[3] * R * S : NULL, allowed ? allowed + which[3] * R * S : NULL, R == 1 ? 0 : S};
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---------------------------------------------------------------- forward and rule */

/* How many numbers a vector has. */
int attention_width(int64_t *restrict width, int64_t one)
{
    for (int64_t i = 0; i < one; i++)
        width[i] = WIDTH;
    return 0;
}

/* y (B, L, E), top and rsum (B, L) for B heads; head b has q[which[b][0]], k[which[b][1]], v[which[b][2]] and, of the
   masks, which[b][3]. A mask of one row, R = 1, holds for all queries. D and E are multiples of WIDTH; of a row of q, k,
   v and g the numbers from d (q, k) or e (v, g) on are zeros. */
int attention(const real *restrict q, const real *restrict k, const real *restrict v, const uint8_t *restrict allowed,
    const real *restrict added, const int64_t *restrict which, real *restrict y, real *restrict top,
    real *restrict rsum, int64_t B, int64_t L, int64_t S, int64_t D, int64_t E, int64_t R, int64_t d, real scale,
    int64_t part, int64_t parts)
{
    real *space = malloc((D * QUERIES + WIDTH) * sizeof(real)), *restrict q_columns = aligned(space);
    if (!space)
        return 1;
    _Alignas(BYTES) real p[KEYS * QUERIES], largest[QUERIES], sum[QUERIES], factor[QUERIES];
    for (int64_t b = B * part / parts; b < B * (part + 1) / parts; b++) {
        const head h = head_of(which + 4 * b, q, k, v, allowed, added, L, S, D, E, R, d);
        for (int64_t query = 0; query < L; query += QUERIES) {
            const int64_t n = smaller(QUERIES, L - query);
            real *restrict ys = y + (b * L + query) * E;
            transpose(h.q + query * D, q_columns, n, D, scale);
            for (int i = 0; i < QUERIES; i++)
                largest[i] = -INFINITY, sum[i] = 0;
            for (int64_t key = 0; key < S; key += KEYS) {
                const int64_t m = smaller(KEYS, S - key);
                scores(&h, q_columns, p, query, n, key, m, D);
                real before[QUERIES], centre[QUERIES], part[QUERIES] = {0};
                memcpy(before, largest, sizeof before);
                for (int64_t j = 0; j < m; j++)
                    for (int i = 0; i < QUERIES; i++)
                        largest[i] = p[j * QUERIES + i] > largest[i] ? p[j * QUERIES + i] : largest[i];
                for (int i = 0; i < QUERIES; i++) /* a query that was masked up to here has no largest score yet */
                    centre[i] = largest[i] == -INFINITY ? 0 : largest[i];
                for (int64_t j = 0; j < m; j++)
                    for (int i = 0; i < QUERIES; i++) {
                        real weight = p[j * QUERIES + i] = exponential_to_zero(p[j * QUERIES + i] - centre[i]);
                        part[i] += weight;
                    }
                for (int i = 0; i < QUERIES; i++) {
                    factor[i] = exponential_to_zero(before[i] - centre[i]);
                    sum[i] = sum[i] * factor[i] + part[i];
                }
                if (key)
                    for (int64_t i = 0; i < n; i++)
                        for (int64_t e = 0; e < E; e++)
                            ys[i * E + e] *= factor[i];
                product(n, E, m, key > 0, ys, E, p, 1, QUERIES, h.v + key * E, E);
            }
            for (int64_t i = 0; i < n; i++) {
                const real r = 1 / sum[i]; /* of a query that is masked as a whole: infinite, and y is NaN */
                top[b * L + query + i] = largest[i], rsum[b * L + query + i] = r;
                for (int64_t e = 0; e < E; e++)
                    ys[i * E + e] *= r;
            }
        }
    }
    free(space);
    return 0;
}

/* The adjoints dq (B, L, D), dk (B, S, D) and dv (B, S, E) from that of y, g. */
int attention_vjp(const real *restrict g, const real *restrict y, const real *restrict top, const real *restrict rsum,
    const real *restrict q, const real *restrict k, const real *restrict v, const uint8_t *restrict allowed,
    const real *restrict added, const int64_t *restrict which, real *restrict dq, real *restrict dk, real *restrict dv,
    int64_t B, int64_t L, int64_t S, int64_t D, int64_t E, int64_t R, int64_t d, int64_t e, real scale,
    int64_t part, int64_t parts)
{
    real *space = malloc(((D + E) * QUERIES + WIDTH) * sizeof(real));
    if (!space)
        return 1;
    real *restrict q_columns = aligned(space), *restrict g_columns = q_columns + D * QUERIES;
    _Alignas(BYTES) real p[KEYS * QUERIES], ds[KEYS * QUERIES], largest[QUERIES], r[QUERIES], mean[QUERIES];
    for (int64_t b = B * part / parts; b < B * (part + 1) / parts; b++) {
        const head h = head_of(which + 4 * b, q, k, v, allowed, added, L, S, D, E, R, d);
        for (int64_t query = 0; query < L; query += QUERIES) {
            const int64_t n = smaller(QUERIES, L - query), at = b * L + query;
            const real *gs = g + at * E, *ys = y + at * E, *qs = h.q + query * D;
            transpose(qs, q_columns, n, D, scale);
            transpose(gs, g_columns, n, E, 1);
            for (int64_t i = 0; i < QUERIES; i++) { /* mean: of p̄ under the weights p */
                mean[i] = i < n ? sum_along(gs + i * E, ys + i * E, E) : 0;
                largest[i] = i < n ? top[at + i] : 0, r[i] = i < n ? rsum[at + i] : 0;
            }
            for (int64_t key = 0; key < S; key += KEYS) {
                const int64_t m = smaller(KEYS, S - key);
                scores(&h, q_columns, p, query, n, key, m, D);
                product(m, QUERIES, e, 0, ds, QUERIES, h.v + key * E, E, 1, g_columns, QUERIES); /* p̄ */
                for (int64_t j = 0; j < m; j++)
                    for (int i = 0; i < QUERIES; i++) {
                        real weight = exponential_to_zero(p[j * QUERIES + i] - largest[i]) * r[i];
                        p[j * QUERIES + i] = weight;
                        ds[j * QUERIES + i] = scale * weight * (ds[j * QUERIES + i] - mean[i]);
                    }
                product(m, E, n, query > 0, dv + (b * S + key) * E, E, p, QUERIES, 1, gs, E);
                product(m, D, n, query > 0, dk + (b * S + key) * D, D, ds, QUERIES, 1, qs, D);
                product(n, D, m, key > 0, dq + at * D, D, ds, 1, QUERIES, h.k + key * D, D);
            }
        }
    }
    free(space);
    return 0;
}
