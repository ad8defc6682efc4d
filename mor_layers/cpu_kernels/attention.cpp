// Attention of tokens to rows of a paged cache, which are read in place.
//
// A tile is a few tokens of one sequence. Its queries read the rows of a key head in blocks, and
// keep a running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), so that a row is read
// once for all of them. Rows of fewer than 32 bits are expanded block by block, into the
// first-level cache.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

constexpr int kRows = 64;    // rows of a block
constexpr int kTokens = 16;  // tokens of a tile, at most
constexpr int kLine = 64;    // bytes that the processor fetches at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(4 * kWidth)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// The sums of neighbours in `a`, then those in `b`.
inline Vec pair_sums(Vec a, Vec b) {
#if defined(__AVX512F__)
  return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX__)
  return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7);
#endif
}

// The product of a query with N keys. With N = kWidth, there is one in each place. V: vectors of a
// head, or 0 for any `size`.
template <int V, int N>
inline Vec products(const float* query, const float* const* keys, int size) {
  if constexpr (N == 1) {
    Vec sum = load(query) * load(keys[0]);
    const int end = V ? V * kWidth : size;
#pragma GCC unroll 8
    for (int i = kWidth; i < end; i += kWidth) sum += load(query + i) * load(keys[0] + i);
    return sum;
  } else {
    return pair_sums(products<V, N / 2>(query, keys, size),
                     products<V, N / 2>(query, keys + N / 2, size));
  }
}

// Add weighted rows to the outputs of Q queries, in V vectors of their columns.
template <int Q, int V>
inline void add_rows(const float* weights, const float* const* rows, int num_rows, int column,
                     float* outputs, int size) {
  Vec sums[Q][V];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[q][v] = load(outputs + q * size + column + v * kWidth);
  for (int r = 0; r < num_rows; ++r) {
    Vec values[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) values[v] = load(rows[r] + column + v * kWidth);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[q][v] += weights[q * kRows + r] * values[v];
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(outputs + q * size + column + v * kWidth, sums[q][v]);
}

template <int Q>
inline void add_rows(const float* weights, const float* const* rows, int num_rows, float* outputs,
                     int size) {
  int column = 0;
  for (; column + 4 * kWidth <= size; column += 4 * kWidth)
    add_rows<Q, 4>(weights, rows, num_rows, column, outputs, size);
  for (; column < size; column += kWidth)
    add_rows<Q, 1>(weights, rows, num_rows, column, outputs, size);
}

// A layer of the cache, `[rows vectors heads size]`: a row has a key and a value of each head, or
// one vector that is both.
struct Cache {
  const void* data;
  const float* scales;  // `[rows vectors heads]`, or null
  int64_t num_vectors, num_heads, size;

  int64_t row_size() const { return num_vectors * num_heads * size; }
  int64_t to_value() const { return (num_vectors - 1) * num_heads * size; }
};

// Keys and values of a block as floats, padded to whole vectors.
struct Block {
  const float* keys[kRows];
  const float* values[kRows];
  std::vector<float> expanded;

  template <typename Stored>
  void read(const Cache& cache, const int64_t* rows, int num_rows, int num_ahead, int head,
            int padded) {
    const Stored* const data = static_cast<const Stored*>(cache.data) + head * cache.size;
    const bool is_float = std::is_same_v<Stored, float> && padded == cache.size;
    if (!is_float) expanded.resize(2 * kRows * padded);
    for (int r = 0; r < num_rows; ++r) {
      if (r < num_ahead) fetch(data + rows[kRows + r] * cache.row_size(), cache);
      const Stored* const key = data + rows[r] * cache.row_size();
      const Stored* const value = key + cache.to_value();
      if constexpr (std::is_same_v<Stored, float>) {
        if (is_float) {
          keys[r] = key, values[r] = value;
          continue;
        }
      }
      const int64_t at = rows[r] * cache.num_vectors * cache.num_heads + head;
      float* const to = expanded.data() + 2 * r * padded;
      expand(key, cache.size, cache.scales ? cache.scales[at] : 1.0f, to, padded);
      expand(value, cache.size,
             cache.scales ? cache.scales[at + (cache.num_vectors - 1) * cache.num_heads] : 1.0f,
             to + padded, padded);
      keys[r] = to, values[r] = to + padded;
    }
  }

  // Let the processor fetch a row that is needed soon.
  template <typename Stored>
  static void fetch(const Stored* key, const Cache& cache) {
    for (int64_t i = 0; i < cache.size; i += kLine / sizeof(Stored)) {
      __builtin_prefetch(key + i);
      __builtin_prefetch(key + cache.to_value() + i);
    }
  }

  template <typename Stored>
  static void expand(const Stored* from, int64_t size, float scale, float* to, int padded) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = number(from[i]) * scale;
    for (int64_t i = size; i < padded; ++i) to[i] = 0.0f;
  }
};

// What a thread needs, allocated once.
struct Scratch {
  std::vector<float> queries, outputs, scores, largest, sums;
  Block block;
};

