// Runs the CUDA kernels of ACT on the CPU, thread by thread, and compares them with loops; for machines without a GPU.
//
// A block is 256 threads that meet at barriers; blocks run one after the other. Exit status 1 if a result differs.

#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

struct Index {
  unsigned x = 0, y = 0;
};
static thread_local Index threadIdx;
static Index blockIdx, gridDim;
static std::barrier<> block_barrier(256);
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static int exchanged[8][32];

static void meet_warp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
static void __syncthreads() { block_barrier.arrive_and_wait(); }
static std::array<int, 32> gather(int value) {
  const int warp = threadIdx.x / 32;
  exchanged[warp][threadIdx.x % 32] = value;
  meet_warp();
  std::array<int, 32> all;
  for (int lane = 0; lane < 32; ++lane) all[lane] = exchanged[warp][lane];
  meet_warp();
  return all;
}
static unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  const auto all = gather(vote);
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(all[lane]) << lane;
  return votes;
}
static int __shfl_up_sync(unsigned, int value, int step) {
  const int lane = threadIdx.x % 32;
  return gather(value)[lane >= step ? lane - step : lane];
}
static int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
static void atomicAdd(int32_t* to, int value) { std::atomic_ref<int32_t>(*to).fetch_add(value); }

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#include "kernels.cuh"

using namespace leanvit_ops;

static void launch(unsigned x, unsigned y, const std::function<void()>& kernel) {
  gridDim = {x, y};
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
          threadIdx = {t, 0};
          kernel();
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
}

static bool check(const char* what, bool same) {
  std::printf("%s: %s\n", what, same ? "same" : "DIFFERENT");
  return same;
}

template <typename scalar>
static bool check_sums(const char* what, int64_t R, int64_t N, int64_t C, int64_t D) {
  std::vector<scalar> x(R * N * D), y(R * C * D, -7), back(R * N * D, -7);
  std::vector<int32_t> groups(R * N);
  std::vector<scalar> weights(R * C);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<scalar>(static_cast<int>(i * 37 % 101) - 50) / 8;
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = static_cast<int32_t>(i * 7919 % (C + 3)) - 1;  // some invalid
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<scalar>(i % 5) / 4;
  for (int32_t& group : groups) group = group == 2 ? 0 : group;  // group 2 stays empty, and its weight is infinite
  for (int64_t r = 0; r < R; ++r) weights[r * C + 2] = INFINITY;
  const unsigned blocks = static_cast<unsigned>((C + kGroupsPerBlock - 1) / kGroupsPerBlock);
  launch(static_cast<unsigned>(R), blocks, [&] {
    weighted_sum_kernel<scalar, scalar>(x.data(), groups.data(), weights.data(), y.data(), N, C, D);
  });
  launch(3, 1, [&] {
    broadcast_kernel<scalar, scalar>(y.data(), groups.data(), weights.data(), back.data(), N, C, D, R * N * D);
  });
  bool same = true;
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t g = 0; g < C; ++g) {
      for (int64_t c = 0; c < D; ++c) {
        scalar sum = 0;
        for (int64_t t = 0; t < N; ++t) sum += groups[r * N + t] == g ? x[(r * N + t) * D + c] : 0;
        same &= y[(r * C + g) * D + c] == (g == 2 ? 0 : weights[r * C + g] * sum);
      }
    }
    for (int64_t t = 0; t < N; ++t) {
      const int32_t g = groups[r * N + t];
      for (int64_t c = 0; c < D; ++c) {
        const scalar want = g < 0 || g >= C ? 0 : weights[r * C + g] * y[(r * C + g) * D + c];
        same &= back[(r * N + t) * D + c] == want;
      }
    }
  }
  return check(what, same);
}

static bool check_ranks(const char* what, int64_t R, int64_t N, int64_t values) {
  std::vector<int64_t> sorted(R * N), position(R * N);
  std::vector<int32_t> groups(R * N, -1), counts(R * N, 0), want(R * N, 0);
  bool same = true;
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t i = 0; i < N; ++i) {
      sorted[r * N + i] = (i * values / N) * 1000003 - 5;
      position[r * N + i] = (i * 5 + r) % N;  // N is no multiple of 5
    }
  }
  launch(static_cast<unsigned>(R), 1,
         [&] { rank_kernel(sorted.data(), position.data(), groups.data(), counts.data(), N); });
  for (int64_t r = 0; r < R; ++r) {
    int32_t rank = 0;
    for (int64_t i = 0; i < N; ++i) {
      rank += i > 0 && sorted[r * N + i] != sorted[r * N + i - 1];
      same &= groups[r * N + position[r * N + i]] == rank;
      ++want[r * N + rank];
    }
  }
  return check(what, same && counts == want);
}

int main() {
  for (int warp = 0; warp < kWarps; ++warp) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
  bool same = check_ranks("ranks in one tile", 2, 33, 9);
  same &= check_ranks("ranks over several tiles", 2, 521, 300);
  same &= check_ranks("one group", 1, 257, 1);
  same &= check_sums<float>("sums, 16 channels", 2, 40, 5, 16);
  same &= check_sums<double>("sums, odd sizes", 2, 67, 37, 5);
  same &= check_sums<float>("sums, more channels than a pass", 1, 33, 4, 150);
  return same ? 0 : 1;
}
