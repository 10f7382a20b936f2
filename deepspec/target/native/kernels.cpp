// Kernels for a decoder layer on CPUs with AVX512-BF16: weights in bfloat16 or in 4 bits, activations in bfloat16, sums in
// float32. They are made for passes over few tokens, which take as long as reading the weights takes.
//
// Every result of a token is computed by the same operations in the same order, whatever other tokens, requests or threads
// share the pass: so a token that is verified in a tree has, to the bit, the states that it has when it is decoded alone.
//
// A matrix [out, in] is stored in blocks of 16 outputs, four of them side by side, by pairs of inputs:
// [out / 64][in / 2][4][16][2]. One 64-byte load then has what `vdpbf16ps` multiplies with a pair of inputs of one token, and
// four blocks are read as one stream. In 4 bits each block stands alone, and has for each 32 inputs 256 bytes of levels and
// behind them 16 scales and 16 zeros in bfloat16; a 16-bit word holds the levels of one place in four pairs that follow each
// other.

#include <immintrin.h>
#include <omp.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr long LANES = 16;
constexpr long SIDE = 4;                        // blocks side by side
constexpr long QUANT = 32;                      // inputs that share a scale
constexpr long QUANT_BYTES = 256 + 2 * 2 * 16;  // of 16 outputs
constexpr int TOKENS = 6;                       // of a tile: what 32 registers hold

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

struct Matrix {
  const void* weight;
  const bf16* bias;  // or none
  int64_t out, in, bits;

  long blocks() const { return (out + LANES - 1) / LANES; }
};

// Levels 0..15 of weights in 4 bits become the numbers −8..7; an index has five bits, of which this table ignores the highest.
inline __m512i numbers() {
  alignas(64) static const bf16 table[32] = {
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
  return _mm512_load_si512(table);
}

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
    const bf16* w = (const bf16*)m.weight + (block / SIDE * m.in * SIDE + block % SIDE * 2) * LANES;
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

#ifdef __AMX_BF16__

// Tiles of AMX, where the CPU has them: 16 tokens by 32 inputs times 32 inputs by 16 outputs. All tokens' sums are taken by them
// then, of one token too, since the order of their additions is another.
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
}

template <int B>
inline void dense_tiles(const Matrix& m, const bf16* x, long block, float* found) {
  const bf16* w = (const bf16*)m.weight + (block / SIDE * m.in * SIDE + block % SIDE * 2) * LANES;
  constexpr long stride = SIDE * 2 * LANES * sizeof(bf16);
  written(x);
  _tile_zero(0);
  if (B > 1) _tile_zero(1);
  if (B > 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < m.in; k += DEEP, w += DEEP * SIDE * LANES) {
    _tile_loadd(4, x + k, m.in * sizeof(bf16));
    _tile_loadd(5, w, stride);
    _tile_dpbf16ps(0, 4, 5);
    if (B > 1) {
      _tile_loadd(6, w + 2 * LANES, stride);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (B > 2) {
      _tile_loadd(7, w + 4 * LANES, stride);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, w + 6 * LANES, stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, found, B * 64);
  if (B > 1) _tile_stored(1, found + LANES, B * 64);
  if (B > 2) {
    _tile_stored(2, found + 2 * LANES, B * 64);
    _tile_stored(3, found + 3 * LANES, B * 64);
  }
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
    if (m.bits == 16) dense_tiles<B>(m, x + first * m.in, block, found);
    else quantised_tiles(m, x + first * m.in, sums + first * (m.in / QUANT), tall, block, found);
    for (long t = next - first; t < tall; ++t)
      for (int b = 0; b < B; ++b) put(first + t, block + b, _mm512_load_ps(found + (t * B + b) * LANES));
  }
}

template <class Put>
void tiles_over_blocks(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, long end, Put& put) {
  if (!tokens) return;
  shape_tiles(height(tokens));
  while (block < end) {
    const long left = m.bits == 16 ? std::min(end - block, SIDE - block % SIDE) : 1;
    if (left == SIDE) tiles_over_tokens<SIDE>(m, x, sums, tokens, block, put);
    else if (left > 1) tiles_over_tokens<2>(m, x, sums, tokens, block, put);
    else tiles_over_tokens<1>(m, x, sums, tokens, block, put);
    block += left == SIDE ? SIDE : std::min(left, 2L);
  }
  _tile_release();
}

#endif

// x Wᵀ of some blocks of outputs; `put` takes (token, block, 16 sums).
template <class Put>
void over_blocks(const Matrix& m, const bf16* x, const float* sums, long tokens, long block, long end, Put& put) {
#ifdef __AMX_BF16__
  if (by_tiles(m)) return tiles_over_blocks(m, x, sums, tokens, block, end, put);
#endif
  const long most = m.bits == 16 ? SIDE : 2;  // in 4 bits each output needs twice the registers
  while (block < end) {
    const long left = std::min(end - block, most - block % most);
    if (left == SIDE) over_tokens<SIDE>(m, x, sums, tokens, block, put);
    else if (left > 1) over_tokens<2>(m, x, sums, tokens, block, put);
    else over_tokens<1>(m, x, sums, tokens, block, put);
    block += left == SIDE ? SIDE : std::min(left, 2L);
  }
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

// log Σ exp of a token's logits, in any parts: 16 sums of a run of blocks, then a sum of the run, then of the token. Runs have
// one length whatever the threads and wherever the logits come from, so the bits are always the same.
constexpr long NORM_RUN = 32;  // blocks
constexpr float LEAST = -1e30f;  // a logit that is not there

inline void add_exps(float* tops, float* sums, __m512 logits, __mmask16 there) {
  logits = _mm512_mask_mov_ps(_mm512_set1_ps(LEAST), there, logits);
  const __m512 before = _mm512_loadu_ps(tops), top = _mm512_max_ps(before, logits);
  const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums), exp(_mm512_sub_ps(before, top)));
  _mm512_storeu_ps(tops, top);
  _mm512_storeu_ps(sums, _mm512_add_ps(sum, exp(_mm512_sub_ps(logits, top))));
}

