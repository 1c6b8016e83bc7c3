// The profiler says where the time of layer calls goes: what each thread did, from when to when. A thread
// writes to its own recorder alone, without locks; what it wrote is read between calls.
#pragma once

#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/view.h"
#include "cpu/processor.h"

namespace kt {

// What a layer's forward and backward pass consist of.
enum class Stage : std::uint8_t {
  setup,              // what the caller does alone: plan, add tasks, free memory
  route,              // routed tokens, sorted by expert
  fetch,              // weights that are not in memory
  dispatch,           // rows of X or dY, packed
  lora_p,             // P = s X A'
  pack_weights,       // weights, packed
  decode_weights,     // codes to bf16, and packed
  gate_up,            // G, U
  activation,         // h
  pack_h,             // h, packed
  down,               // h Wd' + Pd Bd'
  combine,            // sums over a token's experts
  reduce,             // sums over shards or nodes
  grad_down,          // dh
  grad_activation,    // dG, dU
  grad_topk_weights,  // <dh, h>, summed
  pack_grad,          // dG, dU, packed
  lora_q,             // Q = s dY B
  grad_hidden,        // dX
  lora_grad,          // dA, dB
  zero_grad,          // of experts without routed tokens
  wait,               // for what other threads make
  idle,               // before a thread's first and behind its last task of a call
};

// clang-format off
inline constexpr std::array<std::string_view, 23> stage_names{
    "setup", "route", "fetch", "dispatch", "lora_p", "pack_weights", "decode_weights", "gate_up", "activation", "pack_h", "down",
    "combine", "reduce", "grad_down", "grad_activation", "grad_topk_weights", "pack_grad", "lora_q",
    "grad_hidden", "lora_grad", "zero_grad", "wait", "idle"};
// clang-format on
inline constexpr std::size_t kStages = stage_names.size();
static_assert(kStages == to_size(Stage::idle) + 1);

constexpr std::string_view name_of(Stage stage) { return stage_names[to_size(stage)]; }

// The work of some time. Bytes are those that a task has to read or write, caches aside: local ones lie in
// the memory of the node that does it, remote ones in that of another. The caller's tensors lie in node 0's.
struct Work {
  std::int64_t flops = 0, local = 0, remote = 0;

  Work& operator+=(const Work& other) {
    flops += other.flops, local += other.local, remote += other.remote;
    return *this;
  }
};

// The arguments of a span in a trace; -1 where it has none.
struct TraceArgs {
  int shard = -1;  // that of the span around it, or else the thread's first
  int expert = -1, rows = -1;
};

// What tasks are called in a profile.
struct Label {
  Label(Stage what, const TraceArgs& which = {}) : stage(what), args(which) {}

  Stage stage;
  TraceArgs args;
};

struct SpanRecord {
  Ticks begin, end;
  Ticks own;  // without the spans within it
  Work work;  // done in its own time
  TraceArgs args;
  std::int32_t call;  // -1: it lies in none
  Stage stage;
};

// All spans of a stage on one thread, kept or dropped.
struct StageTotal {
  std::int64_t spans = 0;
  Ticks own = 0;
  Work work;
};

enum class Direction : std::uint8_t { forward, backward };
std::string_view name_of(Direction direction);

struct CallRecord {
  Direction direction;
  Ticks begin, end;
  Ticks covered;  // by the spans of all threads
  Work work;
  index_t tokens, routes;
  int experts;        // that have a route
  index_t most_rows;  // of an expert
};

class Span;

// The spans of one thread. On cache lines of its own; the memory they lie in is first touched by that thread.
class alignas(128) Recorder {
 public:
  Recorder(const TickClock& clock, int first_shard, std::size_t most)
      : clock_(clock), first_shard_(first_shard), most_(most) {}

  // Spans in the order of their ends, no more than `most`.
  std::vector<SpanRecord> spans() const;
  const StageTotal& total(Stage stage) const { return totals_[to_size(stage)]; }
  std::int64_t dropped() const { return dropped_; }

