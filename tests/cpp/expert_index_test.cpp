#include "weights/expert_index.h"

#include <doctest/doctest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "forks.h"
#include "temp_files.h"

using namespace kt;
using namespace kt::test;

namespace {

constexpr index_t H = 4, I = 3, E = 2;

ExpertIndex index_of_path(const std::filesystem::path& path) {
  return ExpertIndex(std::make_shared<const Checkpoint>(path));
}

std::string refusal(const ExpertIndex& index, int layer) {
  return message_of<ValueError>([&] { index.open(layer); });
}

// One expert under `prefix`, its tensors called as `names` says (gate, up, down).
void add_expert(Writer& to, const std::string& prefix, const std::vector<std::string>& names) {
  for (std::size_t p = 0; p < 3; ++p) {
    to.add(prefix + names[p] + ".weight", "BF16", p == 2 ? std::vector{H, I} : std::vector{I, H}, 2);
  }
}

Writer per_expert(const std::string& prefix, const std::vector<std::string>& names) {
  Writer writer;
  for (int e = 0; e < E; ++e) add_expert(writer, prefix + std::to_string(e) + ".", names);
  return writer;
}

const std::vector<std::string> proj{"gate_proj", "up_proj", "down_proj"};
const std::string qwen = "model.layers.3.mlp.experts.";

const std::byte* bytes_of(const Checkpoint& checkpoint, const std::string& name) {
  return checkpoint.map(*checkpoint.find(name)).data();
}

void check_mapped(const Weight& m, const std::byte* codes, index_t rows, index_t cols) {
  CHECK(m.codes == codes);
  CHECK(m.type == WeightType{});
  CHECK(m.rows == rows);
  CHECK(m.cols == cols);
}

}  // namespace

TEST_CASE("names tell layer, expert, matrix and role") {
  const auto parsed = parse_expert_name("model.layers.61.mlp.experts.255.down_proj.weight_scale_inv");
  REQUIRE(parsed);
  CHECK(parsed->layer == 61);
  CHECK(parsed->root == "model.layers.61.mlp");
  CHECK(parsed->expert == 255);
  CHECK(parsed->first == Projection::down);
  CHECK(parsed->last == Projection::down);
  REQUIRE(parsed->tail != nullptr);
  CHECK(parsed->tail->role == Role::scale);
  CHECK(tensor_name(*parsed, Projection::up, 7, 0) ==
        "model.layers.61.mlp.experts.7.up_proj.weight_scale_inv");

  const auto fused = parse_expert_name("model.layers.2.mlp.experts.gate_up_proj_blocks");
  REQUIRE(fused);
  CHECK(fused->first == Projection::gate);
  CHECK(fused->last == Projection::up);
  CHECK(fused->tail->encoding == Encoding::mxfp4);

  const auto kt = parse_expert_name("blk.3.ffn_up_exps.17.numa.1.scale");
  REQUIRE(kt);
  CHECK(kt->layer == 3);
  CHECK(kt->expert == 17);
  CHECK(kt->part == 1);
  CHECK(tensor_name(*kt, Projection::gate, 2, 0) == "blk.3.ffn_gate_exps.2.numa.0.scale");

  for (const auto* other :
       {"model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.shared_experts.up_proj.weight",
        "experts.0.up_proj.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight", "", "exp", "."}) {
    CHECK_FALSE(parse_expert_name(other));
  }
}

TEST_CASE("per-expert tensors of every naming are found") {
  struct Naming {
    std::string prefix;
    std::vector<std::string> names;
  };
  for (const auto& [prefix, names] : std::vector<Naming>{
           {qwen, proj},
           {"layers.3.experts.", proj},
           {"language_model.model.layers.3.feed_forward.experts.", {"w1", "w3", "w2"}},
           {"model.layers.3.block_sparse_moe.experts.", {"w1", "w3", "w2"}},
       }) {
    CAPTURE(prefix);
    const TempDir dir;
    const auto index = index_of_path(per_expert(prefix, names).write_to(dir / "m.safetensors"));
    CHECK(index.layers() == std::vector{3});
    const auto source = index.open(3);
    const auto& info = source->info();
    CHECK(info.num_experts == E);
    CHECK(info.hidden == H);
    CHECK(info.intermediate == I);
    CHECK(info.stored_type == "BF16");
    CHECK(info.layout == "per-expert");
    CHECK(info.nbytes == E * 3 * H * I * 2);
    CHECK(info.mappable);
    for (int e = 0; e < E; ++e) {
      for (const Projection p : projections) {
        const auto name = prefix + std::to_string(e) + "." + names[index_of(p)] + ".weight";
        const bool down = p == Projection::down;
        check_mapped(source->map(e, p), bytes_of(index.checkpoint(), name), down ? H : I, down ? I : H);
      }
    }
  }
}

