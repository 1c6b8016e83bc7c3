#include "weights/layer_memory.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/memory.h"
#include "gemm/decode.h"

namespace kt {

namespace {

void check_popularity(int experts, std::span<const double> popularity) {
  KT_CHECK(std::ssize(popularity) == experts, "popularity has {} numbers, wanted {}: one an expert",
           popularity.size(), experts);
  for (std::size_t e = 0; e < popularity.size(); ++e)
    KT_CHECK(std::isfinite(popularity[e]) && popularity[e] >= 0,
             "popularity of expert {} is {}, wanted a finite number that is not negative", e, popularity[e]);
}

index_t padded(index_t bytes) { return round_up(bytes, 64); }

index_t padded_bytes(const MutableWeight& w) {
  return padded(w.codes_bytes()) + padded(w.scales_bytes()) + padded(w.zeros_bytes()) +
         padded(w.global_scale_bytes());
}

// `rows` times `bytes`, each row `stride` bytes behind the one before, side by side.
void copy_rows(const std::byte* from, index_t stride, index_t rows, index_t bytes, std::byte* to) {
  if (rows == 0 || bytes == 0) return;
  if (stride == bytes) bytes *= rows, rows = 1;
  for (index_t i = 0; i < rows; ++i) std::memcpy(to + i * bytes, from + i * stride, to_size(bytes));
}

// Codes, scales and zero points of a slice of a matrix, which is cut where it may be, and its global scale.
// `into` has its shape.
void copy_slice(const Weight& from, Projection p, Range slice, const MutableWeight& into) {
  const WeightBlock part = p == Projection::down ? whole(from).cols_of(slice) : whole(from).rows_of(slice);
  assert(into.rows == part.rows.size() && into.cols == part.cols.size() && into.type == from.type);
  const MatView codes = codes_of(part);
  copy_rows(static_cast<const std::byte*>(codes.data), codes.stride, codes.rows, codes.cols, into.codes);
  if (into.scale_count() == 0) return;
  const index_t stride = ceil_div(from.cols, from.group()), groups = ceil_div(into.cols, into.group());
  const index_t rows = into.scale_count() / groups;
  const index_t first = part.rows.begin / from.type.scale_rows * stride + part.cols.begin / from.group();
  const auto copy_each = [&](const std::byte* source, index_t size, std::byte* to) {
    copy_rows(source + first * size, stride * size, rows, groups * size, to);
  };
  copy_each(from.scales, size_of(from.type.scale), into.scales);
  if (into.zeros_bytes() > 0) copy_each(from.zeros, 1, into.zeros);
  copy_rows(from.global_scale, into.global_scale_bytes(), 1, into.global_scale_bytes(), into.global_scale);
}

QuantError fill_one(const Matrix& m, const LayerShape& layer, std::span<const LayerBlock> blocks,
                    const Fill& fill, const KernelSet& kernels, Arena& scratch) {
  if (blocks.size() == 1) return fill(m, blocks.front().at(m.expert, m.projection), kernels, scratch);
  const MutableWeight all = in_scratch(layer.matrix(m.projection), scratch);
  const QuantError error = fill(m, all, kernels, scratch);
  for (const LayerBlock& block : blocks)
    copy_slice(frozen(all), m.projection, block.slice, block.at(m.expert, m.projection));
  return error;
}

}  // namespace

Placement placement_from(std::string_view name) {
  for (const Placement placement : {Placement::tensor, Placement::expert})
    if (name == name_of(placement)) return placement;
  throw ValueError(message("placement is \"{}\", wanted \"tensor\" or \"expert\"", name));
}

std::string_view name_of(Placement placement) { return placement == Placement::tensor ? "tensor" : "expert"; }

std::vector<index_t> weights_of(const Runtime& runtime) {
  std::vector<index_t> weights;
  for (std::size_t s = 0; s < to_size(runtime.shards()); ++s) weights.push_back(runtime.weight_of(s));
  return weights;
}

std::vector<int> assign_homes(int experts, std::span<const index_t> weights,
                              std::span<const double> popularity) {
  if (!popularity.empty()) check_popularity(experts, popularity);
  constexpr index_t kMost = index_t{1} << 40;  // times experts they stay in index_t
  for (index_t sum = 0; const index_t weight : weights) {
    KT_CHECK(weight >= 0 && weight <= kMost - sum, "weights of shards add up to more than {}", kMost);
    sum += weight;
  }
  KT_CHECK(experts <= 1 << 22, "there are {} experts, wanted at most {}", experts, 1 << 22);
  std::vector<int> homes(to_size(experts));
  if (std::ranges::all_of(popularity, [](double p) { return p == 0; })) {
    const std::vector<Range> runs = split_by(experts, weights, 1);
    for (std::size_t s = 0; s < runs.size(); ++s)
      std::fill(homes.begin() + runs[s].begin, homes.begin() + runs[s].end, to_int(s));
    return homes;
  }

  const index_t all = std::reduce(weights.begin(), weights.end());
  std::vector<index_t> room;
  for (const index_t weight : weights) room.push_back(ceil_div(experts * weight, all));
  std::vector<std::size_t> order(homes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater{}, [&](std::size_t e) { return popularity[e]; });
  const double most = popularity[order.front()];  // in its units no sum leaves the range of numbers
  std::vector<double> load(weights.size(), 0.0);
  for (const std::size_t e : order) {
    const double share = popularity[e] / most;
    std::size_t best = weights.size();
    double least = 0;
    for (std::size_t s = 0; s < weights.size(); ++s) {
      if (room[s] == 0) continue;
      const double after = (load[s] + share) / static_cast<double>(weights[s]);
      if (best == weights.size() || after < least) best = s, least = after;
    }
    homes[e] = to_int(best);
    load[best] += share;
    --room[best];
  }
  return homes;
}

index_t cut_align(const std::array<WeightType, 3>& types, index_t intermediate) {
  index_t align = 32;
  for (const Projection p : projections) {
    const WeightType& type = types[index_of(p)];
    if (type.scale == ScaleType::none) continue;
    const index_t block = p == Projection::down ? type.scale_cols : type.scale_rows;
    if (block > 0 && block < intermediate) align = std::lcm(align, block);
  }
  return align;
}

Sharding divide(const LayerShape& layer, const Runtime& runtime, const ShardingOptions& options) {
  const bool tensor = options.placement == Placement::tensor;
  KT_CHECK(!tensor || options.popularity.empty(),
           "popularity is given, but placement is \"tensor\": every expert lies in all shards");
  Sharding sharding{options.placement,
                    runtime.split(layer.intermediate, cut_align(layer.types, layer.intermediate))};
  if (!tensor) sharding.homes = assign_homes(layer.num_experts, weights_of(runtime), options.popularity);
  return sharding;
}

MutableWeight LayerBlock::at(int expert, Projection p) const {
  std::byte* next = memory + expert * expert_bytes();
  for (const Projection before : projections_of(shape.gated)) {
    if (before == p) break;
    next += padded_bytes(shape.matrix(before));
  }
  return shape.matrix(p).placed([&](index_t bytes) { return std::exchange(next, next + padded(bytes)); });
}

index_t LayerBlock::expert_bytes() const {
  index_t bytes = 0;
  for (const Projection p : projections_of(shape.gated)) bytes += padded_bytes(shape.matrix(p));
  return on_pages ? round_up(bytes, 4096) : bytes;
}

std::array<std::vector<Weight>, 3> weights_in(std::span<const LayerBlock> blocks) {
  std::array<std::vector<Weight>, 3> weights;
  for (const LayerBlock& block : blocks)
    for (const auto& [expert, projection] : matrices_of(block.shape))
      weights[index_of(projection)].push_back(frozen(block.at(expert, projection)));
  return weights;
}

LayerMemory::LayerMemory(const Runtime& runtime, const LayerShape& layer, const Sharding& sharding) {
  for (std::size_t s = 0; s < sharding.shards.size(); ++s) nodes_.push_back(runtime.memory_nodes_of(s));
  const auto add = [&](LayerBlock block, std::span<const int> nodes) {
    const Buffer& buffer = buffers_.emplace_back(to_size(block.bytes()), nodes);
    refused_ |= buffer.refused();
    block.memory = static_cast<std::byte*>(buffer.data());
    blocks_.push_back(block);
  };
  if (sharding.shards.size() == 1) {
    add(LayerBlock::whole(layer), nodes_.front());
    return;
  }
  if (sharding.placement == Placement::tensor) {
    for (std::size_t s = 0; s < sharding.shards.size(); ++s) {
      LayerShape part = layer;
      part.intermediate = sharding.shards[s].size();
      add({part, sharding.shards[s]}, nodes_[s]);
    }
    return;
  }
  LayerBlock all = LayerBlock::whole(layer);
  all.on_pages = true;
  add(all, {});
  for (std::size_t e = 0; e < sharding.homes.size(); ++e) {
    const std::span<std::byte> memory = expert(e);
    refused_ |= !place_memory(memory.data(), memory.size(), nodes_[to_size(sharding.homes[e])]);
  }
  at_ = sharding.homes;
}

bool LayerMemory::move(std::span<const int> homes) {
  bool moved = true;
  for (std::size_t e = 0; e < at_.size(); ++e) {
    if (at_[e] == homes[e]) continue;
    const std::span<std::byte> memory = expert(e);
    if (move_memory(memory.data(), memory.size(), nodes_[to_size(homes[e])]))
      at_[e] = homes[e];
    else
      moved = false;
  }
  return moved;
}

std::span<std::byte> LayerMemory::expert(std::size_t number) const {
  const LayerBlock& all = blocks_.front();
  const auto each = to_size(all.expert_bytes());
  return {all.memory + number * each, each};
}

std::vector<Matrix> matrices_of(const LayerShape& layer) {
  std::vector<Matrix> all;
  for (int e = 0; e < layer.num_experts; ++e)
    for (const Projection p : projections_of(layer.gated)) all.push_back({e, p});
  return all;
}

QuantErrors fill_all(Runtime& runtime, const LayerShape& layer, std::span<const LayerBlock> blocks,
                     const std::vector<Matrix>& order, std::size_t nbytes, const Fill& fill,
                     const Report& report) {
  const std::size_t tasks = order.size();
  std::atomic<std::size_t> done{0};
  std::size_t reported = 0;  // the caller's alone
  const auto tell = [&] {
    const std::size_t now = nbytes / tasks * done + (done == tasks ? nbytes % tasks : 0);
    report(now - std::exchange(reported, now));
  };
  std::vector<QuantError> errors(to_size(layer.num_experts) * projections.size());
  {
    Runtime::Lease lease(runtime);
    const auto fill_task = [&](index_t task, Arena& scratch) {
      const Matrix& m = order[to_size(task)];
      const auto place = to_size(m.expert) * projections.size() + index_of(m.projection);
      errors[place] = fill_one(m, layer, blocks, fill, lease.kernels(), scratch);
      ++done;
    };
    std::function<void()> between;
    if (report) between = tell;
    lease.parallel_for(static_cast<index_t>(tasks), fill_task, between);
    if (report) tell();
  }
  QuantErrors sums{};
  for (std::size_t i = 0; i < errors.size(); ++i) {
    sums[i % sums.size()].error += errors[i].error;
    sums[i % sums.size()].norm += errors[i].norm;
  }
  return sums;
}

MutableWeight in_scratch(const MutableWeight& w, Arena& scratch) {
  return w.placed([&](index_t bytes) { return scratch.take<std::byte>(bytes); });
}

}  // namespace kt
