// Losses of a draft's laws, and their gradients.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "laws.h"

namespace {

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

}  // namespace
