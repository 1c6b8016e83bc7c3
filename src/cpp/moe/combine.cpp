#include "moe/combine.h"

#include <algorithm>

#include "moe/schedule.h"

namespace kt {

namespace {

constexpr index_t kFloat = sizeof(float);
constexpr index_t kChunkCols = 256;  // at most, so rows of 1 KiB to write and to read again
constexpr index_t kChunksInUse = 3;  // that are computed or wait for their sum at the same time
constexpr index_t kTokensPerTask = 64;
constexpr index_t kChunkRanges = 4;  // NC ranges in a chunk: all but the first are fetched early
constexpr index_t kRangeTiles = 4;   // at most, in an NC range

std::vector<NodeProducts> products_by_node(const Plan& plan, const TaskGraph::Groups& ready) {
  std::vector<NodeProducts> nodes;
  for (std::size_t node = 0; node < plan.node_threads.size(); ++node) nodes.push_back({node, -1});
  for (const Block& block : plan.blocks) {
    NodeProducts& part = nodes[block.node];
    part.products.push_back({block});
    part.ready.push_back({ready[block.index]});
    part.routes += block.count;
  }
  return nodes;
}

std::vector<NodeProducts> products_of(const Plan& plan, index_t routes, const TaskGraph::Groups& ready) {
  const std::vector<ShardSlice>& shards = plan.shards;
  if (shards.size() == 1) return products_by_node(plan, ready);
  std::vector<NodeProducts> nodes;
  for (std::size_t s = 0, end; s < shards.size(); s = end) {
    for (end = s; end < shards.size() && shards[end].node == shards[s].node;) ++end;
    NodeProducts& part = nodes.emplace_back();
    part.node = shards[s].node;
    part.shard = to_int(shards[s].number);
    part.routes = routes;
    for (std::size_t b = 0; b < plan.blocks.size(); b += shards.size()) {
      const std::span<const Block> token_block = plan.token_block(plan.blocks[b]);
      std::vector<Block>& blocks = part.products.emplace_back();
      TaskGraph::Groups& groups = part.ready.emplace_back();
      for (std::size_t shard = s; shard < end; ++shard) {
        blocks.push_back(*std::ranges::find(token_block, shard, &Block::shard));
        groups.push_back(ready[blocks.back().index]);
      }
    }
  }
  return nodes;
}

// The tokens that a task sums.
Range tokens_of_task(Range all, index_t task) {
  const index_t first = all.begin + task * kTokensPerTask;
  return {first, std::min(all.end, first + kTokensPerTask)};
}

}  // namespace

Combine::Combine(Pass& pass, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
                 const TaskGraph::Groups& ready)
    : pass_(pass),
      result_(result),
      weighted_(weighted),
      nodes_(products_of(pass.plan, pass.routing.routes(), ready)),
      reduces_(pass.plan.shards.size() > 1 && nodes_.size() > 1) {
  const Plan& plan = pass.plan;
  if (!reduces_ && nodes_.size() > 1) {
    rows_.resize(to_size(pass.routing.routes()));
    for (std::size_t n = 0; n < nodes_.size(); ++n) {
      index_t number = 0;
      for (const std::vector<Block>& blocks : nodes_[n].products)
        for (index_t i = 0; i < blocks.front().count; ++i)
          rows_[to_size(blocks.front().first + i)] = {n, number++};
    }
  }
  const index_t bytes = inner_bytes * ceil_div(pass.experts.intermediate, reduces_ ? std::ssize(nodes_) : 1);
  ranges_ = plan.nc_ranges(pass.experts.hidden, tile,
                           std::max(bytes / kChunkRanges, plan.cache_bytes / kChunkCols));
  const index_t width = chunk(0).size();
  stride_ = min_ldc(pass.kernels(), width);
  nc_ = std::clamp(plan.cache_bytes / bytes, tile, kRangeTiles * tile);
  groups_.resize(chunks());
  buffers_.resize(to_size(std::min(ranges_.count, kChunksInUse)));
  for (ChunkBuffers& own : buffers_)
    for (const NodeProducts& part : nodes_) {
      Arena& arena = pass.lease.arena(part.node);
      own.rows.push_back(arena.take<float>(part.routes * stride_));
      own.sums.push_back(reduces_ ? arena.take<float>(pass.inputs.hidden_states.rows * width) : nullptr);
    }
}

float* Combine::row(std::size_t c, std::size_t n, index_t route) const {
  if (rows_.empty()) return buffers(c).rows[n] + route * stride_;
  const Row& own = rows_[to_size(route)];
  return buffers(c).rows[own.n] + own.number * stride_;
}

// The sums of a chunk come behind the products of the next one, and what is reduced of them behind its sums,
// so that they seldom wait.
void Combine::add_tasks(Stage stage, Product* product, ProductCost* cost) {
  for (std::size_t c = 0; c < chunks() + 2; ++c) {
    if (c < chunks()) add_products(c, stage, product, cost);
    if (c >= 1 && c - 1 < chunks()) reduces_ ? add_partial_sums(c - 1) : add_token_sums(c - 1);
    if (c >= 2 && reduces_) add_reduced_sums(c - 2);
  }
}

void Combine::add_products(std::size_t c, Stage stage, Product* product, ProductCost* cost) {
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    const NodeProducts& part = nodes_[n];
    TaskGraph::Groups readers;  // of the memory that these products write
    if (const ChunkGroups* before = previous(c); before != nullptr)
      readers = reduces_ ? TaskGraph::Groups{before->sums[n]} : before->sums;
    groups_[c].products.push_back(pass_.tasks.add(
        {stage, {part.shard}}, part.node, std::ssize(part.products), {std::move(readers), part.ready},
        [=, this, &part](index_t task, Arena& scratch) {
          multiply(c, n, part.products[to_size(task)], product, scratch);
        },
        [=, this, &part](index_t task) { return cost(pass_, part.products[to_size(task)], chunk(c)); }));
  }
}

