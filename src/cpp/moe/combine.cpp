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

std::vector<Partial> partials_of_nodes(const Plan& plan, const TaskGraph::Groups& ready) {
  std::vector<Partial> partials;
  for (std::size_t node = 0; node < plan.node_threads.size(); ++node) partials.push_back({node, -1});
  for (const Block& block : plan.blocks) {
    Partial& partial = partials[block.node];
    partial.products.push_back({block});
    partial.ready.push_back({ready[block.index]});
    partial.routes += block.count;
  }
  return partials;
}

std::vector<Partial> partials_of(const Plan& plan, index_t routes, const TaskGraph::Groups& ready) {
  const std::vector<ShardSlice>& shards = plan.shards;
  if (shards.size() == 1) return partials_of_nodes(plan, ready);
  std::vector<Partial> partials;
  for (std::size_t s = 0, end; s < shards.size(); s = end) {
    for (end = s; end < shards.size() && shards[end].node == shards[s].node;) ++end;
    Partial& partial = partials.emplace_back();
    partial.node = shards[s].node;
    partial.shard = to_int(static_cast<index_t>(shards[s].number));
    partial.routes = routes;
    for (std::size_t b = 0; b < plan.blocks.size(); b += shards.size()) {
      const std::span<const Block> token_block = plan.token_block(plan.blocks[b]);
      std::vector<Block>& blocks = partial.products.emplace_back();
      TaskGraph::Groups& groups = partial.ready.emplace_back();
      for (std::size_t shard = s; shard < end; ++shard) {
        blocks.push_back(*std::ranges::find(token_block, shard, &Block::shard));
        groups.push_back(ready[blocks.back().index]);
      }
    }
  }
  return partials;
}

}  // namespace

Combine::Combine(Pass& pass, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
                 const TaskGraph::Groups& ready)
    : pass_(pass),
      result_(result),
      weighted_(weighted),
      partials_(partials_of(pass.plan, pass.routing.routes(), ready)),
      reduces_(pass.plan.shards.size() > 1 && partials_.size() > 1) {
  const Plan& plan = pass.plan;
  if (!reduces_ && partials_.size() > 1) {
    rows_.resize(static_cast<std::size_t>(pass.routing.routes()));
    for (std::size_t l = 0; l < partials_.size(); ++l) {
      index_t number = 0;
      for (const std::vector<Block>& blocks : partials_[l].products)
        for (index_t i = 0; i < blocks.front().count; ++i)
          rows_[static_cast<std::size_t>(blocks.front().first + i)] = {l, number++};
    }
  }
  const index_t bytes =
      inner_bytes * ceil_div(pass.experts.intermediate, reduces_ ? std::ssize(partials_) : 1);
  ranges_ = plan.nc_ranges(pass.experts.hidden, tile,
                           std::max(bytes / kChunkRanges, plan.cache_bytes / kChunkCols));
  const index_t width = chunk(0).size();
  stride_ = min_ldc(pass.kernels(), width);
  nc_ = std::clamp(plan.cache_bytes / bytes, tile, kRangeTiles * tile);
  groups_.resize(chunks());
  memory_.resize(static_cast<std::size_t>(std::min(ranges_.count, kChunksInUse)));
  for (Memory& own : memory_)
    for (const Partial& partial : partials_) {
      Arena& arena = pass.lease.memory(partial.node);
      own.rows.push_back(arena.take<float>(partial.routes * stride_));
      own.sums.push_back(reduces_ ? arena.take<float>(pass.inputs.hidden_states.rows * width) : nullptr);
    }
}