inline void sum_of_run(const float* tops, const float* sums, float& most, float& total) {
  const __m512 top = _mm512_loadu_ps(tops), sum = _mm512_loadu_ps(sums);
  most = _mm512_reduce_max_ps(top);
  total = _mm512_reduce_add_ps(_mm512_mul_ps(sum, exp(_mm512_sub_ps(top, _mm512_set1_ps(most)))));
}

// most, total: of each run, `stride` apart
inline float log_sum(const float* most, const float* total, long runs, long stride) {
  float highest = LEAST;
  double sum = 0;
  for (long run = 0; run < runs; ++run) highest = std::max(highest, most[run * stride]);
  for (long run = 0; run < runs; ++run)
    sum += (double)total[run * stride] * std::exp((double)most[run * stride] - highest);
  return highest + std::log(sum);
}

// log Σ exp of each token's outputs, rounded to bfloat16 as they are where they are written.
void log_norm(const Matrix& m, const bf16* x, float* y, long tokens, long threads) {
  const long blocks = m.blocks(), runs = (blocks + NORM_RUN - 1) / NORM_RUN;
  std::vector<float> most(runs * tokens), total(runs * tokens);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> tops(tokens * LANES), sums(tokens * LANES);
    const float* groups = group_sums(m, x, tokens);
    auto put = [&](long t, long block, __m512 logits) {
      const __mmask16 there = outputs(m, block);
      if (m.bias) logits = _mm512_add_ps(logits, load(m.bias + block * LANES, there));
      add_exps(&tops[t * LANES], &sums[t * LANES], widen((__m256i)_mm512_cvtneps_pbh(logits)), there);
    };
#pragma omp for schedule(static, 1)
    for (long run = 0; run < runs; ++run) {
      std::fill(tops.begin(), tops.end(), LEAST);
      std::fill(sums.begin(), sums.end(), 0.f);
      over_blocks(m, x, groups, tokens, run * NORM_RUN, std::min(blocks, (run + 1) * NORM_RUN), put);
      for (long t = 0; t < tokens; ++t)
        sum_of_run(&tops[t * LANES], &sums[t * LANES], most[run * tokens + t], total[run * tokens + t]);
    }
#pragma omp for
    for (long t = 0; t < tokens; ++t) y[t] = log_sum(&most[t], &total[t], runs, tokens);
  }
}

// The same of logits that are written [rows, width].
void log_norm_of(const bf16* logits, float* y, long rows, long width, long threads) {
  const long blocks = (width + LANES - 1) / LANES, runs = (blocks + NORM_RUN - 1) / NORM_RUN;
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row) {
    std::vector<float> most(runs), total(runs);
    for (long run = 0; run < runs; ++run) {
      float tops[LANES], sums[LANES] = {};
      std::fill_n(tops, LANES, LEAST);
      for (long block = run * NORM_RUN; block < std::min(blocks, (run + 1) * NORM_RUN); ++block) {
        const __mmask16 there = lanes(width - block * LANES);
        add_exps(tops, sums, load(logits + row * width + block * LANES, there), there);
      }
      sum_of_run(tops, sums, most[run], total[run]);
    }
    y[row] = log_sum(most.data(), total.data(), runs, 1);
  }
}

// y = x / rms(x) · weight, of n numbers, a multiple of 16; returns 1 / rms(x).
template <class Number>
inline float norm(const Number* x, const Number* weight, float eps, Number* y, long n) {
  constexpr __mmask16 all = 0xFFFF;
  __m512 squares = _mm512_setzero_ps();
  for (long i = 0; i < n; i += LANES) {
    const __m512 v = load(x + i, all);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float rate = 1.f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / n + eps);
  const __m512 scale = _mm512_set1_ps(rate);
  for (long i = 0; i < n; i += LANES)
    store(y + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i, all), scale), load(weight + i, all)), all);
  return rate;
}

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

// What stands before the layers of a decoder and behind them.
struct Ends {
  const int64_t* ids;             // [tokens]
  const bf16 *embeddings, *norm;  // [vocab, d], [d]
  bf16* last;                     // [tokens, d], the last layer's states under the norm
  int64_t vocab;
  float eps;
  const Matrix* head;             // or none
  bf16* logits;                   // [tokens, head.out]

  bool knows(long tokens) const {
    return std::all_of(ids, ids + tokens, [&](int64_t id) { return id >= 0 && id < vocab; });
  }
};

// What a block draft makes of the target's features: keys and values of its layers.
struct Context {
  Matrix join, kv;  // kv: of each layer its keys, then its values
  const bf16 *norm, *k_norms;  // k_norms [layers, head_dim]
  float eps, k_eps;
  int64_t layers, kv_heads, head_dim;
};

// What a block draft reads of the target before its layers run.
struct Before {
  const Context* context;
  const Pass* pass;
  const bf16* features;  // [tokens, join.in]
};

// Rotate a token's head in place, or its first numbers where the rotation is narrower.
void rotate(bf16* x, const Pass& p, long t) {
  const long dim = p.rope_dim, half = dim / 2, row = (p.rope_rows ? p.positions[t] : t) * dim;
  const bf16 *cos = p.cos + row, *sin = p.sin + row;
  for (long i = 0; i < half; i += LANES) {
    const __mmask16 m = lanes(half - i);
    const __m512 low = load(x + i, m), high = load(x + half + i, m);
    const __m512 first = _mm512_fmadd_ps(high, load(sin + i, m), _mm512_mul_ps(low, load(cos + i, m)));
    const __m512 second =
        _mm512_fmadd_ps(low, load(sin + half + i, m), _mm512_mul_ps(high, load(cos + half + i, m)));
    store(x + i, first, m);
    store(x + half + i, second, m);
  }
}

