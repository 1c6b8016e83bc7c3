#include "moe/profile.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <new>
#include <set>
#include <utility>

#include "base/error.h"

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
  StageTotal& total = totals_[static_cast<std::size_t>(span.stage)];
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
  CallTotal& total = totals_[static_cast<std::size_t>(call.direction)];
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
  const auto number = static_cast<int>(std::ssize(profile_->calls_) + profile_->dropped_calls_);
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

// The trace as a file.
namespace {

// Numbers and names that need no escapes, gathered in a buffer on their way to the file.
class Writer {
 public:
  explicit Writer(const std::string& path) : path_(path), file_(path, std::ios::binary | std::ios::trunc) {
    check();
  }

  Writer& operator<<(std::string_view text) {
    buffer_ += text;
    return *this;
  }
  Writer& operator<<(std::int64_t number) {
    std::array<char, 24> digits;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
    return *this << std::string_view(digits.data(), static_cast<std::size_t>(end - digits.data()));
  }
  Writer& operator<<(int number) { return *this << std::int64_t{number}; }

  // Nanoseconds as the format's microseconds.
  Writer& us(std::int64_t ns) {
    const auto part = static_cast<char>(ns % 1000 / 100 + '0');
    const std::array<char, 4> digits{'.', part, static_cast<char>(ns / 10 % 10 + '0'),
                                     static_cast<char>(ns % 10 + '0')};
    return *this << ns / 1000 << std::string_view(digits.data(), digits.size());
  }

  // Before every event.
  Writer& next() {
    *this << (std::exchange(first_, false) ? "\n" : ",\n");
    if (buffer_.size() >= kFlush) flush();
    return *this;
  }

  void close() {
    flush();
    file_.close();
    check();
  }

 private:
  static constexpr std::size_t kFlush = std::size_t{1} << 20;

  void flush() {
    file_.write(buffer_.data(), static_cast<std::streamsize>(buffer_.size()));
    check();
    buffer_.clear();
  }
  void check() const {
    if (!file_) throw IoError(message("\"{}\" cannot be written: {}", path_, std::strerror(errno)));
  }

  std::string path_;
  std::ofstream file_;
  std::string buffer_;
  bool first_ = true;
};

void metadata(Writer& out, std::string_view what, int pid, int tid, std::string_view name, int number) {
  out.next() << R"({"name":")" << what << R"(","ph":"M","pid":)" << pid << R"(,"tid":)" << tid
             << R"(,"args":{"name":")" << name << number << R"("}})";
}

void sort_index(Writer& out, int pid) {
  out.next() << R"({"name":"process_sort_index","ph":"M","pid":)" << pid
             << R"(,"tid":0,"args":{"sort_index":)" << pid << "}}";
}

void begin_event(Writer& out, std::string_view name, std::int64_t begin, std::int64_t end, int pid, int tid) {
  out.next() << R"({"name":")" << name << R"(","ph":"X","ts":)";
  out.us(begin) << R"(,"dur":)";
  out.us(end - begin) << R"(,"pid":)" << pid << R"(,"tid":)" << tid << R"(,"args":{)";
}

void work(Writer& out, const Work& done) {
  if (done.flops != 0) out << R"(,"flops":)" << done.flops;
  if (done.local != 0) out << R"(,"bytes_local":)" << done.local;
  if (done.remote != 0) out << R"(,"bytes_remote":)" << done.remote;
}

void write_span(Writer& out, const TraceTime& time, const SpanRecord& span, int thread) {
  begin_event(out, name_of(span.stage), time(span.begin), time(span.end), span.args.shard, thread);
  out << R"("call":)" << span.call;
  if (span.args.expert >= 0) out << R"(,"expert":)" << span.args.expert;
  if (span.args.rows >= 0) out << R"(,"rows":)" << span.args.rows;
  work(out, span.work);
  out << "}}";
}

void counter(Writer& out, std::string_view name, std::int64_t at, int pid,
             std::initializer_list<std::pair<std::string_view, std::int64_t>> values) {
  out.next() << R"({"name":")" << name << R"(","ph":"C","ts":)";
  out.us(at) << R"(,"pid":)" << pid << R"(,"tid":0,"args":{)";
  std::string_view comma = "";
  for (const auto& [key, value] : values) out << std::exchange(comma, ",") << "\"" << key << "\":" << value;
  out << "}}";
}

void write_call(Writer& out, const TraceTime& time, const Profile& profile, int number) {
  const CallRecord& call = profile.calls()[static_cast<std::size_t>(number)];
  const int pid = profile.shards();
  begin_event(out, name_of(call.direction), time(call.begin), time(call.end), pid, 0);
  out << R"("call":)" << number << R"(,"tokens":)" << call.tokens << R"(,"routes":)" << call.routes
      << R"(,"experts":)" << call.experts;
  work(out, call.work);
  out << "}}";
  const std::int64_t mean = call.experts == 0 ? 0 : call.routes / call.experts;
  counter(out, "rows per expert", time(call.begin), pid, {{"max", call.most_rows}, {"mean", mean}});
  counter(out, "FLOPs", time(call.begin), pid, {{"of the call", call.work.flops}});
  counter(out, "bytes", time(call.begin), pid, {{"local", call.work.local}, {"remote", call.work.remote}});
  counter(out, "rows per expert", time(call.end), pid, {{"max", 0}, {"mean", 0}});
  counter(out, "FLOPs", time(call.end), pid, {{"of the call", 0}});
  counter(out, "bytes", time(call.end), pid, {{"local", 0}, {"remote", 0}});
}

}  // namespace

std::vector<SpanRecord> in_order(const Recorder& recorder) {
  std::vector<SpanRecord> spans = recorder.spans();
  // Of spans that begin at one time the outer one ended later, and if not by the clock, was kept later.
  std::ranges::reverse(spans);
  std::ranges::stable_sort(spans, [](const SpanRecord& a, const SpanRecord& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end > b.end;
  });
  return spans;
}

void write_trace(const Profile& profile, const TraceTime& time, const std::string& path) {
  Writer out(path);
  out << R"({"displayTimeUnit":"ms","otherData":{"threads":)" << profile.threads() << R"(,"shards":)"
      << profile.shards() << R"(,"dropped_spans":)" << profile.dropped_spans() << R"(,"dropped_calls":)"
      << profile.dropped_calls() << R"(,"clock":")" << (profile.clock().tsc() ? "tsc" : "steady_clock")
      << R"("},"traceEvents":[)";
  for (int shard = 0; shard < profile.shards(); ++shard) {
    metadata(out, "process_name", shard, 0, "shard ", shard);
    sort_index(out, shard);
  }
  out.next() << R"({"name":"process_name","ph":"M","pid":)" << profile.shards()
             << R"(,"tid":0,"args":{"name":"calls"}})";
  sort_index(out, profile.shards());
  for (int number = 0; number < std::ssize(profile.calls()); ++number) write_call(out, time, profile, number);
  for (int thread = 0; thread < profile.threads(); ++thread) {
    std::set<int> shards;
    for (const SpanRecord& span : in_order(profile.recorder(static_cast<std::size_t>(thread)))) {
      if (shards.insert(span.args.shard).second)
        metadata(out, "thread_name", span.args.shard, thread, "thread ", thread);
      write_span(out, time, span, thread);
    }
  }
  out << "\n]}\n";
  out.close();
}

}  // namespace kt