// Turn the scores of the first `num_seen` rows into weights, and those of others into 0.
inline void soften(float* scores, int num_seen, int num_rows, float& largest, float& sum,
                   float* output, int size) {
  const int end = (num_seen + kWidth - 1) / kWidth * kWidth;
  std::fill(scores + num_seen, scores + end, kNone);
  Vec most = load(scores);
  for (int r = kWidth; r < end; r += kWidth) {
    const Vec next = load(scores + r);
    most = next > most ? next : most;
  }
  float now = largest;
  for (int i = 0; i < kWidth; ++i) now = most[i] > now ? most[i] : now;
  if (now != largest) {
    const float shrinks = exp_of(largest - now);
#pragma omp simd
    for (int i = 0; i < size; ++i) output[i] *= shrinks;
    sum *= shrinks, largest = now;
  }
  Vec total{};
  for (int r = 0; r < end; r += kWidth) {
#pragma omp simd
    for (int i = r; i < r + kWidth; ++i) scores[i] = exp_of(scores[i] - now);
    total += load(scores + r);
  }
  for (int i = 0; i < kWidth; ++i) sum += total[i];
  std::fill(scores + num_seen, scores + std::max(end, num_rows), 0.0f);
}

// The heads of a tile's queries that read one key head.
template <int V>
void attend_tile(const Cache& cache,
                 void (Block::*read)(const Cache&, const int64_t*, int, int, int, int),
                 const int64_t* rows, const int64_t* counts, int num_tokens, int head, int group,
                 float scale, const float* query, float* out, int64_t token_size, Scratch& s) {
  const int size = V ? V * kWidth : (cache.size + kWidth - 1) / kWidth * kWidth;
  const int num_queries = num_tokens * group;
  s.queries.assign(num_queries * size, 0.0f), s.outputs.assign(num_queries * size, 0.0f);
  s.largest.assign(num_queries, kNone), s.sums.assign(num_queries, 0.0f);
  s.scores.resize(num_queries * kRows);
  const auto offset = [&](int q) {
    return q / group * token_size + (head * group + q % group) * cache.size;
  };
  for (int q = 0; q < num_queries; ++q)
    for (int i = 0; i < cache.size; ++i) s.queries[q * size + i] = query[offset(q) + i] * scale;

  const int64_t longest = *std::max_element(counts, counts + num_tokens);
  for (int64_t start = 0; start < longest; start += kRows) {
    const int num_rows = std::min<int64_t>(kRows, longest - start);
    const int num_ahead = std::min<int64_t>(kRows, longest - start - num_rows);
    (s.block.*read)(cache, rows + start, num_rows, num_ahead, head, size);
    for (int r = num_rows; r % kWidth; ++r) s.block.keys[r] = s.block.keys[0];
    for (int q = 0; q < num_queries; ++q) {
      float* const scores = s.scores.data() + q * kRows;
      const int num_seen = std::clamp<int64_t>(counts[q / group] - start, 0, num_rows);
      for (int r = 0; r < num_seen; r += kWidth)
        store(scores + r, products<V, kWidth>(s.queries.data() + q * size, s.block.keys + r, size));
      if (num_seen == 0)
        std::fill_n(scores, num_rows, 0.0f);
      else
        soften(scores, num_seen, num_rows, s.largest[q], s.sums[q], s.outputs.data() + q * size,
               size);
    }
    for (int q = 0; q < num_queries;) {
      const float* const weights = s.scores.data() + q * kRows;
      float* const outputs = s.outputs.data() + q * size;
      const int left = num_queries - q;
      if (left >= 4)
        add_rows<4>(weights, s.block.values, num_rows, outputs, size), q += 4;
      else if (left == 3)
        add_rows<3>(weights, s.block.values, num_rows, outputs, size), q += 3;
      else if (left == 2)
        add_rows<2>(weights, s.block.values, num_rows, outputs, size), q += 2;
      else
        add_rows<1>(weights, s.block.values, num_rows, outputs, size), q += 1;
    }
  }
  for (int q = 0; q < num_queries; ++q) {
    const float factor = counts[q / group] ? 1.0f / s.sums[q] : 0.0f;
    for (int i = 0; i < cache.size; ++i) out[offset(q) + i] = s.outputs[q * size + i] * factor;
  }
}

}  // namespace

// Attention of `num_tokens` queries `[tokens heads size]`. A token sees the first `counts[t]` rows
// of its list `table[lists[t]]`; one that sees none gets zeros.
extern "C" void mor_paged_attention(int64_t format, const float* query, float* out,
                                    const void* data, const float* scales, const int64_t* table,
                                    const int64_t* lists, const int64_t* counts, int64_t num_tokens,
                                    int64_t num_heads, int64_t list_size, int64_t num_vectors,
                                    int64_t num_kv_heads, int64_t size, int64_t num_threads,
                                    float scale) {
  const Cache cache{data, scales, num_vectors, num_kv_heads, size};
  const auto read = format == kFloat      ? &Block::read<float>
                    : format == kBFloat16 ? &Block::read<BFloat16>
                    : format == kFp8      ? &Block::read<Fp8>
                                          : &Block::read<int8_t>;
  const auto attend = size == 4 * kWidth   ? attend_tile<4>
                      : size == 8 * kWidth ? attend_tile<8>
                                           : attend_tile<0>;
  struct Tile {
    int64_t first, num_tokens;
  };
  std::vector<Tile> tiles;
  for (int64_t first = 0, next; first < num_tokens; first = next) {
    for (next = first + 1;
         next < std::min(num_tokens, first + kTokens) && lists[next] == lists[first];)
      ++next;
    tiles.push_back({first, next - first});
  }
  const int64_t num_items = tiles.size() * num_kv_heads, token_size = num_heads * size;
#pragma omp parallel num_threads(num_threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_items; ++item) {
      const auto [first, n] = tiles[item / num_kv_heads];
      attend(cache, read, table + lists[first] * list_size, counts + first, n, item % num_kv_heads,
             num_heads / num_kv_heads, scale, query + first * token_size, out + first * token_size,
             token_size, scratch);
    }
  }
}
