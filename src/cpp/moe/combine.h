// Combine: a [T, H] result, out or dX, each token's row of which is the sum over its experts, in order, of
// the rows that products write; in forward times the routing weights. Chunk by chunk of its columns: products
// write the rows of all routed tokens, then these are added up. Where several nodes have slices of the
// intermediate dimension, each adds up partial sums of its own, and these are reduced, nodes in order.
#pragma once

#include <vector>

#include "moe/pass.h"

namespace kt {

// What one node, or where every block is computed by one team alone, one team adds to the result.
struct Partial {
  std::size_t team;
  int shard;  // the first, by its number in a profile; -1: there is but one
  std::vector<std::vector<Block>> products = {};  // a token block's shards on the node, in order
  std::vector<TaskGraph::Groups> ready = {};      // what each product waits for
  index_t routes = 0;                             // of the products
};

class Combine {
 public:
  // The products of a block wait for its group of `ready`. `tile`, and `inner_bytes` of weights a column for
  // each of the intermediate dimension, cut the result into chunks, and these into NC ranges.
  Combine(Pass& pass, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
          const TaskGraph::Groups& ready);
  Combine(const Combine&) = delete;
  Combine& operator=(const Combine&) = delete;

  // The order in which tasks are added: for every step s, the products of chunk s, if it is one, by each
  // partial; then add_sums(s), which adds the sums of the chunks before.
  std::size_t steps() const { return chunks() + 2; }
  std::size_t chunks() const { return static_cast<std::size_t>(ranges_.count); }
  Range chunk(std::size_t c) const { return ranges_[static_cast<index_t>(c)]; }
  const std::vector<Partial>& partials() const { return partials_; }
  // What the products of a chunk wait for, and the tasks that compute them.
  TaskGraph::After before_products(std::size_t c, std::size_t partial) const;
  void set_products(std::size_t c, const TaskGraph::Group* tasks) { groups_[c].products.push_back(tasks); }
  void add_sums(std::size_t step);

  // Where a product writes the row of a routed token, a row every `stride` floats.
  float* row(std::size_t c, std::size_t partial, index_t route) const;
  index_t stride() const { return stride_; }
  // Calls body(nc, next, offset) for the NC ranges of a chunk: columns of the result, and where they begin in
  // a row. Ranges begin on multiples of a tile, so what a product writes behind its columns stays in the row
  // and before the next range. Few rows, which fill no cache, take the chunk as it is.
  template <class Body>
  void for_chunk_nc_ranges(std::size_t c, const Block& block, const Body& body) const {
    const Range all = chunk(c);
    const index_t count = pass_.plan.small_m(block) ? 1 : ceil_div(all.size(), nc_);
    for_nc_ranges({all.size(), count, ranges_.tile}, 0, count, [&](index_t, Range nc, Range next) {
      const auto cols = [&](Range r) { return Range{all.begin + r.begin, all.begin + r.end}; };
      body(cols(nc), cols(next), nc.begin);
    });
  }

 private:
  // Memory that later chunks use again, by partial: the rows of its routed tokens; its sums.
  struct Memory {
    std::vector<float*> rows, sums;
  };
  // The row of a routed token where partials have different ones.
  struct Row {
    std::size_t partial;
    index_t number;  // in the partial
  };
  struct ChunkGroups {
    std::vector<const TaskGraph::Group*> products, sums, reduced;
  };

  void add_token_sums(std::size_t c);
  void add_partial_sums(std::size_t c);
  void add_reduced_sums(std::size_t c);
  template <class Body, class Cost>
  void add_by_token(TaskGraph::Groups after, TaskGraph::Groups& added, const Body& body, const Cost& cost);

  void sum_routes(std::size_t c, std::size_t partial, index_t token, float* total, Arena& scratch) const;
  void store(std::size_t c, index_t token, const float* total) const;
  std::span<const std::int32_t> routes_of(Range tokens) const;
  Work cost_of_rows(std::size_t c, Range tokens, std::size_t team) const;
  Work cost_of_result(std::size_t c, Range tokens, std::size_t team) const;

  const Memory& memory(std::size_t c) const { return memory_[c % memory_.size()]; }
  // The groups of the chunk whose memory this one uses again; null: it is the first.
  const ChunkGroups* previous(std::size_t c) const {
    return c < memory_.size() ? nullptr : &groups_[c - memory_.size()];
  }

  Pass& pass_;
  const Result result_;
  const bool weighted_;
  std::vector<Partial> partials_;
  bool reduces_;           // partials are of all routed tokens, and have sums of their own
  std::vector<Row> rows_;  // by routed token; none: a partial has all of them, in order
  NcRanges ranges_{};      // the chunks
  index_t stride_ = 0, nc_ = 0;
  std::vector<Memory> memory_;
  std::vector<ChunkGroups> groups_;  // by chunk
};

}  // namespace kt
