// Products by AMX's tiles, where the CPU has them: 16 tokens by 32 inputs times 32 inputs by 16 outputs. All tokens' sums are taken
// by them then, of one token too, since the order of their additions is another.

#pragma once

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "matrix.h"

namespace {

constexpr long TALL = 16, DEEP = 32;  // tokens, inputs
constexpr long GROUPS = 4;             // of 32 inputs in 4 bits that are multiplied before their scales

bool tiles_allowed = false;

inline bool by_tiles(const Matrix& m) { return tiles_allowed && m.in % DEEP == 0; }

// Tokens of a tile, where all tokens go into tiles of one height.
inline long height(long tokens) {
  const long tiles = (tokens + TALL - 1) / TALL;
  return (tokens + tiles - 1) / tiles;
}

// What is at this address is in memory now: GCC does not know that loading a tile or shapes reads it.
inline void written(const void* at) { asm volatile("" ::"r"(at) : "memory"); }

// Sums 0 to 3, tokens 4, weights 5 to 7.
void shape_tiles(long tokens) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) shapes.rows[i] = i < 5 ? tokens : TALL;
  written(&shapes);
  _tile_loadconfig(&shapes);
  written(&shapes);  // and its room is not another's before it was read
}

// B tiles of sums found [rows][B][16] of rows [rows][depth] and pairs [depth / 2][side][16][2], of which the first B lie side by
// side. As many rows as the tiles have.
template <int B>
inline void multiply(const bf16* rows, const bf16* pairs, long side, long depth, float* found) {
  const long step = side * 2 * LANES, stride = step * sizeof(bf16);
  written(rows);
  written(pairs);
  _tile_zero(0);
  if (B > 1) _tile_zero(1);
  if (B > 2) _tile_zero(2);
  if (B > 3) _tile_zero(3);
  for (long k = 0; k < depth; k += DEEP, pairs += DEEP / 2 * step) {
    _tile_loadd(4, rows + k, depth * sizeof(bf16));
    _tile_loadd(5, pairs, stride);
    _tile_dpbf16ps(0, 4, 5);
    if (B > 1) {
      _tile_loadd(6, pairs + 2 * LANES, stride);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (B > 2) {
      _tile_loadd(7, pairs + 4 * LANES, stride);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (B > 3) {
      _tile_loadd(5, pairs + 6 * LANES, stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, found, B * 64);
  if (B > 1) _tile_stored(1, found + LANES, B * 64);
  if (B > 2) _tile_stored(2, found + 2 * LANES, B * 64);
  if (B > 3) _tile_stored(3, found + 3 * LANES, B * 64);
}

// Sums of some tokens with one block of weights in 4 bits.
void quantised_tiles(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, float* found) {
  alignas(64) static thread_local bf16 weights[GROUPS][QUANT * LANES];
  alignas(64) static thread_local float parts[GROUPS][TALL * LANES];
  const __m512i table = numbers();
  const long groups = m.in / QUANT;
  const uint8_t* w = (const uint8_t*)m.weight + block * groups * QUANT_BYTES;
  std::fill_n(found, tokens * LANES, 0.f);
  for (long g = 0; g < groups; g += GROUPS, w += GROUPS * QUANT_BYTES) {
    const long some = std::min(GROUPS, groups - g);
    for (long i = 0; i < some; ++i)
      for (int four = 0; four < 4; ++four) {
        __m512i levels = _mm512_loadu_si512(w + i * QUANT_BYTES + 64 * four);
        for (int k = 0; k < 4; ++k, levels = _mm512_srli_epi16(levels, 4))
          _mm512_store_si512(weights[i] + (4 * four + k) * 2 * LANES, _mm512_permutexvar_epi16(levels, table));
      }
    written(weights);
    for (long i = 0; i < some; i += 2) {
      _tile_zero(0);
      _tile_loadd(4, x + (g + i) * QUANT, m.in * sizeof(bf16));
      _tile_loadd(5, weights[i], 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_stored(0, parts[i], 64);
      if (i + 1 < some) {
        _tile_zero(1);
        _tile_loadd(3, x + (g + i + 1) * QUANT, m.in * sizeof(bf16));
        _tile_loadd(6, weights[i + 1], 64);
        _tile_dpbf16ps(1, 3, 6);
        _tile_stored(1, parts[i + 1], 64);
      }
    }
    for (long t = 0; t < tokens; ++t) {
      __m512 sum = _mm512_loadu_ps(found + t * LANES);
      for (long i = 0; i < some; ++i) {
        const bf16* scale = (const bf16*)(w + i * QUANT_BYTES + 256);
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(parts[i] + t * LANES), load(scale), sum);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(sums[t * groups + g + i]), load(scale + LANES), sum);
      }
      _mm512_storeu_ps(found + t * LANES, sum);
    }
  }
}

template <int B, class Put>
void tiles_over_tokens(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, Put& put) {
  alignas(64) float found[TALL * B * LANES];
  const long tall = height(tokens);
  for (long next = 0; next < tokens; next += tall) {
    const long first = std::min(next, tokens - tall);  // the last tile may have some tokens again
    if (m.bits == 16) multiply<B>(x + first * m.in, dense_block(m, block), SIDE, m.in, found);
    else quantised_tiles(m, x + first * m.in, sums + first * (m.in / QUANT), tall, block, found);
    for (long t = next - first; t < tall; ++t)
      for (int b = 0; b < B; ++b) put(first + t, block + b, _mm512_load_ps(found + (t * B + b) * LANES));
  }
}

template <class Put>
void tiles_over_blocks(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, long end, Put& put) {
  if (!tokens) return;
  shape_tiles(height(tokens));
  over_runs(block, end, m.bits == 16 ? SIDE : 1, [&](auto width, long first) {
    tiles_over_tokens<decltype(width)::value>(m, x, sums, tokens, first, put);
  });
  _tile_release();
}

// Ask the system for tiles; whether it grants them.
bool ask_for_tiles() {
  constexpr long ask = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tiles_allowed = !syscall(SYS_arch_prctl, ask, tiles);
}

}  // namespace

#endif
