// The kernels of operators_cuda.cu, in plain CUDA C++.
//
// R rows, N tokens, C groups, D channels. No sum depends on the order in which threads run: a group belongs to one warp,
// which adds its members in token order, in float32 for half precision.
#pragma once

#include <cstdint>

namespace leanvit_ops {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroupsPerBlock = 4 * kWarps;
constexpr int kChannelsPerLane = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the threads of a block up to and including this one, and over all of them.
__device__ int scan_block(int value, int* total) {
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) value += warp_sums[w];
    sum += warp_sums[w];
  }
  __syncthreads();  // before the next call writes warp_sums
  *total = sum;
  return value;
}

// One block per row. A token starts a group if its hash differs from the one before it in ascending order; its rank is
// the number of such starts up to it.
__global__ void __launch_bounds__(kThreads)
    rank_kernel(const int64_t* __restrict__ sorted, const int64_t* __restrict__ position, int32_t* __restrict__ groups,
                int32_t* __restrict__ counts, int64_t N) {
  const int64_t row = blockIdx.x * N;
  int rank_before = 0;
  for (int64_t base = 0; base < N; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const int starts = i > 0 && i < N && sorted[row + i] != sorted[row + i - 1];
    int total;
    const int rank = rank_before + scan_block(starts, &total);
    if (i < N) {
      groups[row + position[row + i]] = rank;
      atomicAdd(counts + row + rank, 1);
    }
    rank_before += total;
  }
}

// One warp per group: its lanes look at 32 tokens at once, then share the channels of each member.
template <typename scalar_t, typename sum_t>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const scalar_t* __restrict__ x, const int32_t* __restrict__ groups,
                        const sum_t* __restrict__ weights, scalar_t* __restrict__ y, int64_t N, int64_t C, int64_t D) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kGroupsPerBlock;
  const int32_t* group_of = groups + r * N;
  for (int64_t g = first + warp; g < C && g < first + kGroupsPerBlock; g += kWarps) {
    for (int64_t channel = 0; channel < D; channel += kWarp * kChannelsPerLane) {
      sum_t sum[kChannelsPerLane] = {};
      bool has_member = false;
      for (int64_t base = 0; base < N; base += kWarp) {
        const int64_t mine = base + lane;
        unsigned members = __ballot_sync(kAllLanes, mine < N && group_of[mine] == g);
        has_member |= members != 0;
        while (members) {
          const scalar_t* row = x + (r * N + base + __ffs(members) - 1) * D;
          members &= members - 1;
#pragma unroll
          for (int k = 0; k < kChannelsPerLane; ++k) {
            const int64_t c = channel + k * kWarp + lane;
            if (c < D) sum[k] += static_cast<sum_t>(row[c]);
          }
        }
      }
      const sum_t w = has_member ? weights[r * C + g] : sum_t(0);  // that of an empty group may be infinite
#pragma unroll
      for (int k = 0; k < kChannelsPerLane; ++k) {
        const int64_t c = channel + k * kWarp + lane;
        if (c < D) y[(r * C + g) * D + c] = static_cast<scalar_t>(w * sum[k]);
      }
    }
  }
}

// One thread per element, a grid-stride loop.
template <typename scalar_t, typename sum_t>
__global__ void __launch_bounds__(kThreads)
    broadcast_kernel(const scalar_t* __restrict__ y, const int32_t* __restrict__ groups,
                     const sum_t* __restrict__ weights, scalar_t* __restrict__ x, int64_t N, int64_t C, int64_t D,
                     int64_t elements) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += step) {
    const int64_t token = i / D, r = token / N;
    const int32_t g = groups[token];
    const bool valid = g >= 0 && g < C;
    const int64_t from = r * C + (valid ? g : 0);
    x[i] = valid ? static_cast<scalar_t>(weights[from] * static_cast<sum_t>(y[from * D + i % D])) : scalar_t(0);
  }
}

}  // namespace
}  // namespace leanvit_ops
