// What the operators ask of their arguments, on either device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace leanvit_ops {

inline void check_hashes(const at::Tensor& hashes) {
  TORCH_CHECK(hashes.dim() == 2 && hashes.scalar_type() == at::kLong,
              "ada_cluster: hashes must be int64 of shape (rows, tokens), got ", hashes.scalar_type(), " ",
              hashes.sizes());
  TORCH_CHECK(hashes.size(1) < (int64_t{1} << 31), "ada_cluster: groups are int32, got ", hashes.size(1), " tokens");
}

// `data` is x (rows, tokens, channels) or y (rows, groups, channels); `along` is the size of its second dimension.
inline void check_grouped(const char* name, const at::Tensor& data, const at::Tensor& groups,
                          const at::Tensor& weights, int64_t along) {
  TORCH_CHECK(data.dim() == 3 && data.is_floating_point(), name,
              ": expected floating-point data (rows, tokens or groups, channels), got ", data.scalar_type(), " ",
              data.sizes());
  TORCH_CHECK(groups.dim() == 2 && (groups.scalar_type() == at::kInt || groups.scalar_type() == at::kLong), name,
              ": groups must be int32 or int64 of shape (rows, tokens), got ", groups.scalar_type(), " ",
              groups.sizes());
  TORCH_CHECK(weights.dim() == 2 && weights.is_floating_point(), name,
              ": weights must be floating-point of shape (rows, groups), got ", weights.scalar_type(), " ",
              weights.sizes());
  TORCH_CHECK(groups.size(0) == data.size(0) && weights.size(0) == data.size(0) && data.size(1) == along, name,
              ": sizes do not fit: data ", data.sizes(), ", groups ", groups.sizes(), ", weights ", weights.sizes());
  TORCH_CHECK(groups.device() == data.device() && weights.device() == data.device(), name,
              ": all tensors must be on one device, got ", data.device(), ", ", groups.device(), ", ",
              weights.device());
}

}  // namespace leanvit_ops
