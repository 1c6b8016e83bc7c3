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
  struct Ring {
    char* memory;
    std::vector<std::size_t> inputs = {};  // the blocks that packed into it, in order
  };
  const std::size_t siblings = shards_.size(), blocks = blocks_.size();
  const std::size_t kept = std::min(blocks / siblings, 2 * inputs_ahead_);
  std::vector<Ring> rings;
  for (std::size_t team = 0; team < lease_.teams(); ++team)
    rings.push_back({lease_.memory(team).take<char>(static_cast<index_t>(kept) * bytes)});
  std::vector<const Group*> packed(blocks);
  done.resize(blocks);
  const auto add_pack = [&](std::size_t b) {
    const Block block = blocks_[b];
    Ring& ring = rings[block.team];
    const std::size_t turn = ring.inputs.size();
    std::vector<const Group*> emptied;
    if (turn >= kept)
      for (std::size_t i = 0, before = ring.inputs[turn - kept]; i < siblings; ++i)
        if (const Block& other = blocks_[home_of(blocks_[before]) + i]; other.input == before)
          emptied.push_back(done[other.index]);
    ring.inputs.push_back(b);
    char* piece = ring.memory + static_cast<index_t>(turn % kept) * bytes;
    const Group* home = at_home(block) ? nullptr : packed[home_of(block)];
    packed[b] = tasks_.add(
        label(Stage::gather, block), block.team, 1,
        [=, emptied = std::move(emptied), this](index_t, Arena& scratch) {
          for (const Group* products : emptied) tasks_.wait(products, scratch);
          count(scratch, moved(block.count * experts_.hidden * index_t{sizeof(bf16_t)}, 0, block.team));
          shared->pack(block, piece, home, scratch);
        });
  };
  const auto add_products = [&](std::size_t b) {
    const Block block = blocks_[b];
    const Slices cut = slices[block.shard];
    const index_t run = slices_per_task(cut);
    done[b] = tasks_.add(label(stage, block), block.team, ceil_div(cut.count, run),
                         [=, this, input = packed[block.input]](index_t task, Arena& scratch) {
                           tasks_.wait(input, scratch);
                           for_slices(cut, task, run, [&](index_t i, Range slice, Range next) {
                             const Arena::Frame frame(scratch);
                             shared->multiply(block, i, slice, next, scratch);
                           });
                         });
  };
  for (std::size_t home = 0; home < blocks + inputs_ahead_ * siblings; home += siblings)
    for (std::size_t i = 0; i < siblings; ++i) {
      if (home < blocks && blocks_[home + i].input == home + i) add_pack(home + i);
      if (home >= inputs_ahead_ * siblings) add_products(home + i - inputs_ahead_ * siblings);
    }
}

}  // namespace kt
