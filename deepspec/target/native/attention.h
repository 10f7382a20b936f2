// Attention of new tokens over the cache.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "matrix.h"
#include "tiles.h"

namespace {

struct Layer {
  Matrix qkv, out, gate_up, down;
  const bf16 *norm, *mlp_norm, *q_norm, *k_norm;  // the last two or none
  float eps, mlp_eps, q_eps, k_eps, scale;
  int32_t heads, kv_heads, head_dim, window;  // a window of 0 is none
};

struct Pass {
  int64_t tokens, requests, threads, bidirectional, rope_dim;
  int64_t rope_rows;                            // of cos and sin: one a position, or 0: one a token
  const int64_t *rows, *starts, *counts;        // [requests]
  const int64_t *hidden, *hidden_from;          // columns that a token does not see: hidden[hidden_from[t] : hidden_from[t + 1]];
                                                // the latter is none for a pass without a mask, the former also where all is seen
  const int64_t* positions;                     // [tokens]
  const bf16 *cos, *sin;                        // [rope_rows or tokens, rope_dim], the first half of sin negated
  bf16 *normed, *projected, *attended, *middle, *gated;  // room for each token

  bool rotates() const {
    return !rope_rows || std::all_of(positions, positions + tokens, [&](int64_t at) { return at >= 0 && at < rope_rows; });
  }
};

struct Cache {
  bf16 *keys, *values;  // [slots, kv_heads, length, head_dim]
  int64_t length;
};

// Keys or values of a layer, whatever they are made of.
struct Entries {
  char* at;  // [slots, heads, length, width]
  int64_t heads, length, width;  // in bytes, the last
};

// Of a slot, entries start + kept[i] → start + i; none is written before it is read, since kept[i] ≥ i.
inline void compact(const Entries& e, long slot, long start, const int64_t* kept, long count) {
  for (long head = 0; head < e.heads; ++head) {
    char* own = e.at + ((slot * e.heads + head) * e.length + start) * e.width;
    for (long i = 0; i < count; ++i)
      if (kept[i] != i) std::memcpy(own + i * e.width, own + kept[i] * e.width, e.width);
  }
}

#ifdef __AMX_BF16__

// As `score`, 16 keys at a time.
template <int Q>
void score_by_tiles(const bf16* queries, const bf16* keys, const bf16* values, long count, long dim, float* scores) {
  const long tall = std::min(count, TALL);
  shape_tiles(tall);
  for (long next = 0; next < count; next += tall) {
    const long first = std::min(next, count - tall);  // the last tile may have some keys again
    for (long k = next * dim; k < (first + tall) * dim; k += 2 * LANES)
      _mm_prefetch((const char*)(values + k), _MM_HINT_T1);
    multiply<Q>(keys + first * dim, queries, Q, dim, scores + first * Q * LANES);
  }
  _tile_release();
}

#endif

// Scores of `Q` groups of 16 queries with `count` keys. queries [dim / 2][16·Q][2], scores [count][16·Q]. The keys' values are
// asked for meanwhile.
template <int Q>
void score(const bf16* queries, const bf16* keys, const bf16* values, long count, long dim, float* scores) {
#ifdef __AMX_BF16__
  if (tiles_allowed && dim % DEEP == 0) return score_by_tiles<Q>(queries, keys, values, count, dim, scores);
#endif
  constexpr int KEYS = Q == 1 ? 8 : 4;
  auto some = [&](auto number, long j) {
    constexpr int N = decltype(number)::value;
    __m512 acc[N][Q];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 3
      for (int q = 0; q < Q; ++q) acc[n][q] = _mm512_setzero_ps();
    for (long k = j * dim; k < (j + N) * dim; k += 2 * LANES) _mm_prefetch((const char*)(values + k), _MM_HINT_T1);
    for (long k = 0; k < dim; k += 2) {
      __m512bh asked[Q];
#pragma GCC unroll 3
      for (int q = 0; q < Q; ++q) asked[q] = pairs(queries + (k * Q + q * 2) * LANES);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const __m512bh key = pair(keys + (j + n) * dim + k);
#pragma GCC unroll 3
        for (int q = 0; q < Q; ++q) acc[n][q] = _mm512_dpbf16_ps(acc[n][q], asked[q], key);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 3
      for (int q = 0; q < Q; ++q) _mm512_storeu_ps(scores + ((j + n) * Q + q) * LANES, acc[n][q]);
  };
  long j = 0;
  for (; j + KEYS <= count; j += KEYS) some(std::integral_constant<int, KEYS>(), j);
  for (; j < count; ++j) some(std::integral_constant<int, 1>(), j);
}

// Two rows of 16-bit numbers as pairs of one of each. `vdpbf16ps` adds the product of a pair's second numbers first, then that
// of its first ones, each with a rounding of its own: so with an earlier key second, sums over keys are taken in the keys'
// order, however they fall into pairs.
inline __m512i paired(__m512i second, __m512i first, bool high) {
  return high ? _mm512_unpackhi_epi16(first, second) : _mm512_unpacklo_epi16(first, second);
}

// Softmax down the columns of scores [count][width], which become shares in bfloat16, [⌈count / 2⌉][width] pairs of keys; sums
// [width] are what the shares, left undivided, add up to.
void softmax(float* scores, long count, long width, float scale, float* sums) {
  alignas(64) static const uint16_t turns[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512 minus = _mm512_set1_ps(-__builtin_inff()), factor = _mm512_set1_ps(scale);
  const __m512i order = _mm512_load_si512(turns);
  for (long q = 0; q < width; q += LANES) {
    __m512 most = minus, sum = _mm512_setzero_ps();
    for (long j = 0; j < count; ++j) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + j * width + q));
    auto share = [&](long j) {
      const __m512 x = _mm512_loadu_ps(scores + j * width + q);
      const __mmask16 seen = _mm512_cmp_ps_mask(x, minus, _CMP_NEQ_OQ);
      const __m512 found = _mm512_maskz_mov_ps(seen, exp(_mm512_mul_ps(_mm512_sub_ps(x, most), factor)));
      sum = _mm512_add_ps(sum, found);
      return found;
    };
    for (long j = 0; j < count; j += 2) {
      const __m512 earlier = share(j), later = j + 1 < count ? share(j + 1) : _mm512_setzero_ps();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(earlier, later);
      _mm512_storeu_si512(scores + j / 2 * width + q, _mm512_permutexvar_epi16(order, both));
    }
    _mm512_storeu_ps(sums + q, sum);
  }
}

// N rows of Σ share · value over `count` keys, 32·C numbers of a head, or the first `left` of them where there are fewer;
// shares [⌈count / 2⌉][width] pairs, values [count][dim].
template <int N, int C>
inline void mix(const float* shares, long width, const bf16* values, long count, long dim, long left, const float* sums,
                bf16** to) {
  const __mmask32 there = left >= 2 * LANES ? 0xFFFFFFFF : (1u << left) - 1;
  __m512 acc[N][2 * C];
#pragma GCC unroll 6
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * C; ++c) acc[n][c] = _mm512_setzero_ps();
  for (long j = 0; j < count; j += 2) {
    const bf16 *earlier = values + j * dim, *later = earlier + dim;
    __m512i value[2 * C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512i one = _mm512_maskz_loadu_epi16(there, earlier + c * 2 * LANES);
      const __m512i other = _mm512_maskz_loadu_epi16(j + 1 < count ? there : 0, later + c * 2 * LANES);
      value[2 * c] = paired(one, other, false), value[2 * c + 1] = paired(one, other, true);
    }
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      const __m512bh share = pair((const bf16*)(shares + j / 2 * width + n));
#pragma GCC unroll 4
      for (int c = 0; c < 2 * C; ++c) acc[n][c] = _mm512_dpbf16_ps(acc[n][c], share, (__m512bh)value[c]);
    }
  }
  // Numbers 4 to 7 of each eight came into the second sum.
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 6
  for (int n = 0; n < N; ++n) {
    const __m512 sum = _mm512_set1_ps(sums[n]);
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512 one = _mm512_div_ps(acc[n][2 * c], sum), other = _mm512_div_ps(acc[n][2 * c + 1], sum);
      bf16* at = to[n] + c * 2 * LANES;
      store(at, _mm512_permutex2var_ps(one, low, other));
      if (left > LANES) store(at + LANES, _mm512_permutex2var_ps(one, high, other));
    }
  }
}

