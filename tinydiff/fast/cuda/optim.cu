/*
Steps of optimisers and averages (tinydiff/optim.py), for all parameters in one launch: one thread for each element.

The hyperparameters may change from step to step, so they are read from device memory, and a captured graph does not
repeat them. They are float64, and are rounded to T only after the computations that need the digits, such as 1 - b2.

Depends on TYPE, TENSORS.
*/
#include "common.cuh"
#include "table.cuh"

// p <- p - lr (g + decay p)                          hyperparameters: lr, decay, momentum
struct SgdTensor {
  T* p;
  const T* g;
  long long size;
  int index;
};
extern "C" __global__ void __launch_bounds__(THREADS) sgd(Table<SgdTensor> table, const double* hyperparameters) {
  const SgdTensor& my = table.tensor[blockIdx.y];
  const T lr = T(hyperparameters[0]), decay = T(hyperparameters[1]);
  FOR_EACH_ELEMENT(i, my.size) my.p[i] -= lr * (my.g[i] + decay * my.p[i]);
}

// With g + decay p for g:   v <- momentum v + g,   p <- p - lr v, or p - lr (g + momentum v) with nesterov
//                                                    hyperparameters: lr, decay, momentum
struct MomentumTensor {
  T* p;
  const T* g;
  T* v;
  long long size;
  int index;
};
extern "C" __global__ void __launch_bounds__(THREADS) momentum(
    Table<MomentumTensor> table, const double* hyperparameters, int nesterov) {
  const MomentumTensor& my = table.tensor[blockIdx.y];
  const T lr = T(hyperparameters[0]), decay = T(hyperparameters[1]), momentum = T(hyperparameters[2]);
  FOR_EACH_ELEMENT(i, my.size) {
    const T gradient = my.g[i] + decay * my.p[i];
    my.v[i] = momentum * my.v[i] + gradient;
    my.p[i] -= lr * (nesterov ? gradient + momentum * my.v[i] : my.v[i]);
  }
}

// With g + decay p for g:   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
//                           p <- shrink p - rate m / (sqrt(v) + eps)
//                                                    hyperparameters of each tensor: rate, eps, shrink, decay, b1, b2
// The corrections for the number of steps are in rate and eps. decay is for Adam's gradient, shrink for AdamW.
struct AdamTensor {
  T* p;
  const T* g;
  T* m;
  T* v;
  long long size;
  int index;
};
extern "C" __global__ void __launch_bounds__(THREADS) adam(Table<AdamTensor> table, const double* hyperparameters) {
  const AdamTensor& my = table.tensor[blockIdx.y];
  const double* its = hyperparameters + my.index * 6;
  const T rate = T(its[0]), eps = T(its[1]), shrink = T(its[2]), decay = T(its[3]);
  const T rest_1 = T(1 - its[4]), rest_2 = T(1 - its[5]);
  FOR_EACH_ELEMENT(i, my.size) {
    const T p = my.p[i] * shrink, gradient = my.g[i] + decay * p;
    const T m = my.m[i] + rest_1 * (gradient - my.m[i]), v = my.v[i] + rest_2 * (gradient * gradient - my.v[i]);
    my.p[i] = p - rate * m / (sqrt(v) + eps);
    my.m[i] = m;
    my.v[i] = v;
  }
}

// average <- average + rest (p - average)            hyperparameters: rest
struct AverageTensor {
  T* average;
  const T* p;
  long long size;
  int index;
};
extern "C" __global__ void __launch_bounds__(THREADS) average(
    Table<AverageTensor> table, const double* hyperparameters) {
  const AverageTensor& my = table.tensor[blockIdx.y];
  const T rest = T(hyperparameters[0]);
  FOR_EACH_ELEMENT(i, my.size) my.average[i] += rest * (my.p[i] - my.average[i]);
}
