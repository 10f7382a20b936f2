// Sixteen numbers at a time: float32 in registers, bfloat16 or float32 in memory.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

using bf16 = uint16_t;
constexpr long LANES = 16;

// Which of 16 lanes are there where `left` numbers are.
inline __mmask16 lanes(long left) { return left >= LANES ? 0xFFFF : (__mmask16)((1u << left) - 1); }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512 load(const bf16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
inline void store(bf16* p, __m512 x, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x)); }
inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, __m512 x, __mmask16 m) { _mm512_mask_storeu_ps(p, m, x); }
inline __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh pair(const bf16* p) {
  int32_t both;
  std::memcpy(&both, p, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// e^x, to a unit in the last place or two; of what is not a number, the same.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), x);  // of two of which one is not a number, the second
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

}  // namespace