// Norm and rotate the heads of a token, and put its keys and values into the cache.
void place(const Layer& l, const Pass& p, const Cache& c, long t, long row, long column) {
  const long dim = l.head_dim, heads = l.heads + l.kv_heads;
  bf16* x = p.projected + t * l.qkv.out;
  for (long h = 0; h < heads; ++h) {
    bf16* head = x + h * dim;
    const bool key = h >= l.heads;
    if (l.q_norm) norm(head, key ? l.k_norm : l.q_norm, key ? l.k_eps : l.q_eps, head, dim);
    rotate(head, p, t);
  }
  for (long h = 0; h < l.kv_heads; ++h) {
    const long to = ((row * l.kv_heads + h) * c.length + column) * dim;
    std::memcpy(c.keys + to, x + (l.heads + h) * dim, dim * sizeof(bf16));
    std::memcpy(c.values + to, x + (heads + h) * dim, dim * sizeof(bf16));
  }
}

#ifdef __AMX_BF16__

// As `score`, 16 keys at a time.
template <int Q>
void score_by_tiles(const bf16* queries, const bf16* keys, const bf16* values, long count, long dim, float* scores) {
  constexpr long stride = Q * 2 * LANES * sizeof(bf16);
  const long tall = std::min(count, TALL);
  shape_tiles(tall);
  written(queries);
  for (long next = 0; next < count; next += tall) {
    const long first = std::min(next, count - tall);  // the last tile may have some keys again
    for (long k = next * dim; k < (first + tall) * dim; k += 2 * LANES)
      _mm_prefetch((const char*)(values + k), _MM_HINT_T1);
    _tile_zero(0);
    if (Q > 1) _tile_zero(1);
    if (Q > 2) _tile_zero(2);
    for (long k = 0; k < dim; k += DEEP) {
      const bf16* asked = queries + k * Q * LANES;
      _tile_loadd(4, keys + first * dim + k, dim * sizeof(bf16));
      _tile_loadd(5, asked, stride);
      _tile_dpbf16ps(0, 4, 5);
      if (Q > 1) {
        _tile_loadd(6, asked + 2 * LANES, stride);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (Q > 2) {
        _tile_loadd(7, asked + 4 * LANES, stride);
        _tile_dpbf16ps(2, 4, 7);
      }
    }
    float* to = scores + first * Q * LANES;
    _tile_stored(0, to, Q * 64);
    if (Q > 1) _tile_stored(1, to + LANES, Q * 64);
    if (Q > 2) _tile_stored(2, to + 2 * LANES, Q * 64);
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

// gated [tokens, inner] = silu(gate) · up, the gates rounded in between as the model rounds them. Both products give the
// same outputs to the same thread.
void gated(const Layer& l, const Pass& p, int thread, int threads) {
  const Matrix& m = l.gate_up;
  const long inner = m.out / 2, blocks = inner / LANES;
  auto added = [&](__m512 sum, long block) { return m.bias ? _mm512_add_ps(sum, load(m.bias + block * LANES)) : sum; };
  product(m, p.normed, p.tokens, 0, blocks, thread, threads,
          [&](long t, long block, __m512 sum) { store(p.gated + t * inner + block * LANES, added(sum, block)); });
  const __m512 one = _mm512_set1_ps(1.f), zero = _mm512_setzero_ps();
  product(m, p.normed, p.tokens, blocks, blocks, thread, threads, [&](long t, long block, __m512 sum) {
    bf16* at = p.gated + t * inner + (block - blocks) * LANES;
    const __m512 x = load(at), silu = _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(zero, x))));
    store(at, _mm512_mul_ps(silu, added(sum, block)));
  });
}

// One decoder layer over x [tokens, d], to y, by all threads together.
void decoder_layer(const Layer& l, const Pass& p, const Cache& cache, const bf16* normed, const bf16* x, bf16* y, int me,
                   int all) {
  const long d = l.out.out;
  if (!normed) {
    for (long t = me; t < p.tokens; t += all) norm(x + t * d, l.norm, l.eps, p.normed + t * d, d);
#pragma omp barrier
  }
  linear(l.qkv, normed ? normed : p.normed, nullptr, p.projected, p.tokens, me, all);
#pragma omp barrier
  long first = 0;
  for (long r = 0; r < p.requests; first += p.counts[r++])
    for (long i = 0; i < p.counts[r]; ++i)
      if ((first + i) % all == me) place(l, p, cache, first + i, p.rows[r], p.starts[r] + i);
#pragma omp barrier
  attention(l, p, cache, me, all);
#pragma omp barrier
  linear(l.out, p.attended, x, p.middle, p.tokens, me, all);
#pragma omp barrier
  for (long t = me; t < p.tokens; t += all) norm(p.middle + t * d, l.mlp_norm, l.mlp_eps, p.normed + t * d, d);
#pragma omp barrier
  gated(l, p, me, all);
#pragma omp barrier
  linear(l.down, p.gated, p.middle, y, p.tokens, me, all);
}

// Norm and rotate a token's keys of all layers of a block draft, and put them and its values into their caches.
void place_context(const Context& c, const Pass& p, const Cache* caches, long t, long row, long column) {
  const long dim = c.head_dim, width = c.kv_heads * dim;
  bf16* x = p.projected + t * c.kv.out;
  for (long i = 0; i < c.layers; ++i, x += 2 * width)
    for (long h = 0; h < c.kv_heads; ++h) {
      bf16* key = x + h * dim;
      norm(key, c.k_norms + i * dim, c.k_eps, key, dim);
      rotate(key, p, t);
      const long to = ((row * c.kv_heads + h) * caches[i].length + column) * dim;
      std::memcpy(caches[i].keys + to, key, dim * sizeof(bf16));
      std::memcpy(caches[i].values + to, key + width, dim * sizeof(bf16));
    }
}

