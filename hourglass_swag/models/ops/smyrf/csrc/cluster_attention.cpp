// Attention inside SMYRF's clusters on a CPU, in float32: torch.ops.leanvit_ops.{sort_rows, attend_in_clusters}.
//
// R rows, N queries and M keys of a row, D channels, T rounds, clusters of c_q queries and c_k keys. The clusters of all
// rounds are cut from one list over (round, row, rank), so a cluster may hold tokens of two rows. Softmax over the keys
// of all rounds at once is the same as weighting the rounds by their mass:
//
//     out[n] = sum over rounds t and keys j of n's cluster of exp(s[n, j] - m[n]) v[j]  /  the same sum without v[j]
//            = sum over keys j of count[n, j] exp(s[n, j] - m[n]) v[j]  /  the same sum without v[j]
//
// with m the largest logit so far and count the rounds in which n and j share a cluster. One thread takes a row. It goes
// round by round through the clusters that its queries are in (first form), or, where that meets the same pairs again
// and again, tile by tile of queries through all keys of the row, and cluster by cluster only to keys of other rows
// (second form). The sizes alone decide. Neither writes anything of the size of the gathered tokens, or of all pairs, to
// memory. Results do not depend on the number of threads.

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
typedef uint32_t BitLanes __attribute__((vector_size(kLanes * sizeof(uint32_t))));

INLINE void load(Lanes& to, const float* from) { std::memcpy(&to, from, sizeof(Lanes)); }
INLINE void store(float* to, const Lanes& from) { std::memcpy(to, &from, sizeof(Lanes)); }

// 2^x for x <= 0 to 2 units in the last place; 0 below -125.
INLINE void power_of_two(Lanes& x) {
  const Lanes shifted = x + 12582912.0f;  // its last bits are the nearest whole number
  const Lanes r = x - (shifted - 12582912.0f);
  Lanes p = Lanes{} + 1.3264727e-3f;
  p = p * r + 9.6715130e-3f;
  p = p * r + 5.5507336e-2f;
  p = p * r + 2.4022243e-1f;
  p = p * r + 6.9314700e-1f;
  p = p * r + 1.0f;
  BitLanes exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof(Lanes));
  std::memcpy(&bits, &p, sizeof(Lanes));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(Lanes));
  x = x < -125.0f ? Lanes{} : p;
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
  power_of_two(kept);  // 0 at first, when before is -inf
  for (int64_t j = 0; j < keys; ++j) {
    Lanes p;
    load(p, logits + j * kLanes);
    p -= top;
    power_of_two(p);
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

// Tokens by rank; the list of a round and a row lies in one piece.
struct Order {
  const int64_t* data;
  int64_t round_stride, row_stride;
  const int64_t* list(int64_t t, int64_t r) const { return data + t * round_stride + r * row_stride; }
};

struct Problem {
  const float *q, *k, *v;
  Order order_q, order_k;
  float* out;
  int64_t T, R, N, M, D, c_q, c_k;
  bool padded, counts;
  float scale;  // of logits for powers of two
};

// Running softmax of the queries of one row.
struct Sums {
  std::vector<float> highest, mass;
  float* out;
};

// Cluster by cluster: attention of a row to the keys of its clusters; before counting, only to those of other lists.
template <int D>
INLINE void attend_clusters(const Problem& x, int64_t r, Sums& sums) {
  std::vector<float> logits(x.c_k * kLanes), packed(kLanes * D);
  std::vector<const float*> k(x.c_k), v(x.c_k);
  for (int64_t t = 0; t < x.T; ++t) {
    // The list runs over all rows and rounds; a padded row has a list of its own, whose last cluster may not be full.
    const int64_t row = t * x.R + r, own = row * x.M, own_end = own + x.M;
    const int64_t begin = x.padded ? 0 : row * x.N, end = begin + x.N;
    const int64_t* queries = x.order_q.list(t, r);
    for (int64_t cluster = begin / x.c_q; cluster * x.c_q < end; ++cluster) {
      const int64_t first_key = x.padded ? own + cluster * x.c_k : cluster * x.c_k;
      const int64_t last_key = x.padded ? std::min(first_key + x.c_k, own_end) : first_key + x.c_k;
      int64_t keys = 0;
      for (int64_t place = first_key; place < last_key;) {
        const int64_t list = place / x.M, list_end = std::min((list + 1) * x.M, last_key);
        if (x.counts && list == row) {
          place = list_end;
          continue;
        }
        const int64_t* tokens = x.order_k.list(list / x.R, list % x.R) - list * x.M;
        const int64_t offset = list % x.R * x.M;
        for (; place < list_end; ++place, ++keys) {
          k[keys] = x.k + (offset + tokens[place]) * D;
          v[keys] = x.v + (offset + tokens[place]) * D;
        }
      }
      if (keys == 0) continue;
      const int64_t last = std::min((cluster + 1) * x.c_q, end);
      for (int64_t first = std::max(cluster * x.c_q, begin); first < last; first += kLanes) {
        Block block;
        block.used = static_cast<int>(std::min<int64_t>(kLanes, last - first));
        for (int i = 0; i < kLanes; ++i) {
          const int64_t token = queries[first - begin + (i < block.used ? i : 0)];
          block.query[i] = token;
          block.q[i] = x.q + (r * x.N + token) * D;
          block.sum[i] = sums.out + token * D;
        }
        attend_block<D>(block, k.data(), v.data(), keys, x.scale, sums.highest.data(), sums.mass.data(), logits.data(),
                        packed.data());
      }
    }
  }
}

// The counting form.
constexpr int kTile = 24, kRows = 12;  // queries at once; of them, in registers
constexpr int kBlock = 64;             // keys that are counted at once
constexpr int kPanel = 2 * kLanes;     // keys whose logits, or channels whose sums are in registers
constexpr int kSpan = 128;             // keys whose values are summed at once: long sums lose digits
constexpr int kNone = 255;             // no cluster's number; more rounds would overflow a count
typedef uint8_t Bytes __attribute__((vector_size(kBlock)));

INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Calls f(token, number of its cluster) for a list that may begin inside a cluster.
template <class F>
INLINE void number_clusters(const int64_t* tokens, int64_t count, int64_t begin, int64_t size, const F& f) {
  int number = 0;
  for (int64_t first = -(begin % size); first < count; first += size, ++number) {
    const int64_t last = std::min(first + size, count);
    for (int64_t i = std::max<int64_t>(first, 0); i < last; ++i) f(tokens[i], number);
  }
}

// c[i][j] = or += sum over `depth` of a[i][.] b[.][j], for kRows rows of c and kVectors vectors of each.
template <int kVectors, bool kAdd>
INLINE void multiply(const float* a, int64_t stride_a, const float* b, int64_t stride_b, int64_t depth, float* c,
                     int64_t stride_c, int rows = kRows) {
  Lanes sum[kRows][kVectors] = {};
  for (int64_t l = 0; l < depth; ++l) {
    Lanes from[kVectors];
    for (int j = 0; j < kVectors; ++j) load(from[j], b + l * stride_b + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += from[j] * a[i * stride_a + l];
    }
  }
  for (int i = 0; i < kRows && i < rows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      Lanes before = {};
      if (kAdd) load(before, c + i * stride_c + j * kLanes);
      store(c + i * stride_c + j * kLanes, before + sum[i][j]);
    }
  }
}

