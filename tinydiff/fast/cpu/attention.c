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
        else if (wide == 2)                                                                                            \
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

/* One head: its matrices, and how far apart the rows of each are, in numbers. */
typedef struct {
    const real *q, *k, *v, *added;
    const uint8_t *allowed;
    int64_t q_row, k_row, v_row, mask_row; /* mask_row 0: one row for all queries */
} head;

/* Each matrix of head b begins at the number at[b][which] of its array, and has its rows row[which] apart. */
enum { Q, K, V, MASK, Y, FORWARD, G = FORWARD, DQ, DK, DV, BACKWARD };

/* So many numbers fill whole vectors. */
static int64_t whole(int64_t width) { return (width + WIDTH - 1) / WIDTH * WIDTH; }

/* n rows of so many numbers as rows of whole vectors without gaps, the rest zeros: copied, unless they are such rows. */
static const real *whole_rows(const real *restrict from, int64_t row, int64_t n, int64_t width, real *restrict to)
{
    const int64_t filled = whole(width);
    if (row == filled && width == filled)
        return from;
    for (int64_t i = 0; i < n; i++) {
        real *restrict next = to + i * filled;
        for (int64_t c = 0; c < filled; c += WIDTH)
            store(next + c, load_some(from + i * row + c, width - c));
    }
    return to;
}

/* The way back, times factor[i] for each row i; 1 if there are none. */
static void narrow_rows(const real *restrict from, const real *restrict factor, int64_t n, int64_t width,
    real *restrict to, int64_t row)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < width; c++)
            to[i * row + c] = factor ? factor[i] * from[i * whole(width) + c] : from[i * whole(width) + c];
}

/* rows (n, width), n <= QUERIES -> columns (width, QUERIES) times scale, with zeros for the queries that lack. */
static void rows_to_columns(const real *restrict rows, real *restrict columns, int64_t n, int64_t width, real scale)
{
    for (int64_t first = 0; first < QUERIES; first += WIDTH)
        for (int64_t d = 0; d < width; d += WIDTH) {
            vec square[WIDTH];
            load_transposed(rows + first * width + d, width, n - first, WIDTH, square);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                store(columns + (d + i) * QUERIES + first, scale * square[i]);
        }
}

