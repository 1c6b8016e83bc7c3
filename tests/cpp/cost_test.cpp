#include "moe/cost.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "base/error.h"

using namespace kt;

namespace {

constexpr bool kSliced = false, kWhole = true;

// 3 experts with 600, 0 and 5 routes: two blocks and one of few rows.
LayerCall small_call(bool backward = false, bool saved = true) {
  return {400, 64, 96, {600, 0, 5}, {4, 4, 4}, {100, 100, 200}, 4, backward, saved};
}

Division even(index_t intermediate, int shards, std::vector<int> homes = {}) {
  Division division{{}, std::move(homes)};
  for (int s = 0; s < shards; ++s) division.shards.push_back(split(intermediate, shards, s));
  return division;
}

Traffic total(const std::vector<Traffic>& shards) {
  Traffic sum;
  for (const Traffic& t : shards) sum += t;
  return sum;
}

Traffic total(const StageTraffic& stages) {
  Traffic sum;
  for (const auto& shards : stages) sum += total(shards);
  return sum;
}

Traffic of(const StageTraffic& stages, Stage stage) { return total(stages[static_cast<std::size_t>(stage)]); }

double bytes(const Traffic& t) { return t.local + t.remote; }

const std::vector<LayerCall> kCalls{small_call(), small_call(false, false), small_call(true),
                                    small_call(true, false)};

}  // namespace

TEST_CASE("cost: what forward takes without LoRA on one shard, by hand") {
  const LayerCall call{10, 8, 6, {20, 3}, {}, {96, 96, 96}};
  const StageTraffic t = layer_traffic(call, even(6, 1), kSliced);
  const double routes = 23, packed = 20;  // three rows are multiplied where they lie
  CHECK(of(t, Stage::gather).local == 2 * 8 * (routes + packed));
  CHECK(of(t, Stage::gate_up).local == 2 * 2 * 96 + 2 * packed * 8 + 2 * 3 * routes * 6);  // h, G, U
  CHECK(of(t, Stage::hidden).local == 2 * 6 * (routes + packed));
  const double rows = 4 * routes * 8;  // written, then read
  CHECK(of(t, Stage::down).local == 2 * 96 + 2 * packed * 6 + rows);
  CHECK(of(t, Stage::merge).local == rows + 2 * 10 * 8);
  CHECK(total(t).rows == 2 * rows);
  CHECK(bytes(of(t, Stage::lora_p)) == 0);
  CHECK(total(t).remote == 0);
  CHECK(total(t).flops == 2 * routes * 3 * 8 * 6);
}

TEST_CASE("cost: what two shards read of each other, by hand") {
  const LayerCall call{10, 8, 6, {20}, {2, 0, 2}, {96, 96, 96}, 4, false, false};
  const StageTraffic t = layer_traffic(call, even(6, 2), kSliced);
  CHECK(of(t, Stage::gather).remote == 2 * (2 * 20 * 8) / 2.0);  // half of X for each
  // The other shard reads P of gate; the home reads its sums of Pd. A of gate and of down are the caller's.
  const double a = (8 * 2 + 6 * 2) * 4;
  CHECK(of(t, Stage::lora_p).remote == 2 * 20 * 2 + 4 * 20 * 2 + a / 2);
  CHECK(of(t, Stage::gate_up).remote == 6 * 2 * 4 / 2.0);  // B of gate
  CHECK(of(t, Stage::down).remote == 8 * 2 * 4 / 2.0);     // B of down, at home
  CHECK(of(t, Stage::merge).remote == 4 * 10 * 8 + 2 * 10 * 8 / 2.0);
}