TEST_CASE("experts that are named for the index are found under those names, and no others") {
  const TempDir dir;
  const std::string block = "decoder.4.block.";
  auto writer = per_expert(block, {"a", "b", "c"});
  writer.add(block + "router.weight", "BF16", {E, H}, 2);
  writer.add("decoder.4.blocks.0.a.weight", "BF16", {I, H}, 2);
  const auto tables = index_of_path(writer.write_to(dir / "m.safetensors"));
  CHECK(tables.layers().empty());

  ExpertList list{"decoder.4.block", Form::per_expert, {"a", "b", "c"}, 0, E};
  const ExpertIndex index(tables, {{4, list}});
  CHECK(index.layers() == std::vector{4});
  CHECK(!index.tag(4).empty());
  const auto source = index.open(4);
  CHECK(source->info().num_experts == E);
  for (int e = 0; e < E; ++e) {
    const auto name = block + std::to_string(e) + ".b.weight";
    check_mapped(source->map(e, Projection::up), bytes_of(index.checkpoint(), name), I, H);
  }

  list.first_expert = 1, list.num_experts = E - 1;  // the second list of two
  const ExpertIndex second(tables, {{9, list}});
  CHECK(second.layer(9).num_experts == E - 1);
  CHECK(second.tag(9) != index.tag(4));
  check_mapped(second.open(9)->map(0, Projection::up), bytes_of(index.checkpoint(), block + "1.b.weight"), I,
               H);

  list.num_experts = E;  // one more than there are
  CHECK(ExpertIndex(tables, {{9, list}}).layer(9).num_experts == E - 1);
  list.words[1] = "up";
  CHECK_THROWS_WITH_AS(ExpertIndex(tables, {{9, list}}).layer(9),
                       doctest::Contains("has the tensor \"decoder.4.block.1.b.weight\""), ValueError);
  list.prefix = "decoder.5.block";
  CHECK_THROWS_WITH_AS(ExpertIndex(tables, {{9, list}}),
                       doctest::Contains("layer 9 has no tensor \"decoder.5.block.*\""), ValueError);
}

TEST_CASE("the tables' own experts keep the name of their packed files") {
  const TempDir dir;
  const auto tables = index_of_path(per_expert(qwen, proj).write_to(dir / "m.safetensors"));
  const ExpertList list{"model.layers.3.mlp.experts", Form::per_expert, {proj[0], proj[1], proj[2]}, 0, E};
  const ExpertIndex index(tables, {{3, list}, {4, list}});
  CHECK(index.tag(3).empty());
  CHECK(!index.tag(4).empty());
}

TEST_CASE("a layer is opened once, a refused one is refused again") {
  const TempDir dir;
  auto writer = per_expert(qwen, proj);
  writer.add("model.layers.4.mlp.experts.0.gate_proj.weight", "BF16", {I, H}, 2);
  const auto index = index_of_path(writer.write_to(dir / "m.safetensors"));
  const auto source = index.open(3);
  CHECK(index.layer(3).num_experts == E);
  CHECK(index.open(3) == source);
  const auto why = refusal(index, 4);
  CHECK(contains(why, "is missing"));
  CHECK(refusal(index, 4) == why);
}

TEST_CASE("fused tensors are cut into experts and halves") {
  const TempDir dir;
  const auto index = index_of_path(Writer()
                                       .add(qwen + "gate_up_proj", "BF16", {E, 2 * I, H}, 2)
                                       .add(qwen + "down_proj", "BF16", {E, H, I}, 2)
                                       .write_to(dir / "m.safetensors"));
  const auto source = index.open(3);
  CHECK(source->info().layout == "fused");
  CHECK(source->info().nbytes == E * 3 * H * I * 2);
  const auto* gate_up = bytes_of(index.checkpoint(), qwen + "gate_up_proj");
  const auto* down = bytes_of(index.checkpoint(), qwen + "down_proj");
  for (int e = 0; e < E; ++e) {
    check_mapped(source->map(e, Projection::gate), gate_up + e * 2 * I * H * 2, I, H);
    check_mapped(source->map(e, Projection::up), gate_up + (e * 2 + 1) * I * H * 2, I, H);
    check_mapped(source->map(e, Projection::down), down + e * H * I * 2, H, I);
  }
}