/* The scores of n queries from `query` on and of m keys from `key` on: s (m, QUERIES). */
static void scores(const head *h, const real *restrict ks, const real *restrict q_columns, real *restrict s,
    int64_t query, int64_t n, int64_t key, int64_t m, int64_t D)
{
    product(m, QUERIES, D, 0, s, QUERIES, ks + key * whole(D), whole(D), 1, q_columns, QUERIES);
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

static head head_of(const int64_t *restrict at, const int64_t *restrict row, const real *q, const real *k,
    const real *v, const uint8_t *allowed, const real *added)
{
    return (head){q + at[Q], k + at[K], v + at[V], added ? added + at[MASK] : NULL, allowed ? allowed + at[MASK] : NULL,
        row[Q], row[K], row[V], row[MASK]};
}

/* ---------------------------------------------------------------- forward and rule */

/* y, and of each of the B heads and L queries the largest score, `top`, and 1 / sum, `rsum`. For `at` and `row` see
   the enum above. */
int attention(const real *restrict q, const real *restrict k, const real *restrict v, const uint8_t *restrict allowed,
    const real *restrict added, const int64_t *restrict at, const int64_t *restrict row, real *restrict y,
    real *restrict top, real *restrict rsum, int64_t nq, int64_t nk, int64_t nv, int64_t nm, int64_t ny, int64_t B,
    int64_t L, int64_t S, int64_t D, int64_t E, real scale, int64_t part, int64_t parts)
{
    const int64_t DW = whole(D), EW = whole(E);
    real *space = malloc((2 * DW * QUERIES + EW * QUERIES + (DW + EW) * S + WIDTH) * sizeof(real));
    if (!space)
        return 1;
    real *restrict q_rows = aligned(space), *restrict q_columns = q_rows + DW * QUERIES;
    real *restrict ys = q_columns + DW * QUERIES, *restrict k_rows = ys + EW * QUERIES;
    real *restrict v_rows = k_rows + DW * S;
    _Alignas(BYTES) real p[KEYS * QUERIES], largest[QUERIES], sum[QUERIES], factor[QUERIES];
    for (int64_t b = B * part / parts; b < B * (part + 1) / parts; b++) {
        const int64_t *restrict from = at + b * FORWARD;
        const head h = head_of(from, row, q, k, v, allowed, added);
        const real *restrict ks = whole_rows(h.k, h.k_row, S, D, k_rows);
        const real *restrict vs = whole_rows(h.v, h.v_row, S, E, v_rows);
        for (int64_t query = 0; query < L; query += QUERIES) {
            const int64_t n = smaller(QUERIES, L - query);
            rows_to_columns(whole_rows(h.q + query * h.q_row, h.q_row, n, D, q_rows), q_columns, n, DW, scale);
            for (int i = 0; i < QUERIES; i++)
                largest[i] = -INFINITY, sum[i] = 0;
            for (int64_t key = 0; key < S; key += KEYS) {
                const int64_t m = smaller(KEYS, S - key);
                scores(&h, ks, q_columns, p, query, n, key, m, D);
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
                        for (int64_t e = 0; e < EW; e++)
                            ys[i * EW + e] *= factor[i];
                product(n, EW, m, key > 0, ys, EW, p, 1, QUERIES, vs + key * EW, EW);
            }
            for (int64_t i = 0; i < n; i++) { /* of a query that is masked as a whole 1 / sum is infinite, and y NaN */
                factor[i] = 1 / sum[i];
                top[b * L + query + i] = largest[i], rsum[b * L + query + i] = factor[i];
            }
            narrow_rows(ys, factor, n, E, y + from[Y] + query * row[Y], row[Y]);
        }
    }
    free(space);
    return 0;
}

/* The adjoints of q, k and v from that of y, g. */
int attention_vjp(const real *restrict q, const real *restrict k, const real *restrict v,
    const uint8_t *restrict allowed, const real *restrict added, const int64_t *restrict at,
    const int64_t *restrict row, const real *restrict y, const real *restrict top, const real *restrict rsum,
    const real *restrict g, real *restrict dq, real *restrict dk, real *restrict dv, int64_t nq, int64_t nk, int64_t nv,
    int64_t nm, int64_t ny, int64_t ng, int64_t ndq, int64_t ndk, int64_t ndv, int64_t B, int64_t L, int64_t S,
    int64_t D, int64_t E, real scale, int64_t part, int64_t parts)
{
    const int64_t DW = whole(D), EW = whole(E);
    real *space = malloc((3 * DW * QUERIES + 2 * EW * QUERIES + 2 * (DW + EW) * S + WIDTH) * sizeof(real));
    if (!space)
        return 1;
    real *restrict q_rows = aligned(space), *restrict q_columns = q_rows + DW * QUERIES;
    real *restrict dqs = q_columns + DW * QUERIES, *restrict g_rows = dqs + DW * QUERIES;
    real *restrict g_columns = g_rows + EW * QUERIES, *restrict k_rows = g_columns + EW * QUERIES;
    real *restrict dks = k_rows + DW * S, *restrict dvs = dks + DW * S, *restrict v_rows = dvs + EW * S;
    _Alignas(BYTES) real p[KEYS * QUERIES], ds[KEYS * QUERIES], largest[QUERIES], r[QUERIES], mean[QUERIES];
    for (int64_t b = B * part / parts; b < B * (part + 1) / parts; b++) {
        const int64_t *restrict from = at + b * BACKWARD;
        const head h = head_of(from, row, q, k, v, allowed, added);
        const real *restrict ks = whole_rows(h.k, h.k_row, S, D, k_rows);
        const real *restrict vs = whole_rows(h.v, h.v_row, S, E, v_rows);
        for (int64_t query = 0; query < L; query += QUERIES) {
            const int64_t n = smaller(QUERIES, L - query);
            const real *restrict qs = whole_rows(h.q + query * h.q_row, h.q_row, n, D, q_rows);
            const real *restrict gs = whole_rows(g + from[G] + query * row[G], row[G], n, E, g_rows);
            const real *restrict ys = y + from[Y] + query * row[Y];
            rows_to_columns(qs, q_columns, n, DW, scale);
            rows_to_columns(gs, g_columns, n, EW, 1);
            for (int64_t i = 0; i < QUERIES; i++) { /* mean: of p̄ under the weights p */
                const int64_t each = b * L + query + i;
                mean[i] = i < n ? sum_along(gs + i * EW, ys + i * row[Y], E) : 0;
                largest[i] = i < n ? top[each] : 0, r[i] = i < n ? rsum[each] : 0;
            }
            for (int64_t key = 0; key < S; key += KEYS) {
                const int64_t m = smaller(KEYS, S - key);
                scores(&h, ks, q_columns, p, query, n, key, m, D);
                product(m, QUERIES, E, 0, ds, QUERIES, vs + key * EW, EW, 1, g_columns, QUERIES); /* p̄ */
                for (int64_t j = 0; j < m; j++)
                    for (int i = 0; i < QUERIES; i++) {
                        real weight = exponential_to_zero(p[j * QUERIES + i] - largest[i]) * r[i];
                        p[j * QUERIES + i] = weight;
                        ds[j * QUERIES + i] = scale * weight * (ds[j * QUERIES + i] - mean[i]);
                    }
                product(m, EW, n, query > 0, dvs + key * EW, EW, p, QUERIES, 1, gs, EW);
                product(m, DW, n, query > 0, dks + key * DW, DW, ds, QUERIES, 1, qs, DW);
                product(n, DW, m, key > 0, dqs, DW, ds, 1, QUERIES, ks + key * DW, DW);
            }
            narrow_rows(dqs, NULL, n, D, dq + from[DQ] + query * row[DQ], row[DQ]);
        }
        narrow_rows(dks, NULL, S, D, dk + from[DK], row[DK]);
        narrow_rows(dvs, NULL, S, E, dv + from[DV], row[DV]);
    }
    free(space);
    return 0;
}
