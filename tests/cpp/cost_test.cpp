#include "moe/cost.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "base/error.h"

using namespace kt;

namespace {

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

Traffic of(const StageTraffic& stages, TrafficStage stage) {
  return total(stages[static_cast<std::size_t>(stage)]);
}

double bytes(const Traffic& t) { return t.local + t.remote; }

const std::vector<LayerCall> kCalls{small_call(), small_call(false, false), small_call(true),
                                    small_call(true, false)};

}  // namespace

TEST_CASE("cost: what forward takes without LoRA on one shard, by hand") {
  const LayerCall call{10, 8, 6, {20, 3}, {}, {96, 96, 96}};
  const StageTraffic t = layer_traffic(call, even(6, 1), Mode::tensor);
  const double routes = 23, packed = 20;  // three rows are multiplied where they lie
  CHECK(of(t, TrafficStage::gather).local == 2 * 8 * (routes + packed));
  CHECK(of(t, TrafficStage::gate_up).local == 2 * 2 * 96 + 2 * packed * 8 + 2 * 3 * routes * 6);  // h, G, U
  CHECK(of(t, TrafficStage::pack).local == 2 * 6 * (routes + packed));
  CHECK(of(t, TrafficStage::down).local == 2 * 96 + 2 * packed * 6);
  CHECK(of(t, TrafficStage::rows).local == 2 * 4 * routes * 8);
  CHECK(of(t, TrafficStage::merge).local == 2 * 10 * 8);
  CHECK(bytes(of(t, TrafficStage::low_rank)) == 0);
  CHECK(total(t).remote == 0);
  CHECK(total(t).flops == 2 * routes * 3 * 8 * 6);
}

TEST_CASE("cost: what two shards read of each other, by hand") {
  const LayerCall call{10, 8, 6, {20}, {2, 0, 2}, {96, 96, 96}, 4, false, false};
  const StageTraffic t = layer_traffic(call, even(6, 2), Mode::tensor);
  CHECK(of(t, TrafficStage::gather).remote == 2 * (2 * 20 * 8) / 2.0);  // half of X for each
  // The other shard reads P of gate; the home reads its sums of Pd. A of gate and of down are the caller's.
  const double a = (8 * 2 + 6 * 2) * 4;
  CHECK(of(t, TrafficStage::low_rank).remote == 2 * 20 * 2 + 4 * 20 * 2 + a / 2);
  CHECK(of(t, TrafficStage::gate_up).remote == 6 * 2 * 4 / 2.0);  // B of gate
  CHECK(of(t, TrafficStage::down).remote == 8 * 2 * 4 / 2.0);     // B of down, at home
  CHECK(of(t, TrafficStage::merge).remote == 4 * 10 * 8 + 2 * 10 * 8 / 2.0);
  CHECK(of(t, TrafficStage::rows).remote == 0);
}

TEST_CASE("cost: every product is computed once, however it is cut") {
  for (const LayerCall& call : kCalls) {
    const double flops = total(layer_traffic(call, even(96, 1), Mode::tensor)).flops;
    for (const int shards : {2, 3, 5, 8, 16}) {
      CAPTURE(shards);
      CHECK(total(layer_traffic(call, even(96, shards), Mode::tensor)).flops == doctest::Approx(flops));
      const Division whole = even(96, shards, {0, shards / 2, shards - 1});
      CHECK(total(layer_traffic(call, whole, Mode::tensor)).flops == doctest::Approx(flops));
      CHECK(total(layer_traffic(call, whole, Mode::expert)).flops == doctest::Approx(flops));
    }
  }
  const double kept = total(layer_traffic(small_call(true), even(96, 1), Mode::tensor)).flops;
  CHECK(total(layer_traffic(small_call(true, false), even(96, 1), Mode::tensor)).flops > kept);
}

TEST_CASE("cost: weights and what is cut with them are read once, however they are cut") {
  for (const LayerCall& call : kCalls)
    for (const int shards : {2, 7, 16}) {
      const StageTraffic one = layer_traffic(call, even(96, 1), Mode::tensor);
      const StageTraffic cut = layer_traffic(call, even(96, shards), Mode::tensor);
      CHECK(bytes(of(cut, TrafficStage::pack)) == doctest::Approx(bytes(of(one, TrafficStage::pack))));
      const StageTraffic whole = layer_traffic(call, even(96, shards, {0, 1, 1}), Mode::expert);
      CHECK(bytes(total(whole)) == doctest::Approx(bytes(total(one))));
    }
  LayerCall call = small_call();
  call.ranks = {};
  const auto weights = [&](const Division& division) {
    LayerCall heavy = call;
    heavy.weight_bytes = {1e12, 1e12, 1e12};
    return total(layer_traffic(heavy, division, Mode::tensor));
  };
  CHECK(bytes(weights(even(96, 4))) == doctest::Approx(9e12));  // three blocks
  CHECK(weights(even(96, 4)).remote < 1e9);
  CHECK(weights(even(96, 4, {0, 1, 3})).remote == doctest::Approx(9e12 * 3 / 4));  // whole at their homes
}

