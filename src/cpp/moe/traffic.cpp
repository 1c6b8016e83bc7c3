#include "moe/cost.h"

#include <algorithm>

#include "base/error.h"
#include "base/projection.h"
#include "moe/pass.h"

namespace kt {

namespace {

constexpr index_t kFewRows = 8;  // most that are multiplied where they lie, not packed
constexpr double kBf16 = 2, kFp32 = 4;

// What a shard has to do with the routes.
struct Share {
  double width = 0;   // of the intermediate dimension in its products
  double part = 0;    // of what all threads do together
  double routes = 0;  // that its products take, in `blocks`; those in blocks worth packing
  double blocks = 0, packed = 0;
  double home_routes = 0, home_blocks = 0;  // whose low-rank products it merges, and uses where not sliced
  double experts = 0;                       // whose LoRA gradients of a slice it writes
  double weight_blocks = 0;                 // of experts whose weights lie here
};

class Account {
 public:
  Account(const LayerCall& call, const Division& division, Mode mode)
      : call_(call),
        tensor_(mode == Mode::tensor),
        summed_(tensor_ && division.shards.size() > 1),
        weights_at_home_(tensor_ && !division.homes.empty()),
        shares_(division.shards.size()) {
    for (auto& stage : traffic_) stage.resize(shares_.size());
    for (std::size_t s = 0; s < shares_.size(); ++s) {
      Share& share = shares_[s];
      share.part = static_cast<double>(division.shards[s].size()) /
                   static_cast<double>(std::max<index_t>(1, call.intermediate));
      share.width = static_cast<double>(tensor_ ? division.shards[s].size() : call.intermediate);
    }
    share_out(division.homes);
  }

  StageTraffic run() {
    for (std::size_t s = 0; s < shares_.size(); ++s) call_.backward ? backward(s) : forward(s);
    return std::move(traffic_);
  }

 private:
  void share_out(const std::vector<int>& homes);

  void forward(std::size_t s) {
    gather(s);
    gate_up(s, call_.saved);
    pack(s, 1);
    if (has(Projection::down)) product_of_slice(Projection::down, s, /*copies=*/call_.saved ? 2 : 1);
    down(s);
    sum(s);
  }

  void backward(std::size_t s) {
    if (!call_.saved) {
      gather(s);
      gate_up(s, /*keep=*/true);
      if (has(Projection::down)) product_of_slice(Projection::down, s, 1);
    }
    gather(s);
    down_gradient(s);
    pack(s, 2);
    for (const Projection p : {Projection::gate, Projection::up})
      if (has(p)) product_of_slice(p, s, /*copies=*/2);
    gate_up_gradient(s);
    sum(s);
    lora(s);
  }

  void gather(std::size_t s) {
    const Share& share = shares_[s];
    caller(TrafficStage::gather, s, kBf16 * share.routes * hidden());
    own(TrafficStage::gather, s, kBf16 * share.packed * hidden());
  }

  // G, U = X W' + P B', h.
  void gate_up(std::size_t s, bool keep) {
    const Share& share = shares_[s];
    for (const Projection p : {Projection::gate, Projection::up}) {
      if (has(p)) product_of_row(p, s, 1);
      weights(TrafficStage::gate_up, p, s);
      multiply(TrafficStage::gate_up, s, share.routes, hidden(), share.width);
      if (has(p)) second_of_slice(TrafficStage::gate_up, p, s);
    }
    own(TrafficStage::gate_up, s,
        kBf16 * (share.packed * hidden() + (keep ? 3 : 1) * share.routes * share.width));
  }

  // Some [routes, I] matrices, read and written.
  void pack(std::size_t s, double matrices) {
    const Share& share = shares_[s];
    own(TrafficStage::pack, s, kBf16 * matrices * (share.routes + share.packed) * share.width);
  }

  // h W' + P B'.
  void down(std::size_t s) {
    const Share& share = shares_[s];
    weights(TrafficStage::down, Projection::down, s);
    multiply(TrafficStage::down, s, share.routes, share.width, hidden());
    own(TrafficStage::down, s, kBf16 * share.packed * share.width);
    if (has(Projection::down)) second_of_row(TrafficStage::down, Projection::down, s);
  }

  // dh' = dY W + Q A; dG, dU and h from it and the saved G, U.
  void down_gradient(std::size_t s) {
    const Share& share = shares_[s];
    if (has(Projection::down)) product_of_row(Projection::down, s, 2);
    weights(TrafficStage::down, Projection::down, s);
    multiply(TrafficStage::down, s, share.routes, hidden(), share.width);
    if (has(Projection::down)) second_of_slice(TrafficStage::down, Projection::down, s);
    own(TrafficStage::down, s, kBf16 * (share.packed * hidden() + 5 * share.routes * share.width));
  }

