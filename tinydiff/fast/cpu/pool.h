/* All parts of a call: pool.c. */

#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef int Work(const void *call, int64_t part, int64_t parts); /* 0, or something else if it failed */

bool in_parts(Work *work, const void *call, int64_t parts, int64_t threads); /* did a part fail? */
void stop_looking(void); /* the cores are for others now, until the next call */
