/*
The patches of a convolution (tinydiff/ops/conv.py), and the sum of patches, its adjoint.

    im2col    patches[n, oy, ox, ky, kx, c] = image[n, y, x, c],    or 0 outside of the image
    col2im    image[n, y, x, c] = the sum of patches[n, oy, ox, ky, kx, c] over all that read (y, x)

              where y = oy stride_h + ky dilation_h - top,    x = ox stride_w + kx dilation_w - left

Channels are last and contiguous. A thread has one run of neighbouring channels at one place, and neighbouring threads
have neighbouring runs, so they read and write neighbouring memory. The number of a thread is divided by the sizes of
the axes, the last axis first; the remainders are its run and its place, and `rest` is the quotient so far.

Depends on TYPE, LANES, INDEX_BITS.
*/
#include "common.cuh"

// One thread for each run of channels of one tap of one output pixel.
extern "C" __global__ void __launch_bounds__(THREADS) im2col(
    const Run* image, Run* patches, int runs, int height, int width, int out_h, int out_w, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int top, int left, int dilation_h, int dilation_w, Index threads) {
  const Index thread = blockIdx.x * (Index)THREADS + threadIdx.x;
  if (thread >= threads) return;
  Index rest = thread;
  const int run = rest % runs; rest /= runs;
  const int tap_x = rest % kernel_w; rest /= kernel_w;
  const int tap_y = rest % kernel_h; rest /= kernel_h;
  const int out_x = rest % out_w; rest /= out_w;
  const int out_y = rest % out_h; rest /= out_h;  // and the rest is the sample

  const int x = out_x * stride_w + tap_x * dilation_w - left;
  const int y = out_y * stride_h + tap_y * dilation_h - top;
  Run value = {};
  if (x >= 0 && x < width && y >= 0 && y < height) value = image[((rest * height + y) * width + x) * runs + run];
  patches[thread] = value;
}

// One thread for each run of channels of one input pixel: it gathers the taps that read this pixel. No two threads
// write to the same place, so no atomics are needed, and the sum is the same every time.
extern "C" __global__ void __launch_bounds__(THREADS) col2im(
    const Run* patches, Run* image, int runs, int height, int width, int out_h, int out_w, int kernel_h, int kernel_w,
    int stride_h, int stride_w, int top, int left, int dilation_h, int dilation_w, Index threads) {
  const Index thread = blockIdx.x * (Index)THREADS + threadIdx.x;
  if (thread >= threads) return;
  Index rest = thread;
  const int run = rest % runs; rest /= runs;
  const int x = rest % width; rest /= width;
  const int y = rest % height; rest /= height;

  Run sum = {};
  for (int tap_y = 0; tap_y < kernel_h; ++tap_y) {
    const int from_y = y + top - tap_y * dilation_h;  // out_y stride_h, if this tap of an output pixel reads row y
    if (from_y < 0 || from_y % stride_h || from_y / stride_h >= out_h) continue;
    const Index row = rest * out_h + from_y / stride_h;
    for (int tap_x = 0; tap_x < kernel_w; ++tap_x) {
      const int from_x = x + left - tap_x * dilation_w;
      if (from_x < 0 || from_x % stride_w || from_x / stride_w >= out_w) continue;
      const Index pixel = row * out_w + from_x / stride_w;
      const Run part = patches[((pixel * kernel_h + tap_y) * kernel_w + tap_x) * runs + run];
      for (int i = 0; i < LANES; ++i) sum.lane[i] += part.lane[i];
    }
  }
  image[thread] = sum;
}