  // dG W + dU W + Q A of both.
  void gate_up_gradient(std::size_t s) {
    const Share& share = shares_[s];
    for (const Projection p : {Projection::gate, Projection::up}) {
      weights(TrafficStage::gate_up, p, s);
      multiply(TrafficStage::gate_up, s, share.routes, share.width, hidden());
      own(TrafficStage::gate_up, s, kBf16 * share.packed * share.width);
      if (has(p)) second_of_row(TrafficStage::gate_up, p, s);
    }
  }

  // The [T, H] result: of a shard's routes by its own threads, then of all shards by all threads.
  void sum(std::size_t s) {
    const Share& share = shares_[s];
    const double result = static_cast<double>(call_.tokens) * hidden();
    own(TrafficStage::rows, s, kFp32 * share.routes * hidden());
    if (tensor_ && share.width > 0) {
      own(TrafficStage::rows, s, kFp32 * share.routes * hidden());
      if (summed_) own(TrafficStage::merge, s, kFp32 * result);
    }
    for (std::size_t t = 0; t < shares_.size(); ++t) {
      const Share& other = shares_[t];
      if (!tensor_)
        at(s == t ? TrafficStage::rows : TrafficStage::merge, s, t,
           kFp32 * other.routes * hidden() * share.part);
      if (summed_ && other.width > 0) at(TrafficStage::merge, s, t, kFp32 * result * share.part);
    }
    caller(TrafficStage::merge, s, kBf16 * result * share.part);
  }

  void lora(std::size_t s) {
    for (const Projection p : projections) {
      if (!has(p)) continue;
      gradient_of_row(p, s);
      gradient_of_slice(p, s);
    }
  }

  // Products with the LoRA matrix that has a side of H, which is not cut. The first, [routes, H] by [H, r]:
  // P of gate and up, Q of down. At home, in `copies`, and read by whoever has those routes.
  void product_of_row(Projection p, std::size_t s, double copies) {
    const Share& share = shares_[s];
    multiply(TrafficStage::low_rank, s, share.home_routes, hidden(), rank(p));
    caller(TrafficStage::low_rank, s, share.home_blocks * hidden() * rank(p) * lora_bytes());
    own(TrafficStage::low_rank, s, copies * kBf16 * share.home_routes * rank(p));
    read_low_rank(TrafficStage::low_rank, p, s);
  }
  // The second, [routes, r] by [r, H], at home: of the other shards' sums it is no part.
  void second_of_row(TrafficStage stage, Projection p, std::size_t s) {
    const Share& share = shares_[s];
    multiply(stage, s, share.home_routes, rank(p), hidden());
    caller(stage, s, share.home_blocks * hidden() * rank(p) * lora_bytes());
  }
  // The gradient of that matrix, by any shard.
  void gradient_of_row(Projection p, std::size_t s) {
    const Share& share = shares_[s];
    const double routes = tensor_ ? routes_ * share.part : share.routes;
    const double experts = tensor_ ? static_cast<double>(call_.routes.size()) * share.part : share.experts;
    multiply(TrafficStage::lora, s, routes, hidden(), rank(p));
    caller(TrafficStage::lora, s, kBf16 * routes * hidden() + experts * hidden() * rank(p) * lora_bytes());
    read_low_rank(TrafficStage::lora, p, s, tensor_ ? share.part : 1);
  }

  // Products with the one that has a side of I, of which each shard has a slice. The first, [routes, I] by
  // [I, r]: Pd, and Q of gate and up. Sums of fp32, which the home of their routes merges and rounds.
  void product_of_slice(Projection p, std::size_t s, double copies) {
    const Share& share = shares_[s];
    multiply(TrafficStage::low_rank, s, share.routes, share.width, rank(p));
    caller(TrafficStage::low_rank, s, share.blocks * share.width * rank(p) * lora_bytes());
    if (summed_) {
      own(TrafficStage::low_rank, s, kFp32 * share.routes * rank(p));
      for (std::size_t t = 0; t < shares_.size(); ++t)
        if (shares_[t].width > 0) at(TrafficStage::low_rank, s, t, kFp32 * share.home_routes * rank(p));
    }
    own(TrafficStage::low_rank, s, (copies + 1) * kBf16 * share.home_routes * rank(p));
  }
  // The second, [routes, r] by [r, I].
  void second_of_slice(TrafficStage stage, Projection p, std::size_t s) {
    const Share& share = shares_[s];
    multiply(stage, s, share.routes, rank(p), share.width);
    caller(stage, s, share.blocks * share.width * rank(p) * lora_bytes());
  }
  void gradient_of_slice(Projection p, std::size_t s) {
    const Share& share = shares_[s];
    multiply(TrafficStage::lora, s, share.routes, share.width, rank(p));
    own(TrafficStage::lora, s, kBf16 * share.routes * share.width);
    caller(TrafficStage::lora, s, share.experts * share.width * rank(p) * lora_bytes());
    if (share.width > 0) read_low_rank(TrafficStage::lora, p, s);
  }

