/* Arrays beside each other, and apart again: concatenate along the last axis, of ops/shape.py, and its rule. The arrays
   x[i] are (A, C[i]), y is (A, C[0] + C[1] + ...):

       y[a, C[0] + ... + C[i-1] + c] = x[i][a, c]

   The rows are short, and lie apart in y. So the processor does not guess what comes next, and what will soon be read or
   written is fetched into the cache. A line of the cache may hold the end of one row and the start of another. So some
   rows of all arrays are copied before the next rows: the line is still in the cache when it is needed again. */

#include "vector.h"

#define AT_ONCE 32      /* rows */
#define AHEAD (1 << 11) /* bytes of rows between what is copied and what is fetched */

static void copy(const real *restrict from, int64_t from_step, real *restrict to, int64_t to_step, int64_t rows,
                 int64_t width)
{
    const int64_t ahead = AHEAD / (width * (int64_t)sizeof(real)) + 1;
    for (int64_t r = 0; r < rows; r++, from += from_step, to += to_step) {
        for (int64_t c = 0; c < width; c += LINE) { /* an address behind the end does no harm */
            __builtin_prefetch(from + ahead * from_step + c);
            __builtin_prefetch(to + ahead * to_step + c, 1);
        }
        int64_t c = 0;
        for (; c + WIDTH <= width; c += WIDTH)
            store(to + c, load(from + c));
        memcpy(to + c, from + c, (width - c) * sizeof(real));
    }
}

/* n[i] = A C[i], the size of x[i] */
int put_beside(const real *const *restrict x, real *restrict y, const int64_t *restrict n, int64_t count, int64_t A,
               int64_t C, int64_t part, int64_t parts)
{
    for (int64_t a = A * part / parts, end = A * (part + 1) / parts; a < end; a += AT_ONCE)
        for (int64_t i = 0, c = 0; i < count; c += n[i++] / A)
            copy(x[i] + a * (n[i] / A), n[i] / A, y + a * C + c, C, smaller(end - a, AT_ONCE), n[i] / A);
    return 0;
}

int take_apart(const real *restrict y, real *const *restrict x, const int64_t *restrict n, int64_t count, int64_t A,
               int64_t C, int64_t part, int64_t parts)
{
    for (int64_t a = A * part / parts, end = A * (part + 1) / parts; a < end; a += AT_ONCE)
        for (int64_t i = 0, c = 0; i < count; c += n[i++] / A)
            copy(y + a * C + c, C, x[i] + a * (n[i] / A), n[i] / A, smaller(end - a, AT_ONCE), n[i] / A);
    return 0;
}