TEST_CASE("experts without a gate: of each expert as the files tell, where somebody names them as he says") {
  const TempDir dir;
  Writer writer;
  for (int e = 0; e < E; ++e) {
    writer.add(message("{}{}.up_proj.weight", qwen, e), "BF16", {I, H}, 2);
    writer.add(message("{}{}.down_proj.weight", qwen, e), "BF16", {H, I}, 2);
  }
  const auto tables = index_of_path(writer.write_to(dir / "m.safetensors"));
  ExpertList list{"model.layers.3.mlp.experts", Form::per_expert, {"", "up_proj", "down_proj"}, 0, E};
  const ExpertIndex named(tables, {{3, list}});
  for (const ExpertIndex* index : {&tables, &named}) {
    const auto source = index->open(3);
    CHECK_FALSE(source->info().gated);
    CHECK(source->info().nbytes == E * 2 * H * I * 2);
    for (int e = 0; e < E; ++e) {
      const auto name = message("{}{}.", qwen, e);
      check_mapped(source->map(e, Projection::up), bytes_of(index->checkpoint(), name + "up_proj.weight"), I,
                   H);
      check_mapped(source->map(e, Projection::down), bytes_of(index->checkpoint(), name + "down_proj.weight"),
                   H, I);
    }
  }
  list.words[0] = "gate_proj";
  CHECK(contains(refusal(ExpertIndex(tables, {{3, list}}), 3), "0.gate_proj.weight\" is missing"));

  writer.add(qwen + "1.gate_proj.weight", "BF16", {I, H}, 2);
  CHECK(contains(refusal(index_of_path(writer.write_to(dir / "m.safetensors")), 3),
                 "0.gate_proj.weight\" is missing"));
}

TEST_CASE("experts without a gate in fused tensors") {
  const TempDir dir;
  const ExpertList list{"model.layers.3.mlp.experts", Form::fused, {"", "up_proj", "down_proj"}, 0, E};
  const auto stored = [&](const std::vector<index_t>& up) {
    const auto tables = index_of_path(Writer()
                                          .add(qwen + "up_proj", "BF16", up, 2)
                                          .add(qwen + "down_proj", "BF16", {E, H, I}, 2)
                                          .write_to(dir / "m.safetensors"));
    return ExpertIndex(tables, {{3, list}});
  };
  const ExpertIndex index = stored({E, I, H});
  const auto source = index.open(3);
  CHECK_FALSE(source->info().gated);
  CHECK(source->info().layout == "fused");
  for (int e = 0; e < E; ++e) {
    check_mapped(source->map(e, Projection::up),
                 bytes_of(index.checkpoint(), qwen + "up_proj") + e * I * H * 2, I, H);
    check_mapped(source->map(e, Projection::down),
                 bytes_of(index.checkpoint(), qwen + "down_proj") + e * H * I * 2, H, I);
  }
  CHECK(contains(refusal(stored({E, 2 * I, H}), 3), "wanted [E, I, H] and [E, H, I]"));
}

TEST_CASE("a norm of the experts' outputs is none of them") {
  const TempDir dir;
  auto writer = per_expert(qwen, proj);
  writer.add(qwen + "post_expert_norm.weight", "BF16", {H}, 2);
  CHECK(index_of_path(writer.write_to(dir / "m.safetensors")).layer(3).num_experts == E);
}

TEST_CASE("other types and mixtures of types are refused") {
  const TempDir dir;
  const auto stored = [&](std::string_view gate_type, int gate_size, std::string_view type, int size) {
    return index_of_path(Writer()
                             .add(qwen + "0.gate_proj.weight", gate_type, {I, H}, gate_size)
                             .add(qwen + "0.up_proj.weight", type, {I, H}, size)
                             .add(qwen + "0.down_proj.weight", type, {H, I}, size)
                             .write_to(dir / "m.safetensors"));
  };
  CHECK(stored("F16", 2, "F16", 2).layer(3).types[0] == WeightType{});
  CHECK_FALSE(stored("F32", 4, "F32", 4).layer(3).mappable);
  CHECK(contains(refusal(stored("F8_E4M3", 1, "F8_E4M3", 1), 3), "has no weight_scale_inv or weight_scale"));
  CHECK(contains(refusal(stored("I32", 4, "I32", 4), 3), "is I32, wanted one of BF16 F16 F32"));
  const auto mixed = refusal(stored("F16", 2, "BF16", 2), 3);
  CHECK(contains(mixed, "up_proj.weight\" is BF16, the layer's first is F16"));
}

