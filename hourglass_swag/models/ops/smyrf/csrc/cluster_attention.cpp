// Attention inside SMYRF's clusters on a CPU, in float32: torch.ops.leanvit_ops.{sort_rows, attend_in_clusters}.
//
// R rows, N queries and M keys of a row, D channels, T rounds, clusters of c_q queries and c_k keys. The clusters of all
// rounds are cut from one list over (round, row, rank), so a cluster may hold tokens of two rows. One thread takes a row
// and, round by round, the clusters that its queries are in; nothing of the size of the gathered tokens is written to
// memory. Softmax over the keys of all rounds at once is the same as weighting the rounds by their mass:
//
//     out[n] = sum over rounds t and keys j of n's cluster of exp(s[n, j] - m[n]) v[j]  /  the same sum without v[j]
//
// with m the largest logit so far. Results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntLanes{__VA_ARGS__})
#endif
#define INLINE inline __attribute__((always_inline))

namespace leanvit_ops {
namespace {

constexpr int kLanes = 16;  // queries of a block: one lane each
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

INLINE void load(Lanes& to, const float* from) { std::memcpy(&to, from, sizeof(Lanes)); }
INLINE void store(float* to, const Lanes& from) { std::memcpy(to, &from, sizeof(Lanes)); }

// exp(x) for x <= 0 to 2 units in the last place; 0 below -87.
INLINE void exponential(Lanes& x) {
  const IntLanes tiny = x < -87.0f;
  const Lanes clamped = tiny ? Lanes{} : x;
  const Lanes scaled = clamped * 1.44269504088896341f - 0.5f;
  const IntLanes exponent = __builtin_convertvector(scaled, IntLanes);  // towards zero: the nearest to x / ln 2
  const Lanes n = __builtin_convertvector(exponent, Lanes);
  const Lanes r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = Lanes{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntLanes bits = (exponent + 127) << 23;
  Lanes power;
  std::memcpy(&power, &bits, sizeof(Lanes));
  x = tiny ? Lanes{} : p * power;
}

// 16 x 16 transpose in registers: four rounds of exchanging halves.
INLINE void transpose(Lanes (&x)[kLanes]) {
#define EXCHANGE(step)                              \
  for (int i = 0; i < kLanes; ++i) {                           \
    if (i & step) continue;                                    \
    const Lanes a = x[i], b = x[i + step];                     \
    x[i] = SHUFFLE(a, b, LOW##step);                        \
    x[i + step] = SHUFFLE(a, b, HIGH##step);                \
  }
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  EXCHANGE(8)
  EXCHANGE(4)
  EXCHANGE(2)
  EXCHANGE(1)
}

// A block of up to 16 queries that attend the keys of one cluster.
struct Block {
  const float* q[kLanes];  // rows of channels; unused lanes repeat the first
  float* sum[kLanes];      // running sums of values
  int64_t query[kLanes];   // places of `highest` and `mass`
  int used;
};

// Running softmax of a block over `keys` more keys.
template <int D>
INLINE void attend_block(const Block& block, const float* const* k, const float* const* v, int64_t keys, float scale,
                         float* highest, float* mass, float* logits, float* packed) {
  Lanes q[D];  // [channel], lanes are queries
  for (int chunk = 0; chunk < D; chunk += kLanes) {
    Lanes tile[kLanes];
    for (int i = 0; i < kLanes; ++i) load(tile[i], block.q[i] + chunk);
    transpose(tile);
    for (int i = 0; i < kLanes; ++i) q[chunk + i] = tile[i] * scale;
  }
  Lanes before, top;
  for (int i = 0; i < kLanes; ++i) before[i] = highest[block.query[i]];
  top = before;
  for (int64_t first = 0; first < keys; first += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, keys - first));
    for (int j = 0; j < kLanes; ++j) {
      std::memcpy(packed + j * D, k[first + std::min(j, count - 1)], D * sizeof(float));
    }
    Lanes s[kLanes] = {};
    for (int c = 0; c < D; ++c) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) s[j] += q[c] * packed[j * D + c];
    }
    for (int j = 0; j < count; ++j) {
      top = s[j] > top ? s[j] : top;
      store(logits + (first + j) * kLanes, s[j]);
    }
  }
  Lanes kept = before - top, total = {};
  exponential(kept);  // 0 at first, when before is -inf
  for (int64_t j = 0; j < keys; ++j) {
    Lanes p;
    load(p, logits + j * kLanes);
    p -= top;
    exponential(p);
    total += p;
    store(logits + j * kLanes, p);
  }
  for (int i = 0; i < block.used; ++i) {
    highest[block.query[i]] = top[i];
    mass[block.query[i]] = mass[block.query[i]] * kept[i] + total[i];
  }
  constexpr int kChunks = D / kLanes, kQueries = 4;
  for (int i0 = 0; i0 < block.used; i0 += kQueries) {
    Lanes sum[kQueries][kChunks] = {};  // of this cluster alone: long sums lose digits
    for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) {
        Lanes value;
        load(value, v[j] + c * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kQueries; ++i) sum[i][c] += value * logits[j * kLanes + i0 + i];
      }
    }
    const int count = std::min(kQueries, block.used - i0);
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < kChunks; ++c) {
        Lanes earlier;
        load(earlier, block.sum[i0 + i] + c * kLanes);
        store(block.sum[i0 + i] + c * kLanes, earlier * kept[i0 + i] + sum[i][c]);
      }
    }
  }
}