TEST_CASE("cost: every product is computed once, however it is cut") {
  for (const LayerCall& call : kCalls) {
    const double flops = total(layer_traffic(call, even(96, 1), kSliced)).flops;
    for (const int shards : {2, 3, 5, 8, 16}) {
      CAPTURE(shards);
      CHECK(total(layer_traffic(call, even(96, shards), kSliced)).flops == doctest::Approx(flops));
      const Division whole = even(96, shards, {0, shards / 2, shards - 1});
      CHECK(total(layer_traffic(call, whole, kSliced)).flops == doctest::Approx(flops));
      CHECK(total(layer_traffic(call, whole, kWhole)).flops == doctest::Approx(flops));
    }
  }
  const double kept = total(layer_traffic(small_call(true), even(96, 1), kSliced)).flops;
  CHECK(total(layer_traffic(small_call(true, false), even(96, 1), kSliced)).flops > kept);
}

TEST_CASE("cost: weights and what is cut with them are read once, however they are cut") {
  for (const LayerCall& call : kCalls)
    for (const int shards : {2, 7, 16}) {
      const StageTraffic one = layer_traffic(call, even(96, 1), kSliced);
      const StageTraffic cut = layer_traffic(call, even(96, shards), kSliced);
      for (const Stage stage : {Stage::hidden, Stage::gather_grad})
        CHECK(bytes(of(cut, stage)) == doctest::Approx(bytes(of(one, stage))));
      const StageTraffic whole = layer_traffic(call, even(96, shards, {0, 1, 1}), kWhole);
      CHECK(bytes(total(whole)) == doctest::Approx(bytes(total(one))));
    }
  LayerCall call = small_call();
  call.ranks = {};
  const auto weights = [&](const Division& division) {
    LayerCall heavy = call;
    heavy.weight_bytes = {1e12, 1e12, 1e12};
    return total(layer_traffic(heavy, division, kSliced));
  };
  CHECK(bytes(weights(even(96, 4))) == doctest::Approx(9e12));  // three blocks
  CHECK(weights(even(96, 4)).remote < 1e9);
  CHECK(weights(even(96, 4, {0, 1, 3})).remote == doctest::Approx(9e12 * 3 / 4));  // whole at their homes
}

TEST_CASE("cost: what one reads remotely another serves, and one shard has nothing to read") {
  for (const LayerCall& call : kCalls) {
    for (const bool whole : {kSliced, kWhole}) {
      CHECK(total(layer_traffic(call, even(96, 1, {0, 0, 0}), whole)).remote == 0);
      const Traffic t = total(layer_traffic(call, even(96, 4, {3, 0, 1}), whole));
      CHECK(t.remote > 0);
      CHECK(t.served == doctest::Approx(t.remote));
    }
    double before = 0;
    for (const int shards : {1, 2, 4, 8, 16}) {
      const double remote = total(layer_traffic(call, even(96, shards), kSliced)).remote;
      CHECK(remote >= before);
      before = remote;
    }
  }
}

TEST_CASE("cost: stages are those of the profile, and only those that a pass has") {
  const auto seen = [](const LayerCall& call) {
    std::vector<std::string> names;
    const StageTraffic stages = layer_traffic(call, even(96, 2), kSliced);
    for (std::size_t i = 0; i < kStages; ++i)
      if (bytes(total(stages[i])) > 0) names.emplace_back(name_of(static_cast<Stage>(i)));
    return names;
  };
  using Names = std::vector<std::string>;
  CHECK(seen(small_call()) == Names{"gather", "lora_p", "gate_up", "hidden", "down", "merge"});
  CHECK(seen(small_call(true)) ==
        Names{"gather", "merge", "grad_down", "gather_grad", "lora_q", "grad_hidden", "lora_grad"});
}

TEST_CASE("cost: shards too many for the intermediate dimension have little to do") {
  const LayerCall call = small_call();
  Division division{{{0, 64}, {64, 96}, {96, 96}}};
  const StageTraffic t = layer_traffic(call, division, kSliced);
  const auto at = [&](Stage stage, std::size_t shard) { return t[static_cast<std::size_t>(stage)][shard]; };
  CHECK(at(Stage::down, 2).rows == 0);
  CHECK(at(Stage::gate_up, 2).flops == 0);
  CHECK(at(Stage::hidden, 0).local == doctest::Approx(2 * at(Stage::hidden, 1).local));
}