TEST_CASE("a layer that is not there names those that are") {
  const TempDir dir;
  Writer writer;
  for (int layer : {1, 2, 3, 7}) add_expert(writer, message("model.layers.{}.mlp.experts.0.", layer), proj);
  writer.add("model.layers.0.mlp.gate_proj.weight", "BF16", {I, H}, 2);
  writer.add("model.layers.4.mlp.shared_experts.gate_proj.weight", "BF16", {I, H}, 2);
  writer.add("experts.0.gate_proj.weight", "BF16", {I, H}, 2);
  add_expert(writer, "mtp.layers.0.mlp.experts.0.", proj);
  add_expert(writer, "model.layers.x.mlp.experts.0.", proj);
  const auto index = index_of_path(writer.write_to(dir / "m.safetensors"));
  CHECK(index.layers() == std::vector{1, 2, 3, 7});
  CHECK(contains(refusal(index, 0), "no experts in layer 0; layers with experts: 1-3, 7"));
  CHECK(contains(refusal(index, -1), "no experts in layer -1"));
  const auto dense = index_of_path(Writer().add("a", "F32", {}, 4).write_to(dir / "d.safetensors"));
  CHECK(contains(refusal(dense, 0), "layers with experts: none"));
}

TEST_CASE("a tensor that is missing is named by its key") {
  const TempDir dir;
  const auto lacking = [&](const std::string& missing) {
    Writer writer;
    for (int e = 0; e < 4; ++e) {
      for (const auto& name : proj) {
        const auto key = qwen + std::to_string(e) + "." + name + ".weight";
        if (key.find(missing) != key.npos) continue;
        writer.add(key, "BF16", name == "down_proj" ? std::vector{H, I} : std::vector{I, H}, 2);
      }
    }
    return refusal(index_of_path(writer.write_to(dir / "m.safetensors")), 3);
  };
  CHECK(contains(lacking("experts.2."), "\"model.layers.3.mlp.experts.2.gate_proj.weight\" is missing"));
  CHECK(contains(lacking("2.up_proj"), "\"model.layers.3.mlp.experts.2.up_proj.weight\" is missing"));
  CHECK(contains(lacking("3.down_proj"), "\"model.layers.3.mlp.experts.3.down_proj.weight\" is missing"));
  CHECK(contains(lacking("0.gate_proj"), "\"model.layers.3.mlp.experts.0.gate_proj.weight\" is missing"));

  const auto half =
      Writer().add(qwen + "gate_up_proj", "BF16", {E, 2 * I, H}, 2).write_to(dir / "h.safetensors");
  CHECK(contains(refusal(index_of_path(half), 3), "experts.down_proj\" is missing"));
  const auto far = per_expert(qwen, proj).add(qwen + "999999999.up_proj.weight", "BF16", {I, H}, 2);
  CHECK(contains(refusal(index_of_path(far.write_to(dir / "f.safetensors")), 3),
                 "experts.2.gate_proj.weight\" is missing"));
  const auto parts = Writer().add("blk.3.ffn_up_exps.999999999.numa.999999999.weight", "I8", {1}, 1);
  CHECK(contains(refusal(index_of_path(parts.write_to(dir / "p.safetensors")), 3), "some are missing"));
  const auto bare =
      Writer().add(qwen + "0.up_proj.input_scale", "F32", {}, 4).write_to(dir / "b.safetensors");
  CHECK(contains(refusal(index_of_path(bare), 3), "but no weights beside them"));
}

TEST_CASE("shapes that disagree name the tensor, what it is and what was wanted") {
  const TempDir dir;
  const auto with_second = [&](const std::vector<index_t>& gate, const std::vector<index_t>& down) {
    Writer writer;
    add_expert(writer, qwen + "0.", proj);
    writer.add(qwen + "1.gate_proj.weight", "BF16", gate, 2)
        .add(qwen + "1.up_proj.weight", "BF16", {I, H}, 2);
    writer.add(qwen + "1.down_proj.weight", "BF16", down, 2);
    return refusal(index_of_path(writer.write_to(dir / "m.safetensors")), 3);
  };
  CHECK(contains(with_second({I, H + 1}, {H, I}), "1.gate_proj.weight\" has shape [3, 5], wanted [3, 4]"));
  CHECK(contains(with_second({I, H}, {I, H}), "1.down_proj.weight\" has shape [3, 4], wanted [4, 3]"));
  CHECK(contains(with_second({1, I, H}, {H, I}), "has shape [1, 3, 4], wanted [3, 4]"));

  const auto fused = [&](const std::vector<index_t>& gate_up, const std::vector<index_t>& down) {
    Writer writer;
    writer.add(qwen + "gate_up_proj", "BF16", gate_up, 2).add(qwen + "down_proj", "BF16", down, 2);
    return refusal(index_of_path(writer.write_to(dir / "m.safetensors")), 3);
  };
  CHECK(
      contains(fused({E, 5, H}, {E, H, I}), "wanted [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]"));
  CHECK(contains(fused({2 * I, H}, {E, H, I}), "wanted 3 dimensions"));
  CHECK(contains(fused({E, 2 * I, 0}, {E, 0, I}), "wanted no 0"));
  CHECK(contains(fused({E, 2 * I, H}, {E + 1, H, I}), "has shape [3, 4, 3], wanted [2, 4, 3]"));
  CHECK(contains(fused({E, H, 2 * H}, {E, H, H + 1}), "wanted [E, 2I, H]"));
}

