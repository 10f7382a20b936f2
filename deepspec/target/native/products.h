// x Wᵀ of bfloat16 x, summed in float32.

#pragma once

#include <algorithm>

#include "matrix.h"
#include "tiles.h"

namespace {

constexpr int TOKENS = 6;                       // of a tile: what 32 registers hold

// Which lines of the next blocks, of the four that a pair of inputs has there, a tile asks for while it computes. Where several
// tiles read the same blocks, memory would wait for all but the first.
struct Ahead {
  long from, to;
};

// Sums of T tokens and B blocks of outputs, which stand side by side. `sums`: of the inputs of each token in groups of 32, for weights in 4 bits.
template <int T, int B>
inline void tile(const Matrix& m, const bf16* x, const float* sums, long block, Ahead ahead, __m512 (&acc)[T][B]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[t][b] = _mm512_setzero_ps();
  if (m.bits == 16) {
    const bf16* w = dense_block(m, block);
    for (long k = 0; k < m.in; k += 2) {
      __m512bh weights[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) weights[b] = pairs(w + (k * SIDE + b * 2) * LANES);
      for (long line = ahead.from; line < ahead.to; ++line)
        _mm_prefetch((const char*)(w + ((m.in + k) * SIDE + line * 2) * LANES), _MM_HINT_T1);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512bh inputs = pair(x + t * m.in + k);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[t][b] = _mm512_dpbf16_ps(acc[t][b], inputs, weights[b]);
      }
    }
    return;
  }
  const __m512i table = numbers();
  const long groups = m.in / QUANT, stride = groups * QUANT_BYTES;
  const uint8_t* w = (const uint8_t*)m.weight + block * stride;
  for (long g = 0; g < groups; ++g, w += QUANT_BYTES) {
    __m512 part[T][B];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) part[t][b] = _mm512_setzero_ps();
    for (int four = 0; four < 4; ++four) {
      __m512i levels[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) levels[b] = _mm512_loadu_si512(w + b * stride + 64 * four);
      for (int k = 0; k < 4; ++k) {
        __m512bh weights[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          weights[b] = (__m512bh)_mm512_permutexvar_epi16(levels[b], table);
          levels[b] = _mm512_srli_epi16(levels[b], 4);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m512bh inputs = pair(x + t * m.in + g * QUANT + 8 * four + 2 * k);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) part[t][b] = _mm512_dpbf16_ps(part[t][b], inputs, weights[b]);
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const bf16* scale = (const bf16*)(w + b * stride + 256);
      const __m512 scales = load(scale), zeros = load(scale + LANES);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        acc[t][b] = _mm512_fmadd_ps(part[t][b], scales, acc[t][b]);
        acc[t][b] = _mm512_fmadd_ps(_mm512_set1_ps(sums[t * groups + g]), zeros, acc[t][b]);
      }
    }
  }
}

template <int T, int B, class Put>
inline void put_tile(const Matrix& m, const bf16* x, const float* sums, long first, long block, Ahead ahead, Put& put) {
  __m512 acc[T][B];
  tile<T, B>(m, x + first * m.in, sums ? sums + first * (m.in / QUANT) : nullptr, block, ahead, acc);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) put(first + t, block + b, acc[t][b]);
}

template <int B, class Put>
inline void over_tokens(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, Put& put) {
  const long tiles = (tokens + TOKENS - 1) / TOKENS;
  for (long i = 0; i < tiles; ++i) {
    const long t = tokens * i / tiles;
    const Ahead ahead = tiles > 1 && B == SIDE ? Ahead{SIDE * i / tiles, SIDE * (i + 1) / tiles} : Ahead{0, 0};
    switch (tokens * (i + 1) / tiles - t) {
      case 6: put_tile<6, B>(m, x, sums, t, block, ahead, put); break;
      case 5: put_tile<5, B>(m, x, sums, t, block, ahead, put); break;
      case 4: put_tile<4, B>(m, x, sums, t, block, ahead, put); break;
      case 3: put_tile<3, B>(m, x, sums, t, block, ahead, put); break;
      case 2: put_tile<2, B>(m, x, sums, t, block, ahead, put); break;
      case 1: put_tile<1, B>(m, x, sums, t, block, ahead, put); break;
    }
  }
}

// x Wᵀ of some blocks of outputs; `put` takes (token, block, 16 sums).
template <class Put>
void over_blocks(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, long end, Put& put) {
#ifdef __AMX_BF16__
  if (by_tiles(m)) return tiles_over_blocks(m, x, sums, tokens, block, end, put);
#endif
  const long most = m.bits == 16 ? SIDE : 2;  // in 4 bits each output needs twice the registers
  over_runs(block, end, most, [&](auto width, long first) {
    over_tokens<decltype(width)::value>(m, x, sums, tokens, first, put);
  });
}

// x Wᵀ of this thread's share of `blocks` of them, from the first on. Blocks that stand side by side stay together: half a
// stream is read hardly sooner than the whole.
template <class Put>
void product(const Matrix& m, const bf16* x, long tokens, long first, long blocks, int thread, int threads, Put put) {
  auto share = [&](long i) { return first + (i < threads ? blocks * i / threads / SIDE * SIDE : blocks); };
  over_blocks(m, x, group_sums(m, x, tokens), tokens, share(thread), share(thread + 1), put);
}

inline __mmask16 outputs(const Matrix& m, long block) {
  return lanes(m.out - block * LANES);
}

// y [tokens, out] = x Wᵀ + bias + residual
void linear(const Matrix& m, const bf16* x, const bf16* residual, bf16* y, long tokens, int thread, int threads) {
  product(m, x, tokens, 0, m.blocks(), thread, threads, [&](long t, long block, __m512 sum) {
    const long first = block * LANES;
    const __mmask16 there = outputs(m, block);
    if (m.bias) sum = _mm512_add_ps(sum, load(m.bias + first, there));
    if (residual) sum = _mm512_add_ps(sum, load(residual + t * m.out + first, there));
    store(y + t * m.out + first, sum, there);
  });
}

}  // namespace
