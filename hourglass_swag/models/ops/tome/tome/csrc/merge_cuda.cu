// The CUDA form of tome::merge_wavg; see merge.cpp for what it computes.
//
// One block per row that comes out. The block first finds the tokens that join its row: each warp compares 32 entries of
// `into` at once and keeps the answer as one word, so the set is found without atomics and is read in the order of j.
// Then each thread sums a few channels of these tokens, 16 bytes at a time where the width allows.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "merge.h"

namespace tome {
namespace {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 256;

template <typename T>
struct Accumulated {
  using type = float;
};
template <>
struct Accumulated<double> {
  using type = double;
};

__device__ float read(float value) { return value; }
__device__ double read(double value) { return value; }
__device__ float read(__half value) { return __half2float(value); }
__device__ float read(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ void write(float& place, float value) { place = value; }
__device__ void write(double& place, double value) { place = value; }
__device__ void write(__half& place, float value) { place = __float2half_rn(value); }
__device__ void write(__nv_bfloat16& place, float value) { place = __float2bfloat16_rn(value); }

template <typename T, int LENGTH>
struct alignas(sizeof(T) * LENGTH) Vector {
  T values[LENGTH];
};

template <typename T, int LENGTH>
__global__ void merge_rows_kernel(const T* __restrict__ x, const typename Accumulated<T>::type* __restrict__ size,
                                  const int64_t* __restrict__ keep, const int64_t* __restrict__ source,
                                  const int64_t* __restrict__ into, T* __restrict__ out,
                                  typename Accumulated<T>::type* __restrict__ total, int64_t tokens, int64_t rows,
                                  int merged, int64_t width) {
  using A = typename Accumulated<T>::type;
  extern __shared__ unsigned joined[];  // bit j % 32 of word j / 32: token source[j] joins this row
  const int64_t b = blockIdx.x / rows, u = blockIdx.x % rows;
  x += b * tokens * width;
  if (size) size += b * tokens;
  source += b * merged;
  into += b * merged;

  const int lane = threadIdx.x % WARP, words = (merged + WARP - 1) / WARP;
  bool any = false;
  for (int word = threadIdx.x / WARP; word < words; word += blockDim.x / WARP) {
    const int j = word * WARP + lane;
    const unsigned found = __ballot_sync(0xffffffffu, j < merged && into[j] == u);
    if (lane == 0) joined[word] = found;
    any |= found != 0;
  }
  any = __syncthreads_or(any);

  const int64_t start = keep[blockIdx.x];
  const A weight = size ? size[start] : A(1);
  const auto* from = reinterpret_cast<const Vector<T, LENGTH>*>(x + start * width);
  auto* to = reinterpret_cast<Vector<T, LENGTH>*>(out + blockIdx.x * width);
  if (!any) {
    for (int64_t c = threadIdx.x; c < width / LENGTH; c += blockDim.x) to[c] = from[c];
    if (threadIdx.x == 0) total[blockIdx.x] = weight;
    return;
  }

  A weights = weight;
  for (int word = 0; word < words; ++word) {
    for (unsigned bits = joined[word]; bits; bits &= bits - 1) {
      weights += size ? size[source[word * WARP + __ffs(bits) - 1]] : A(1);
    }
  }
  for (int64_t c = threadIdx.x; c < width / LENGTH; c += blockDim.x) {
    const Vector<T, LENGTH> own = from[c];
    A sum[LENGTH];
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) sum[i] = read(own.values[i]) * weight;
    for (int word = 0; word < words; ++word) {
      for (unsigned bits = joined[word]; bits; bits &= bits - 1) {
        const int64_t position = source[word * WARP + __ffs(bits) - 1];
        const A share = size ? size[position] : A(1);
        const Vector<T, LENGTH> other = reinterpret_cast<const Vector<T, LENGTH>*>(x + position * width)[c];
#pragma unroll
        for (int i = 0; i < LENGTH; ++i) sum[i] += read(other.values[i]) * share;
      }
    }
    Vector<T, LENGTH> result;
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) write(result.values[i], sum[i] / weights);
    to[c] = result;
  }
  if (threadIdx.x == 0) total[blockIdx.x] = weights;
}

template <typename T, int LENGTH>
void launch(const void* x, const void* size, const int64_t* keep, const int64_t* source, const int64_t* into, void* out,
            void* total, int64_t batch, int64_t tokens, int64_t rows, int64_t merged, int64_t width,
            cudaStream_t stream) {
  using A = typename Accumulated<T>::type;
  const int64_t vectors = width / LENGTH;
  const int threads = vectors >= MAX_THREADS ? MAX_THREADS : static_cast<int>((vectors + WARP - 1) / WARP * WARP);
  const size_t shared = (merged + WARP - 1) / WARP * sizeof(unsigned);
  merge_rows_kernel<T, LENGTH><<<static_cast<unsigned>(batch * rows), threads > 0 ? threads : WARP, shared, stream>>>(
      static_cast<const T*>(x), static_cast<const A*>(size), keep, source, into, static_cast<T*>(out),
      static_cast<A*>(total), tokens, rows, static_cast<int>(merged), width);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
void launch_widest(const void* x, const void* size, const int64_t* keep, const int64_t* source, const int64_t* into,
                   void* out, void* total, int64_t batch, int64_t tokens, int64_t rows, int64_t merged, int64_t width,
                   cudaStream_t stream) {
  constexpr int LENGTH = 16 / sizeof(T);
  if (width % LENGTH == 0 && aligned(x) && aligned(out)) {
    launch<T, LENGTH>(x, size, keep, source, into, out, total, batch, tokens, rows, merged, width, stream);
  } else {
    launch<T, 1>(x, size, keep, source, into, out, total, batch, tokens, rows, merged, width, stream);
  }
}

}  // namespace

void merge_rows(Type type, const void* x, const void* size, const int64_t* keep, const int64_t* source,
                const int64_t* into, void* out, void* total, int64_t batch, int64_t tokens, int64_t rows,
                int64_t merged, int64_t width, cudaStream_t stream) {
  const auto run = [&](auto* launcher) {
    launcher(x, size, keep, source, into, out, total, batch, tokens, rows, merged, width, stream);
  };
  switch (type) {
    case Type::float16: return run(&launch_widest<__half>);
    case Type::bfloat16: return run(&launch_widest<__nv_bfloat16>);
    case Type::float32: return run(&launch_widest<float>);
    case Type::float64: return run(&launch_widest<double>);
  }
}

}  // namespace tome