// Keys and values of a draft's layers from the target's features, by all threads together.
void write_context(const Before& before, const Cache* caches, int me, int all) {
  const Context& c = *before.context;
  const Pass& p = *before.pass;
  const long d = c.join.out;
  linear(c.join, before.features, nullptr, p.middle, p.tokens, me, all);
#pragma omp barrier
  for (long t = me; t < p.tokens; t += all) norm(p.middle + t * d, c.norm, c.eps, p.normed + t * d, d);
#pragma omp barrier
  linear(c.kv, p.normed, nullptr, p.projected, p.tokens, me, all);
#pragma omp barrier
  long first = 0;
  for (long r = 0; r < p.requests; first += p.counts[r++])
    for (long i = 0; i < p.counts[r]; ++i)
      if ((first + i) % all == me) place_context(c, p, caches, first + i, p.rows[r], p.starts[r] + i);
}

// Laws of tokens: rows of logits or of probabilities, read in runs of the same length whatever the threads. A row that is long
// is shared by the threads; its parts are added up in their order.
constexpr long RUN = 256;

// The largest of a run, and whether all are numbers.
template <class Number>
inline float largest(const Number* x, long count, bool& numbers) {
  const __m512 minus = _mm512_set1_ps(-__builtin_inff());
  __m512 most = minus;
  __mmask16 none = 0;
  for (long i = 0; i < count; i += LANES) {
    const __mmask16 there = lanes(count - i);
    const __m512 v = _mm512_mask_mov_ps(minus, there, load(x + i, there));
    none |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, v);
  }
  numbers = !none;
  return _mm512_reduce_max_ps(most);
}

// What `softmax_rows` keeps of rows between its parts.
struct Softmax {
  long rows, columns, runs;
  std::vector<float> tops, sums, highest, factors;

  Softmax(long rows, long columns)
      : rows(rows), columns(columns), runs((columns + RUN - 1) / RUN), tops(rows * runs), sums(rows * runs), highest(rows),
        factors(rows) {}
};

// probs = softmax(logits / temperature), by all threads of a team; what is −∞ has none, and a row with what is not a number
// has no number.
template <class Number>
void softmax_rows(const Number* logits, float* probs, float temperature, Softmax& s) {
  const long rows = s.rows, columns = s.columns, runs = s.runs;
  const __m512 minus = _mm512_set1_ps(-__builtin_inff()), sharp = _mm512_set1_ps(1 / temperature);
#pragma omp for
  for (long i = 0; i < rows * runs; ++i) {
    const long row = i / runs, from = i % runs * RUN;
    bool numbers;
    const float most = largest(logits + row * columns + from, std::min(RUN, columns - from), numbers);
    s.tops[i] = numbers ? most : __builtin_nanf("");
  }
#pragma omp for
  for (long row = 0; row < rows; ++row) {
    float most = -__builtin_inff();
    for (long i = row * runs; i < (row + 1) * runs; ++i)
      most = s.tops[i] > most || s.tops[i] != s.tops[i] ? s.tops[i] : most;
    s.highest[row] = most;
  }
#pragma omp for
  for (long i = 0; i < rows * runs; ++i) {
    const long row = i / runs, from = row * columns + i % runs * RUN, count = std::min(RUN, columns - i % runs * RUN);
    const __m512 most = _mm512_set1_ps(s.highest[row]);
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < count; k += LANES) {
      const __mmask16 there = lanes(count - k);
      const __m512 x = load(logits + from + k, there);
      const __mmask16 seen = there & _mm512_cmp_ps_mask(x, minus, _CMP_NEQ_UQ);
      const __m512 share = _mm512_maskz_mov_ps(seen, exp(_mm512_mul_ps(_mm512_sub_ps(x, most), sharp)));
      sum = _mm512_add_ps(sum, share);
      _mm512_mask_storeu_ps(probs + from + k, there, share);
    }
    s.sums[i] = _mm512_reduce_add_ps(sum);
  }
#pragma omp for
  for (long row = 0; row < rows; ++row) {
    double sum = 0;
    for (long i = row * runs; i < (row + 1) * runs; ++i) sum += s.sums[i];
    s.factors[row] = (float)(1 / sum);
  }
#pragma omp for
  for (long i = 0; i < rows * runs; ++i) {
    const long row = i / runs, from = row * columns + i % runs * RUN, count = std::min(RUN, columns - i % runs * RUN);
    const __m512 factor = _mm512_set1_ps(s.factors[row]);
    for (long k = 0; k < count; k += LANES) {
      const __mmask16 there = lanes(count - k);
      float* at = probs + from + k;
      _mm512_mask_storeu_ps(at, there, _mm512_mul_ps(_mm512_maskz_loadu_ps(there, at), factor));
    }
  }
}

template <class Number>
void probabilities(const Number* logits, float* probs, long rows, long columns, float temperature, long threads) {
  Softmax softmax(rows, columns);
#pragma omp parallel num_threads(threads)
  softmax_rows(logits, probs, temperature, softmax);
}