template <int C>
void mix_all(const float* shares, long lanes, long width, const bf16* values, long count, long dim, long left,
             const float* sums, bf16** to) {
  long n = 0;
  for (; n + 6 <= lanes; n += 6) mix<6, C>(shares + n, width, values, count, dim, left, sums + n, to + n);
  for (; n + 3 <= lanes; n += 3) mix<3, C>(shares + n, width, values, count, dim, left, sums + n, to + n);
  for (; n < lanes; ++n) mix<1, C>(shares + n, width, values, count, dim, left, sums + n, to + n);
}

// Attention of `tokens` tokens of one request under one key head.
void attend(const Layer& l, const Pass& p, const Cache& c, long request, long first, long tokens, long offset, long head) {
  const long dim = l.head_dim, group = l.heads / l.kv_heads, lanes = tokens * group;
  const long blocks = (lanes + LANES - 1) / LANES, width = blocks * LANES;
  const long start = p.starts[request], all = start + p.counts[request];
  const long keys = p.bidirectional || p.hidden_from ? all : start + offset + tokens;
  static thread_local std::vector<float> scores, sums;
  static thread_local std::vector<bf16> queries;
  static thread_local std::vector<bf16*> to;
  scores.resize(keys * width);
  sums.resize(width);
  queries.assign(dim * width, 0);
  to.resize(lanes);
  for (long t = 0; t < tokens; ++t)
    for (long g = 0; g < group; ++g) {
      const long lane = t * group + g, at = (head * group + g) * dim;
      const bf16* query = p.projected + (first + t) * l.qkv.out + at;
      for (long k = 0; k < dim; k += 2) std::memcpy(&queries[(k * width) + lane * 2], query + k, 2 * sizeof(bf16));
      to[lane] = p.attended + (first + t) * l.heads * dim + at;
    }
  const long from = (p.rows[request] * l.kv_heads + head) * c.length * dim;
  const bf16 *key = c.keys + from, *value = c.values + from;
  if (blocks == 1) score<1>(queries.data(), key, value, keys, dim, scores.data());
  else if (blocks == 2) score<2>(queries.data(), key, value, keys, dim, scores.data());
  else score<3>(queries.data(), key, value, keys, dim, scores.data());
  const float minus = -__builtin_inff();
  auto hide = [&](long column, long t) {
    for (long g = 0; g < group; ++g) scores[column * width + t * group + g] = minus;
  };
  for (long t = 0; t < tokens; ++t) {
    const long token = first + t;
    if (p.hidden_from)
      for (long i = p.hidden_from[token]; i < p.hidden_from[token + 1]; ++i) hide(p.hidden[i], t);
    else if (!p.bidirectional)
      for (long column = start + offset + t + 1; column < keys; ++column) hide(column, t);
    if (l.window) {
      const long last = p.positions[token] - l.window;  // the last position that is out of sight
      for (long column = 0; column <= std::min(last, start - 1); ++column) hide(column, t);
      for (long column = start; column < keys; ++column)
        if (p.positions[first - offset + column - start] <= last) hide(column, t);
    }
  }
  softmax(scores.data(), keys, width, l.scale, sums.data());
  for (long d = 0, by; d < dim; d += by) {
    const long left = dim - d;
    by = left >= 64 ? 64 : 32;
    (by == 64 ? mix_all<2> : mix_all<1>)(scores.data(), lanes, width, value + d, keys, dim, left, sums.data(), to.data());
    for (auto& each : to) each += by;
  }
}

// The tasks are a key head and some tokens of a request: as many as its queries fill registers for, fewer where there would
// be too few tasks for the threads. Those of a head follow one another, so few heads are read by two threads.
void attention(const Layer& l, const Pass& p, const Cache& c, int thread, int threads) {
  const long room = 3 * LANES / (l.heads / l.kv_heads);
  auto tasks = [&](long most) {
    long count = 0;
    for (long r = 0; r < p.requests; ++r) count += (p.counts[r] + most - 1) / most * l.kv_heads;
    return count;
  };
  const long longest = *std::max_element(p.counts, p.counts + p.requests);
  const long most = tasks(room) >= 8 * threads ? room : std::min(room, std::max(1L, longest / threads));
  const long all = tasks(most), begin = all * thread / threads, end = all * (thread + 1) / threads;
  long task = 0, first = 0;
  for (long r = 0; r < p.requests; first += p.counts[r++])
    for (long head = 0; head < l.kv_heads; ++head)
      for (long offset = 0; offset < p.counts[r]; offset += most, ++task)
        if (begin <= task && task < end)
          attend(l, p, c, r, first + offset, std::min(most, p.counts[r] - offset), offset, head);
}

}  // namespace
