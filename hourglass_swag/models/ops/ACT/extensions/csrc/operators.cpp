// Schemas of torch.ops.leanvit_ops, and its operators on the CPU.
//
// R rows, N tokens, C groups, D channels. Rows run in parallel; inside a row members are added in token order, so
// results do not depend on the number of threads. Half precision is added up in float32.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"

namespace leanvit_ops {
namespace {

std::tuple<at::Tensor, at::Tensor> ada_cluster(const at::Tensor& hashes_) {
  check_hashes(hashes_);
  const at::Tensor hashes = hashes_.contiguous();
  const int64_t R = hashes.size(0), N = hashes.size(1);
  at::Tensor groups = at::empty({R, N}, hashes.options().dtype(at::kInt));
  at::Tensor counts = at::zeros({R, N}, hashes.options().dtype(at::kInt));
  const int64_t* hash = hashes.const_data_ptr<int64_t>();
  int32_t* group = groups.mutable_data_ptr<int32_t>();
  int32_t* count = counts.mutable_data_ptr<int32_t>();
  at::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<int64_t, int32_t>> tokens(N);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t t = 0; t < N; ++t) tokens[t] = {hash[r * N + t], static_cast<int32_t>(t)};
      std::sort(tokens.begin(), tokens.end());
      int32_t rank = 0;
      for (int64_t i = 0; i < N; ++i) {
        rank += i > 0 && tokens[i].first != tokens[i - 1].first;
        group[r * N + tokens[i].second] = rank;
        ++count[r * N + rank];
      }
    }
  });
  return {groups, counts};
}

at::Tensor weighted_sum(const at::Tensor& x_, const at::Tensor& groups_, const at::Tensor& weights_) {
  check_grouped("weighted_sum", x_, groups_, weights_, groups_.size(-1));
  const at::Tensor x = x_.contiguous(), groups = groups_.to(at::kInt).contiguous();
  const int64_t R = x.size(0), N = x.size(1), D = x.size(2), C = weights_.size(1);
  at::Tensor y = at::empty({R, C, D}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "weighted_sum", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const at::Tensor weights = weights_.to(c10::CppTypeToScalarType<sum_t>::value).contiguous();
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    const int32_t* group = groups.const_data_ptr<int32_t>();
    const sum_t* weight = weights.const_data_ptr<sum_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
      std::vector<sum_t> sums(C * D);
      std::vector<char> has_member(C);
      for (int64_t r = begin; r < end; ++r) {
        std::fill(sums.begin(), sums.end(), sum_t{0});
        std::fill(has_member.begin(), has_member.end(), char{0});
        for (int64_t t = 0; t < N; ++t) {
          const int32_t g = group[r * N + t];
          if (g < 0 || g >= C) continue;
          has_member[g] = 1;
          const scalar_t* row = in + (r * N + t) * D;
          sum_t* sum = sums.data() + g * D;
          for (int64_t c = 0; c < D; ++c) sum[c] += static_cast<sum_t>(row[c]);
        }
        for (int64_t g = 0; g < C; ++g) {  // the weight of a group without members may be infinite
          const sum_t w = has_member[g] ? weight[r * C + g] : sum_t{0};
          const sum_t* sum = sums.data() + g * D;
          scalar_t* row = out + (r * C + g) * D;
          for (int64_t c = 0; c < D; ++c) row[c] = static_cast<scalar_t>(w * sum[c]);
        }
      }
    });
  });
  return y;
}

at::Tensor broadcast(const at::Tensor& y_, const at::Tensor& groups_, const at::Tensor& weights_) {
  check_grouped("broadcast", y_, groups_, weights_, weights_.size(-1));
  const at::Tensor y = y_.contiguous(), groups = groups_.to(at::kInt).contiguous();
  const int64_t R = y.size(0), C = y.size(1), D = y.size(2), N = groups.size(1);
  at::Tensor x = at::empty({R, N, D}, y.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "broadcast", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const at::Tensor weights = weights_.to(c10::CppTypeToScalarType<sum_t>::value).contiguous();
    const scalar_t* in = y.const_data_ptr<scalar_t>();
    const int32_t* group = groups.const_data_ptr<int32_t>();
    const sum_t* weight = weights.const_data_ptr<sum_t>();
    scalar_t* out = x.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, R * N, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / N;
        const int32_t g = group[i];
        scalar_t* row = out + i * D;
        if (g < 0 || g >= C) {
          std::fill(row, row + D, scalar_t{0});
          continue;
        }
        const sum_t w = weight[r * C + g];
        const scalar_t* from = in + (r * C + g) * D;
        for (int64_t c = 0; c < D; ++c) row[c] = static_cast<scalar_t>(w * static_cast<sum_t>(from[c]));
      }
    });
  });
  return x;
}

}  // namespace

TORCH_LIBRARY(leanvit_ops, m) {
  m.def("ada_cluster(Tensor hashes) -> (Tensor groups, Tensor counts)");
  m.def("weighted_sum(Tensor x, Tensor groups, Tensor weights) -> Tensor");
  m.def("broadcast(Tensor y, Tensor groups, Tensor weights) -> Tensor");
}

TORCH_LIBRARY_IMPL(leanvit_ops, CPU, m) {
  m.impl("ada_cluster", &ada_cluster);
  m.impl("weighted_sum", &weighted_sum);
  m.impl("broadcast", &broadcast);
}

}  // namespace leanvit_ops
