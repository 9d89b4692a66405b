/* A vector register as a type: WIDTH numbers, which +, - and * treat side by side. It may lie at any address. */

#ifdef __AVX512F__
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define WIDTH ((int)(BYTES / sizeof(real)))

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real))));

/* The same number at every place; x - 0 is x, also for -0. */
static inline vec broadcast(real x) { return x - (vec){0}; }
