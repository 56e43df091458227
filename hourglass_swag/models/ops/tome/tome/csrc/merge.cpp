// tome::merge_wavg: average merged tokens in one pass. Operator, CPU form, and the entry to the CUDA form (merge_cuda.cu).
//
// Letters: B images, N tokens in, U rows out, r tokens merged away, C channels. Row u starts from token keep[u]; token
// source[j] joins row into[j]. With weights s (one each if there are none)
//
//     total[u] = s[keep[u]] + sum over j with into[j] = u of s[source[j]]
//     out[u]   = (s[keep[u]] x[keep[u]] + sum over those j of s[source[j]] x[source[j]]) / total[u]
//
// The sums run in the order of j, so results do not depend on threads. Half precision is summed in float.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "merge.h"
#endif

namespace {

using at::Tensor;
using Rows = std::tuple<Tensor, Tensor>;

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Shapes, types and devices; positions are checked where that costs nothing (the CPU form).
void check(const Tensor& x, const std::optional<Tensor>& size, const Tensor& keep, const Tensor& source,
           const Tensor& into) {
  TORCH_CHECK(x.dim() == 3, "merge_wavg: x must be (B, N, C), got ", x.sizes());
  const int64_t batch = x.size(0);
  if (size) {
    TORCH_CHECK(size->dim() == 3 && size->size(0) == batch && size->size(1) == x.size(1) && size->size(2) == 1,
                "merge_wavg: size must be (", batch, ", ", x.size(1), ", 1), got ", size->sizes());
    TORCH_CHECK(size->scalar_type() == accumulation_type(x.scalar_type()), "merge_wavg: size must be ",
                accumulation_type(x.scalar_type()), " for ", x.scalar_type(), " tokens, got ", size->scalar_type());
    TORCH_CHECK(size->device() == x.device() && size->is_contiguous(),
                "merge_wavg: size must be contiguous and on the device of x");
  }
  for (const Tensor& index : {keep, source, into}) {
    TORCH_CHECK(index.dim() == 2 && index.size(0) == batch && index.scalar_type() == at::kLong,
                "merge_wavg: keep, source and into must be int64 (", batch, ", ...), got ", index.scalar_type(), " ",
                index.sizes());
    TORCH_CHECK(index.device() == x.device() && index.is_contiguous(),
                "merge_wavg: keep, source and into must be contiguous and on the device of x");
  }
  TORCH_CHECK(source.size(1) == into.size(1), "merge_wavg: source and into differ in length: ", source.size(1), ", ",
              into.size(1));
  TORCH_CHECK(x.is_contiguous(), "merge_wavg: x must be contiguous");
}

Rows make_rows(const Tensor& x, const Tensor& keep) {
  const auto shape = std::vector<int64_t>{x.size(0), keep.size(1), x.size(2)};
  const auto total_shape = std::vector<int64_t>{x.size(0), keep.size(1), 1};
  return {at::empty(shape, x.options()), at::empty(total_shape, x.options().dtype(accumulation_type(x.scalar_type())))};
}

// For each row the tokens that join it, as a linked list in the order of j.
struct Joined {
  std::vector<int32_t> first, next;

