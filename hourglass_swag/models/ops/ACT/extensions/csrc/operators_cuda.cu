// The operators of torch.ops.leanvit_ops on CUDA devices.
//
// R rows, N tokens, C groups, D channels. Everything runs on the current stream of the tensors' device.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "kernels.cuh"

namespace leanvit_ops {
namespace {

std::tuple<at::Tensor, at::Tensor> ada_cluster(const at::Tensor& hashes) {
  check_hashes(hashes);
  const c10::cuda::CUDAGuard guard(hashes.device());
  const int64_t R = hashes.size(0), N = hashes.size(1);
  at::Tensor groups = at::empty({R, N}, hashes.options().dtype(at::kInt));
  at::Tensor counts = at::zeros({R, N}, hashes.options().dtype(at::kInt));
  if (hashes.numel() == 0) return {groups, counts};
  auto [sorted, position] = at::sort(hashes.contiguous(), 1);
  sorted = sorted.contiguous();
  position = position.contiguous();
  rank_kernel<<<R, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
      sorted.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(), groups.mutable_data_ptr<int32_t>(),
      counts.mutable_data_ptr<int32_t>(), N);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {groups, counts};
}

at::Tensor weighted_sum(const at::Tensor& x_, const at::Tensor& groups_, const at::Tensor& weights_) {
  check_grouped("weighted_sum", x_, groups_, weights_, groups_.size(-1));
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::Tensor x = x_.contiguous(), groups = groups_.to(at::kInt).contiguous();
  const int64_t R = x.size(0), N = x.size(1), D = x.size(2), C = weights_.size(1);
  at::Tensor y = at::empty({R, C, D}, x.options());
  if (y.numel() == 0) return y;
  const int64_t blocks = (C + kGroupsPerBlock - 1) / kGroupsPerBlock;
  TORCH_CHECK(blocks < 65536, "weighted_sum: too many groups: ", C);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "weighted_sum", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const at::Tensor weights = weights_.to(c10::CppTypeToScalarType<sum_t>::value).contiguous();
    weighted_sum_kernel<scalar_t, sum_t><<<dim3(R, blocks), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        x.const_data_ptr<scalar_t>(), groups.const_data_ptr<int32_t>(), weights.const_data_ptr<sum_t>(),
        y.mutable_data_ptr<scalar_t>(), N, C, D);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

at::Tensor broadcast(const at::Tensor& y_, const at::Tensor& groups_, const at::Tensor& weights_) {
  check_grouped("broadcast", y_, groups_, weights_, weights_.size(-1));
  const c10::cuda::CUDAGuard guard(y_.device());
  const at::Tensor y = y_.contiguous(), groups = groups_.to(at::kInt).contiguous();
  const int64_t R = y.size(0), C = y.size(1), D = y.size(2), N = groups.size(1);
  at::Tensor x = at::empty({R, N, D}, y.options());
  if (x.numel() == 0) return x;
  const int64_t blocks = std::min<int64_t>((x.numel() + kThreads - 1) / kThreads, int64_t{1} << 20);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "broadcast", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const at::Tensor weights = weights_.to(c10::CppTypeToScalarType<sum_t>::value).contiguous();
    broadcast_kernel<scalar_t, sum_t><<<blocks, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        y.const_data_ptr<scalar_t>(), groups.const_data_ptr<int32_t>(), weights.const_data_ptr<sum_t>(),
        x.mutable_data_ptr<scalar_t>(), N, C, D, x.numel());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return x;
}

}  // namespace

TORCH_LIBRARY_IMPL(leanvit_ops, CUDA, m) {
  m.impl("ada_cluster", &ada_cluster);
  m.impl("weighted_sum", &weighted_sum);
  m.impl("broadcast", &broadcast);
}

}  // namespace leanvit_ops