// NC ranges begin on multiples of a tile, so what a product writes behind its columns stays in the row and
// before the next range. A GEMV, whose rows fill no cache, takes the chunk as it is.
void Combine::multiply(std::size_t c, std::size_t n, std::span<const Block> blocks, Product* product,
                       Arena& scratch) const {
  const Range all = chunk(c);
  const Block& block = blocks.front();
  float* rows = row(c, n, block.first);
  const index_t count = by_gemv(block) ? 1 : ceil_div(all.size(), nc_);
  for_nc_ranges({all.size(), count, ranges_.tile}, 0, count, [&](index_t, Range nc, Range next) {
    const Arena::Frame frame(scratch);
    const auto cols = [&](Range r) { return Range{all.begin + r.begin, all.begin + r.end}; };
    product(pass_, blocks, cols(nc), cols(next), rows + nc.begin, stride_, scratch);
  });
}

void Combine::add_token_sums(std::size_t c) {
  add_by_token(
      Stage::combine, groups_[c].products, groups_[c].sums,
      [this, c](Range tokens, Arena& scratch) {
        auto* total = scratch.take<float>(chunk(c).size());
        for (index_t t = tokens.begin; t < tokens.end; ++t) {
          sum_routes(c, 0, t, total, scratch);
          store(c, t, total);
        }
      },
      [this, c](std::size_t node, Range tokens) {
        Work work = cost_of_rows(c, tokens, node);
        return work += cost_of_result(c, tokens, node);
      });
}

void Combine::add_partial_sums(std::size_t c) {
  const index_t tokens = pass_.inputs.hidden_states.rows;
  const index_t width = chunk(0).size();
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    TaskGraph::Groups after{groups_[c].products[n]};
    if (const ChunkGroups* before = previous(c); before != nullptr)
      after.insert(after.end(), before->reduced.begin(), before->reduced.end());
    groups_[c].sums.push_back(pass_.tasks.add(
        {Stage::combine, {nodes_[n].shard}}, nodes_[n].node, ceil_div(tokens, kTokensPerTask),
        std::move(after),
        [=, this](index_t task, Arena& scratch) {
          const Range some = tokens_of_task({0, tokens}, task);
          for (index_t t = some.begin; t < some.end; ++t)
            sum_routes(c, n, t, buffers(c).sums[n] + t * width, scratch);
        },
        [=, this](index_t task) {
          const Range some = tokens_of_task({0, tokens}, task);
          return Work{0, (std::ssize(routes_of(some)) + some.size()) * chunk(c).size() * kFloat, 0};
        }));
  }
}