// The column at which the sum of a row's weights first passes `uniform` of all of them; one of weight 0 never is it, unless
// all are.
int64_t drawn(const float* weights, long columns, double uniform) {
  const long runs = (columns + RUN - 1) / RUN;
  static thread_local std::vector<double> before;
  before.resize(runs + 1);
  before[0] = 0;
  for (long i = 0; i < runs; ++i) {
    const float* run = weights + i * RUN;
    const long count = std::min(RUN, columns - i * RUN);
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < count; k += LANES) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(count - k), run + k));
    before[i + 1] = before[i] + _mm512_reduce_add_ps(sum);
  }
  const double point = uniform * before[runs];
  long run = std::min<long>(std::upper_bound(before.begin() + 1, before.end(), point) - before.begin() - 1, runs - 1);
  while (run > 0 && !(before[run + 1] > before[run])) --run;  // rounded to the very end, where there may be nothing
  const long end = std::min((run + 1) * RUN, columns);
  long last = columns - 1;
  double sum = before[run];
  for (long k = run * RUN; k < end; ++k) {
    if (!(weights[k] > 0)) continue;
    last = k;
    if ((sum += weights[k]) > point) break;
  }
  return last;  // rounding between the sums may leave the point behind the run: its last one then
}

// The first of a row's largest numbers, and what it is; not a number where one of them is not.
template <class Number>
int64_t first_largest(const Number* x, long columns, float* value) {
  float most = -__builtin_inff();
  long best = 0;
  bool all = true;
  for (long from = 0; from < columns; from += RUN) {
    bool numbers;
    const float top = largest(x + from, std::min(RUN, columns - from), numbers);
    all &= numbers;
    if (top > most) most = top, best = from;
  }
  *value = all ? most : __builtin_nanf("");
  const __m512 sought = _mm512_set1_ps(most);
  for (long k = best; k < columns; k += LANES)
    if (const __mmask16 at = _mm512_mask_cmp_ps_mask(lanes(columns - k), load(x + k, lanes(columns - k)), sought, _CMP_EQ_OQ))
      return k + __builtin_ctz(at);
  return best;
}

// Σ (scale·p − q)₊ over a vocabulary of which a draft knows some columns: q [width] are theirs, the others have none. p [vocab]
// sums to 1, so what it has elsewhere is what it lacks here.
double excess(const float* p, const int64_t* columns, const float* q, long width, float scale) {
  const __m512 factor = _mm512_set1_ps(scale), zero = _mm512_setzero_ps();
  double above = 0, here = 0;
  for (long from = 0; from < width; from += RUN) {
    __m512 sum = zero, seen = zero;
    for (long k = from; k < std::min(from + RUN, width); k += LANES) {
      const __mmask16 there = lanes(width - k);
      __m512 own;
      if (columns) {
        const __mmask8 low = (__mmask8)there, high = (__mmask8)(there >> 8);
        const __m256 first = _mm512_mask_i64gather_ps(_mm256_setzero_ps(), low, _mm512_maskz_loadu_epi64(low, columns + k), p, 4);
        const __m256 second =
            _mm512_mask_i64gather_ps(_mm256_setzero_ps(), high, _mm512_maskz_loadu_epi64(high, columns + k + 8), p, 4);
        own = _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
      } else {
        own = _mm512_maskz_loadu_ps(there, p + k);
      }
      seen = _mm512_add_ps(seen, own);
      const __m512 over = _mm512_sub_ps(_mm512_mul_ps(factor, own), _mm512_maskz_loadu_ps(there, q + k));
      sum = _mm512_add_ps(sum, _mm512_max_ps(zero, over));  // of two of which one is not a number, the second
    }
    above += _mm512_reduce_add_ps(sum);
    here += _mm512_reduce_add_ps(seen);
  }
  return columns ? above + scale * std::max(0., 1 - here) : above;
}

// rest [vocab] = (scale·p − q)₊, q [width] of these columns, or of all; returns its sum.
double remainder(const float* p, const int64_t* columns, const float* q, long width, long vocab, float scale, float* rest) {
  auto over = [&](long at, long k) {
    const float found = scale * p[at] - q[k];
    rest[at] = found < 0 ? 0 : found;  // what is not a number stays none
  };
  if (columns) {
    for (long i = 0; i < vocab; ++i) rest[i] = scale * p[i];
    for (long k = 0; k < width; ++k) over(columns[k], k);
  } else {
    for (long i = 0; i < vocab; ++i) over(i, i);
  }
  double total = 0;
  for (long i = 0; i < vocab; i += LANES)
    total += _mm512_reduce_add_ps(_mm512_maskz_loadu_ps(lanes(vocab - i), rest + i));
  return total;
}

// A drawn chain of `drafted` tokens under its target's laws, to be judged as a block (arXiv 2403.10444).
struct Block {
  const float *p, *q;        // [1 + drafted, vocab] of the target, [drafted, width] that tokens were drawn from
  const int64_t* columns;    // of q, or none: all
  const int64_t *tokens, *places;  // [drafted], and in which column of q each stands
  const double* uniforms;    // [1 + drafted]
  int64_t drafted, vocab, width;
};

// How many tokens of a block stand, and the one that follows them; the same numbers as `block` in verify.py.
void judge_block(const Block& b, int64_t* accepted, int64_t* next, long threads) {
  const long drafted = b.drafted;
  std::vector<double> chances(drafted + 1, 1), masses(drafted + 1, 0);
  for (long i = 0; i < drafted; ++i) {
    const double chance = chances[i] * b.p[i * b.vocab + b.tokens[i]] / b.q[i * b.width + b.places[i]];
    chances[i + 1] = 1. < chance ? 1. : chance;  // what is no number stays none, and nothing is accepted by it
  }
#pragma omp parallel for num_threads(threads)
  for (long i = 1; i < drafted; ++i)
    masses[i] = excess(b.p + i * b.vocab, b.columns, b.q + i * b.width, b.width, chances[i]);
  long best = 0;
  for (long i = 1; i <= drafted; ++i) {
    double h = chances[i];
    if (i < drafted) {
      const double remaining = masses[i] + 1 - h;
      h = remaining <= 0 ? 1 : masses[i] / remaining;
    }
    if (b.uniforms[i - 1] < h) best = i;
  }
  const float* law = b.p + best * b.vocab;
  std::vector<float> rest;
  if (best < drafted) {
    rest.resize(b.vocab);
    if (remainder(law, b.columns, b.q + best * b.width, b.width, b.vocab, chances[best], rest.data()) > 0) law = rest.data();
  }
  *accepted = best;
  *next = drawn(law, b.vocab, b.uniforms[drafted]);
}