  Joined(const int64_t* into, int64_t rows, int64_t merged) : first(rows, -1), next(merged) {
    for (int64_t j = merged - 1; j >= 0; --j) {
      TORCH_CHECK_INDEX(0 <= into[j] && into[j] < rows, "merge_wavg: into holds ", into[j], ", there are ", rows,
                        " rows");
      next[j] = first[into[j]];
      first[into[j]] = static_cast<int32_t>(j);
    }
  }
};

template <typename scalar, typename acc>
void merge_rows(const scalar* x, const acc* size, const int64_t* keep, const int64_t* source, const Joined& joined,
                scalar* out, acc* total, int64_t begin, int64_t end, int64_t tokens, int64_t width) {
  const auto weight = [size](int64_t position) { return size ? size[position] : acc(1); };
  const auto checked = [tokens](int64_t position) {
    TORCH_CHECK_INDEX(0 <= position && position < tokens, "merge_wavg: position ", position, " of ", tokens, " tokens");
    return position;
  };
  std::vector<acc> sum(width);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t start = checked(keep[u]);
    const scalar* row = x + start * width;
    acc weights = weight(start);
    int32_t j = joined.first[u];
    if (j < 0) {
      std::copy(row, row + width, out + u * width);
      total[u] = weights;
      continue;
    }
    for (int64_t c = 0; c < width; ++c) sum[c] = static_cast<acc>(row[c]) * weights;
    for (; j >= 0; j = joined.next[j]) {
      const int64_t position = checked(source[j]);
      const acc share = weight(position);
      const scalar* other = x + position * width;
      for (int64_t c = 0; c < width; ++c) sum[c] += static_cast<acc>(other[c]) * share;
      weights += share;
    }
    for (int64_t c = 0; c < width; ++c) out[u * width + c] = static_cast<scalar>(sum[c] / weights);
    total[u] = weights;
  }
}

Rows merge_wavg_cpu(const Tensor& x, const std::optional<Tensor>& size, const Tensor& keep, const Tensor& source,
                    const Tensor& into) {
  check(x, size, keep, source, into);
  auto [out, total] = make_rows(x, keep);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), rows = keep.size(1), merged = source.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "merge_wavg", [&] {
    using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* x_data = x.const_data_ptr<scalar_t>();
    const auto* size_data = size ? size->const_data_ptr<acc>() : nullptr;
    const auto *keep_data = keep.const_data_ptr<int64_t>(), *source_data = source.const_data_ptr<int64_t>(),
               *into_data = into.const_data_ptr<int64_t>();
    auto* out_data = out.mutable_data_ptr<scalar_t>();
    auto* total_data = total.mutable_data_ptr<acc>();
    for (int64_t b = 0; b < batch; ++b) {
      const Joined joined(into_data + b * merged, rows, merged);
      at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
        merge_rows<scalar_t, acc>(x_data + b * tokens * width, size_data ? size_data + b * tokens : nullptr,
                                  keep_data + b * rows, source_data + b * merged, joined, out_data + b * rows * width,
                                  total_data + b * rows, begin, end, tokens, width);
      });
    }
  });
  return {out, total};
}

#ifdef WITH_CUDA
Rows merge_wavg_cuda(const Tensor& x, const std::optional<Tensor>& size, const Tensor& keep, const Tensor& source,
                     const Tensor& into) {
  check(x, size, keep, source, into);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [out, total] = make_rows(x, keep);
  if (total.numel() == 0) return {out, total};
  tome::Type type;
  switch (x.scalar_type()) {
    case at::kFloat: type = tome::Type::float32; break;
    case at::kDouble: type = tome::Type::float64; break;
    case at::kHalf: type = tome::Type::float16; break;
    case at::kBFloat16: type = tome::Type::bfloat16; break;
    default: TORCH_CHECK(false, "merge_wavg: ", x.scalar_type(), " tokens are not supported");
  }
  tome::merge_rows(type, x.const_data_ptr(), size ? size->const_data_ptr() : nullptr, keep.const_data_ptr<int64_t>(),
                   source.const_data_ptr<int64_t>(), into.const_data_ptr<int64_t>(), out.mutable_data_ptr(),
                   total.mutable_data_ptr(), x.size(0), x.size(1), keep.size(1), source.size(1), x.size(2),
                   c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, total};
}
#endif

std::string devices() {
#ifdef WITH_CUDA
  return "cpu cuda";
#else
  return "cpu";
#endif
}

}  // namespace

TORCH_LIBRARY(tome, m) {
  m.def("merge_wavg(Tensor x, Tensor? size, Tensor keep, Tensor source, Tensor into) -> (Tensor, Tensor)");
  m.def("devices() -> str", devices);
}

TORCH_LIBRARY_IMPL(tome, CPU, m) { m.impl("merge_wavg", merge_wavg_cpu); }

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(tome, CUDA, m) { m.impl("merge_wavg", merge_wavg_cuda); }
#endif

// An empty module: the library registers itself when it is loaded, and setuptools expects a module.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
