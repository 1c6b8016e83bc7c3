// What a call of a layer reads, writes and computes on each shard of a machine with several memory nodes, and
// how long that takes at least. Pure: no threads, no weights. docs/numa.md derives the terms.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/split.h"

namespace kt {

// A slice of every expert on each shard, or each expert whole on one shard, its home.
enum class Mode : std::uint8_t { tensor, expert };

// ValueError for a name that is not known.
Mode mode_from(std::string_view name);
std::string_view name_of(Mode mode);

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

// Steps that share data. gather: rows of X or dY, packed. low_rank: P and Q, with what their merging takes.
// pack: h, or dG and dU, as input of the next product. gate_up, down: the products with weights and what they
// read and write. rows: the fp32 results of routes, written, and read where they lie. merge: those of other
// shards, or the sums of all shards, and the result. lora: the gradients of A and B.
enum class TrafficStage : std::uint8_t { gather, low_rank, gate_up, pack, down, rows, merge, lora };

inline constexpr std::array<std::string_view, 8> stage_names{"gather", "low_rank", "gate_up", "pack",
                                                             "down",   "rows",     "merge",   "lora"};

// Of one shard. Bytes that its threads read and write in memory of their own node and of others, by design:
// each once, whether or not a cache has them. Memory of the caller lies on all nodes alike.
struct Traffic {
  double local = 0, remote = 0;
  double served = 0;  // of the remote bytes of others, those that lie here
  double flops = 0;   // of products

  Traffic& operator+=(const Traffic& other);
};

using StageTraffic = std::array<std::vector<Traffic>, stage_names.size()>;  // [stage][shard]

// `homes` must not be empty in expert mode.
StageTraffic layer_traffic(const LayerCall& call, const Division& division, Mode mode);

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

Prediction predict(const LayerCall& call, const Division& division, Mode mode,
                   const std::vector<NodeRates>& nodes);

// The mode that will be done sooner where experts lie whole at `division.homes`: in tensor mode the other
// shards then read their slices from there.
Mode choose(const LayerCall& call, const Division& division, const std::vector<NodeRates>& nodes);

}  // namespace kt
