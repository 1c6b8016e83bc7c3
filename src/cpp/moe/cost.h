// What a call of a layer reads, writes and computes on each shard of a machine with several memory nodes, and
// how long that takes at least. Pure: no threads, no weights. docs/numa.md derives the terms.
//
// Such a call is computed in one of two ways: every shard its slice of each expert, or `whole`, each expert
// by one shard alone, its home.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/split.h"
#include "moe/stage.h"

namespace kt {

struct LayerCall {
  index_t tokens = 0, hidden = 0, intermediate = 0;
  std::vector<index_t> routes;           // [E]
  std::array<index_t, 3> ranks{};        // LoRA of each projection; 0: none
  std::array<double, 3> weight_bytes{};  // of one expert's projection, scales included
  index_t lora_bytes = 4;                // of a LoRA parameter and of its gradient
  bool backward = false;
  bool saved = true;  // forward keeps G, U and P; backward has them, or else computes them again
};

struct Division {
  std::vector<Range> shards;    // of the intermediate dimension, each as large as the cores behind it
  std::vector<int> homes = {};  // the shard that has all of an expert; none: each shard has its own slice
};

// Of one shard. Bytes that its threads read and write in memory of their own node and of others, by design:
// each once, whether or not a cache has them. Memory of the caller lies on all nodes alike.
struct Traffic {
  double local = 0, remote = 0;
  double served = 0;  // of the remote bytes of others, those that lie here
  double rows = 0;    // of the local bytes, those of fp32 results of routes
  double flops = 0;   // of products

  Traffic& operator+=(const Traffic& other);
};

// Weights count where they are multiplied by, not as `pack` or `decode`; G, U, h and their gradients in the
// product that writes them; P and Q together with adding up their parts; all gradients of A and B as
// `lora_grad`, zeros included.
using StageTraffic = std::array<std::vector<Traffic>, kStages>;  // [stage][shard]

// Experts computed `whole` want `homes`.
StageTraffic layer_traffic(const LayerCall& call, const Division& division, bool whole);

// A shard's node: bytes/s of its memory and of its links to others, FLOP/s of all its cores, and bytes of its
// last cache: where the rows kept at a time fit in there, they cost its memory nothing.
struct NodeRates {
  double cores = 1, local = 0, remote = 0, flops = 0, cache = 0;
};

enum class Limit : std::uint8_t { compute, memory, remote, overhead };

std::string_view name_of(Limit limit);

struct Prediction {
  double seconds = 0;
  Limit limit = Limit::compute;   // the largest part of the slowest node's time
  std::vector<Traffic> traffic;   // of each shard
  std::vector<double> node_time;  // seconds of each node without overhead
  double overhead = 0;            // seconds: handing out tasks, waiting for each other
};

Prediction predict(const LayerCall& call, const Division& division, bool whole,
                   const std::vector<NodeRates>& nodes);

// Which way is done sooner where experts lie whole at `division.homes`: the other one then reads its slices
// from there.
bool whole_is_sooner(const LayerCall& call, const Division& division, const std::vector<NodeRates>& nodes);

}  // namespace kt