TEST_CASE("cost: time follows the slowest node and what limits it") {
  const LayerCall call{512, 1024, 1024, std::vector<index_t>(8, 512), {}, {2e6, 2e6, 2e6}};
  const auto time = [&](NodeRates node, int shards = 2) {
    return predict(call, even(1024, shards), kSliced,
                   std::vector<NodeRates>(static_cast<std::size_t>(shards), node));
  };
  CHECK(time({8, 1e15, 1e15, 1e9}).limit == Limit::compute);
  CHECK(time({8, 1e9, 1e15, 1e15}).limit == Limit::memory);
  CHECK(time({8, 1e15, 1e9, 1e15}).limit == Limit::remote);
  CHECK(time({8, 1e15, 1e15, 1e15}).limit == Limit::overhead);
  CHECK(time({8, 1e15, 1e15, 1e9}, 1).seconds ==
        doctest::Approx(2.0 * 8 * 512 * 3 * 1024 * 1024 / 1e9).epsilon(1e-3));
  double before = time({8, 1e11, 3e10, 1e12}, 1).seconds;
  for (const int shards : {2, 4, 8}) {
    const double now = time({8, 1e11, 3e10, 1e12}, shards).seconds;
    CHECK(now < before);
    before = now;
  }
  CHECK(time({8, 2e11, 3e10, 1e12}).seconds <= time({8, 1e11, 3e10, 1e12}).seconds);
  CHECK(time({8, 1e9, 1e15, 1e15, 1e9}).seconds < time({8, 1e9, 1e15, 1e15, 1e6}).seconds);
  LayerCall more = call;
  more.routes[0] += 512;
  CHECK(predict(more, even(1024, 1), kSliced, {{8, 1e11, 1, 1e12}}).seconds >
        time({8, 1e11, 1, 1e12}, 1).seconds);
  // One node is slower: it is waited for.
  const Prediction uneven =
      predict(call, even(1024, 2), kSliced, {{8, 1e15, 1e15, 1e12}, {8, 1e15, 1e15, 1e10}});
  CHECK(uneven.seconds == doctest::Approx(uneven.node_time[1] + uneven.overhead));
}

TEST_CASE("cost: the way that is done sooner is chosen") {
  LayerCall call{1, 4096, 1536, std::vector<index_t>(16, 0), {}, {12e6, 12e6, 12e6}};
  const std::vector<NodeRates> nodes(2, NodeRates{48, 3e11, 1e11, 4e13});
  std::vector<int> homes;
  for (int e = 0; e < 16; ++e) homes.push_back(e % 2);
  const Division division = even(1536, 2, homes);
  for (const std::size_t e : {0, 1}) call.routes[e] = 1;  // one on each node: nothing to be gained by cutting
  CHECK(whole_is_sooner(call, division, nodes));
  for (const std::size_t e : {2, 4, 6, 8}) call.routes[e] = 1000;  // all at one node
  call.tokens = 1000;
  CHECK_FALSE(whole_is_sooner(call, division, nodes));
}

TEST_CASE("cost: what cannot be is named") {
  const auto message_of = [](const auto& act) {
    try {
      act();
    } catch (const ValueError& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const LayerCall call = small_call();
  CHECK(message_of([&] { layer_traffic(call, {}, kSliced); }) == "there are no shards, wanted one at least");
  CHECK(message_of([&] { layer_traffic(call, even(96, 2), kWhole); }) ==
        "homes has 0 entries, wanted a shard for each of 3 experts");
  CHECK(message_of([&] { layer_traffic(call, even(96, 2, {0, 1, 2}), kWhole); }) ==
        "a home is 2, wanted one of 2 shards");
  CHECK(message_of([&] { predict(call, even(96, 2), kSliced, {{}}); }) ==
        "there are 1 nodes, wanted one for each of 2 shards");
}
