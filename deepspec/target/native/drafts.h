// What drafts propose, grown in one call: chains drawn or ranked token by token, trees of the likeliest paths level by level.

#pragma once

#include "laws.h"

namespace {

// The laws of a draft: logits of each place, to which the token before adds a row of a product of two matrices.
struct Laws {
  Matrix second;             // [columns, rank]
  const bf16* first;         // [vocab, rank]
  const int64_t* ids;        // of the columns, or none where a column is a token
  const bf16* logits;        // [depth, requests, columns]
  const int64_t* anchors;    // [requests]
  int64_t requests, depth;
  float temperature;

  int64_t token(int64_t column) const { return ids ? ids[column] : column; }
};

struct Chains {
  Laws laws;
  const double* uniforms;    // [depth, requests], or none: the likeliest tokens
  int64_t* columns;          // [depth, requests], of the chains' tokens
  float* probs;              // [depth, requests, columns] that they were drawn from
};

// Each token of the chains of all requests, one place after the other.
void draw_chains(const Chains& c, long threads) {
  const Laws& laws = c.laws;
  const long width = laws.second.out, rank = laws.second.in, requests = laws.requests;
  std::vector<bf16> latents(requests * rank), logits(requests * width);
  std::vector<int64_t> tokens(laws.anchors, laws.anchors + requests);
  Softmax softmax(c.uniforms ? requests : 0, width);
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < laws.depth; ++k) {
#pragma omp for
    for (long r = 0; r < requests; ++r)
      std::memcpy(&latents[r * rank], laws.first + tokens[r] * rank, rank * sizeof(bf16));
    linear(laws.second, latents.data(), laws.logits + k * requests * width, logits.data(), requests, omp_get_thread_num(),
           omp_get_num_threads());
#pragma omp barrier
    float* probs = c.uniforms ? c.probs + k * requests * width : nullptr;
    if (probs) softmax_rows(logits.data(), probs, laws.temperature, softmax);
#pragma omp for
    for (long r = 0; r < requests; ++r) {
      float unread;
      const int64_t column = probs ? drawn(probs + r * width, width, c.uniforms[k * requests + r])
                                   : first_largest(&logits[r * width], width, &unread);
      c.columns[k * requests + r] = column;
      tokens[r] = laws.token(column);
    }
  }
}

// Trees of the likeliest paths, as `RankedGrowth` of growths.py grows them.
struct Trees {
  Laws laws;
  const int64_t* depths;     // [requests], levels of each
  const int64_t* widths;     // [depth], most children of a node, by level
  int64_t nodes, beam;       // of a tree, and of a level that are expanded
  int64_t *columns, *parents;  // [requests, nodes]
  double* survival;          // [requests, nodes]
  int64_t* counts;           // [requests], nodes of each
};

// One of them in the making: all nodes that were ever among the best, in the order in which they were found.
struct Tree {
  std::vector<int64_t> columns, parents;
  std::vector<double> survival;
  std::vector<long> best, open{-1};  // the likeliest first; those whose children come next

  double above(long node) const { return node < 0 ? 1 : survival[node]; }

  // Children of the open nodes, the likeliest first of each, in rows of `most`.
  void grow(const float* probs, const int64_t* found, long width, long most, long nodes, long beam) {
    const long first = columns.size();
    // What is no likelier than the last of a full set can never enter it.
    const double floor = (long)best.size() == nodes ? survival[best.back()] : 0;
    for (size_t i = 0; i < open.size(); ++i) {
      for (long j = 0; j < width; ++j) {
        const double chance = above(open[i]) * probs[i * most + j];
        if (!(chance > floor)) break;
        columns.push_back(found[i * most + j]), parents.push_back(open[i]), survival.push_back(chance);
      }
    }
    for (long node = first; node < (long)columns.size(); ++node) best.push_back(node);
    std::sort(best.begin(), best.end(), [&](long a, long b) { return survival[a] != survival[b] ? survival[a] > survival[b] : a < b; });
    if ((long)best.size() > nodes) best.resize(nodes);
    open.clear();
    for (long node : best)
      if (node >= first && (long)open.size() < beam) open.push_back(node);
    std::sort(open.begin(), open.end());
  }

  // Writes the best in the order in which they were found, and returns how many there are.
  int64_t write(int64_t* to_columns, int64_t* to_parents, double* to_survival) {
    std::vector<int64_t> place(columns.size());
    std::sort(best.begin(), best.end());
    for (size_t i = 0; i < best.size(); ++i) {
      const long node = best[i];
      place[node] = i;
      to_columns[i] = columns[node];
      to_parents[i] = parents[node] < 0 ? -1 : place[parents[node]];
      to_survival[i] = survival[node];
    }
    return best.size();
  }
};

// The trees of all requests, one level after the other.
void grow_trees(const Trees& t, long threads) {
  const Laws& laws = t.laws;
  const long width = laws.second.out, rank = laws.second.in, requests = laws.requests;
  const long most = *std::max_element(t.widths, t.widths + laws.depth);
  std::vector<Tree> trees(requests);
  std::vector<long> first(requests + 1);  // of the rows of a level, each request's
  std::vector<std::pair<long, long>> rows;  // request and node
  std::vector<bf16> latents, base, logits;
  std::vector<float> probs, chances;
  std::vector<int64_t> columns;
  Softmax softmax(0, width);
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < laws.depth; ++k) {
#pragma omp single
    {
      rows.clear();
      for (long r = 0; r < requests; ++r) {
        first[r] = rows.size();
        if (k < t.depths[r])
          for (long node : trees[r].open) rows.emplace_back(r, node);
      }
      first[requests] = rows.size();
      const long count = rows.size();
      softmax = Softmax(count, width);
      latents.resize(count * rank), base.resize(count * width), logits.resize(count * width), probs.resize(count * width);
      chances.resize(count * most), columns.resize(count * most);
    }
    const long count = rows.size();
    if (!count) break;
#pragma omp for
    for (long i = 0; i < count; ++i) {
      const auto [r, node] = rows[i];
      const int64_t token = node < 0 ? laws.anchors[r] : laws.token(trees[r].columns[node]);
      std::memcpy(&latents[i * rank], laws.first + token * rank, rank * sizeof(bf16));
      std::memcpy(&base[i * width], laws.logits + (k * requests + r) * width, width * sizeof(bf16));
    }
    linear(laws.second, latents.data(), base.data(), logits.data(), count, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    softmax_rows(logits.data(), probs.data(), laws.temperature, softmax);
#pragma omp for
    for (long i = 0; i < count; ++i) top(&probs[i * width], width, t.widths[k], &columns[i * most], &chances[i * most]);
#pragma omp for
    for (long r = 0; r < requests; ++r)
      if (first[r + 1] > first[r])
        trees[r].grow(&chances[first[r] * most], &columns[first[r] * most], t.widths[k], most, t.nodes, t.beam);
  }
  for (long r = 0; r < requests; ++r)
    t.counts[r] = trees[r].write(t.columns + r * t.nodes, t.parents + r * t.nodes, t.survival + r * t.nodes);
}

}  // namespace
