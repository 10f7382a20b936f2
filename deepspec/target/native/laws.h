// Laws of tokens: log-sum-exps, softmax, draws, and the verdict on a drawn chain.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "products.h"

namespace {

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

// The `count` largest of a row's weights, the largest first, of equal ones the first; there are none of 0 among them: their
// places hold a weight of 0 where there are fewer.
void top(const float* weights, long columns, long count, int64_t* found, float* values) {
  long held = 0;
  float least = 0;
  for (long from = 0; from < columns; from += LANES) {
    const __mmask16 there = lanes(columns - from);
    __mmask16 larger = _mm512_mask_cmp_ps_mask(there, load(weights + from, there), _mm512_set1_ps(least), _CMP_GT_OQ);
    for (; larger; larger &= larger - 1) {
      const long column = from + __builtin_ctz(larger);
      const float weight = weights[column];
      if (!(weight > least)) continue;
      long place = held < count ? held++ : count - 1;
      for (; place > 0 && values[place - 1] < weight; --place) {
        values[place] = values[place - 1];
        found[place] = found[place - 1];
      }
      values[place] = weight;
      found[place] = column;
      if (held == count) least = values[count - 1];
    }
  }
  for (; held < count; ++held) values[held] = 0, found[held] = 0;
}

template <class Number>
void likeliest(const Number* logits, int64_t* columns, float* values, long rows, long width, long threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row) columns[row] = first_largest(logits + row * width, width, values + row);
}

}  // namespace
