/*
Normalisation, with a shift before it and silu after it, and its adjoint (tinydiff/ops/norm.py).

    xhat = (x + shift - mean) rstd,    u = xhat weight + bias,    y = u, or silu(u)

x is (A, L, G, D): samples of L positions and G groups of D channels. mean and rstd = 1 / sqrt(var + eps) are those of
the L D elements of a group. shift has one number for each channel of a sample; so have weight and bias, unless they are
the same for all samples.

The adjoint. Let g be the adjoint of y. The adjoint of u is k = g, or g silu'(u), and that of xhat is h = k weight. xhat
does not change if a constant is added to a group, or if the group is scaled. So x̄ is rstd times the part of h that is
orthogonal to the constants and to xhat:

    x̄ = (h - mean(h) - xhat mean(h xhat)) rstd,   shift̄ = sum x̄,   weight̄ = sum k xhat,   bias̄ = sum k

with the last three sums over the positions of a channel. As weight is constant in a channel, three sums over positions,
of k, k xhat and xhat, are enough:

    mean(h) = (sum over channels of weight sum k) / (L D),    mean(h xhat) = the same with k xhat for k
    shift̄ = (weight sum k - L mean(h) - mean(h xhat) sum xhat) rstd

Access to memory takes most of the time. So xhat and u are computed again from x wherever they are needed, and x and g
are read twice: once for the sums, once for the result.

How the elements are spread over threads (norm.py chooses the sizes). A block takes one sample and some neighbouring
groups, enough of them to fill a line of memory. A thread stays in one run of channels, its column, and goes along L. So
it reads weight, bias and shift of its channels once, and keeps its sums over L in registers:

    column   0 1 2 3 0 1 2 3      runs = 4 columns, here two groups of group_runs = 2
    row      0 0 0 0 1 1 1 1      each row of threads takes every rows-th position

Then the sums of all rows of threads are added to those of the first row, and there those of the columns of each group.
A few long samples would leave most of the device idle (batch norm has A = 1). Then the positions are also divided into
gridDim.z parts: a first launch (`moments`, `sums`) writes the sums of each part to memory, and each block of the second
launch begins by adding those up. The order of every sum depends on shape and alignment alone, so the result is the same
every time.

Depends on TYPE, LANES, THREADS, INDEX_BITS.
*/
#include "activation.cuh"
#include "common.cuh"
#include "fold.cuh"

// Where a thread works.
struct Place {
  int column, row, rows;  // of the threads of the block
  int run;                // of the all_runs of a position
  int member;             // of the group_runs of its group
  int group, groups;
  bool busy;              // the other threads take part in `fold`, but their results are not used
  int begin, end;         // the positions of the block
  int length, all_runs;

  __device__ Place(int length, int part, int all_runs, int runs, int group_runs)
      : column(threadIdx.x % runs),
        row(threadIdx.x / runs),
        rows(THREADS / runs),
        run(blockIdx.y * runs + column),
        member(column % group_runs),
        group(run / group_runs),
        groups(all_runs / group_runs),
        busy(row < rows && run < all_runs),
        begin(blockIdx.z * part),
        end(min(length, begin + part)),
        length(length),
        all_runs(all_runs) {}

  // Where this run of channels is: at position l of sample a; among those of sample a; in part p of sample a.
  __device__ Index at(Index a, int l) const { return (a * length + l) * all_runs + run; }
  __device__ Index of_sample(Index a) const { return a * all_runs + run; }
  __device__ Index of_part(Index a, int p) const { return (a * gridDim.z + p) * all_runs + run; }
  // And its group.
  __device__ Index group_of_sample(Index a) const { return a * groups + group; }
  __device__ Index group_of_part(Index a, int p) const { return (a * gridDim.z + p) * groups + group; }
};

// ---------------------------------------------------------------- forward

// The mean of some elements, and the sum of their squared deviations from it. A new element moves the mean by
// (x - mean) / count (Welford 1962), and a similar formula joins two sets (Chan et al. 1979). So one pass over memory
// gives both, and no digits are lost in a difference of large sums.
struct Moments {
  T count, mean, squares;
  __device__ void operator+=(const Moments& other) {
    if (other.count == 0) return;
    T all = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / all);
    squares += other.squares + apart * apart * (count * other.count / all);
    count = all;
  }
};