 private:
  friend class Span;
  friend class Call;

  static constexpr std::size_t kChunk = 1024;

  void begin_call(int call, Ticks begin);
  // The thread has had nothing to do since its last span.
  void idle_until(Ticks end);
  void keep(const SpanRecord& span) noexcept;

  const TickClock& clock_;
  const int first_shard_;  // that the thread serves
  const std::size_t most_;
  Span* innermost_ = nullptr;
  int call_ = -1;
  bool idle_ = false;  // until the next span begins
  Ticks last_ = 0;     // end of the last span that lay in no other, or where the call began
  Ticks covered_ = 0;  // of this call
  Work work_;          // of this call
  std::array<StageTotal, kStages> totals_{};
  std::vector<std::unique_ptr<SpanRecord[]>> chunks_;
  std::size_t count_ = 0;
  std::int64_t dropped_ = 0;
};

// The time from its construction to its destruction, on one thread. Spans nest; without a recorder they cost
// a branch.
class Span {
 public:
  Span(Recorder* recorder, Stage stage, const TraceArgs& args = {}) : recorder_(recorder) {
    if (recorder_ != nullptr) [[unlikely]]
      open(stage, args);
  }
  ~Span() {
    if (recorder_ != nullptr) [[unlikely]]
      close();
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  void count(const Work& work) {
    if (recorder_ != nullptr) [[unlikely]]
      work_ += work;
  }

 private:
  friend class Call;

  void open(Stage stage, const TraceArgs& args);
  void close() noexcept;

  Recorder* recorder_;
  Span* outer_;
  Ticks begin_, inner_;
  Work work_;
  TraceArgs args_;
  Stage stage_;
};

// All calls in one direction, kept or dropped.
struct CallTotal {
  std::int64_t calls = 0;
  Ticks wall = 0, covered = 0;  // the latter by the spans of all threads
};

class Profile {
 public:
  static constexpr std::size_t kMostCalls = std::size_t{1} << 20;

  // `first_shards`: the first that each thread serves. Keeps about `most_spans` of all threads together.
  Profile(const std::vector<int>& first_shards, int shards, std::size_t most_spans);
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  // Whether this process made it. In a forked child its open spans are those of threads that are not there.
  bool is_own() const { return process_ == getpid(); }
  int threads() const { return to_int(recorders_.size()); }
  int shards() const { return shards_; }
  Recorder& recorder(std::size_t thread) { return *recorders_[thread]; }
  const Recorder& recorder(std::size_t thread) const { return *recorders_[thread]; }
  const std::vector<CallRecord>& calls() const { return calls_; }
  const CallTotal& total(Direction direction) const { return totals_[to_size(direction)]; }
  std::int64_t dropped_calls() const { return dropped_calls_; }
  std::int64_t dropped_spans() const;
  const TickClock& clock() const { return clock_; }

 private:
  friend class Call;

  void keep(const CallRecord& call) noexcept;

  const pid_t process_ = getpid();
  TickClock clock_;
  int shards_;
  std::vector<std::unique_ptr<Recorder>> recorders_;
  std::array<CallTotal, 2> totals_{};
  std::vector<CallRecord> calls_;
  std::int64_t dropped_calls_ = 0;
};

// One forward or backward of a layer, from construction to destruction, on the caller's thread, which is
// number 0. Nothing without a profile.
class Call {
 public:
  Call(Profile* profile, Direction direction);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // The caller's, for what it does alone.
  Recorder* caller() const { return profile_ == nullptr ? nullptr : &profile_->recorder(0); }
  void describe(index_t tokens, index_t routes, int experts, index_t most_rows);
  // Around the tasks of all threads.
  void begin_tasks();
  void end_tasks();

 private:
  Profile* profile_;
  CallRecord record_{};
  std::optional<Span> setup_;
};

// The kept spans of a thread by their begin, outer ones before inner ones.
std::vector<SpanRecord> in_order(const Recorder& recorder);

}  // namespace kt
