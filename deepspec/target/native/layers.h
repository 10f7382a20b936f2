// Decoder layers of Llama's shape, and what a block draft makes of its target's features.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "norms.h"
#include "products.h"

namespace {

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

}  // namespace
