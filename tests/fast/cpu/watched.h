/* Included before every kernel when the tests are watched (watched.py): it counts the blocks of memory that a kernel has
   asked for and not yet given back, and can refuse the next but a few of them. */

#include <stdlib.h>

__attribute__((weak)) long watched_blocks = 0;
__attribute__((weak)) long watched_grant = -1; /* so many are still granted, then one is not; below 0: all are */

static inline int watched_refuses(void)
{
    return __atomic_load_n(&watched_grant, __ATOMIC_SEQ_CST) >= 0 &&
           __atomic_sub_fetch(&watched_grant, 1, __ATOMIC_SEQ_CST) == -1;
}

static inline void *watched_block(void *p)
{
    if (p)
        __atomic_add_fetch(&watched_blocks, 1, __ATOMIC_SEQ_CST);
    return p;
}

static inline void watched_free(void *p)
{
    if (p)
        __atomic_sub_fetch(&watched_blocks, 1, __ATOMIC_SEQ_CST);
    free(p);
}

#define malloc(size) (watched_refuses() ? NULL : watched_block(malloc(size)))
#define calloc(n, size) (watched_refuses() ? NULL : watched_block(calloc(n, size)))
#define aligned_alloc(align, size) (watched_refuses() ? NULL : watched_block(aligned_alloc(align, size)))
#define free(p) watched_free(p)
