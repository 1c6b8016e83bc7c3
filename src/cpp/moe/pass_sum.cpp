// The part of both passes that adds up products over experts and shards, and stores results in the wanted
// type.
#include <algorithm>
#include <cstring>

#include "moe/pass.h"

namespace kt {

namespace {

constexpr index_t kFloat = sizeof(float);
constexpr index_t kSumTokens = 64;   // a task
constexpr index_t kSliceStrips = 4;  // that fill the cache, in a slice: all but the first are fetched early
constexpr index_t kStripTiles = 4;   // at most

index_t size(const Result& result) { return static_cast<index_t>(size_of(result.dtype)); }

}  // namespace

// Products of a [T, H] result that a team computes one after the other.
struct Pass::Lane {
  std::size_t team;
  int shard;  // the first, by its number in a profile; -1: there is but one
  std::vector<Siblings> products = {};
  index_t routes = 0;  // of these products
};

// A [T, H] result in the making, slice by slice of its columns.
struct Pass::Sum {
  Stage stage;  // of the products
  Result result;
  bool weighted;
  std::vector<const Group*> ready;  // a block each
  Product product;
  std::vector<Lane> lanes;
  bool parts;  // lanes have sums of their own, which are merged
  struct Row {
    std::size_t lane;
    index_t number;  // in the lane
  };
  std::vector<Row> rows;  // of every route, where lanes have routes of their own; none: all, in order
  Slices slices;
  index_t width, stride;  // of a slice at most, and of its rows
  index_t strip;          // columns at most, on tiles
  // Memory that later slices use again, a lane each: the products of its routes; its sums.
  struct Memory {
    std::vector<float*> rows, sums;
  };
  std::vector<Memory> kept = {};
  struct Groups {
    std::vector<const Group*> products, sums, merges;  // a lane each; where all threads do it, a team each
  };
  std::vector<Groups> groups = {};  // of slices