// What chains are drawn from: logits of each place, to which each token adds a row of a product of two matrices.
struct Chains {
  Matrix second;             // [columns, rank]
  const bf16* first;         // [vocab, rank]
  const int64_t* ids;        // of the columns, or none where a column is a token
  const bf16* logits;        // [depth, requests, columns]
  const int64_t* anchors;    // [requests]
  const double* uniforms;    // [depth, requests], or none: the likeliest tokens
  int64_t requests, depth;
  float temperature;
  int64_t* columns;          // [depth, requests], of the chains' tokens
  float* probs;              // [depth, requests, columns] that they were drawn from
};

// Each token of the chains of all requests, one place after the other.
void draw_chains(const Chains& c, long threads) {
  const long width = c.second.out, rank = c.second.in, requests = c.requests;
  std::vector<bf16> latents(requests * rank), logits(requests * width);
  std::vector<int64_t> tokens(c.anchors, c.anchors + requests);
  Softmax softmax(c.uniforms ? requests : 0, width);
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < c.depth; ++k) {
#pragma omp for
    for (long r = 0; r < requests; ++r)
      std::memcpy(&latents[r * rank], c.first + tokens[r] * rank, rank * sizeof(bf16));
    linear(c.second, latents.data(), c.logits + k * requests * width, logits.data(), requests, omp_get_thread_num(),
           omp_get_num_threads());
#pragma omp barrier
    float* probs = c.uniforms ? c.probs + k * requests * width : nullptr;
    if (probs) softmax_rows(logits.data(), probs, c.temperature, softmax);
#pragma omp for
    for (long r = 0; r < requests; ++r) {
      float unread;
      const int64_t column = probs ? drawn(probs + r * width, width, c.uniforms[k * requests + r])
                                   : first_largest(&logits[r * width], width, &unread);
      c.columns[k * requests + r] = column;
      tokens[r] = c.ids ? c.ids[column] : column;
    }
  }
}

// Gradients of `norm` over rows of `width` numbers, r = 1 / rms(x) [rows]: of x where dy is y's, and of the weight, a sum for
// each thread: by_weight [threads, width], zeros before.
template <class Number>
void norm_gradients(const Number* dy, const Number* x, const Number* weight, const float* r, Number* dx, float* by_weight,
                    long rows, long width, long threads) {
#pragma omp parallel num_threads(threads)
  {
    constexpr __mmask16 all = 0xFFFF;
    float* own = by_weight + omp_get_thread_num() * width;
#pragma omp for schedule(static)
    for (long row = 0; row < rows; ++row) {
      const Number *from = x + row * width, *slope = dy + row * width;
      const __m512 scale = _mm512_set1_ps(r[row]);
      __m512 sum = _mm512_setzero_ps();
      for (long k = 0; k < width; k += LANES) {
        const __m512 g = load(slope + k, all), v = _mm512_mul_ps(load(from + k, all), scale);
        const __m512 product = _mm512_mul_ps(g, v);
        sum = _mm512_fmadd_ps(product, load(weight + k, all), sum);
        _mm512_storeu_ps(own + k, _mm512_add_ps(_mm512_loadu_ps(own + k), product));
      }
      const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
      for (long k = 0; k < width; k += LANES) {
        const __m512 g = _mm512_mul_ps(load(slope + k, all), load(weight + k, all));
        const __m512 v = _mm512_mul_ps(load(from + k, all), scale);
        store(dx + row * width + k, _mm512_mul_ps(scale, _mm512_fnmadd_ps(v, along, g)), all);
      }
    }
  }
}

// Losses of a draft's laws q = softmax(logits) against its target's, p = exp(theirs − log_norms); see training/losses.py.
struct Losses {
  void* logits;              // [rows, columns], float32 (bits 32) or bfloat16; they become ∂loss/∂logits
  int64_t bits;
  const void* theirs;        // the target's logits [·, columns], or none where only labels count
  int64_t their_bits;
  const float* log_norms;    // of each of theirs
  const int64_t* places;     // [rows], the row of theirs; or none: the same
  const int64_t* labels;     // [rows], columns; below 0: none
  int64_t rows, columns, measured, overlap;
  float ce, kl, tv, lk, lk_mixed, decay, least;
  float *terms, *alphas, *chances;  // [rows, 3], [rows], [rows]
};