struct Problem {
  const float *q, *k, *v;
  const int64_t *order_q, *order_k;  // (T, R, N), (T, R, M)
  float* out;
  int64_t T, R, N, M, c_q, c_k;
  bool padded;
  float scale;
};

// All queries of one row.
template <int D>
INLINE void attend_row(const Problem& x, int64_t r) {
  std::vector<float> highest(x.N, -std::numeric_limits<float>::infinity()), mass(x.N, 0.0f);
  std::vector<float> logits(x.c_k * kLanes), packed(kLanes * D);
  std::vector<const float*> k(x.c_k), v(x.c_k);
  float* out = x.out + r * x.N * D;
  std::fill(out, out + x.N * D, 0.0f);
  for (int64_t t = 0; t < x.T; ++t) {
    // The list runs over all rows and rounds; a padded row has a list of its own, whose last cluster may not be full.
    const int64_t row = t * x.R + r;
    const int64_t begin = x.padded ? 0 : row * x.N, end = begin + x.N;
    for (int64_t cluster = begin / x.c_q; cluster * x.c_q < end; ++cluster) {
      const int64_t first_key = cluster * x.c_k;
      const int64_t keys = x.padded ? std::min(x.c_k, x.M - first_key) : x.c_k;
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t place = x.padded ? row * x.M + first_key + j : first_key + j;  // in order_k
        const int64_t token = (place / x.M % x.R) * x.M + x.order_k[place];
        k[j] = x.k + token * D;
        v[j] = x.v + token * D;
      }
      const int64_t last = std::min((cluster + 1) * x.c_q, end);
      for (int64_t first = std::max(cluster * x.c_q, begin); first < last; first += kLanes) {
        Block block;
        block.used = static_cast<int>(std::min<int64_t>(kLanes, last - first));
        for (int i = 0; i < kLanes; ++i) {
          const bool used = i < block.used;
          const int64_t token = x.order_q[row * x.N + first - begin + (used ? i : 0)];
          block.query[i] = token;
          block.q[i] = x.q + (r * x.N + token) * D;
          block.sum[i] = out + token * D;
        }
        attend_block<D>(block, k.data(), v.data(), keys, x.scale, highest.data(), mass.data(), logits.data(),
                        packed.data());
      }
    }
  }
  for (int64_t n = 0; n < x.N; ++n) {
    const float factor = 1.0f / mass[n];
    for (int c = 0; c < D; ++c) out[n * D + c] *= factor;
  }
}

#define ROW_OF(D) \
  FOR_EACH_CPU void attend_row_##D(const Problem& x, int64_t r) { attend_row<D>(x, r); }
ROW_OF(16)
ROW_OF(32)
ROW_OF(48)
ROW_OF(64)
ROW_OF(80)
ROW_OF(96)
ROW_OF(112)
ROW_OF(128)

using Row = void (*)(const Problem&, int64_t);
constexpr int64_t kLargestWidth = 128;
Row row_of_width(int64_t D) {
  static const Row rows[] = {attend_row_16, attend_row_32, attend_row_48,  attend_row_64,
                             attend_row_80, attend_row_96, attend_row_112, attend_row_128};
  return rows[D / 16 - 1];
}

