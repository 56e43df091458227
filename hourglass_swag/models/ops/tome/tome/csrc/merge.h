// The CUDA form of tome::merge_wavg, free of torch's headers so that nvcc is done in seconds; see merge.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tome {

enum class Type { float16, bfloat16, float32, float64 };

// x (batch, tokens, width), size (batch, tokens) or null, keep (batch, rows), source and into (batch, merged),
// out (batch, rows, width), total (batch, rows). Sizes and totals are float, double for float64 tokens.
void merge_rows(Type type, const void* x, const void* size, const int64_t* keep, const int64_t* source,
                const int64_t* into, void* out, void* total, int64_t batch, int64_t tokens, int64_t rows,
                int64_t merged, int64_t width, cudaStream_t stream);

}  // namespace tome