// Of kRows queries and all keys, the rounds in which they share a cluster; `own` and `numbers` as in attend_counts.
INLINE void count_rounds(const uint32_t* own, const uint8_t* numbers, int64_t T, int64_t width, uint8_t* counts) {
  for (int64_t j = 0; j < width; j += kBlock) {
    Bytes count[kRows] = {};
    for (int64_t t = 0; t < T; ++t) {
      Bytes of_keys;
      std::memcpy(&of_keys, numbers + t * width + j, kBlock);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const Bytes of_query = reinterpret_cast<Bytes>(BitLanes{} + own[i * T + t]);
        count[i] = of_keys == of_query ? count[i] + 1 : count[i];
      }
    }
    for (int i = 0; i < kRows; ++i) std::memcpy(counts + i * width + j, &count[i], kBlock);
  }
}

// Logits of a query to weights: counts times powers of two; the highest logit that counts, and the sum of the weights.
INLINE void weigh(const uint8_t* counts, int64_t width, float* logits, float& highest, float& total) {
  constexpr int kVectors = kBlock / kLanes;
  Lanes top = Lanes{} + highest, sum = {};
  for (int64_t j = 0; j < width; j += kBlock) {
    BitLanes count;
    std::memcpy(&count, counts + j, kBlock);
    for (int b = 0; b < kVectors; ++b, count >>= 8) {
      Lanes s;
      load(s, logits + j + b * kLanes);
      s = (count & 255) != 0 ? s : top;  // one condition at a time: GCC takes their conjunction lane by lane
      top = s > top ? s : top;
    }
  }
  for (int i = 0; i < kLanes; ++i) highest = std::max(highest, top[i]);
  for (int64_t j = 0; j < width; j += kBlock) {
    BitLanes count;
    std::memcpy(&count, counts + j, kBlock);
    for (int b = 0; b < kVectors; ++b, count >>= 8) {
      Lanes p;
      load(p, logits + j + b * kLanes);
      p -= highest;
      power_of_two(p);
      const IntLanes times = reinterpret_cast<IntLanes>(count & 255);
      p = times != 0 ? p * __builtin_convertvector(times, Lanes) : Lanes{};
      sum += p;
      store(logits + j + b * kLanes, p);
    }
  }
  total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
}

