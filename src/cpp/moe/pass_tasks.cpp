// The tasks of a pass for all its blocks, in an order in which each waits for earlier ones alone.
#include <algorithm>
#include <memory>
#include <utility>

#include "moe/pass.h"

namespace kt {

void Pass::add_reduced(Stage stage, const std::vector<const Group*>& ready, Reduced steps,
                       std::vector<const Group*>& done) {
  const auto shared = std::make_shared<const Reduced>(std::move(steps));
  const std::size_t siblings = shards_.size();
  done.resize(blocks_.size());
  std::vector<const float*> products(blocks_.size());
  for (std::size_t home = 0; home < blocks_.size(); home += siblings) {
    for (std::size_t b = home + siblings; b-- > home;) {  // home comes last: it waits for the others
      const Block block = blocks_[b];
      float* own = siblings == 1 ? nullptr : memory(block).take<float>(shared->floats(block));
      products[b] = own;
      std::vector<const Group*> others;
      std::vector<const float*> terms;
      for (std::size_t i = 0; b == home && siblings > 1 && i < siblings; ++i) {
        if (i > 0) others.push_back(done[home + i]);
        terms.resize(siblings);
        terms[blocks_[home + i].shard] = products[home + i];
      }
      done[b] =
          tasks_.add(label(stage, block), block.team, 1,
                     [=, this, input = ready[b], others = std::move(others), terms = std::move(terms)](
                         index_t, Arena& scratch) {
                       tasks_.wait(input, scratch);
                       const index_t n = shared->floats(block);
                       float* product = own == nullptr ? scratch.take<float>(n) : own;
                       shared->compute(block, product, scratch);
                       if (!at_home(block)) return;
                       for (const Group* other : others) tasks_.wait(other, scratch);
                       if (!terms.empty()) {
                         const Span span(recorder(scratch), Stage::merge);
                         const std::vector<float> once(terms.size(), 1.0f);
                         product = scratch.take<float>(n);
                         kernels().epilogue.sum_scaled(static_cast<int>(n), static_cast<int>(terms.size()),
                                                       terms.data(), once.data(), product);
                       }
                       shared->finish(block, product, scratch);
                     });
    }
  }
}

void Pass::add_with_input(Stage stage, index_t bytes, const std::vector<Slices>& slices, WithInput steps,
                          std::vector<const Group*>& done) {
  const auto shared = std::make_shared<const WithInput>(std::move(steps));
  // A team's inputs, in order: pieces of its memory that they are packed into, again and again.
  struct Ring {
    std::size_t ahead, kept;  // inputs packed before the first is multiplied; pieces
    char* memory;
    std::vector<std::size_t> inputs = {};  // the blocks that packed into it
    std::size_t multiplied = 0;            // of them have their products
  };
  std::vector<Ring> rings;
  for (std::size_t team = 0; team < lease_.teams(); ++team) {
    const auto ahead = static_cast<std::size_t>(std::max(2, lease_.threads(team) / 2));
    const auto packing = static_cast<std::size_t>(std::ranges::count_if(
        blocks_, [&](const Block& block) { return block.team == team && block.input == block.index; }));
    const std::size_t kept = std::min(packing, 2 * ahead);
    rings.push_back({ahead, kept, lease_.memory(team).take<char>(static_cast<index_t>(kept) * bytes)});
  }
  std::vector<const Group*> packed(blocks_.size());
  done.resize(blocks_.size());
  // Calls body(block) for the siblings that read an input.
  const auto for_readers = [&](std::size_t input, const auto& body) {
    for (std::size_t i = 0; i < shards_.size(); ++i)
      if (const Block& block = blocks_[home_of(blocks_[input]) + i]; block.input == input) body(block);
  };
  const auto add_pack = [&](std::size_t b, Ring& ring) {
    const Block block = blocks_[b];
    const std::size_t turn = ring.inputs.size();
    std::vector<const Group*> emptied;
    if (turn >= ring.kept)
      for_readers(ring.inputs[turn - ring.kept],
                  [&](const Block& reader) { emptied.push_back(done[reader.index]); });
    ring.inputs.push_back(b);
    char* piece = ring.memory + static_cast<index_t>(turn % ring.kept) * bytes;
    const Group* home = at_home(block) ? nullptr : packed[home_of(block)];
    packed[b] = tasks_.add(
        label(Stage::gather, block), block.team, 1,
        [=, emptied = std::move(emptied), this](index_t, Arena& scratch) {
          for (const Group* products : emptied) tasks_.wait(products, scratch);
          count(scratch, moved(block.count * experts_.hidden * index_t{sizeof(bf16_t)}, 0, block.team));
          shared->pack(block, piece, home, scratch);
        });
  };
  const auto add_products = [&](const Block& of) {
    const Block block = of;
    const Slices cut = slices[block.shard];
    const index_t run = slices_per_task(cut);
    done[block.index] = tasks_.add(label(stage, block), block.team, ceil_div(cut.count, run),
                                   [=, this, input = packed[block.input]](index_t task, Arena& scratch) {
                                     tasks_.wait(input, scratch);
                                     for_slices(cut, task, run, [&](index_t i, Range slice, Range next) {
                                       const Arena::Frame frame(scratch);
                                       shared->multiply(block, i, slice, next, scratch);
                                     });
                                   });
  };
  for (const Block& block : blocks_) {
    if (block.input != block.index) continue;
    Ring& ring = rings[block.team];
    add_pack(block.index, ring);
    if (ring.inputs.size() > ring.ahead) for_readers(ring.inputs[ring.multiplied++], add_products);
  }
  for (Ring& ring : rings)
    while (ring.multiplied < ring.inputs.size()) for_readers(ring.inputs[ring.multiplied++], add_products);
}

}  // namespace kt