  Range slice(std::size_t s) const { return slices[static_cast<index_t>(s)]; }
  const Memory& memory(std::size_t s) const { return kept[s % kept.size()]; }
  // The groups of the slice whose memory slice s takes; null: it is new.
  const Groups* before(std::size_t s) const { return s < kept.size() ? nullptr : &groups[s - kept.size()]; }
  // `rows` of lanes whose products have no siblings.
  static std::vector<Row> rows_of(const std::vector<Lane>& lanes, index_t routes) {
    std::vector<Row> rows(static_cast<std::size_t>(routes));
    for (std::size_t l = 0; l < lanes.size(); ++l) {
      index_t number = 0;
      for (const Siblings& blocks : lanes[l].products)
        for (index_t i = 0; i < blocks.front().count; ++i)
          rows[static_cast<std::size_t>(blocks.front().first + i)] = {l, number++};
    }
    return rows;
  }
  // The row of a route in a slice; `lane` counts where every lane has all routes.
  float* row(std::size_t s, std::size_t lane, index_t route) const {
    if (rows.empty()) return memory(s).rows[lane] + route * stride;
    const Row& own = rows[static_cast<std::size_t>(route)];
    return memory(s).rows[own.lane] + own.number * stride;
  }
};

std::vector<Pass::Lane> Pass::lanes_of_teams() const {
  std::vector<Lane> lanes;
  for (std::size_t team = 0; team < lease_.teams(); ++team) lanes.push_back({team, -1});
  for (const Block& block : blocks_) {
    lanes[block.team].products.push_back({block});
    lanes[block.team].routes += block.count;
  }
  return lanes;
}

std::vector<Pass::Lane> Pass::lanes() const {
  const std::size_t siblings = shards_.size();
  if (siblings == 1) return lanes_of_teams();
  std::vector<Lane> lanes;
  for (std::size_t s = 0, end; s < siblings; s = end) {
    for (end = s; end < siblings && shards_[end].place == shards_[s].place;) ++end;
    Lane lane{shards_[s].team, to_int(static_cast<index_t>(shards_[s].number)), {}, routing_.routes()};
    for (std::size_t home = 0; home < blocks_.size(); home += siblings) {
      Siblings& blocks = lane.products.emplace_back();
      for (std::size_t i = s; i < end; ++i)  // add_siblings began with another shard
        blocks.push_back(blocks_[home + (i + siblings - home / siblings % siblings) % siblings]);
    }
    lanes.push_back(std::move(lane));
  }
  return lanes;
}

void Pass::add_sum(Stage stage, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
                   const std::vector<const Group*>& ready, Product product) {
  std::vector<Lane> lanes = this->lanes();
  const bool parts = shards_.size() > 1 && lanes.size() > 1;
  const bool apart = !parts && lanes.size() > 1;
  std::vector<Sum::Row> rows = apart ? Sum::rows_of(lanes, routing_.routes()) : std::vector<Sum::Row>();
  const index_t bytes = inner_bytes * ceil_div(experts_.intermediate, parts ? std::ssize(lanes) : 1);
  const Slices slices =
      this->slices(experts_.hidden, tile, std::max(bytes / kSliceStrips, cache_part() / kSumCols));
  const index_t width = slices[0].size();
  const auto sum = std::make_shared<Sum>(Sum{
      stage, result, weighted, ready, std::move(product), std::move(lanes), parts, std::move(rows), slices,
      width, result_stride(kernels(), width), std::clamp(cache_part() / bytes, tile, kStripTiles * tile)});
  take_memory(*sum);
  // The sum of a slice comes behind the next one's products, and what parts become behind the parts of the
  // next one, so that they seldom wait for their own.
  const auto count = static_cast<std::size_t>(slices.count);
  sum->groups.resize(count);
  for (std::size_t s = 0; s < count + 2; ++s) {
    if (s < count) add_products(sum, s);
    if (s >= 1 && s - 1 < count) parts ? add_parts(sum, s - 1) : add_sums(sum, s - 1);
    if (s >= 2 && parts) add_merges(sum, s - 2);
  }
}

void Pass::take_memory(Sum& sum) {
  sum.kept.resize(static_cast<std::size_t>(std::min(sum.slices.count, kSumsKept)));
  for (Sum::Memory& slice : sum.kept)
    for (const Lane& lane : sum.lanes) {
      Arena& memory = lease_.memory(lane.team);
      slice.rows.push_back(memory.take<float>(lane.routes * sum.stride));
      slice.sums.push_back(sum.parts ? memory.take<float>(inputs_.hidden_states.rows * sum.width) : nullptr);
    }
}

void Pass::add_products(const std::shared_ptr<Sum>& sum, std::size_t s) {
  for (std::size_t l = 0; l < sum->lanes.size(); ++l) {
    const Lane& lane = sum->lanes[l];
    const auto body = [=, this, &lane](index_t task, Arena& scratch) {
      if (const Sum::Groups* before = sum->before(s); before != nullptr) {
        if (sum->parts)  // a lane's rows are read by its own sums alone
          tasks_.wait(before->sums[l], scratch);
        else
          wait(before->sums, scratch);
      }
      const Siblings& blocks = lane.products[static_cast<std::size_t>(task)];
      for (const Block& block : blocks) tasks_.wait(sum->ready[block.index], scratch);
      count(scratch, {0, blocks.front().count * sum->slice(s).size() * kFloat, 0});
      multiply_slice(*sum, blocks, sum->slice(s), sum->row(s, l, blocks.front().first), scratch);
    };
    const Label label{sum->stage, {lane.shard}};
    sum->groups[s].products.push_back(tasks_.add(label, lane.team, std::ssize(lane.products), body));
  }
}

void Pass::multiply_slice(const Sum& sum, const Siblings& blocks, Range slice, float* rows,
                          Arena& scratch) const {
  // Strips begin on multiples of a tile, so what a product writes behind its columns stays in the row and
  // before the next strip. Few rows, which fill no cache, take the slice as it is.
  const Block block = blocks.front();
  const index_t count = few(block) ? 1 : ceil_div(slice.size(), sum.strip);
  const Slices strips{slice.size(), count, sum.slices.tile};
  for_slices(strips, 0, count, [&](index_t, Range strip, Range next) {
    const Arena::Frame frame(scratch);
    const auto cols = [&](Range r) { return Range{slice.begin + r.begin, slice.begin + r.end}; };
    sum.product(blocks, cols(strip), cols(next), rows + strip.begin, sum.stride, scratch);
  });
}

void Pass::add_sums(const std::shared_ptr<Sum>& sum, std::size_t s) {
  const auto body = [=, this](std::size_t team, Range tokens, Arena& scratch) {
    wait(sum->groups[s].products, scratch);
    const index_t width = sum->slice(s).size();
    if (recorder(scratch) != nullptr) count(scratch, rows_read(*sum, s, tokens, team));
    count(scratch, moved(tokens.size() * width * size(sum->result), 0, team));
    auto* total = scratch.take<float>(width);
    for (index_t t = tokens.begin; t < tokens.end; ++t) {
      sum_routes(*sum, s, 0, t, total, scratch);
      store(total, width, sum->result, t * experts_.hidden + sum->slice(s).begin);
    }
  };
  add_by_token(body, sum->groups[s].sums);
}

void Pass::add_parts(const std::shared_ptr<Sum>& sum, std::size_t s) {
  const index_t tokens = inputs_.hidden_states.rows;
  for (std::size_t l = 0; l < sum->lanes.size(); ++l) {
    const Lane& lane = sum->lanes[l];
    const auto body = [=, this](index_t task, Arena& scratch) {
      if (const Sum::Groups* before = sum->before(s); before != nullptr) wait(before->merges, scratch);
      tasks_.wait(sum->groups[s].products[l], scratch);
      const Range some{task * kSumTokens, std::min(tokens, (task + 1) * kSumTokens)};
      const index_t width = sum->slice(s).size();
      count(scratch, {0, (std::ssize(routes_of(some)) + some.size()) * width * kFloat, 0});
      for (index_t t = some.begin; t < some.end; ++t)
        sum_routes(*sum, s, l, t, sum->memory(s).sums[l] + t * sum->width, scratch);
    };
    const Label label{Stage::merge, {lane.shard}};
    sum->groups[s].sums.push_back(tasks_.add(label, lane.team, ceil_div(tokens, kSumTokens), body));
  }
}

void Pass::add_merges(const std::shared_ptr<Sum>& sum, std::size_t s) {
  const auto body = [=, this](std::size_t team, Range tokens, Arena& scratch) {
    wait(sum->groups[s].sums, scratch);
    const index_t width = sum->slice(s).size();
    for (const Lane& lane : sum->lanes)
      count(scratch, moved(tokens.size() * width * kFloat, lane.team, team));
    count(scratch, moved(tokens.size() * width * size(sum->result), 0, team));
    auto* total = scratch.take<float>(width);
    const std::vector<float*>& sums = sum->memory(s).sums;
    const std::vector<float> once(sums.size(), 1.0f);
    std::vector<const float*> terms(sums.size());
    for (index_t t = tokens.begin; t < tokens.end; ++t) {
      std::ranges::transform(sums, terms.begin(), [&](const float* own) { return own + t * sum->width; });
      kernels().epilogue.sum_scaled(to_int(width), to_int(std::ssize(terms)), terms.data(), once.data(),
                                    total);
      store(total, width, sum->result, t * experts_.hidden + sum->slice(s).begin);
    }
  };
  add_by_token(body, sum->groups[s].merges);
}

void Pass::add_by_token(const TokenBody& body, std::vector<const Group*>& groups) {
  std::vector<index_t> threads;
  for (std::size_t team = 0; team < lease_.teams(); ++team) threads.push_back(lease_.threads(team));
  const std::vector<Range> shares = split_by(inputs_.hidden_states.rows, threads, kSumTokens);
  for (std::size_t team = 0; team < shares.size(); ++team) {
    const Range share = shares[team];
    groups.push_back(
        tasks_.add(Stage::merge, team, ceil_div(share.size(), kSumTokens), [=](index_t task, Arena& scratch) {
          const index_t first = share.begin + task * kSumTokens;
          body(team, {first, std::min(share.end, first + kSumTokens)}, scratch);
        }));
  }
}

std::span<const std::int32_t> Pass::routes_of(Range tokens) const {
  const std::int32_t *offset = routing_.token_offset.data(), *routes = routing_.of_token.data();
  return {routes + offset[tokens.begin], routes + offset[tokens.end]};
}

Work Pass::rows_read(const Sum& sum, std::size_t s, Range tokens, std::size_t team) const {
  const index_t bytes = sum.slice(s).size() * kFloat;
  const std::span<const std::int32_t> routes = routes_of(tokens);
  if (sum.rows.empty()) return moved(std::ssize(routes) * bytes, sum.lanes.front().team, team);
  Work work;
  for (const std::int32_t route : routes)
    work += moved(bytes, sum.lanes[sum.rows[static_cast<std::size_t>(route)].lane].team, team);
  return work;
}

void Pass::sum_routes(const Sum& sum, std::size_t s, std::size_t lane, index_t token, float* total,
                      Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const std::span<const std::int32_t> routes = routes_of({token, token + 1});
  auto* scale = scratch.take<float>(std::ssize(routes));
  auto* terms = scratch.take<const float*>(std::ssize(routes));
  for (std::size_t i = 0; i < routes.size(); ++i) {
    scale[i] = sum.weighted ? weight(routes[i]) : 1.0f;
    terms[i] = sum.row(s, lane, routes[i]);
  }
  kernels().epilogue.sum_scaled(to_int(sum.slice(s).size()), to_int(std::ssize(routes)), terms, scale, total);
}

void Pass::store(const float* row, index_t n, const Result& result, index_t offset) const {
  if (result.dtype == DType::f32)
    std::memcpy(static_cast<float*>(result.data) + offset, row, static_cast<std::size_t>(n) * sizeof(float));
  else
    kernels().epilogue.round_scaled(static_cast<int>(n), 1.0f, row,
                                    static_cast<bf16_t*>(result.data) + offset);
}

}  // namespace kt
