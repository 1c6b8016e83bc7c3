// Combine: a [T, H] result, out or dX, each token's row of which is the sum over its experts, in order, of
// the rows that products write; in forward times the routing weights. Chunk by chunk of its columns: products
// write the rows of all routed tokens, then these are added up. Where several nodes have slices of the
// intermediate dimension, each adds up partial sums of its own, and these are reduced, nodes in order.
#pragma once

#include <vector>

#include "moe/pass.h"

namespace kt {

// The products of one node. Of these there are as many as nodes that have some of the intermediate dimension.
struct NodeProducts {
  std::size_t node;
  int shard;  // the first, by its number in a profile; -1: there is but one
  std::vector<std::vector<Block>> products = {};  // a token block's shards on the node, in order
  std::vector<TaskGraph::Groups> ready = {};      // what each product waits for
  index_t routes = 0;                             // of the products
};

// Products of a token block on some shards: computes columns nc of the rows that are combined, to rows
// `stride` floats apart, and prefetches the weights of columns `next`; and what it costs.
using Product = void(const Pass& pass, std::span<const Block> blocks, Range nc, Range next, float* rows,
                     index_t stride, Arena& scratch);
using ProductCost = Work(const Pass& pass, std::span<const Block> blocks, Range nc);

class Combine {
 public:
  // The products of a block wait for its group of `ready`. `tile`, and `inner_bytes` of weights a column for
  // each of the intermediate dimension, cut the result into chunks, and these into NC ranges.
  Combine(Pass& pass, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
          const TaskGraph::Groups& ready);
  Combine(const Combine&) = delete;
  Combine& operator=(const Combine&) = delete;

  // Adds the tasks of the products and of the sums; the Combine outlives their run.
  void add_tasks(Stage stage, Product* product, ProductCost* cost);

 private:
  // Memory that later chunks use again, by node: the rows of its routed tokens; its sums.
  struct ChunkBuffers {
    std::vector<float*> rows, sums;
  };
  // The row of a routed token where nodes have different ones.
  struct Row {
    std::size_t n;
    index_t number;  // in the node's rows
  };
  struct ChunkGroups {
    std::vector<const TaskGraph::Group*> products, sums, reduced;
  };

  void add_products(std::size_t c, Stage stage, Product* product, ProductCost* cost);
  void multiply(std::size_t c, std::size_t n, std::span<const Block> blocks, Product* product,
                Arena& scratch) const;
  void add_token_sums(std::size_t c);
  void add_partial_sums(std::size_t c);
  void add_reduced_sums(std::size_t c);
  template <class Body, class Cost>
  void add_by_token(Stage stage, TaskGraph::Groups after, TaskGraph::Groups& added, const Body& body,
                    const Cost& cost);

  void sum_routes(std::size_t c, std::size_t n, index_t token, float* total, Arena& scratch) const;
  void store(std::size_t c, index_t token, const float* total) const;
  std::span<const std::int32_t> routes_of(Range tokens) const;
  Work cost_of_rows(std::size_t c, Range tokens, std::size_t node) const;
  Work cost_of_result(std::size_t c, Range tokens, std::size_t node) const;

  std::size_t chunks() const { return to_size(ranges_.count); }
  Range chunk(std::size_t c) const { return ranges_[static_cast<index_t>(c)]; }
  // Where a product writes the row of a routed token.
  float* row(std::size_t c, std::size_t n, index_t route) const;
  const ChunkBuffers& buffers(std::size_t c) const { return buffers_[c % buffers_.size()]; }
  // The groups of the chunk whose memory this one uses again; null: it is the first.
  const ChunkGroups* previous(std::size_t c) const {
    return c < buffers_.size() ? nullptr : &groups_[c - buffers_.size()];
  }

  Pass& pass_;
  const Result result_;
  const bool weighted_;
  std::vector<NodeProducts> nodes_;
  bool reduces_;           // every node has products of all routed tokens, and sums of its own
  std::vector<Row> rows_;  // by routed token; none: a node has all of them, in order
  NcRanges ranges_{};      // the chunks
  index_t stride_ = 0, nc_ = 0;
  std::vector<ChunkBuffers> buffers_;
  std::vector<ChunkGroups> groups_;  // by chunk
};

}  // namespace kt