template <class Number, class Theirs>
void losses_of_row(const Losses& l, long row, float* q) {
  const long width = l.columns, label = l.labels[row];
  Number* z = (Number*)l.logits + row * width;
  const long place = l.places ? l.places[row] : row;
  const Theirs* t = l.theirs ? (const Theirs*)l.theirs + place * width : nullptr;
  const float known = label >= 0, log_norm = t ? l.log_norms[place] : 0;
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.f), norm = _mm512_set1_ps(log_norm);
  bool numbers;
  const float top = largest(z, width, numbers);
  __m512 sum = zero;
  for (long k = 0; k < width; k += LANES) {
    const __mmask16 there = lanes(width - k);
    const __m512 e = _mm512_maskz_mov_ps(there, exp(_mm512_sub_ps(load(z + k, there), _mm512_set1_ps(top))));
    sum = _mm512_add_ps(sum, e);
    _mm512_mask_storeu_ps(q + k, there, e);
  }
  const float total = _mm512_reduce_add_ps(sum), own = top + std::log(total);
  const float log_chance = load(z + std::max(label, 0L), 1)[0] - own;
  const __m512 factor = _mm512_set1_ps(1 / total);
  __m512 inside = zero, apart = zero, signs = zero, entropy = zero, cross = zero;
  auto law = [&](long k, __mmask16 there, __m512& log_p) {
    log_p = _mm512_sub_ps(load(t + k, there), norm);
    return _mm512_maskz_mov_ps(there, exp(log_p));
  };
  // The sign of q − p as 1, −1 or 0.
  auto sign = [&](__m512 x) {
    const __m512 ones = _mm512_mask_mov_ps(zero, _mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ), one);
    return _mm512_mask_mov_ps(ones, _mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ), _mm512_set1_ps(-1.f));
  };
  const bool with_kl = l.kl || l.lk_mixed;
  for (long k = 0; t && k < width; k += LANES) {
    const __mmask16 there = lanes(width - k);
    __m512 log_p;
    const __m512 p = law(k, there, log_p), x = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, q + k), factor);
    inside = _mm512_add_ps(inside, p);
    if (with_kl) {
      entropy = _mm512_mask3_fmadd_ps(p, log_p, entropy, there);
      cross = _mm512_fmadd_ps(p, load(z + k, there), cross);
    }
    if (l.measured) {
      const __m512 difference = _mm512_sub_ps(x, p);
      apart = _mm512_add_ps(apart, _mm512_abs_ps(difference));
      signs = _mm512_fmadd_ps(x, sign(difference), signs);
    }
  }
  const float mass = _mm512_reduce_add_ps(inside);
  float divergence = 0, distance = __builtin_nanf(""), alpha = distance;
  if (with_kl) divergence = _mm512_reduce_add_ps(entropy) - _mm512_reduce_add_ps(cross) + own * mass;
  if (l.measured) {
    const float outside = 1 - mass;
    distance = _mm512_reduce_add_ps(apart) + (outside < 0 ? 0 : outside);  // what is not a number stays none
    alpha = 1 - distance / 2;
  }
  const float by_ce = l.ce * known;
  float by_kl = l.kl, by_tv = 0;
  if (l.overlap) {
    const float at_least = alpha < l.least ? l.least : alpha, blend = std::exp(-l.decay * at_least);
    by_kl = l.kl + l.lk_mixed * blend;
    by_tv = l.tv + l.lk / (2 * at_least) + l.lk_mixed * (1 - blend) / 2;
  }
  const float centre = by_ce + by_kl * mass - (by_tv ? by_tv * _mm512_reduce_add_ps(signs) : 0.f);
  const __m512 middle = _mm512_set1_ps(centre), turn = _mm512_set1_ps(by_tv), pull = _mm512_set1_ps(by_kl);
  for (long k = 0; k < width; k += LANES) {
    const __mmask16 there = lanes(width - k);
    const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, q + k), factor);
    __m512 slope = middle, found = zero;
    if (by_tv || by_kl) {
      __m512 log_p;
      const __m512 p = law(k, there, log_p);
      if (by_tv) slope = _mm512_fmadd_ps(turn, sign(_mm512_sub_ps(x, p)), slope);
      if (by_kl) found = _mm512_mul_ps(pull, p);
    }
    found = _mm512_fmsub_ps(x, slope, found);
    if (known && k <= label && label < k + LANES)
      found = _mm512_mask_sub_ps(found, (__mmask16)(1u << (label - k)), found, _mm512_set1_ps(by_ce));
    store(z + k, found, there);
  }
  const float terms[3] = {-log_chance * known, divergence, distance};
  std::memcpy(l.terms + 3 * row, terms, sizeof terms);
  l.alphas[row] = alpha;
  l.chances[row] = std::exp(log_chance) * known;
}

template <class Number, class Theirs>
void losses(const Losses& l, long threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> q(l.columns);
#pragma omp for
    for (long row = 0; row < l.rows; ++row) losses_of_row<Number, Theirs>(l, row, q.data());
  }
}

template <class Number>
void likeliest(const Number* logits, int64_t* columns, float* values, long rows, long width, long threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row) columns[row] = first_largest(logits + row * width, width, values + row);
}

}  // namespace

