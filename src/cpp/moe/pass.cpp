#include "moe/pass.h"

#include <algorithm>
#include <cstring>

#include "moe/cost.h"
#include "moe/pass_tasks.h"

namespace kt {

namespace {

constexpr index_t kTasksPerThread = 4;  // at least, where they are small
constexpr index_t kMostSlices = 4;      // of one task: each fetches the next one's weights
constexpr index_t kLeastCols = 24;      // of a slice, or its input is read too often
constexpr index_t kFewCols = 128;       // at least, of a slice for few rows: runs of 256 bytes

}  // namespace

Pass::Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs,
           std::optional<bool> whole, Direction direction)
    : lease_(runtime),
      call_(lease_.profile(), direction),
      threads_(runtime.threads()),
      inputs_ahead_(static_cast<std::size_t>(std::max(2, runtime.threads() / 2))),
      experts_(experts),
      inputs_(inputs),
      activation_(kernels_of(kernels(), experts.activation)),
      routing_(find_routes()),
      tasks_(lease_.teams()) {
  if (experts.fetch)
    tasks_.add(Stage::fetch, 0, std::ssize(routing_.experts),
               [this](index_t i, Arena&) { experts_.fetch(routing_.experts[static_cast<std::size_t>(i)]); });
  whole_ = whole.value_or(sooner_whole());
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

// Where experts lie whole: whether a call with these routes is done sooner at their homes.
bool Pass::sooner_whole() const {
  if (experts_.placement != Placement::automatic) return experts_.placement == Placement::expert;
  LayerCall call;
  call.tokens = inputs_.hidden_states.rows;
  call.hidden = experts_.hidden, call.intermediate = experts_.intermediate;
  for (int e = 0; e < experts_.num_experts; ++e) call.routes.push_back(routing_.count(e));
  for (const Projection p : projections) {
    call.ranks[index_of(p)] = inputs_.of(p).rank();
    call.weight_bytes[index_of(p)] = static_cast<double>(experts_.of(p, 0).bytes());
  }
  return choose(call, {experts_.shards, experts_.homes}, lease_.rates()) == Mode::expert;
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

Pass::ByShard Pass::take_by_shard() {
  ByShard memory;
  for (const Portion& shard : shards_)
    memory.push_back(lease_.memory(shard.team).take<bf16_t>(routing_.routes() * shard.inner.size()));
  return memory;
}

Pass::ByShard Pass::cut(bf16_t* matrix) const {
  ByShard parts;
  for (const Portion& shard : shards_)
    parts.push_back(matrix == nullptr ? nullptr : matrix + routing_.routes() * shard.inner.begin);
  return parts;
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

void Pass::add_gate_up() {
  std::vector<Slices> slices;
  for (const Portion& shard : shards_)
    slices.push_back(this->slices(shard.inner.size(), kernels().gemm.mr,
                                  2 * experts_.hidden * kernels().gemm.element_bytes));
  hidden_states_.resize(blocks_.size());
  add_with_input(
      Stage::gate_up, forward_input_bytes(kGateUp, kBlockRows, experts_.hidden),
      [this](Block block, char* memory, const Group* home, Arena& scratch) {
        pack_forward_input(kGateUp, block, memory, home, hidden_states_[block.index], scratch);
      },
      slices,
      [=, this](Block block, index_t, Range slice, Range next, Arena& scratch) {
        gate_up(block, slice, next, hidden_states_[block.input], scratch);
      },
      gate_up_done_);
}

index_t Pass::forward_input_bytes(std::span<const Projection> targets, index_t routes, index_t cols) const {
  index_t bytes = packed_b_bytes(kernels(), routes, cols);
  for (const Projection p : targets) bytes += packed_b_bytes(kernels(), routes, inputs_.of(p).rank());
  return bytes;
}

void Pass::pack_forward_input(std::span<const Projection> targets, Block block, char* into, const Group* home,
                              ForwardInput& in, Arena& scratch) {
  into = pack_input(targets.front(), block, into, in);
  if (home != nullptr) tasks_.wait(home, scratch);
  for (const Projection p : targets) {
    if (!inputs_.of(p)) continue;
    if (home == nullptr) {
      const Arena::Frame frame(scratch);
      auto* product = scratch.take<float>(product_floats(p, block));
      multiply_a(p, block, in.rows, product, scratch);
      keep_low_rank(p, block, product);
    }
    into = pack_low_rank(p, block, into, in);
  }
}

char* Pass::pack_input(Projection p, Block block, char* into, ForwardInput& in) const {
  const index_t n = cols(p, block);
  if (!few(block)) in.rows = pack_b_cols_into(into, kernels(), input(p, block, {0, n}));
  return into + packed_b_bytes(kernels(), block.count, n);
}

char* Pass::pack_low_rank(Projection p, Block block, char* into, ForwardInput& in) const {
  const index_t rank = inputs_.of(p).rank();
  const MatView low_rank = low_rank_of(low_rank_[index_of(p)], rank, block);
  if (!few(block)) in.low_rank[index_of(p)] = pack_b_rows_into(into, kernels(), {low_rank});
  return into + packed_b_bytes(kernels(), block.count, rank);
}

void Pass::multiply_a(Projection p, Block block, PackedB packed, float* product, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const MatView lora_a = this->lora_a(p, block);
  const index_t rank = lora_a.rows, in = lora_a.cols, stride = result_stride(kernels(), block.count);
  Span span(recorder(scratch), Stage::lora_p);
  span.count({2 * block.count * rank * in, 0, 0});
  const PackedA a = few(block) ? PackedA{} : pack_a(kernels(), {lora_a}, scratch);
  for_parts(block, kernels().gemm.nr, [&](Block part) {
    const Arena::Frame part_frame(scratch);
    float* place = product + within(part).begin;
    if (few(block)) {
      auto* by_row = scratch.take<float>(part.count * rank);
      multiply_few_transposed(kernels(), lora_input(p, part, {0, in}, scratch), {lora_a}, by_row, rank,
                              /*accumulate=*/false, scratch);
      kernels().epilogue.transpose(by_row, rank, to_int(part.count), to_int(rank), place, stride);
    } else {
      const bool as_packed = packed.data != nullptr && !inputs_.dropout.active();
      const PackedB rows = as_packed ? cols_of(kernels(), packed, within(part))
                                     : pack_b_cols(kernels(), lora_input(p, part, {0, in}, scratch), scratch);
      const Term term{a, rows};
      multiply(kernels(), {&term, 1}, place, stride);
    }
  });
}

void Pass::keep_low_rank(Projection p, Block block, float* product) {
  const index_t rank = inputs_.of(p).rank(), stride = result_stride(kernels(), block.count);
  for (index_t i = 0; i < rank; ++i) {
    float* row = product + i * stride;
    const auto keep = [&](bf16_t* stored) {
      kernels().epilogue.round_scaled(to_int(block.count), lora_scale(p), row,
                                      stored + rank * block.first + i * block.count);
    };
    if (low_rank_[index_of(p)] != nullptr) keep(low_rank_[index_of(p)]);
    if (p != Projection::down || weighted_low_rank_ == nullptr) continue;
    for (index_t j = 0; j < block.count; ++j) row[j] *= weight(block.first + j);
    keep(weighted_low_rank_);
  }
}

void Pass::gate_up(Block block, Range slice, Range next, const ForwardInput& in, Arena& scratch) const {
  const index_t n = inner(block), width = slice.size(), part_rows = kernels().gemm.nr;
  bf16_t *const gate = saved_gate_[block.shard], *const up = saved_up_[block.shard];
  std::array<ForwardWeights, 2> weights;
  std::array<float*, 2> result;
  for (const Projection p : kGateUp) {
    weights[index_of(p)] = forward_weights(p, block, in, slice, next, scratch);
    result[index_of(p)] = scratch.take<float>(part_rows * width);
  }
  const index_t stored = block.count * width * index_t{sizeof(bf16_t)};
  count(scratch, {0, stored, 0});  // h
  if (gate != nullptr) count(scratch, moved(2 * stored, 0, block.team));
  auto* unsaved =
      scratch.take<bf16_t>(width + 1) + 1;  // off a line, for what fills lines may go past the caches
  for_tiles(block, [&](Block part) {
    for (const Projection p : kGateUp)
      multiply_forward(p, {&weights[index_of(p)], 1}, part, result[index_of(p)], width, scratch);
    const Span span(recorder(scratch), Stage::activation);
    for (index_t i = 0; i < part.count; ++i) {
      const index_t place = (part.first + i) * n + slice.begin;
      activation_.forward(to_int(width), result[0] + i * width, result[1] + i * width,
                          gate ? gate + place : unsaved, up ? up + place : unsaved,
                          hidden_[block.shard] + place);
    }
  });
}

Pass::ForwardWeights Pass::forward_weights(Projection p, Block block, const ForwardInput& in, Range slice,
                                           Range next, Arena& scratch) const {
  const WeightBlock all = weights_of(p, block);
  const bool shared = p == Projection::down;
  ForwardWeights w{};
  w.block = block;
  w.input = &in;
  w.weights = all.rows_of(slice);
  w.next = codes_of(all.rows_of(next));
  w.lora = inputs_.of(p) && (!shared || at_home(block));
  if (const bf16_t* bias = experts_.bias(p, block.expert); bias != nullptr && (!shared || at_home(block)))
    w.bias = bias + first_row(p, block) + slice.begin;
  if (w.lora) w.lora_b = {lora_b(p, block).block(slice.begin, 0, slice.size(), inputs_.of(p).rank())};
  count(scratch, {0, bytes_of(w.weights), 0});
  if (few(block)) return w;
  const Span span(recorder(scratch), packing(w.weights));
  w.packed_weights = pack_a(kernels(), w.weights, scratch);
  if (w.lora) w.packed_lora_b = pack_a(kernels(), w.lora_b, scratch);
  return w;
}

void Pass::multiply_forward(Projection p, std::span<const ForwardWeights> weights, Block part, float* result,
                            index_t stride, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const index_t width = weights.front().weights.rows.size(), part_rows = kernels().gemm.nr;
  for (const ForwardWeights& w : weights)
    count(scratch, {2 * part.count * width * (cols(p, w.block) + (w.lora ? inputs_.of(p).rank() : 0)), 0, 0});
  if (few(part) || part.count <= kernels().few.max_tail) {
    for (const ForwardWeights& w : weights)
      multiply_few_forward(p, w, part, result, stride, /*accumulate=*/&w != weights.data(), scratch);
    return;
  }
  const index_t all = blocks_[part.index].count;
  Range fetching = within(part);  // and for a tail of few rows behind it
  if (all - fetching.end <= kernels().few.max_tail) fetching.end = all;
  const bf16_t* bias = nullptr;  // which the sum starts from
  std::size_t n = 0;
  auto* terms = scratch.take<Term>(2 * std::ssize(weights));
  for (const ForwardWeights& w : weights) {
    const auto add = [&](PackedA a, PackedB b, MatView next) {
      terms[n++] = {a, cols_of(kernels(), b, within(part)), next};
    };
    add(w.packed_weights, w.input->rows, share(w.next, fetching, all));
    if (w.lora) add(w.packed_lora_b, w.input->low_rank[index_of(p)], {});
    if (w.bias != nullptr) bias = w.bias;
  }
  auto* transposed = scratch.take<float>(width * part_rows);
  for (index_t i = 0; bias != nullptr && i < width; ++i)
    std::fill_n(transposed + i * part_rows, part.count, to_float(bias[i]));
  multiply(kernels(), {terms, n}, transposed, part_rows, /*accumulate=*/bias != nullptr);
  kernels().epilogue.transpose(transposed, part_rows, to_int(width), to_int(part.count), result, stride);
}

void Pass::multiply_few_forward(Projection p, const ForwardWeights& w, Block part, float* result,
                                index_t stride, bool accumulate, Arena& scratch) const {
  const Block mine = of_sibling(w.block, part);
  const index_t width = w.weights.rows.size();
  for (index_t i = 0; w.bias != nullptr && i < part.count; ++i)
    for (index_t j = 0; j < width; ++j)
      result[i * stride + j] = to_float(w.bias[j]) + (accumulate ? result[i * stride + j] : 0.0f);
  multiply_few_transposed(kernels(), input(p, mine, {0, cols(p, mine)}), w.weights, result, stride,
                          accumulate || w.bias != nullptr, scratch);
  if (w.lora)
    multiply_few_transposed(kernels(), low_rank_rows(p, mine, scratch), w.lora_b, result, stride,
                            /*accumulate=*/true, scratch);
}

Rows Pass::low_rank_rows(Projection p, Block block, Arena& scratch) const {
  const index_t rank = inputs_.of(p).rank();
  const MatView stored = low_rank_of(low_rank_[index_of(p)], rank, block);
  auto* rows = scratch.take<bf16_t>(block.count * rank);
  for (index_t i = 0; i < rank; ++i)
    for (index_t j = 0; j < block.count; ++j)
      rows[j * rank + i] = *static_cast<const bf16_t*>(stored.at(i, j));
  return {view(rows, DType::bf16, block.count, rank)};
}

Rows Pass::by_token(const MatView& matrix, Block block, Range cols) const {
  return {matrix.block(0, cols.begin, block.count, cols.size()), routing_.token.data() + block.first};
}

Rows Pass::by_route(const bf16_t* matrix, index_t row_length, Block block, Range cols) const {
  return {view(matrix, DType::bf16, routing_.routes(), row_length)
              .block(block.first, cols.begin, block.count, cols.size())};
}

Rows Pass::input(Projection p, Block block, Range cols) const {
  return p == Projection::down ? by_route(hidden_[block.shard], inner(block), block, cols)
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

MatView Pass::low_rank_of(const bf16_t* low_rank, index_t rank, Block part) const {
  const Block& whole = blocks_[part.index];
  return view(low_rank + rank * whole.first, DType::bf16, rank, whole.count)
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
