#include "moe/profile.h"

#include <algorithm>
#include <new>
#include <utility>

namespace kt {

std::string_view name_of(Direction direction) {
  return direction == Direction::forward ? "forward" : "backward";
}

std::vector<SpanRecord> Recorder::spans() const {
  std::vector<SpanRecord> all;
  all.reserve(count_);
  for (std::size_t i = 0; i < count_; ++i) all.push_back(chunks_[i / kChunk][i % kChunk]);
  return all;
}

void Recorder::begin_call(int call, Ticks begin) {
  call_ = call;
  last_ = begin;
  idle_ = true;
  covered_ = 0;
  work_ = {};
}

void Recorder::idle_until(Ticks end) {
  if (end <= last_) return;
  keep({last_, end, end - last_, {}, {first_shard_, -1, -1}, call_, Stage::idle});
  covered_ += end - last_;
  last_ = end;
}

// A span that finds no memory is dropped as one too many is.
void Recorder::keep(const SpanRecord& span) noexcept {
  StageTotal& total = totals_[to_size(span.stage)];
  ++total.spans;
  total.own += span.own;
  total.work += span.work;
  work_ += span.work;
  const bool full = count_ == chunks_.size() * kChunk;
  try {
    if (full && count_ < most_) chunks_.push_back(std::make_unique_for_overwrite<SpanRecord[]>(kChunk));
  } catch (const std::bad_alloc&) {
  }
  if (count_ == most_ || count_ == chunks_.size() * kChunk) {
    ++dropped_;
    return;
  }
  chunks_[count_ / kChunk][count_ % kChunk] = span;
  ++count_;
}

void Span::open(Stage stage, const TraceArgs& args) {
  outer_ = recorder_->innermost_;
  recorder_->innermost_ = this;
  args_ = args;
  if (args_.shard < 0) args_.shard = outer_ != nullptr ? outer_->args_.shard : recorder_->first_shard_;
  stage_ = stage;
  inner_ = 0;
  begin_ = recorder_->clock_.now();
  if (outer_ != nullptr || !recorder_->idle_) return;
  recorder_->idle_until(begin_);
  recorder_->idle_ = false;
}

void Span::close() noexcept {
  const Ticks end = std::max(recorder_->clock_.now(), begin_), took = end - begin_;
  recorder_->keep({begin_, end, took - inner_, work_, args_, recorder_->call_, stage_});
  recorder_->innermost_ = outer_;
  if (outer_ != nullptr) {
    outer_->inner_ += took;
  } else {
    recorder_->covered_ += took;
    recorder_->last_ = end;
  }
}

Profile::Profile(const std::vector<int>& first_shards, int shards, std::size_t most_spans) : shards_(shards) {
  for (const int shard : first_shards)
    recorders_.push_back(std::make_unique<Recorder>(clock_, shard, most_spans / first_shards.size()));
}

std::int64_t Profile::dropped_spans() const {
  std::int64_t sum = 0;
  for (const auto& recorder : recorders_) sum += recorder->dropped();
  return sum;
}

void Profile::keep(const CallRecord& call) noexcept {
  CallTotal& total = totals_[to_size(call.direction)];
  ++total.calls;
  total.wall += call.end - call.begin;
  total.covered += call.covered;
  try {
    // In order: a call's place is its number, until the first that is dropped.
    if (dropped_calls_ == 0 && calls_.size() < kMostCalls) return calls_.push_back(call);
  } catch (const std::bad_alloc&) {
  }
  ++dropped_calls_;
}

Call::Call(Profile* profile, Direction direction) : profile_(profile) {
  if (profile_ == nullptr) return;
  setup_.emplace(caller(), Stage::setup);
  record_.direction = direction;
  record_.begin = setup_->begin_;
  const auto number = to_int(std::ssize(profile_->calls_) + profile_->dropped_calls_);
  for (auto& recorder : profile_->recorders_) recorder->begin_call(number, record_.begin);
  profile_->recorder(0).idle_ = false;
}

Call::~Call() {
  if (profile_ == nullptr) return;
  end_tasks();  // where an exception came in between
  setup_.reset();
  record_.end = profile_->recorder(0).last_;
  for (auto& recorder : profile_->recorders_) {
    recorder->idle_until(record_.end);
    record_.covered += recorder->covered_;
    record_.work += recorder->work_;
    recorder->call_ = -1;
    recorder->idle_ = false;  // a span outside of calls follows none
  }
  profile_->keep(record_);
}

void Call::describe(index_t tokens, index_t routes, int experts, index_t most_rows) {
  record_.tokens = tokens, record_.routes = routes, record_.experts = experts, record_.most_rows = most_rows;
}

void Call::begin_tasks() {
  if (profile_ == nullptr) return;
  setup_.reset();
  profile_->recorder(0).idle_ = true;
}

void Call::end_tasks() {
  if (profile_ == nullptr || setup_) return;
  Recorder& own = profile_->recorder(0);
  own.idle_until(profile_->clock_.now());
  own.idle_ = false;
  setup_.emplace(&own, Stage::setup);
}

std::vector<SpanRecord> in_order(const Recorder& recorder) {
  std::vector<SpanRecord> spans = recorder.spans();
  // Of spans that begin at one time the outer one ended later, and if not by the clock, was kept later.
  std::ranges::reverse(spans);
  std::ranges::stable_sort(spans, [](const SpanRecord& a, const SpanRecord& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end > b.end;
  });
  return spans;
}

}  // namespace kt