void Combine::add_reduced_sums(std::size_t c) {
  add_by_token(
      Stage::reduce, groups_[c].sums, groups_[c].reduced,
      [this, c](Range tokens, Arena& scratch) {
        const index_t width = chunk(c).size();
        auto* total = scratch.take<float>(width);
        const std::vector<float*>& sums = buffers(c).sums;
        const std::vector<float> once(sums.size(), 1.0f);
        std::vector<const float*> terms(sums.size());
        for (index_t t = tokens.begin; t < tokens.end; ++t) {
          std::ranges::transform(sums, terms.begin(),
                                 [&](const float* sum) { return sum + t * chunk(0).size(); });
          pass_.kernels().epilogue.sum_scaled(to_int(width), to_int(std::ssize(terms)), terms.data(),
                                              once.data(), total);
          store(c, t, total);
        }
      },
      [this, c](std::size_t node, Range tokens) {
        Work work = cost_of_result(c, tokens, node);
        for (const NodeProducts& part : nodes_)
          work += moved(tokens.size() * chunk(c).size() * kFloat, part.node, node);
        return work;
      });
}

// Adds tasks body(tokens, scratch) for the share of all tokens that each node has.
template <class Body, class Cost>
void Combine::add_by_token(Stage stage, TaskGraph::Groups after, TaskGraph::Groups& added, const Body& body,
                           const Cost& cost) {
  const std::vector<int>& node_threads = pass_.plan.node_threads;
  const std::vector<index_t> threads(node_threads.begin(), node_threads.end());
  const std::vector<Range> shares = split_by(pass_.inputs.hidden_states.rows, threads, kTokensPerTask);
  for (std::size_t node = 0; node < shares.size(); ++node) {
    added.push_back(pass_.tasks.add(
        stage, node, ceil_div(shares[node].size(), kTokensPerTask), after,
        [=, share = shares[node]](index_t task, Arena& scratch) {
          body(tokens_of_task(share, task), scratch);
        },
        [=, share = shares[node]](index_t task) { return cost(node, tokens_of_task(share, task)); }));
  }
}

// The sum of a token's rows, experts in order: those of the n-th node, or of all nodes where each routed
// token has one.
void Combine::sum_routes(std::size_t c, std::size_t n, index_t token, float* total, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const std::span<const std::int32_t> routes = routes_of({token, token + 1});
  auto* scale = scratch.take<float>(std::ssize(routes));
  auto* terms = scratch.take<const float*>(std::ssize(routes));
  for (std::size_t i = 0; i < routes.size(); ++i) {
    scale[i] = weighted_ ? pass_.route_weight(routes[i]) : 1.0f;
    terms[i] = row(c, n, routes[i]);
  }
  pass_.kernels().epilogue.sum_scaled(to_int(chunk(c).size()), to_int(std::ssize(routes)), terms, scale,
                                      total);
}

void Combine::store(std::size_t c, index_t token, const float* total) const {
  pass_.store(total, chunk(c).size(), result_, token * pass_.experts.hidden + chunk(c).begin);
}

std::span<const std::int32_t> Combine::routes_of(Range tokens) const {
  const Routing& routing = pass_.routing;
  const std::int32_t *offset = routing.token_offsets.data(), *routes = routing.inverse_permutation.data();
  return {routes + offset[tokens.begin], routes + offset[tokens.end]};
}

Work Combine::cost_of_rows(std::size_t c, Range tokens, std::size_t node) const {
  const index_t bytes = chunk(c).size() * kFloat;
  const std::span<const std::int32_t> routes = routes_of(tokens);
  if (rows_.empty()) return moved(std::ssize(routes) * bytes, nodes_.front().node, node);
  Work work;
  for (const std::int32_t route : routes) work += moved(bytes, nodes_[rows_[to_size(route)].n].node, node);
  return work;
}

Work Combine::cost_of_result(std::size_t c, Range tokens, std::size_t node) const {
  return moved(tokens.size() * chunk(c).size() * static_cast<index_t>(size_of(result_.dtype)), 0, node);
}

}  // namespace kt
