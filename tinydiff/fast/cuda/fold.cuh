/*
Sums over the threads of a block, through shared memory.
*/
#ifndef TINYDIFF_FOLD
#define TINYDIFF_FOLD

// Add up, by +=, the values `mine` of `count` threads whose numbers are `apart` from one another. `place` is the place
// of this thread among them, or at least `count` if it is not one of them. Afterwards the thread at place 0 has the
// sum. The upper half is added to the lower, again and again, so the order is always the same. All threads of the block
// must call it, and `memory` has room for one value per thread.
template <class Value>
__device__ void fold(Value& mine, Value* memory, int place, int count, int apart) {
  while (count > 1) {
    int half = (count + 1) / 2;
    __syncthreads();  // all threads have finished reading the memory
    if (place >= half && place < count) memory[threadIdx.x - half * apart] = mine;
    __syncthreads();
    if (place + half < count) mine += memory[threadIdx.x];
    count = half;
  }
}

// The value of thread number `first`, for all threads that pass that number. All threads of the block must call it.
template <class Value>
__device__ Value held_by(int first, const Value& mine, Value* memory) {
  __syncthreads();
  if (threadIdx.x == first) memory[first] = mine;
  __syncthreads();
  return memory[first];
}

#endif