// x + shift is taken relative to the first element of its group, so a mean far from 0 costs no digits either.
struct Origin {
  T x, shift;  // of the first element
  Run rest;    // the shift of each channel, less that of the first

  __device__ Origin(const Run* all_x, const Run* shift_or_null, const Place& my, Index a) : x(0), shift(0), rest() {
    if (!my.busy) return;
    x = all_x[my.at(a, 0) - my.member].lane[0];
    if (shift_or_null) {
      shift = shift_or_null[my.of_sample(a) - my.member].lane[0];
      rest = shift_or_null[my.of_sample(a)];
      for (int i = 0; i < LANES; ++i) rest.lane[i] -= shift;
    }
  }
  __device__ T relative(T value, int i) const { return value - x + rest.lane[i]; }
};

// The moments of the elements of sample a that this thread reads.
__device__ Moments moments_of_positions(const Run* x, const Origin& origin, const Place& my, Index a) {
  Moments found = {};
  if (!my.busy) return found;
  Moments lane[LANES] = {};
  T count = 0;
  for (int l = my.begin + my.row; l < my.end; l += my.rows) {
    const Run value = x[my.at(a, l)];
    count += 1;
    const T share = 1 / count;
    for (int i = 0; i < LANES; ++i) {
      T number = origin.relative(value.lane[i], i), apart = number - lane[i].mean;
      lane[i].mean += apart * share;
      lane[i].squares += apart * (number - lane[i].mean);
    }
  }
  for (int i = 0; i < LANES; ++i) {
    lane[i].count = count;
    found += lane[i];
  }
  return found;
}

// The moments of the parts of the group that this thread reads.
__device__ Moments moments_of_parts(const Moments* parts, const Place& my, Index a) {
  Moments found = {};
  if (my.busy && my.member == 0)
    for (int p = my.row; p < gridDim.z; p += my.rows) found += parts[my.group_of_part(a, p)];
  return found;
}

// The moments of each part of the positions, (A, parts, G, 3): the first of two launches.
extern "C" __global__ void __launch_bounds__(THREADS) moments(
    const Run* x, const Run* shift_or_null, T* parts, int length, int part, int all_runs, int runs, int group_runs) {
  __shared__ Moments memory[THREADS];
  const Place my(length, part, all_runs, runs, group_runs);
  const Index a = blockIdx.x;
  const Origin origin(x, shift_or_null, my, a);
  Moments found = moments_of_positions(x, origin, my, a);
  fold(found, memory, my.row, my.rows, runs);
  fold(found, memory, my.member, group_runs, 1);
  if (my.busy && my.row == 0 && my.member == 0) ((Moments*)parts)[my.group_of_part(a, blockIdx.z)] = found;
}

// y, mean and rstd; from the moments of the parts, if a first launch has found them.
extern "C" __global__ void __launch_bounds__(THREADS) normalize(
    const Run* x, const Run* shift_or_null, const T* parts_or_null, const Run* weight_or_null, const Run* bias_or_null,
    int of_samples, T eps, int with_silu, Run* y, T* mean, T* rstd, int length, int part, int all_runs, int runs,
    int group_runs) {
  __shared__ Moments memory[THREADS];
  const Place my(length, part, all_runs, runs, group_runs);
  const Index a = blockIdx.x;
  const Origin origin(x, shift_or_null, my, a);
  Moments found = parts_or_null ? moments_of_parts((const Moments*)parts_or_null, my, a)
                                : moments_of_positions(x, origin, my, a);
  fold(found, memory, my.row, my.rows, runs);
  fold(found, memory, my.member, group_runs, 1);
  found = held_by(my.column - my.member, found, memory);
  if (!my.busy) return;

  const T scale = 1 / sqrt(found.squares / found.count + T(eps));
  if (my.row == 0 && my.member == 0 && blockIdx.z == 0) {
    mean[my.group_of_sample(a)] = origin.x + origin.shift + found.mean;
    rstd[my.group_of_sample(a)] = scale;
  }
  Run factor, offset = {};  // u = (x + shift - mean) factor + offset
  for (int i = 0; i < LANES; ++i) factor.lane[i] = scale;
  if (weight_or_null) {
    const Index at = of_samples ? my.of_sample(a) : my.run;
    offset = bias_or_null[at];
    for (int i = 0; i < LANES; ++i) factor.lane[i] *= weight_or_null[at].lane[i];
  }
  for (int l = my.begin + my.row; l < my.end; l += my.rows) {
    Run value = x[my.at(a, l)];
    for (int i = 0; i < LANES; ++i) {
      T u = (origin.relative(value.lane[i], i) - found.mean) * factor.lane[i] + offset.lane[i];
      value.lane[i] = with_silu ? silu(u) : u;
    }
    y[my.at(a, l)] = value;
  }
}

