// The part of both passes that adds up products over experts and shards, and stores results in the wanted
// type.
#include <algorithm>
#include <cstring>

#include "moe/pass.h"

namespace kt {

namespace {

constexpr index_t kFloat = sizeof(float);
constexpr index_t kSumTokens = 64;   // a task
constexpr index_t kSumCols = 256;    // at most, of a slice: rows of 1 KiB to write and to read again
constexpr index_t kSliceStrips = 4;  // that fill the cache, in a slice: all but the first are fetched early
constexpr index_t kStripTiles = 4;   // at most
constexpr std::size_t kSlicesKept = 3;  // that are computed or wait for their sum at the same time

index_t size(const Result& result) { return static_cast<index_t>(size_of(result.dtype)); }

}  // namespace

std::vector<Pass::Lane> Pass::lanes() const {
  std::vector<Lane> lanes;
  const std::size_t siblings = shards_.size();
  if (siblings == 1) {
    for (std::size_t team = 0; team < lease_.teams(); ++team) lanes.push_back({team});
    for (const Block& block : blocks_) lanes[block.team].products.push_back({block});
    return lanes;
  }
  for (std::size_t s = 0, end; s < siblings; s = end) {
    for (end = s; end < siblings && shards_[end].place == shards_[s].place;) ++end;
    Lane lane{shards_[s].team};
    for (std::size_t home = 0; home < blocks_.size(); home += siblings) {
      Siblings& blocks = lane.products.emplace_back();
      for (std::size_t i = s; i < end; ++i)  // add_siblings began with another shard
        blocks.push_back(blocks_[home + (i + siblings - home / siblings % siblings) % siblings]);
    }
    lanes.push_back(std::move(lane));
  }
  return lanes;
}

void Pass::add_by_token(const TokenBody& body, std::vector<const Group*>& groups) {
  const index_t tokens = inputs_.hidden_states.rows;
  std::vector<index_t> threads;
  for (std::size_t team = 0; team < lease_.teams(); ++team) threads.push_back(lease_.threads(team));
  const std::vector<Range> shares = split_by(tokens, threads, kSumTokens);
  for (std::size_t team = 0; team < shares.size(); ++team) {
    const Range share = shares[team];
    groups.push_back(
        tasks_.add(Stage::merge, team, ceil_div(share.size(), kSumTokens), [=](index_t task, Arena& scratch) {
          const index_t first = share.begin + task * kSumTokens;
          body(team, {first, std::min(share.end, first + kSumTokens)}, scratch);
        }));
  }
}

void Pass::add_sum(Stage stage, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
                   const std::vector<const Group*>& ready, Product product) {
  const index_t h = experts_.hidden, tokens = inputs_.hidden_states.rows;
  const std::vector<Lane> lanes = this->lanes();
  const bool several = shards_.size() > 1 && lanes.size() > 1;
  const index_t places = several ? std::ssize(lanes) : 1;
  const index_t bytes = inner_bytes * ceil_div(experts_.intermediate, places);
  const index_t most = kSumCols;
  const Slices slices = this->slices(h, tile, std::max(bytes / kSliceStrips, cache_part() / most));
  const index_t width = slices[0].size(), stride = result_stride(kernels(), width);

  // What lies in memory of a slice, until a later one takes its place.
  struct Kept {
    std::vector<float*> rows, sums;  // of a lane: the products of its routes; of several places, their sums
    std::vector<const Group*> read;  // that read the rows
    std::vector<const Group*> merged;
  };
  std::vector<Kept> kept(std::min(static_cast<std::size_t>(slices.count), kSlicesKept));
  for (Kept& slice : kept)
    for (const Lane& lane : lanes) {
      Arena& memory = lease_.memory(lane.team);
      const bool own = several || slice.rows.empty();
      slice.rows.push_back(own ? memory.take<float>(routing_.routes() * stride) : slice.rows.front());
      slice.sums.push_back(several ? memory.take<float>(tokens * width) : nullptr);
    }

  std::vector<std::vector<const Group*>> products;  // of a slice, one a lane
  const auto add_products = [&](std::size_t s) {
    Kept& mine = kept[s % kept.size()];
    const Range slice = slices[static_cast<index_t>(s)];
    std::vector<const Group*>& groups = products.emplace_back();
    for (std::size_t l = 0; l < lanes.size(); ++l) {
      // With several places a lane's rows are read by its own sums alone.
      std::vector<const Group*> emptied = mine.read;
      if (several && !emptied.empty()) emptied.assign(1, mine.read[l]);
      const std::size_t team = lanes[l].team, memory = several ? team : lanes.front().team;
      groups.push_back(tasks_.add(
          {stage, {shard_of(l)}}, team, std::ssize(lanes[l].products),
          [=, this, all = lanes[l].products, rows = mine.rows[l]](index_t task, Arena& scratch) {
            for (const Group* sums : emptied) tasks_.wait(sums, scratch);
            const Siblings& blocks = all[static_cast<std::size_t>(task)];
            for (const Block& block : blocks) tasks_.wait(ready[block.index], scratch);
            const Block block = blocks.front();
            count(scratch, moved(block.count * slice.size() * kFloat, memory, team));
            // Strips begin on multiples of a tile, so what a product writes behind its columns stays in the
            // row and before the next strip. Few rows, which fill no cache, take the slice as it is.
            const index_t fit = std::clamp(cache_part() / bytes, tile, kStripTiles * tile);
            const Slices strips{slice.size(), few(block) ? 1 : ceil_div(slice.size(), fit), tile};
            for_slices(strips, 0, strips.count, [&](index_t, Range strip, Range next) {
              const Arena::Frame frame(scratch);
              const auto cols = [&](Range r) { return Range{slice.begin + r.begin, slice.begin + r.end}; };
              product(blocks, cols(strip), cols(next), rows + block.first * stride + strip.begin, stride,
                      scratch);
            });
          }));
    }
  };
  const auto add_sums = [&](std::size_t s) {
    Kept& mine = kept[s % kept.size()];
    const Range slice = slices[static_cast<index_t>(s)];
    mine.read.clear();
    if (!several)
      return add_by_token(
          [=, this, made = products[s], rows = mine.rows.front(), memory = lanes.front().team](
              std::size_t team, Range some, Arena& scratch) {
            for (const Group* group : made) tasks_.wait(group, scratch);
            count(scratch, moved(routes_of(some) * slice.size() * kFloat, memory, team));
            count(scratch, moved(some.size() * slice.size() * size(result), 0, team));
            auto* sum = scratch.take<float>(slice.size());
            for (index_t t = some.begin; t < some.end; ++t) {
              sum_routes(t, slice.size(), rows, stride, weighted, sum, scratch);
              store(sum, slice.size(), result, t * h + slice.begin);
            }
          },
          mine.read);
    for (std::size_t l = 0; l < lanes.size(); ++l)
      mine.read.push_back(
          tasks_.add({Stage::merge, {shard_of(l)}}, lanes[l].team, ceil_div(tokens, kSumTokens),
                     [=, this, emptied = mine.merged, made = products[s][l], rows = mine.rows[l],
                      sums = mine.sums[l]](index_t task, Arena& scratch) {
                       for (const Group* merged : emptied) tasks_.wait(merged, scratch);
                       tasks_.wait(made, scratch);
                       const index_t first = task * kSumTokens, last = std::min(tokens, first + kSumTokens);
                       const index_t terms = routes_of({first, last}) + last - first;
                       count(scratch, {0, terms * slice.size() * kFloat, 0});
                       for (index_t t = first; t < last; ++t)
                         sum_routes(t, slice.size(), rows, stride, weighted, sums + t * width, scratch);
                     }));
  };
  const auto add_merges = [&](std::size_t s) {
    Kept& mine = kept[s % kept.size()];
    const Range slice = slices[static_cast<index_t>(s)];
    mine.merged.clear();
    add_by_token(
        [=, this, made = mine.read, sums = mine.sums](std::size_t team, Range some, Arena& scratch) {
          for (const Group* group : made) tasks_.wait(group, scratch);
          for (const Portion& shard : shards_)
            count(scratch, moved(some.size() * slice.size() * kFloat, shard.team, team));
          count(scratch, moved(some.size() * slice.size() * size(result), 0, team));
          auto* sum = scratch.take<float>(slice.size());
          const std::vector<float> once(sums.size(), 1.0f);
          std::vector<const float*> terms(sums.size());
          for (index_t t = some.begin; t < some.end; ++t) {
            std::ranges::transform(sums, terms.begin(), [&](const float* own) { return own + t * width; });
            kernels().epilogue.sum_scaled(static_cast<int>(slice.size()), static_cast<int>(terms.size()),
                                          terms.data(), once.data(), sum);
            store(sum, slice.size(), result, t * h + slice.begin);
          }
        },
        mine.merged);
  };
  // The sum of a slice comes behind the next one's products, and what places' sums become behind the sums of
  // the next one, so that they seldom wait for their own.
  const auto count = static_cast<std::size_t>(slices.count);
  for (std::size_t s = 0; s < count + 2; ++s) {
    if (s < count) add_products(s);
    if (s >= 1 && s - 1 < count) add_sums(s - 1);
    if (several && s >= 2) add_merges(s - 2);
  }
}

index_t Pass::routes_of(Range tokens) const {
  const std::int32_t* offset = routing_.token_offset.data();
  return offset[tokens.end] - offset[tokens.begin];
}

void Pass::sum_routes(index_t token, index_t width, const float* rows, index_t stride, bool weighted,
                      float* sum, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const std::int32_t* offset = routing_.token_offset.data() + token;
  const int count = offset[1] - offset[0];
  auto* scale = scratch.take<float>(count);
  auto* terms = scratch.take<const float*>(count);
  for (int i = 0; i < count; ++i) {
    const index_t route = routing_.of_token[static_cast<std::size_t>(offset[0] + i)];
    scale[i] = weighted ? weight(route) : 1.0f;
    terms[i] = rows + route * stride;
  }
  kernels().epilogue.sum_scaled(static_cast<int>(width), count, terms, scale, sum);
}

void Pass::store(const float* row, index_t n, const Result& result, index_t offset) const {
  if (result.dtype == DType::f32)
    std::memcpy(static_cast<float*>(result.data) + offset, row, static_cast<std::size_t>(n) * sizeof(float));
  else
    kernels().epilogue.round_scaled(static_cast<int>(n), 1.0f, row,
                                    static_cast<bf16_t*>(result.data) + offset);
}

}  // namespace kt
