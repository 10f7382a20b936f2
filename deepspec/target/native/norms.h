// RMSNorm, and its gradients.

#pragma once

#include <omp.h>

#include "numbers.h"

namespace {

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

}  // namespace