// ---------------------------------------------------------------- adjoint

// Sums over positions, channel by channel.
struct Sums {
  Run k, k_xhat, xhat;
  __device__ void operator+=(const Sums& other) {
    for (int i = 0; i < LANES; ++i) {
      k.lane[i] += other.k.lane[i];
      k_xhat.lane[i] += other.k_xhat.lane[i];
      xhat.lane[i] += other.xhat.lane[i];
    }
  }
};

// Sums over a group, and then its means.
struct Means {
  T h, h_xhat;
  __device__ void operator+=(const Means& other) {
    h += other.h;
    h_xhat += other.h_xhat;
  }
};

// The forward pass of a thread's channels, element by element.
struct Channels {
  T rstd;
  Run offset, weight, bias;  // xhat = (x + offset) rstd,   u = xhat weight + bias

  __device__ Channels(
      const T* mean, const T* all_rstd, const Run* shift_or_null, const Run* weight_or_null, const Run* bias_or_null,
      int of_samples, const Place& my, Index a)
      : rstd(0), offset(), weight(), bias() {
    if (!my.busy) return;
    rstd = all_rstd[my.group_of_sample(a)];
    if (shift_or_null) offset = shift_or_null[my.of_sample(a)];
    if (weight_or_null) {
      const Index at = of_samples ? my.of_sample(a) : my.run;
      weight = weight_or_null[at];
      bias = bias_or_null[at];
    }
    for (int i = 0; i < LANES; ++i) {
      offset.lane[i] -= mean[my.group_of_sample(a)];
      if (!weight_or_null) weight.lane[i] = 1;
    }
  }
  __device__ T xhat(T x, int i) const { return (x + offset.lane[i]) * rstd; }
  // with_silu is not a member, so that the compiler makes two versions of each loop that uses it.
  __device__ T k(T g, T xhat, int i, int with_silu) const {
    return with_silu ? g * silu_derivative(xhat * weight.lane[i] + bias.lane[i]) : g;
  }
};

// The sums of the elements of sample a that this thread reads.
__device__ Sums sums_of_positions(
    const Run* g, const Run* x, const Channels& channels, int with_silu, const Place& my, Index a) {
  Sums found = {};
  if (!my.busy) return found;
  for (int l = my.begin + my.row; l < my.end; l += my.rows) {
    const Run value = x[my.at(a, l)], adjoint = g[my.at(a, l)];
    for (int i = 0; i < LANES; ++i) {
      const T xhat = channels.xhat(value.lane[i], i), k = channels.k(adjoint.lane[i], xhat, i, with_silu);
      found.k.lane[i] += k;
      found.k_xhat.lane[i] += k * xhat;
      found.xhat.lane[i] += xhat;
    }
  }
  return found;
}

// The sums of the parts that this thread reads.
__device__ Sums sums_of_parts(const Sums* parts, const Place& my, Index a) {
  Sums found = {};
  if (my.busy)
    for (int p = my.row; p < gridDim.z; p += my.rows) found += parts[my.of_part(a, p)];
  return found;
}

// The sums of each part of the positions, (A, parts, runs, 3, LANES): the first of two launches.
extern "C" __global__ void __launch_bounds__(THREADS) sums(
    const Run* g, const Run* x, const T* mean, const T* rstd, const Run* shift_or_null, const Run* weight_or_null,
    const Run* bias_or_null, int of_samples, int with_silu, T* parts, int length, int part, int all_runs, int runs,
    int group_runs) {
  __shared__ Sums memory[THREADS / 2];
  const Place my(length, part, all_runs, runs, group_runs);
  const Index a = blockIdx.x;
  const Channels channels(mean, rstd, shift_or_null, weight_or_null, bias_or_null, of_samples, my, a);
  Sums found = sums_of_positions(g, x, channels, with_silu, my, a);
  fold(found, memory, my.row, my.rows, runs);
  if (my.busy && my.row == 0) ((Sums*)parts)[my.of_part(a, blockIdx.z)] = found;
}

