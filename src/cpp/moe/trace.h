// A profile as a trace for Perfetto and chrome://tracing: JSON of the Trace Event Format, shards as
// processes, threads as threads, and one process more for the calls.
#pragma once

#include <string>

#include "moe/profile.h"

namespace kt {

// Ticks as nanoseconds since the profile began. Fixes the rate of its clock when it is made.
class TraceTime {
 public:
  explicit TraceTime(const Profile& profile)
      : begin_(profile.clock().begin()), rate_(1e9 * profile.clock().seconds_per_tick()) {}

  std::int64_t operator()(Ticks at) const { return lasted(at - begin_); }
  std::int64_t lasted(Ticks ticks) const {
    return static_cast<std::int64_t>(static_cast<double>(ticks) * rate_ + 0.5);
  }

 private:
  Ticks begin_;
  double rate_;
};

// The kept spans of a thread by their begin, outer ones before inner ones.
std::vector<SpanRecord> in_order(const Recorder& recorder);

// IoError if the file cannot be written.
void write_trace(const Profile& profile, const TraceTime& time, const std::string& path);

}  // namespace kt
