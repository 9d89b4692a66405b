/*
Kernels over a list of tensors, in one launch (optim.cu, clip.cu; table.py fills in the table).

A kernel gets a table by value, with the addresses and lengths of the arrays of each tensor. So parameters, gradients
and moments stay where they are; one buffer for all of them would save nothing, and every `p.data = ...` would break it.
Arguments may have 4 KB, which is room for TENSORS of them; a net with more needs one launch for every TENSORS.

The blocks with blockIdx.y = n work on tensor number n of the launch. Its struct names its arrays, all of `size`
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

// The elements of a tensor that this thread works on.
#define FOR_EACH_ELEMENT(i, size)                                               \
  for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < (size); \
       i += gridDim.x * (long long)THREADS)

#endif
