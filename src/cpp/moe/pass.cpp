#include "moe/pass.h"

#include <algorithm>
#include <cstring>

namespace kt {

Pass::Pass(Runtime& runtime, const ExpertWeights& weights, const LayerInputs& layer_inputs,
           Direction direction)
    : lease(runtime),
      call(lease.profile(), direction),
      experts(weights),
      inputs(layer_inputs),
      activation(kernels_of(kernels(), weights.activation, weights.gated)),
      routing(find_routes()),
      plan(routing, weights, kernels(), lease.workers()),
      tasks(plan.node_threads) {
  if (experts.fetch)
    tasks.add(Stage::fetch, 0, std::ssize(routing.experts), {},
              [this](index_t i, Arena&) { experts.fetch(routing.experts[to_size(i)]); });
  const auto* topk_weights = static_cast<const float*>(inputs.topk_weights.data);
  for (const std::int32_t slot : routing.sorted_slots) route_weights.push_back(topk_weights[slot]);
}

Routing Pass::find_routes() {
  const Span span(call.caller(), Stage::route);
  Routing found = route(inputs.topk_ids, experts.num_experts);
  index_t most = 0;
  for (const int e : found.experts) most = std::max(most, found.count(e));
  call.describe(inputs.topk_ids.rows, found.routes(), to_int(std::ssize(found.experts)), most);
  return found;
}

void Pass::run() {
  call.begin_tasks();
  tasks.run(lease);
  call.end_tasks();
}

Label Pass::label(Stage stage, const Block& block) const {
  const int shard = plan.shards.size() > 1 ? to_int(plan.shards[block.shard].number) : -1;
  return {stage, {shard, block.expert, to_int(block.count)}};
}

WeightBlock Pass::weight(Projection of, const Block& block) const {
  if (plan.shards.size() == 1 && !experts.split()) return whole(experts.of(of, block.expert));
  return experts.of(of, block.expert, plan.shards[block.shard].number);
}

MatView Pass::lora_a(Projection of, const Block& block) const {
  return lora(of).a[block.expert].block(0, first_col(of, block), rank(of), cols(of, block));
}

MatView Pass::lora_b(Projection of, const Block& block) const {
  return lora(of).b[block.expert].block(first_row(of, block), 0, rows(of, block), rank(of));
}

Rows Pass::by_token(const MatView& matrix, const BlockRows& rows, Range columns) const {
  return {matrix.block(0, columns.begin, rows.count(), columns.size()),
          routing.sorted_token_ids.data() + rows.first()};
}

Rows Pass::by_route(const ByBlock& matrices, index_t width, const BlockRows& rows, Range columns) const {
  return {view(matrices[rows.block.index], DType::bf16, rows.block.count, width)
              .block(rows.rows.begin, columns.begin, rows.count(), columns.size())};
}

Rows Pass::input(Projection of, const BlockRows& rows, Range columns) const {
  return of == Projection::down ? by_route(h, plan.width(rows.block), rows, columns)
                                : by_token(inputs.hidden_states, rows, columns);
}

Rows Pass::grad_output(Projection of, const BlockRows& rows, Range columns) const {
  return of == Projection::down ? by_token(grad_out, rows, columns)
                                : by_route(d_gate_up[index_of(of)], plan.width(rows.block), rows, columns);
}

MatView Pass::transposed_rows(const ByBlock& matrices, Projection of, const BlockRows& rows) const {
  return view(matrices[rows.block.index], DType::bf16, rank(of), rows.block.count)
      .block(0, rows.rows.begin, rank(of), rows.count());
}

ByBlock Pass::take_inner() {
  ByBlock matrices;
  for (const Block& block : plan.blocks)
    matrices.push_back(arena(block).take<bf16_t>(block.count * plan.width(block)));
  return matrices;
}

ByBlock Pass::saved_inner(bf16_t* matrix) const {
  ByBlock matrices;
  if (matrix == nullptr) return matrices;
  for (const Block& block : plan.blocks)
    matrices.push_back(matrix + routing.routes() * plan.slice(block).begin + block.first * plan.width(block));
  return matrices;
}

ByBlock Pass::take_p_or_q(Projection of) {
  ByBlock matrices;
  for (const Block& block : plan.blocks)
    matrices.push_back(plan.is_root(block) ? arena(block).take<bf16_t>(rank(of) * block.count)
                                           : matrices[plan.root(block).index]);
  return matrices;
}

ByBlock Pass::saved_p(Projection of, bf16_t* matrix) const {
  ByBlock matrices;
  if (matrix == nullptr) return matrices;
  for (const Block& block : plan.blocks) matrices.push_back(matrix + rank(of) * block.first);
  return matrices;
}

void Pass::store(const float* row, index_t n, const Result& result, index_t offset) const {
  if (result.dtype == DType::f32)
    std::memcpy(static_cast<float*>(result.data) + offset, row, to_size(n) * sizeof(float));
  else
    kernels().epilogue.round_scaled(to_int(n), 1.0f, row, static_cast<bf16_t*>(result.data) + offset);
}

}  // namespace kt
