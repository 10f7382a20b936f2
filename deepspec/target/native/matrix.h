// Weights as products read them.
//
// A matrix [out, in] is stored in blocks of 16 outputs, four of them side by side, by pairs of inputs:
// [out / 64][in / 2][4][16][2]. One 64-byte load then has what `vdpbf16ps` multiplies with a pair of inputs of one token, and
// four blocks are read as one stream. In 4 bits each block stands alone, and has for each 32 inputs 256 bytes of levels and
// behind them 16 scales and 16 zeros in bfloat16; a 16-bit word holds the levels of one place in four pairs that follow each
// other.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

constexpr long SIDE = 4;                        // blocks side by side
constexpr long QUANT = 32;                      // inputs that share a scale
constexpr long QUANT_BYTES = 256 + 2 * 2 * 16;  // of 16 outputs

struct Matrix {
  const void* weight;
  const bf16* bias;  // or none
  int64_t out, in, bits;

  long blocks() const { return (out + LANES - 1) / LANES; }
};

// A block's weights in bfloat16.
inline const bf16* dense_block(const Matrix& m, long block) {
  return (const bf16*)m.weight + (block / SIDE * m.in * SIDE + block % SIDE * 2) * LANES;
}

// `some` of (how many, from which on) for blocks by four, two or one, at most `most`, and none across what lies side by side.
template <class Some>
inline void over_runs(long block, long end, long most, Some some) {
  while (block < end) {
    const long left = std::min(end - block, most - block % most);
    if (left == SIDE) some(std::integral_constant<int, SIDE>(), block);
    else if (left > 1) some(std::integral_constant<int, 2>(), block);
    else some(std::integral_constant<int, 1>(), block);
    block += left == SIDE ? SIDE : std::min(left, 2L);
  }
}

// Levels 0..15 of weights in 4 bits become the numbers −8..7; an index has five bits, of which this table ignores the highest.
inline __m512i numbers() {
  alignas(64) static const bf16 table[32] = {
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
  return _mm512_load_si512(table);
}

// Sums of each token's inputs in groups of 32; none for a weight in bfloat16, which needs none.
const float* group_sums(const Matrix& m, const bf16* x, long tokens) {
  if (m.bits == 16) return nullptr;
  static thread_local std::vector<float> sums;
  const long groups = m.in / QUANT;
  sums.resize(tokens * groups);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
  for (long i = 0; i < tokens * groups; ++i)
    sums[i] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), pairs(x + i * QUANT), ones));
  return sums.data();
}

}  // namespace