// Tile by tile of queries: attention of a row to its own keys, weighted by the rounds in which they share a cluster.
FOR_EACH_CPU void attend_counts(const Problem& x, int64_t r, Sums& sums) {
  const int64_t N = x.N, M = x.M, T = x.T, D = x.D, width = round_up(M, kBlock), panels = round_up(M, kPanel) / kPanel;
  const float *k = x.k + r * M * D, *v = x.v + r * M * D;
  // Numbers of queries' clusters, (N, T), four times each, to be compared with four vectors of keys at once; those of
  // keys, (T, M), in an order that makes byte b of 16 counts, seen as 32 bits, the count of vector b of the block.
  std::vector<uint32_t> clusters_q(round_up(N, kTile) * T);
  std::vector<uint8_t> clusters_k(T * width, kNone), counts(kTile * width);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t list = x.padded ? 0 : t * x.R + r;
    number_clusters(x.order_q.list(t, r), N, list * N, x.c_q,
                    [&](int64_t n, int number) { clusters_q[n * T + t] = number * 0x01010101u; });
    number_clusters(x.order_k.list(t, r), M, list * M, x.c_k, [&](int64_t m, int number) {
      clusters_k[t * width + m / kBlock * kBlock + m % kLanes * 4 + m / kLanes % 4] = static_cast<uint8_t>(number);
    });
  }
  std::vector<float> packed(panels * D * kPanel), q(kTile * D), logits(kTile * width);
  for (int64_t j = 0; j < panels * kPanel; j += kLanes) {  // (panel, channel, key)
    float* to = packed.data() + j / kPanel * D * kPanel + j % kPanel;
    for (int64_t chunk = 0; chunk < D; chunk += kLanes) {
      Lanes tile[kLanes];
      for (int i = 0; i < kLanes; ++i) load(tile[i], k + std::min(j + i, M - 1) * D + chunk);
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(to + (chunk + i) * kPanel, tile[i]);
    }
  }
  for (int64_t first = 0; first < N; first += kTile) {
    const int used = static_cast<int>(std::min<int64_t>(kTile, N - first));
    for (int64_t i = 0; i < used * D; ++i) q[i] = x.q[(r * N + first) * D + i] * x.scale;
    for (int i = 0; i < used; i += kRows) {
      count_rounds(&clusters_q[(first + i) * T], clusters_k.data(), T, width, &counts[i * width]);
    }
    for (int64_t j = 0; j < panels; ++j) {
      for (int i = 0; i < used; i += kRows) {
        multiply<2, false>(&q[i * D], D, &packed[j * D * kPanel], kPanel, D, &logits[i * width + j * kPanel], width);
      }
    }
    for (int i = 0; i < used; ++i) {
      const int64_t n = first + i;
      Lanes kept = Lanes{} + sums.highest[n];
      float total;
      weigh(&counts[i * width], width, &logits[i * width], sums.highest[n], total);
      kept -= sums.highest[n];
      power_of_two(kept);
      sums.mass[n] = sums.mass[n] * kept[0] + total;
      for (int64_t c = 0; c < D; ++c) sums.out[n * D + c] *= kept[0];
    }
    for (int64_t j = 0; j < M; j += kSpan) {
      const int64_t depth = std::min<int64_t>(kSpan, M - j);
      for (int64_t c = 0; c < D; c += kPanel) {
        for (int i = 0; i < used; i += kRows) {
          const float *p = &logits[i * width + j], *value = v + j * D + c;
          float* out = sums.out + (first + i) * D + c;
          if (D - c < kPanel) {
            multiply<1, true>(p, width, value, D, depth, out, D, used - i);
          } else {
            multiply<2, true>(p, width, value, D, depth, out, D, used - i);
          }
        }
      }
    }
  }
}

// All queries of one row.
template <int D>
INLINE void attend_row(const Problem& x, int64_t r) {
  Sums sums{std::vector<float>(x.N, -std::numeric_limits<float>::infinity()), std::vector<float>(x.N, 0.0f),
            x.out + r * x.N * D};
  std::fill(sums.out, sums.out + x.N * D, 0.0f);
  if (!x.counts || !x.padded) attend_clusters<D>(x, r, sums);
  if (x.counts) attend_counts(x, r, sums);
  for (int64_t n = 0; n < x.N; ++n) {
    const float factor = 1.0f / sums.mass[n];
    for (int c = 0; c < D; ++c) sums.out[n * D + c] *= factor;
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
                              const at::Tensor& order_q, const at::Tensor& order_k, int64_t c_q, int64_t c_k,
                              double scale, bool padded) {
  const at::Tensor q = q_.contiguous(), k = k_.contiguous(), v = v_.contiguous();
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
  // The first form computes T c_k pairs per query, the second M and those with other rows. M / c_k < 5 / 6 T also means
  // that a row has less than kNone clusters.
  const bool counts = T <= kNone && 5 * T * c_k > 6 * M;
  const auto lists = [](const at::Tensor& order) {
    return Order{order.const_data_ptr<int64_t>(), order.stride(0), order.stride(1)};
  };
  const at::Tensor lists_q = order_q.stride(2) == 1 ? order_q : order_q.contiguous();
  const at::Tensor lists_k = order_k.stride(2) == 1 ? order_k : order_k.contiguous();
  const Problem problem{q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
                        lists(lists_q), lists(lists_k), out.mutable_data_ptr<float>(), T, R, N, M, D, c_q, c_k, padded,
                        counts, static_cast<float>(scale * 1.4426950408889634)};
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
