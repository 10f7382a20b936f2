// Kernels for CPUs with AVX512-BF16: weights in bfloat16 or in 4 bits, activations in bfloat16, sums in float32. They are made
// for passes over few tokens, which take as long as reading the weights takes.
//
// Every result of a token is computed by the same operations in the same order, whatever other tokens, requests or threads
// share the pass: so a token that is verified in a tree has, to the bit, the states that it has when it is decoded alone.

#include "drafts.h"
#include "layers.h"
#include "losses.h"
#include "norms.h"
#include "products.h"

extern "C" {

// Ask the system for AMX's tiles. Returns whether products use them from here on.
int64_t deepspec_tiles() {
#ifdef __AMX_BF16__
  return ask_for_tiles();
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

// Move the entries start + kept[i] of a slot to start + i, in keys and values of all layers; kept ascends, and kept[i] ≥ i.
void deepspec_compact(const Entries* entries, int64_t count, int64_t slot, int64_t start, int64_t moved, const int64_t* kept) {
  for (long i = 0; i < count; ++i) compact(entries[i], slot, start, kept, moved);
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

// Trees of all requests, in one call
void deepspec_trees(const Trees* trees, int64_t threads) { grow_trees(*trees, threads); }

// columns, values [rows, count]: the largest of each row of weights [rows, width], none of them below 0, the largest first
void deepspec_top(const float* weights, int64_t* columns, float* values, int64_t count, int64_t rows, int64_t width,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row) top(weights + row * width, width, count, columns + row * count, values + row * count);
}

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
