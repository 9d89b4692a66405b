/*
Kernels over a list of tensors, in one launch (optim.cu, clip.cu; table.py fills the table in).

A kernel is handed a table by value: where the arrays of each tensor are, and how long. So parameters, gradients and
moments stay where they are; a buffer that held all of them in one piece would save nothing, and every `p.data = ...`
would break it. Arguments may have 4 KB, which is room for TENSORS of them; a net with more takes another launch for
each TENSORS.

Tensor number blockIdx.y of the launch is worked on by the blocks of that y. Its struct names its arrays, all of `size`
elements; it is number `index` in the list.
*/
#ifndef TINYDIFF_TABLE
#define TINYDIFF_TABLE

#ifndef TENSORS
#define TENSORS 80
#endif

template <class Tensor>
struct Table {
  Tensor tensor[TENSORS];
};

// The elements of a tensor that fall to this thread.
#define FOR_EACH_ELEMENT(i, size)                                               \
  for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < (size); \
       i += gridDim.x * (long long)THREADS)

#endif
