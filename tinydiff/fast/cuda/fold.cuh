/*
What the threads of a block find together, through shared memory.
*/
#ifndef TINYDIFF_FOLD
#define TINYDIFF_FOLD

// Add up, by +=, what `count` threads hold that are `apart` from one another; `place` is this thread's place among
// them, at least `count` if it has none. The one at place 0 has the sum afterwards. The upper half is added to the
// lower, again and again, so the order is always the same. All threads of the block must call it, and `memory` has room
// for one value per thread.
template <class Value>
__device__ void fold(Value& mine, Value* memory, int place, int count, int apart) {
  while (count > 1) {
    int half = (count + 1) / 2;
    __syncthreads();  // whoever read the memory before has done so
    if (place >= half && place < count) memory[threadIdx.x - half * apart] = mine;
    __syncthreads();
    if (place + half < count) mine += memory[threadIdx.x];
    count = half;
  }
}

// What thread number `first` holds, for all that name it. All threads of the block must call it.
template <class Value>
__device__ Value held_by(int first, const Value& mine, Value* memory) {
  __syncthreads();
  if (threadIdx.x == first) memory[first] = mine;
  __syncthreads();
  return memory[first];
}

#endif