at::Tensor attend_in_clusters(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                              const at::Tensor& order_q_, const at::Tensor& order_k_, int64_t c_q, int64_t c_k,
                              double scale, bool padded) {
  const at::Tensor q = q_.contiguous(), k = k_.contiguous(), v = v_.contiguous();
  const at::Tensor order_q = order_q_.contiguous(), order_k = order_k_.contiguous();
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && order_q.dim() == 3 && order_k.dim() == 3,
              "attend_in_clusters: q, k, v must be (rows, tokens, channels), orders (rounds, rows, tokens)");
  const int64_t R = q.size(0), N = q.size(1), D = q.size(2), M = k.size(1), T = order_q.size(0);
  for (const at::Tensor& x : {q, k, v}) {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "attend_in_clusters: expected float32, got ", x.scalar_type());
  }
  TORCH_CHECK(D > 0 && D % kLanes == 0 && D <= kLargestWidth, "attend_in_clusters: ", D,
              " channels; expected a multiple of ", kLanes, " up to ", kLargestWidth);
  TORCH_CHECK(k.size(0) == R && k.size(2) == D && v.sizes() == k.sizes(), "attend_in_clusters: sizes do not fit: ",
              q.sizes(), k.sizes(), v.sizes());
  TORCH_CHECK(order_q.scalar_type() == at::kLong && order_k.scalar_type() == at::kLong &&
                  order_q.sizes() == at::IntArrayRef({T, R, N}) && order_k.sizes() == at::IntArrayRef({T, R, M}),
              "attend_in_clusters: orders must be int64 (rounds, rows, tokens), got ", order_q.sizes(),
              order_k.sizes());
  const bool whole = padded ? (N + c_q - 1) / c_q == (M + c_k - 1) / c_k
                            : T * R * N % c_q == 0 && T * R * M % c_k == 0 && T * R * N / c_q == T * R * M / c_k;
  TORCH_CHECK(c_q > 0 && c_k > 0 && whole, "attend_in_clusters: clusters of ", c_q, " and ", c_k, " do not fit");
  at::Tensor out = at::empty({R, N, D}, q.options());
  const Problem problem{q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
                        order_q.const_data_ptr<int64_t>(), order_k.const_data_ptr<int64_t>(),
                        out.mutable_data_ptr<float>(), T, R, N, M, c_q, c_k, padded, static_cast<float>(scale)};
  const Row attend = row_of_width(D);
  at::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) attend(problem, r);
  });
  return out;
}

// Order of the values of each row, ascending; equal values keep their order. Four passes over eight bits each.
at::Tensor sort_rows(const at::Tensor& values_) {
  TORCH_CHECK(values_.scalar_type() == at::kFloat && values_.dim() > 0, "sort_rows: expected float32, got ",
              values_.scalar_type());
  const at::Tensor values = values_.contiguous();
  const int64_t N = values.size(-1), rows = N ? values.numel() / N : 0;
  TORCH_CHECK(N < (int64_t{1} << 31), "sort_rows: rows are too long: ", N);
  at::Tensor order = at::empty(values.sizes(), values.options().dtype(at::kLong));
  const float* in = values.const_data_ptr<float>();
  int64_t* out = order.mutable_data_ptr<int64_t>();
  struct Item {
    uint32_t key;
    int32_t token;
  };
  at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<Item> items(N), sorted(N);
    for (int64_t row = begin; row < end; ++row) {
      uint32_t places[4][256] = {};
      for (int64_t n = 0; n < N; ++n) {
        uint32_t bits;
        const float value = in[row * N + n] + 0.0f;  // -0 becomes 0
        std::memcpy(&bits, &value, sizeof(bits));
        const uint32_t key = bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);  // ascending as unsigned
        items[n] = {key, static_cast<int32_t>(n)};
        for (int pass = 0; pass < 4; ++pass) ++places[pass][key >> (8 * pass) & 255];
      }
      for (int pass = 0; pass < 4; ++pass) {
        uint32_t sum = 0;
        for (uint32_t& place : places[pass]) {
          const uint32_t count = place;
          place = sum;
          sum += count;
        }
        for (const Item& item : items) sorted[places[pass][item.key >> (8 * pass) & 255]++] = item;
        items.swap(sorted);
      }
      for (int64_t n = 0; n < N; ++n) out[row * N + n] = items[n].token;
    }
  });
  return order;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(leanvit_ops, m) {
  m.def("sort_rows(Tensor values) -> Tensor");
  m.def(
      "attend_in_clusters(Tensor q, Tensor k, Tensor v, Tensor order_q, Tensor order_k, int c_q, int c_k, float scale, "
      "bool padded) -> Tensor");
}

TORCH_LIBRARY_IMPL(leanvit_ops, CPU, m) {
  m.impl("sort_rows", &sort_rows);
  m.impl("attend_in_clusters", &attend_in_clusters);
}

}  // namespace leanvit_ops