extern "C" {

// Ask the system for AMX's tiles. Returns whether products use them from here on.
int64_t deepspec_tiles() {
#ifdef __AMX_BF16__
  constexpr long ask = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  tiles_allowed = !syscall(SYS_arch_prctl, ask, tiles);
  return tiles_allowed;
#else
  return 0;
#endif
}

// y [tokens, out] = x [tokens, in] Wᵀ + bias + residual [tokens, out]
void deepspec_linear(const Matrix* matrix, const bf16* x, const bf16* residual, bf16* y, int64_t tokens, int64_t threads) {
#pragma omp parallel num_threads(threads)
  linear(*matrix, x, residual, y, tokens, omp_get_thread_num(), omp_get_num_threads());
}

// y [rows, width] = x / rms(x) · weight
void deepspec_norm(const bf16* x, const bf16* weight, bf16* y, float eps, int64_t rows, int64_t width) {
  for (long i = 0; i < rows; ++i) norm(x + i * width, weight, eps, y + i * width, width);
}

// y [tokens] = log Σ exp (x Wᵀ + bias)
void deepspec_log_norm(const Matrix* matrix, const bf16* x, float* y, int64_t tokens, int64_t threads) {
  log_norm(*matrix, x, y, tokens, threads);
}

// y [rows] = log Σ exp of logits [rows, width]
void deepspec_log_norm_of(const bf16* logits, float* y, int64_t rows, int64_t width, int64_t threads) {
  log_norm_of(logits, y, rows, width, threads);
}

// Decoder layers one after the other, over x [tokens, d]; made: what each hands on. `normed`: what the first one's attention
// reads, where that is not x under its own norm. `ends`, or none: what x is made of, and made of the last one's states. `before`,
// or none: what is written into the caches first. Returns 1 where a token is not in the vocabulary and 2 where a position has no
// rotation, and has done nothing then.
int64_t deepspec_layers(const Layer* const* layers, const Pass* pass, const Cache* caches, const bf16* normed, bf16* x,
                        bf16* const* made, int64_t count, const Ends* ends, const Before* before) {
  const long tokens = pass->tokens, d = layers[0]->out.out;
  if (ends && !ends->knows(tokens)) return 1;
  if (!pass->rotates() || (before && !before->pass->rotates())) return 2;
#pragma omp parallel num_threads(pass->threads)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    if (before) write_context(*before, caches, me, all);
    if (ends)
      for (long t = me; t < tokens; t += all) std::memcpy(x + t * d, ends->embeddings + ends->ids[t] * d, d * sizeof(bf16));
    if (before || ends) {
#pragma omp barrier
    }
    for (long i = 0; i < count; ++i) {
      decoder_layer(*layers[i], *pass, caches[i], i ? nullptr : normed, i ? made[i - 1] : x, made[i], me, all);
#pragma omp barrier
    }
    if (ends) {
      for (long t = me; t < tokens; t += all) norm(made[count - 1] + t * d, ends->norm, ends->eps, ends->last + t * d, d);
      if (ends->head) {
#pragma omp barrier
        linear(*ends->head, ends->last, nullptr, ends->logits, tokens, me, all);
      }
    }
  }
  return 0;
}

// Keys and values of a draft's layers from the target's features [tokens, join.in]. Returns 1 where a position has no rotation,
// and has done nothing then.
int64_t deepspec_context(const Before* before, const Cache* caches) {
  if (!before->pass->rotates()) return 1;
#pragma omp parallel num_threads(before->pass->threads)
  write_context(*before, caches, omp_get_thread_num(), omp_get_num_threads());
  return 0;
}

// probs [rows, columns] = softmax(logits / temperature), of float32 logits (bits 32) or bfloat16 ones
void deepspec_probabilities(const void* logits, int64_t bits, float* probs, int64_t rows, int64_t columns, float temperature,
                            int64_t threads) {
  if (bits == 32) probabilities((const float*)logits, probs, rows, columns, temperature, threads);
  else probabilities((const bf16*)logits, probs, rows, columns, temperature, threads);
}

// tokens [rows]: one drawn from each row of weights [rows, columns], by its number in [0, 1)
void deepspec_draw(const float* weights, const double* uniforms, int64_t* tokens, int64_t rows, int64_t columns, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row) tokens[row] = drawn(weights + row * columns, columns, uniforms[row]);
}

// tokens, values [rows]: the first of the largest of each row of logits [rows, columns]
void deepspec_best(const void* logits, int64_t bits, int64_t* tokens, float* values, int64_t rows, int64_t columns,
                   int64_t threads) {
  if (bits == 32) likeliest((const float*)logits, tokens, values, rows, columns, threads);
  else likeliest((const bf16*)logits, tokens, values, rows, columns, threads);
}

// Chains of all requests, in one call
void deepspec_chains(const Chains* chains, int64_t threads) { draw_chains(*chains, threads); }

// mass = Σ (scale·p − q)₊ with p [vocab] and q [width] of these columns, or of all
void deepspec_excess(const float* p, const int64_t* columns, const float* q, int64_t width, float scale, double* mass) {
  *mass = excess(p, columns, q, width, scale);
}

// How many tokens of a drawn chain stand, and the token that follows them
void deepspec_block(const Block* block, int64_t* accepted, int64_t* next, int64_t threads) {
  judge_block(*block, accepted, next, threads);
}

// y [rows, width] = x / rms(x) · weight, of float32 (bits 32) or bfloat16, and r = 1 / rms(x) [rows]
void deepspec_norm_rows(const void* x, const void* weight, int64_t bits, void* y, float* r, float eps, int64_t rows, int64_t width,
                        int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < rows; ++i) {
    const long at = i * width;
    if (bits == 32) r[i] = norm((const float*)x + at, (const float*)weight, eps, (float*)y + at, width);
    else r[i] = norm((const bf16*)x + at, (const bf16*)weight, eps, (bf16*)y + at, width);
  }
}

// Its gradients dx [rows, width] and by_weight [threads, width], zeros before, which are to be added up
void deepspec_norm_gradients(const void* dy, const void* x, const void* weight, int64_t bits, const float* r, void* dx,
                             float* by_weight, int64_t rows, int64_t width, int64_t threads) {
  if (bits == 32)
    norm_gradients((const float*)dy, (const float*)x, (const float*)weight, r, (float*)dx, by_weight, rows, width, threads);
  else norm_gradients((const bf16*)dy, (const bf16*)x, (const bf16*)weight, r, (bf16*)dx, by_weight, rows, width, threads);
}

// Losses of each row, and their gradient in the place of its logits
void deepspec_losses(const Losses* l, int64_t threads) {
  if (l->bits == 32) l->their_bits == 32 ? losses<float, float>(*l, threads) : losses<float, bf16>(*l, threads);
  else l->their_bits == 32 ? losses<bf16, float>(*l, threads) : losses<bf16, bf16>(*l, threads);
}

// rest [vocab] = (scale·p − q)₊, and its sum
void deepspec_remainder(const float* p, const int64_t* columns, const float* q, int64_t width, int64_t vocab, float scale,
                        float* rest, double* mass) {
  *mass = remainder(p, columns, q, width, vocab, scale, rest);
}

}