TEST_CASE("cost: what one reads remotely another serves, and one shard has nothing to read") {
  for (const LayerCall& call : kCalls) {
    for (const Mode mode : {Mode::tensor, Mode::expert}) {
      CHECK(total(layer_traffic(call, even(96, 1, {0, 0, 0}), mode)).remote == 0);
      const Traffic t = total(layer_traffic(call, even(96, 4, {3, 0, 1}), mode));
      CHECK(t.remote > 0);
      CHECK(t.served == doctest::Approx(t.remote));
    }
    double before = 0;
    for (const int shards : {1, 2, 4, 8, 16}) {
      const double remote = total(layer_traffic(call, even(96, shards), Mode::tensor)).remote;
      CHECK(remote >= before);
      before = remote;
    }
  }
}

TEST_CASE("cost: shards too many for the intermediate dimension have little to do") {
  const LayerCall call = small_call();
  Division division{{{0, 64}, {64, 96}, {96, 96}}};
  const StageTraffic t = layer_traffic(call, division, Mode::tensor);
  CHECK(t[static_cast<std::size_t>(TrafficStage::rows)][2].local == 0);
  CHECK(t[static_cast<std::size_t>(TrafficStage::gate_up)][2].flops == 0);
  CHECK(t[static_cast<std::size_t>(TrafficStage::pack)][0].local ==
        doctest::Approx(2 * t[static_cast<std::size_t>(TrafficStage::pack)][1].local));
}

TEST_CASE("cost: time follows the slowest node and what limits it") {
  const LayerCall call{512, 1024, 1024, std::vector<index_t>(8, 512), {}, {2e6, 2e6, 2e6}};
  const auto time = [&](NodeRates node, int shards = 2) {
    return predict(call, even(1024, shards), Mode::tensor,
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
  CHECK(predict(more, even(1024, 1), Mode::tensor, {{8, 1e11, 1, 1e12}}).seconds >
        time({8, 1e11, 1, 1e12}, 1).seconds);
  // One node is slower: it is waited for.
  const Prediction uneven =
      predict(call, even(1024, 2), Mode::tensor, {{8, 1e15, 1e15, 1e12}, {8, 1e15, 1e15, 1e10}});
  CHECK(uneven.seconds == doctest::Approx(uneven.node_time[1] + uneven.overhead));
}

TEST_CASE("cost: the mode that is done sooner is chosen") {
  LayerCall call{1, 4096, 1536, std::vector<index_t>(16, 0), {}, {12e6, 12e6, 12e6}};
  const std::vector<NodeRates> nodes(2, NodeRates{48, 3e11, 1e11, 4e13});
  std::vector<int> homes;
  for (int e = 0; e < 16; ++e) homes.push_back(e % 2);
  const Division division = even(1536, 2, homes);
  for (const std::size_t e : {0, 1}) call.routes[e] = 1;  // one on each node: nothing to be gained by cutting
  CHECK(choose(call, division, nodes) == Mode::expert);
  for (const std::size_t e : {2, 4, 6, 8}) call.routes[e] = 1000;  // all at one node
  call.tokens = 1000;
  CHECK(choose(call, division, nodes) == Mode::tensor);
  for (const Mode mode : {Mode::tensor, Mode::expert}) CHECK(mode_from(name_of(mode)) == mode);
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
  CHECK(message_of([&] { mode_from("layer"); }) == "mode is \"layer\", wanted tensor or expert");
  CHECK(message_of([&] { layer_traffic(call, {}, Mode::tensor); }) ==
        "there are no shards, wanted one at least");
  CHECK(message_of([&] { layer_traffic(call, even(96, 2), Mode::expert); }) ==
        "homes has 0 entries, wanted a shard for each of 3 experts");
  CHECK(message_of([&] { layer_traffic(call, even(96, 2, {0, 1, 2}), Mode::expert); }) ==
        "a home is 2, wanted one of 2 shards");
  CHECK(message_of([&] { predict(call, even(96, 2), Mode::tensor, {{}}); }) ==
        "there are 1 nodes, wanted one for each of 2 shards");
}