TEST_CASE("an expert out of range is refused") {
  const TempDir dir;
  const auto source = index_of_path(per_expert(qwen, proj).write_to(dir / "m.safetensors")).open(3);
  for (int e : {-1, static_cast<int>(E)}) {
    CHECK(contains(message_of<ValueError>([&] { source->map(e, Projection::up); }), "layer 3 has 2 experts"));
  }
}

TEST_CASE("tensors that do not belong are named, never ignored") {
  struct Foreign {
    std::string tensor, says;
  };
  for (const auto& [tensor, says] : std::vector<Foreign>{
           {"0.gate_proj.weight_scale_inv", "0.up_proj.weight_scale_inv\" is missing"},
           {"0.gate_proj.weight_packed", "stored in two layouts"},
           {"gate_up_proj_blocks", "stored in two layouts"},
           {"gate_up_proj_bias", "stored in two layouts"},
           {"0.gate_proj.bias", "0.up_proj.bias\" is missing"},
           {"0.gate_proj.weight_scale_2", "0.up_proj.weight_scale_2\" is missing"},
           {"gate_up_proj_weight_scale_2", "NVFP4 of fused experts"},
           {"0.gate_proj.lora_A.weight", "adapter"},
           {"00.gate_proj.weight", "unknown"},
           {"0.fc1.weight", "unknown"},
       }) {
    CAPTURE(tensor);
    const TempDir dir;
    const auto index = index_of_path(
        per_expert(qwen, proj).add(qwen + tensor, "U8", {1}, 1).write_to(dir / "m.safetensors"));
    CHECK(index.layers() == std::vector{3});
    CHECK(contains(refusal(index, 3), says));
  }
}

TEST_CASE("a layer that is stored twice is refused") {
  const TempDir dir;
  auto both = per_expert(qwen, proj);
  both.add(qwen + "gate_up_proj", "BF16", {E, 2 * I, H}, 2);
  CHECK(contains(refusal(index_of_path(both.write_to(dir / "a.safetensors")), 3), "stored in two layouts"));
  auto roots = per_expert(qwen, proj);
  add_expert(roots, "vision.layers.3.mlp.experts.0.", proj);
  const auto message = refusal(index_of_path(roots.write_to(dir / "b.safetensors")), 3);
  CHECK(contains(message, "experts under both \"model.layers.3.mlp\" and \"vision.layers.3.mlp\""));
  auto scales = Writer()
                    .add(qwen + "0.up_proj.weight", "F8_E4M3", {I, H}, 1)
                    .add(qwen + "0.up_proj.weight_scale", "F32", {1}, 4)
                    .add(qwen + "0.up_proj.weight_scale_inv", "F32", {1}, 4);
  CHECK(contains(refusal(index_of_path(scales.write_to(dir / "c.safetensors")), 3), "says the same as"));
}

TEST_CASE("a tensor that its elements cannot be used from in place is not mapped") {
  const TempDir dir;
  Writer writer;
  writer.add("odd", "U8", {1}, 1);
  add_expert(writer, qwen + "0.", proj);
  const auto source = index_of_path(writer.write_to(dir / "m.safetensors")).open(3);
  CHECK_FALSE(source->info().mappable);
  CHECK(contains(message_of<ValueError>([&] { source->map(0, Projection::up); }), "aligned"));
}

TEST_CASE("a child that is forked while another thread opens a layer") {
  const TempDir dir;
  Writer writer = per_expert(qwen, proj);
  add_expert(writer, "model.layers.4.mlp.experts.1.", proj);  // without expert 0: refused by every call
  const auto path = writer.write_to(dir / "model.safetensors");
  const ExpertIndex index = index_of_path(path);
  const auto refused = [&] { return !refusal(index, 4).empty(); };
  CHECK(true_in_children([&] { return refused() && index.layer(3).num_experts == E; }, refused));
}
