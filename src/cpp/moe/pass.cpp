#include "moe/pass.h"

#include <algorithm>
#include <cstring>

namespace kt {

namespace {

constexpr index_t kTasksPerThread = 4;  // at least, where they are small
constexpr index_t kMostSlices = 4;      // of one task: each fetches the next one's weights
constexpr index_t kLeastCols = 24;      // of a slice, or its input is read too often
constexpr index_t kFewCols = 128;       // at least, of a slice for few rows: runs of 256 bytes

}  // namespace

Pass::Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, Direction direction)
    : lease_(runtime),
      call_(lease_.profile(), direction),
      threads_(runtime.threads()),
      experts_(experts),
      inputs_(inputs),
      activation_(kernels_of(kernels(), experts.activation)),
      routing_(find_routes()),
      whole_(experts.placement == Placement::expert),
      tasks_(lease_.teams()) {
  if (experts.fetch)
    tasks_.add(Stage::fetch, 0, std::ssize(routing_.experts),
               [this](index_t i, Arena&) { experts_.fetch(routing_.experts[static_cast<std::size_t>(i)]); });
  add_blocks();
  const auto* weights = static_cast<const float*>(inputs.topk_weights.data);
  for (const std::int32_t slot : routing_.slot) weight_.push_back(weights[slot]);
}

Routing Pass::find_routes() {
  const Span span(call_.caller(), Stage::route);
  Routing routing = route(inputs_.topk_ids, experts_.num_experts);
  index_t most = 0;
  for (const int e : routing.experts) most = std::max(most, routing.count(e));
  call_.describe(inputs_.topk_ids.rows, routing.routes(), to_int(std::ssize(routing.experts)), most);
  return routing;
}

void Pass::run_tasks() {
  call_.begin_tasks();
  tasks_.run(lease_);
  call_.end_tasks();
}

Label Pass::label(Stage stage, Block block) const {
  const int shard = shards_.size() > 1 ? to_int(static_cast<index_t>(shards_[block.shard].number)) : -1;
  return {stage, {shard, block.expert, to_int(block.count)}};
}

void Pass::add_blocks() {
  for (std::size_t s = 0; s < experts_.shards.size() && !whole_; ++s)
    if (experts_.shards[s].size() > 0)
      shards_.push_back({experts_.shards[s], s, lease_.team_of(s), lease_.place_of(s)});
  if (shards_.empty()) shards_.push_back({{0, experts_.intermediate}, 0, 0, 0});
  for (const int e : routing_.experts) {
    const index_t count = routing_.count(e), cuts = ceil_div(count, kBlockRows);
    const index_t each = round_up(ceil_div(count, cuts), kernels().gemm.nr);
    Block block{e, 0, 0, 0, 0, routing_.first(e), count};
    if (whole_)
      block.team = lease_.team_of(static_cast<std::size_t>(experts_.homes[static_cast<std::size_t>(e)]));
    for_parts(block, each, [&](Block routes) { add_siblings(routes); });
  }
}

void Pass::add_siblings(Block block) {
  most_rows_ = std::max(most_rows_, block.count);
  const std::size_t home = blocks_.size();
  std::vector<std::size_t> packs(lease_.teams(), blocks_.max_size());
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    block.index = blocks_.size();
    block.shard = (home / shards_.size() + i) % shards_.size();  // in turn every shard is at home
    if (!whole_) block.team = shards_[block.shard].team;
    std::size_t& first = packs[block.team];
    block.input = first = std::min(first, block.index);
    blocks_.push_back(block);
  }
}

Pass::ByBlock Pass::take_inner() {
  ByBlock matrices;
  for (const Block block : blocks_)
    matrices.push_back(memory(block).take<bf16_t>(block.count * inner(block)));
  return matrices;
}

Pass::ByBlock Pass::cut_inner(bf16_t* matrix) const {
  ByBlock matrices;
  for (std::size_t b = 0; matrix != nullptr && b < blocks_.size(); ++b)
    matrices.push_back(matrix + routing_.routes() * shards_[blocks_[b].shard].inner.begin +
                       blocks_[b].first * inner(blocks_[b]));
  return matrices;
}

Pass::ByBlock Pass::take_low_rank(Projection p) {
  ByBlock matrices;
  for (const Block block : blocks_)
    matrices.push_back(at_home(block) ? memory(block).take<bf16_t>(inputs_.of(p).rank() * block.count)
                                      : matrices[home_of(block)]);
  return matrices;
}

