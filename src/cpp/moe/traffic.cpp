#include "moe/cost.h"

#include <algorithm>

#include "base/error.h"
#include "base/projection.h"
#include "moe/share.h"

namespace kt {

namespace {

constexpr double kBf16 = 2, kFp32 = 4;

class Account {
 public:
  Account(const LayerCall& call, const Division& division, bool whole)
      : call_(call),
        whole_(whole),
        summed_(!whole && division.shards.size() > 1),
        weights_at_home_(!whole && !division.homes.empty()),
        shares_(share_out(call, division, whole)) {
    for (auto& stage : traffic_) stage.resize(shares_.size());
  }

  StageTraffic run() {
    for (std::size_t s = 0; s < shares_.size(); ++s) call_.backward ? backward(s) : forward(s);
    return std::move(traffic_);
  }

 private:
  void forward(std::size_t s) {
    gather(s);
    gate_up(s, call_.saved);
    pack(Stage::hidden, s, 1);
    if (has(Projection::down)) product_of_slice(Projection::down, s, /*copies=*/call_.saved ? 2 : 1);
    down(s);
    sum(Stage::down, s);
  }

  void backward(std::size_t s) {
    if (!call_.saved) {
      gather(s);
      gate_up(s, /*keep=*/true);
      if (has(Projection::down)) product_of_slice(Projection::down, s, 1);
    }
    gather(s);
    down_gradient(s);
    pack(Stage::gather_grad, s, 2);
    for (const Projection p : {Projection::gate, Projection::up})
      if (has(p)) product_of_slice(p, s, /*copies=*/2);
    gate_up_gradient(s);
    sum(Stage::grad_hidden, s);
    lora(s);
  }

  void gather(std::size_t s) {
    const Share& share = shares_[s];
    caller(Stage::gather, s, kBf16 * share.routes * hidden());
    own(Stage::gather, s, kBf16 * share.packed * hidden());
  }

  // G, U = X W' + P B', h.
  void gate_up(std::size_t s, bool keep) {
    const Share& share = shares_[s];
    for (const Projection p : {Projection::gate, Projection::up}) {
      if (has(p)) product_of_row(p, s, 1);
      weights(Stage::gate_up, p, s);
      multiply(Stage::gate_up, s, share.routes, hidden(), share.width);
      if (has(p)) second_of_slice(Stage::gate_up, p, s);
    }
    own(Stage::gate_up, s, kBf16 * (share.packed * hidden() + (keep ? 3 : 1) * share.routes * share.width));
  }

  // Some [routes, I] matrices, read and written.
  void pack(Stage stage, std::size_t s, double matrices) {
    const Share& share = shares_[s];
    own(stage, s, kBf16 * matrices * (share.routes + share.packed) * share.width);
  }

  // h W' + P B'.
  void down(std::size_t s) {
    const Share& share = shares_[s];
    weights(Stage::down, Projection::down, s);
    multiply(Stage::down, s, share.routes, share.width, hidden());
    own(Stage::down, s, kBf16 * share.packed * share.width);
    if (has(Projection::down)) second_of_row(Stage::down, Projection::down, s);
  }

  // dh' = dY W + Q A; dG, dU and h from it and the saved G, U.
  void down_gradient(std::size_t s) {
    const Share& share = shares_[s];
    if (has(Projection::down)) product_of_row(Projection::down, s, 2);
    weights(Stage::grad_down, Projection::down, s);
    multiply(Stage::grad_down, s, share.routes, hidden(), share.width);
    if (has(Projection::down)) second_of_slice(Stage::grad_down, Projection::down, s);
    own(Stage::grad_down, s, kBf16 * (share.packed * hidden() + 5 * share.routes * share.width));
  }

  // dG W + dU W + Q A of both.
  void gate_up_gradient(std::size_t s) {
    const Share& share = shares_[s];
    for (const Projection p : {Projection::gate, Projection::up}) {
      weights(Stage::grad_hidden, p, s);
      multiply(Stage::grad_hidden, s, share.routes, share.width, hidden());
      own(Stage::grad_hidden, s, kBf16 * share.packed * share.width);
      if (has(p)) second_of_row(Stage::grad_hidden, p, s);
    }
  }

  // The [T, H] result: fp32 rows of a shard's routes, which a product ends with, are added up by its own
  // threads; then the sums of all shards are, by all threads.
  void sum(Stage product, std::size_t s) {
    const Share& share = shares_[s];
    const double result = static_cast<double>(call_.tokens) * hidden();
    rows(product, s, s, share.routes);
    if (!whole_ && share.width > 0) {
      rows(Stage::merge, s, s, share.routes);
      if (summed_) own(Stage::merge, s, kFp32 * result);
    }
    for (std::size_t t = 0; t < shares_.size(); ++t) {
      const Share& other = shares_[t];
      if (whole_) rows(Stage::merge, s, t, other.routes * share.part);
      if (summed_ && other.width > 0) at(Stage::merge, s, t, kFp32 * result * share.part);
    }
    caller(Stage::merge, s, kBf16 * result * share.part);
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
    const Stage stage = p == Projection::down ? Stage::lora_q : Stage::lora_p;
    multiply(stage, s, share.home_routes, hidden(), rank(p));
    caller(stage, s, share.home_blocks * hidden() * rank(p) * lora_bytes());
    own(stage, s, copies * kBf16 * share.home_routes * rank(p));
    read_low_rank(stage, p, s);
  }
  // The second, [routes, r] by [r, H], at home: of the other shards' sums it is no part.
  void second_of_row(Stage stage, Projection p, std::size_t s) {
    const Share& share = shares_[s];
    multiply(stage, s, share.home_routes, rank(p), hidden());
    caller(stage, s, share.home_blocks * hidden() * rank(p) * lora_bytes());
  }
  // The gradient of that matrix, by any shard.
  void gradient_of_row(Projection p, std::size_t s) {
    const Share& share = shares_[s];
    const double part = whole_ ? 1 : share.part;
    const double routes = part * share.routes, experts = part * share.experts;
    multiply(Stage::lora_grad, s, routes, hidden(), rank(p));
    caller(Stage::lora_grad, s, kBf16 * routes * hidden() + experts * hidden() * rank(p) * lora_bytes());
    read_low_rank(Stage::lora_grad, p, s, part);
  }