  // A part of P or Q of the routes that a shard computes, from their homes.
  void read_low_rank(TrafficStage stage, Projection p, std::size_t s, double part = 1) {
    if (!tensor_) return own(stage, s, part * kBf16 * shares_[s].home_routes * rank(p));
    if (shares_[s].routes == 0) return;
    for (std::size_t t = 0; t < shares_.size(); ++t)
      at(stage, s, t, part * kBf16 * shares_[t].home_routes * rank(p));
  }

  // A shard's part of a projection, once a block.
  void weights(TrafficStage stage, Projection p, std::size_t s) {
    const Share& share = shares_[s];
    const double bytes = call_.weight_bytes[index_of(p)] * share.width /
                         static_cast<double>(std::max<index_t>(1, call_.intermediate));
    if (!weights_at_home_) return own(stage, s, share.blocks * bytes);
    for (std::size_t t = 0; t < shares_.size(); ++t) at(stage, s, t, shares_[t].weight_blocks * bytes);
  }

  void multiply(TrafficStage stage, std::size_t s, double m, double n, double k) {
    of(stage, s).flops += 2 * m * n * k;
  }
  void own(TrafficStage stage, std::size_t s, double bytes) { of(stage, s).local += bytes; }
  void at(TrafficStage stage, std::size_t s, std::size_t where, double bytes) {
    if (s == where) return own(stage, s, bytes);
    of(stage, s).remote += bytes;
    of(stage, where).served += bytes;
  }
  void caller(TrafficStage stage, std::size_t s, double bytes) {
    for (std::size_t t = 0; t < shares_.size(); ++t)
      at(stage, s, t, bytes / static_cast<double>(shares_.size()));
  }

  Traffic& of(TrafficStage stage, std::size_t s) { return traffic_[static_cast<std::size_t>(stage)][s]; }
  double hidden() const { return static_cast<double>(call_.hidden); }
  double rank(Projection p) const { return static_cast<double>(call_.ranks[index_of(p)]); }
  bool has(Projection p) const { return call_.ranks[index_of(p)] > 0; }
  double lora_bytes() const { return static_cast<double>(call_.lora_bytes); }

  const LayerCall& call_;
  bool tensor_;
  bool summed_;  // sums over the intermediate dimension have parts
  bool weights_at_home_;
  double routes_ = 0;
  std::vector<Share> shares_;
  StageTraffic traffic_;
};

void Account::share_out(const std::vector<int>& homes) {
  std::size_t block = 0;
  double blocks = 0, packed = 0;
  for (std::size_t e = 0; e < call_.routes.size(); ++e) {
    const index_t count = call_.routes[e], cut = ceil_div(count, kBlockRows);
    const double rows = static_cast<double>(count), in_packed = count > kFewRows ? rows : 0;
    routes_ += rows, blocks += static_cast<double>(cut), packed += in_packed;
    if (!homes.empty()) {
      Share& home = shares_[static_cast<std::size_t>(homes[e])];
      home.weight_blocks += static_cast<double>(cut);
      if (!tensor_) {
        home.routes += rows, home.blocks += static_cast<double>(cut), home.packed += in_packed;
        home.experts += 1;
      }
    }
    for (index_t b = 0; tensor_ && b < cut; ++b, ++block) {  // homes of blocks in turn
      Share& home = shares_[block % shares_.size()];
      home.home_routes += rows / static_cast<double>(cut);
      home.home_blocks += 1;
    }
  }
  for (Share& share : shares_) {
    if (!tensor_) share.home_routes = share.routes, share.home_blocks = share.blocks;
    if (!tensor_ || share.width == 0) continue;
    share.routes = routes_, share.blocks = blocks, share.packed = packed;
    share.experts = static_cast<double>(call_.routes.size());
  }
}

}  // namespace

Traffic& Traffic::operator+=(const Traffic& other) {
  local += other.local, remote += other.remote, served += other.served, flops += other.flops;
  return *this;
}

StageTraffic layer_traffic(const LayerCall& call, const Division& division, Mode mode) {
  KT_CHECK(!division.shards.empty(), "there are no shards, wanted one at least");
  KT_CHECK(division.homes.empty() ? mode == Mode::tensor : division.homes.size() == call.routes.size(),
           "homes has {} entries, wanted a shard for each of {} experts", division.homes.size(),
           call.routes.size());
  for (const int home : division.homes)
    KT_CHECK(home >= 0 && home < std::ssize(division.shards), "a home is {}, wanted one of {} shards", home,
             division.shards.size());
  return Account(call, division, mode).run();
}

}  // namespace kt
