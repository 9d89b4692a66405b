/* Calls the kernels with the arguments that a file holds, and writes their results to another: other_processor.py.
   CALLS is the generated `case`s of a switch over the functions. */

#include "real.h"
#include <stdio.h>
#include <stdlib.h>

enum { NOTHING, BLOCK, LIST, INTEGER, NUMBER };

typedef struct {
    int64_t kind, count, size[1024];
    void *blocks[1024];
    int64_t integer;
    double number;
} value;

#include "declarations.h"

static FILE *input, *output;

static void get(void *to, size_t size)
{
    if (size && fread(to, size, 1, input) != 1)
        exit(2);
}

static int64_t get_integer(void)
{
    int64_t n;
    get(&n, sizeof n);
    return n;
}

static void get_value(value *v)
{
    v->kind = get_integer();
    v->count = v->kind == BLOCK ? 1 : v->kind == LIST ? get_integer() : 0;
    v->blocks[0] = NULL;
    for (int64_t i = 0; i < v->count; i++) {
        v->size[i] = get_integer();
        v->blocks[i] = malloc(v->size[i] + !v->size[i]);
        get(v->blocks[i], v->size[i]);
    }
    if (v->kind == INTEGER)
        v->integer = get_integer();
    if (v->kind == NUMBER)
        get(&v->number, sizeof v->number);
}

int main(int count, char **names)
{
    static value a[64];
    input = fopen(names[1], "rb"), output = fopen(names[2], "wb");
    if (count != 3 || !input || !output)
        return 3;
    for (int64_t calls = get_integer(); calls > 0; calls--) {
        int64_t function = get_integer(), arguments = get_integer();
        for (int64_t i = 0; i < arguments; i++)
            get_value(a + i);
        int status = 1;
        switch (function) { CALLS }
        if (status)
            return 4;
        for (int64_t i = 0; i < arguments; i++)
            for (int64_t k = 0; k < a[i].count; k++) {
                fwrite(a[i].blocks[k], a[i].size[k], 1, output);
                free(a[i].blocks[k]);
            }
    }
    return fclose(output) ? 5 : 0;
}