float* Combine::row(std::size_t c, std::size_t partial, index_t route) const {
  if (rows_.empty()) return memory(c).rows[partial] + route * stride_;
  const Row& own = rows_[static_cast<std::size_t>(route)];
  return memory(c).rows[own.partial] + own.number * stride_;
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
  for (std::size_t l = 0; l < partials_.size(); ++l) {
    const Partial& partial = partials_[l];
    TaskGraph::Groups readers;  // of the memory that these products write
    if (const ChunkGroups* before = previous(c); before != nullptr)
      readers = reduces_ ? TaskGraph::Groups{before->sums[l]} : before->sums;
    groups_[c].products.push_back(pass_.tasks.add(
        {stage, {partial.shard}}, partial.node, std::ssize(partial.products),
        {std::move(readers), partial.ready},
        [=, this, &partial](index_t task, Arena& scratch) {
          multiply(c, l, partial.products[static_cast<std::size_t>(task)], product, scratch);
        },
        [=, this, &partial](index_t task) {
          return cost(pass_, partial.products[static_cast<std::size_t>(task)], chunk(c));
        }));
  }
}

// NC ranges begin on multiples of a tile, so what a product writes behind its columns stays in the row and
// before the next range. A GEMV, whose rows fill no cache, takes the chunk as it is.
void Combine::multiply(std::size_t c, std::size_t partial, std::span<const Block> blocks, Product* product,
                       Arena& scratch) const {
  const Range all = chunk(c);
  const Block& block = blocks.front();
  float* rows = row(c, partial, block.first);
  const index_t count = pass_.plan.by_gemv(block) ? 1 : ceil_div(all.size(), nc_);
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
  const auto tokens_of = [tokens](index_t task) {
    return Range{task * kTokensPerTask, std::min(tokens, (task + 1) * kTokensPerTask)};
  };
  for (std::size_t l = 0; l < partials_.size(); ++l) {
    TaskGraph::Groups after{groups_[c].products[l]};
    if (const ChunkGroups* before = previous(c); before != nullptr)
      after.insert(after.end(), before->reduced.begin(), before->reduced.end());
    groups_[c].sums.push_back(pass_.tasks.add(
        {Stage::combine, {partials_[l].shard}}, partials_[l].node, ceil_div(tokens, kTokensPerTask),
        std::move(after),
        [=, this](index_t task, Arena& scratch) {
          const Range some = tokens_of(task);
          for (index_t t = some.begin; t < some.end; ++t)
            sum_routes(c, l, t, memory(c).sums[l] + t * width, scratch);
        },
        [=, this](index_t task) {
          const Range some = tokens_of(task);
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
        const std::vector<float*>& sums = memory(c).sums;
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
        for (const Partial& partial : partials_)
          work += moved(tokens.size() * chunk(c).size() * kFloat, partial.node, node);
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
    const auto tokens = [share = shares[node]](index_t task) {
      const index_t first = share.begin + task * kTokensPerTask;
      return Range{first, std::min(share.end, first + kTokensPerTask)};
    };
    added.push_back(pass_.tasks.add(
        stage, node, ceil_div(shares[node].size(), kTokensPerTask), after,
        [=](index_t task, Arena& scratch) { body(tokens(task), scratch); },
        [=](index_t task) { return cost(node, tokens(task)); }));
  }
}

// The sum of a token's rows, experts in order: those of a partial, or of all of them where each has its own.
void Combine::sum_routes(std::size_t c, std::size_t partial, index_t token, float* total,
                         Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const std::span<const std::int32_t> routes = routes_of({token, token + 1});
  auto* scale = scratch.take<float>(std::ssize(routes));
  auto* terms = scratch.take<const float*>(std::ssize(routes));
  for (std::size_t i = 0; i < routes.size(); ++i) {
    scale[i] = weighted_ ? pass_.route_weight(routes[i]) : 1.0f;
    terms[i] = row(c, partial, routes[i]);
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
  if (rows_.empty()) return moved(std::ssize(routes) * bytes, partials_.front().node, node);
  Work work;
  for (const std::int32_t route : routes)
    work += moved(bytes, partials_[rows_[static_cast<std::size_t>(route)].partial].node, node);
  return work;
}

Work Combine::cost_of_result(std::size_t c, Range tokens, std::size_t node) const {
  return moved(tokens.size() * chunk(c).size() * static_cast<index_t>(size_of(result_.dtype)), 0, node);
}

}  // namespace kt
