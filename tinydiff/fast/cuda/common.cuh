/*
Definitions that the kernels share. A file compiles as it stands, with the default values below; a call may choose
others, by -D:

    TYPE         float, double   T, the type of the elements
    LANES        1, 2, 4         how many neighbours a thread moves at once, a Run of them: at most 16 bytes
    THREADS      up to 1024      the size of a block
    INDEX_BITS   32, 64          an Index counts elements; 64 bits only if an array has 2^31 of them or more, because
                                 32 bits are much faster

A file states above its kernels which of these it depends on.
*/
#ifndef TINYDIFF_COMMON
#define TINYDIFF_COMMON

#ifndef TYPE
#define TYPE float
#endif
#ifndef LANES
#define LANES 1
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef INDEX_BITS
#define INDEX_BITS 32
#endif

typedef TYPE T;

#if INDEX_BITS == 64
typedef long long Index;
#else
typedef unsigned int Index;
#endif

// Memory is moved in words of up to 16 bytes, if the array is aligned to them.
struct __align__(LANES * sizeof(T)) Run {
  T lane[LANES];
};

#endif