  // Products with the one that has a side of I, of which each shard has a slice. The first, [routes, I] by
  // [I, r]: Pd, and Q of gate and up. Sums of fp32, which the home of their routes merges and rounds.
  void product_of_slice(Projection p, std::size_t s, double copies) {
    const Share& share = shares_[s];
    const Stage stage = p == Projection::down ? Stage::lora_p : Stage::lora_q;
    multiply(stage, s, share.routes, share.width, rank(p));
    caller(stage, s, share.blocks * share.width * rank(p) * lora_bytes());
    if (summed_) {
      own(stage, s, kFp32 * share.routes * rank(p));
      for (std::size_t t = 0; t < shares_.size(); ++t)
        if (shares_[t].width > 0) at(stage, s, t, kFp32 * share.home_routes * rank(p));
    }
    own(stage, s, (copies + 1) * kBf16 * share.home_routes * rank(p));
  }
  // The second, [routes, r] by [r, I].
  void second_of_slice(Stage stage, Projection p, std::size_t s) {
    const Share& share = shares_[s];
    multiply(stage, s, share.routes, rank(p), share.width);
    caller(stage, s, share.blocks * share.width * rank(p) * lora_bytes());
  }
  void gradient_of_slice(Projection p, std::size_t s) {
    const Share& share = shares_[s];
    multiply(Stage::lora_grad, s, share.routes, share.width, rank(p));
    own(Stage::lora_grad, s, kBf16 * share.routes * share.width);
    caller(Stage::lora_grad, s, share.experts * share.width * rank(p) * lora_bytes());
    if (share.width > 0) read_low_rank(Stage::lora_grad, p, s);
  }

  // A part of P or Q of the routes that a shard computes, from their homes.
  void read_low_rank(Stage stage, Projection p, std::size_t s, double part = 1) {
    if (whole_) return own(stage, s, part * kBf16 * shares_[s].home_routes * rank(p));
    if (shares_[s].routes == 0) return;
    for (std::size_t t = 0; t < shares_.size(); ++t)
      at(stage, s, t, part * kBf16 * shares_[t].home_routes * rank(p));
  }

  // A shard's part of a projection, once a block.
  void weights(Stage stage, Projection p, std::size_t s) {
    const Share& share = shares_[s];
    const double bytes = call_.weight_bytes[index_of(p)] * share.width /
                         static_cast<double>(std::max<index_t>(1, call_.intermediate));
    if (!weights_at_home_) return own(stage, s, share.blocks * bytes);
    for (std::size_t t = 0; t < shares_.size(); ++t) at(stage, s, t, shares_[t].weight_blocks * bytes);
  }

  void multiply(Stage stage, std::size_t s, double m, double n, double k) {
    of(stage, s).flops += 2 * m * n * k;
  }
  void own(Stage stage, std::size_t s, double bytes) { of(stage, s).local += bytes; }
  void at(Stage stage, std::size_t s, std::size_t where, double bytes) {
    if (s == where) return own(stage, s, bytes);
    of(stage, s).remote += bytes;
    of(stage, where).served += bytes;
  }
  void rows(Stage stage, std::size_t s, std::size_t where, double routes) {
    const double bytes = kFp32 * routes * hidden();
    at(stage, s, where, bytes);
    if (s == where) of(stage, s).rows += bytes;
  }
  void caller(Stage stage, std::size_t s, double bytes) {
    for (std::size_t t = 0; t < shares_.size(); ++t)
      at(stage, s, t, bytes / static_cast<double>(shares_.size()));
  }

  Traffic& of(Stage stage, std::size_t s) { return traffic_[static_cast<std::size_t>(stage)][s]; }
  double hidden() const { return static_cast<double>(call_.hidden); }
  double rank(Projection p) const { return static_cast<double>(call_.ranks[index_of(p)]); }
  bool has(Projection p) const { return call_.ranks[index_of(p)] > 0; }
  double lora_bytes() const { return static_cast<double>(call_.lora_bytes); }

  const LayerCall& call_;
  bool whole_;
  bool summed_;  // sums over the intermediate dimension have parts
  bool weights_at_home_;
  std::vector<Share> shares_;
  StageTraffic traffic_;
};

}  // namespace

Traffic& Traffic::operator+=(const Traffic& other) {
  local += other.local, remote += other.remote, served += other.served;
  rows += other.rows, flops += other.flops;
  return *this;
}

StageTraffic layer_traffic(const LayerCall& call, const Division& division, bool whole) {
  KT_CHECK(!division.shards.empty(), "there are no shards, wanted one at least");
  KT_CHECK(division.homes.empty() ? !whole : division.homes.size() == call.routes.size(),
           "homes has {} entries, wanted a shard for each of {} experts", division.homes.size(),
           call.routes.size());
  for (const int home : division.homes)
    KT_CHECK(home >= 0 && home < std::ssize(division.shards), "a home is {}, wanted one of {} shards", home,
             division.shards.size());
  return Account(call, division, whole).run();
}

}  // namespace kt