Pass::ByBlock Pass::cut_low_rank(Projection p, bf16_t* matrix) const {
  ByBlock matrices;
  for (std::size_t b = 0; matrix != nullptr && b < blocks_.size(); ++b)
    matrices.push_back(matrix + inputs_.of(p).rank() * blocks_[b].first);
  return matrices;
}

WeightBlock Pass::weights_of(Projection p, Block block) const {
  if (shards_.size() == 1 && !experts_.split) return whole(experts_.of(p, block.expert));
  return experts_.of(p, block.expert, shards_[block.shard].number);
}

index_t Pass::bytes_of(const WeightBlock& weights) {
  const index_t all = weights.weight->rows * weights.weight->cols;
  return weights.weight->bytes() * weights.rows.size() * weights.cols.size() / all;
}

MatView Pass::lora_a(Projection p, Block block) const {
  const LoraPair& lora = inputs_.of(p);
  if (p != Projection::down) return lora.a[block.expert];
  return lora.a[block.expert].block(0, shards_[block.shard].inner.begin, lora.rank(), inner(block));
}

MatView Pass::lora_b(Projection p, Block block) const {
  const LoraPair& lora = inputs_.of(p);
  if (p == Projection::down) return lora.b[block.expert];
  return lora.b[block.expert].block(shards_[block.shard].inner.begin, 0, inner(block), lora.rank());
}

Rows Pass::by_token(const MatView& matrix, Block part, Range cols) const {
  return {matrix.block(0, cols.begin, part.count, cols.size()), routing_.token.data() + part.first};
}

Rows Pass::by_route(const ByBlock& matrices, index_t row_length, Block part, Range cols) const {
  return {view(matrices[part.index], DType::bf16, blocks_[part.index].count, row_length)
              .block(within(part).begin, cols.begin, part.count, cols.size())};
}

Rows Pass::input(Projection p, Block block, Range cols) const {
  return p == Projection::down ? by_route(hidden_, inner(block), block, cols)
                               : by_token(inputs_.hidden_states, block, cols);
}

Rows Pass::lora_input(Projection p, Block block, Range cols, Arena& scratch) const {
  const Rows rows = input(p, block, cols);
  if (!inputs_.dropout.active()) return rows;
  auto* copy = scratch.take<bf16_t>(block.count * cols.size());
  for (index_t i = 0; i < block.count; ++i) {
    bf16_t* row = copy + i * cols.size();
    const index_t source = rows.index ? rows.index[i] : i;
    std::memcpy(row, rows.matrix.at(source, 0), static_cast<std::size_t>(cols.size()) * sizeof(bf16_t));
    drop(inputs_.dropout, p, routing_.slot[static_cast<std::size_t>(block.first + i)],
         first_col(p, block) + cols.begin, cols.size(), row);
  }
  return {view(copy, DType::bf16, block.count, cols.size())};
}

MatView Pass::low_rank_of(const ByBlock& low_rank, index_t rank, Block part) const {
  return view(low_rank[part.index], DType::bf16, rank, blocks_[part.index].count)
      .block(0, within(part).begin, rank, part.count);
}

Slices Pass::slices(index_t n, index_t tile, index_t bytes) const {
  const auto cut = [&](index_t count, index_t most) {
    return Slices{n, std::clamp(count, index_t{1}, most), tile};
  };
  if (all_few())
    return cut(ceil_div(kTasksPerThread * threads_, std::max(std::ssize(blocks_), index_t{1})),
               ceil_div(n, std::max(tile, kFewCols)));
  return cut(ceil_div(n, std::max(round_up(kLeastCols, tile), cache_part() / bytes)), ceil_div(n, tile));
}

index_t Pass::slices_per_task(const Slices& slices) const {
  return std::clamp(slices.count * std::ssize(blocks_) / (kTasksPerThread * threads_), index_t{1},
                    kMostSlices);
}

// Dropped inputs are zeros; the kept ones' factor 1 / (1 - probability) enters here, in fp32.
float Pass::lora_scale(Projection p) const {
  return static_cast<float>(inputs_.of(p).scaling / (1.0 - inputs_.dropout.probability));
}

}  // namespace kt
