/*
The activation functions (tinydiff/ops/activation.py), of one number, real or complex. CuPy makes kernels of them
(activation.py), and norm.cu uses silu.

Where e^-x overflows, the quotients are 0, which is right; and NaN stays NaN.
*/
#ifndef TINYDIFF_ACTIVATION
#define TINYDIFF_ACTIVATION

// s = 1 / (1 + e^-x)
template <class Number>
__device__ Number sigmoid(Number x) {
  return Number(1) / (Number(1) + exp(-x));
}

// x s
template <class Number>
__device__ Number silu(Number x) {
  return x / (Number(1) + exp(-x));
}

// silu'(x) = s + x s (1 - s) = s (1 + x (1 - s)),    as s' = s (1 - s)
template <class Number>
__device__ Number silu_derivative(Number x) {
  Number s = sigmoid(x);
  return s * (Number(1) + x * (Number(1) - s));
}

// The adjoint of x from that of silu(x), g: g silu'(x)
template <class Number>
__device__ Number silu_backward(Number g, Number x) {
  Number s = sigmoid(x);
  return g * s * (Number(1) + x * (Number(1) - s));
}

#endif