// The adjoints of x, shift, weight and bias; from the sums of the parts, if a first launch has found them.
//
// affine_adjoints: of weight, then of bias; (2, A, G D) if every sample has its own. If the samples share them, a block
// takes every gridDim.x-th sample and adds up over these; the result, (2, gridDim.x, G D), is summed over the blocks
// later.
extern "C" __global__ void __launch_bounds__(THREADS) normalize_backward(
    const Run* g, const Run* x, const T* mean, const T* rstd, const Run* shift_or_null, const Run* weight_or_null,
    const Run* bias_or_null, int of_samples, int with_silu, const T* parts_or_null, Run* x_adjoint,
    Run* shift_adjoint_or_null, Run* affine_adjoints_or_null, Index samples, int length, int part, int all_runs,
    int runs, int group_runs) {
  __shared__ Sums memory[THREADS / 2];
  __shared__ Means memory_of_means[THREADS];
  const Place my(length, part, all_runs, runs, group_runs);
  Run weight_adjoint = {}, bias_adjoint = {};
  for (Index a = blockIdx.x; a < samples; a += gridDim.x) {
    const Channels channels(mean, rstd, shift_or_null, weight_or_null, bias_or_null, of_samples, my, a);
    Sums found = parts_or_null ? sums_of_parts((const Sums*)parts_or_null, my, a)
                               : sums_of_positions(g, x, channels, with_silu, my, a);
    fold(found, memory, my.row, my.rows, runs);

    Means means = {};
    for (int i = 0; i < LANES; ++i) {
      means.h += channels.weight.lane[i] * found.k.lane[i];
      means.h_xhat += channels.weight.lane[i] * found.k_xhat.lane[i];
    }
    fold(means, memory_of_means, my.member, group_runs, 1);
    means = held_by(my.column - my.member, means, memory_of_means);
    const T count = T(length) * (group_runs * LANES);
    means.h /= count;
    means.h_xhat /= count;

    if (my.busy && my.row == 0 && blockIdx.z == 0) {
      if (shift_adjoint_or_null) {
        Run sum;
        for (int i = 0; i < LANES; ++i)
          sum.lane[i] = (channels.weight.lane[i] * found.k.lane[i] - means.h * length
                         - means.h_xhat * found.xhat.lane[i]) * channels.rstd;
        shift_adjoint_or_null[my.of_sample(a)] = sum;
      }
      for (int i = 0; i < LANES; ++i) {
        weight_adjoint.lane[i] = of_samples ? found.k_xhat.lane[i] : weight_adjoint.lane[i] + found.k_xhat.lane[i];
        bias_adjoint.lane[i] = of_samples ? found.k.lane[i] : bias_adjoint.lane[i] + found.k.lane[i];
      }
      const bool last = a + gridDim.x >= samples;
      if (affine_adjoints_or_null && (of_samples || last)) {
        const Index kept = of_samples ? samples : gridDim.x, at = of_samples ? a : blockIdx.x;
        affine_adjoints_or_null[my.of_sample(at)] = weight_adjoint;
        affine_adjoints_or_null[my.of_sample(kept + at)] = bias_adjoint;
      }
    }
    if (!my.busy) continue;
    for (int l = my.begin + my.row; l < my.end; l += my.rows) {
      Run value = x[my.at(a, l)];
      const Run adjoint = g[my.at(a, l)];
      for (int i = 0; i < LANES; ++i) {
        const T xhat = channels.xhat(value.lane[i], i), k = channels.k(adjoint.lane[i], xhat, i, with_silu);
        value.lane[i] = (k * channels.weight.lane[i] - means.h - xhat * means.h_xhat) * channels.rstd;
      }
      x_adjoint[my.at(a, l)] = value;
    }
  }
}
