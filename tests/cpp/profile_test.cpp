#include "moe/profile.h"

#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <stdexcept>
#include <thread>

#include "cpu/worker_pool.h"

using namespace kt;

namespace {

constexpr std::size_t kMany = std::size_t{1} << 16;

void spin_us(int us) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
  while (std::chrono::steady_clock::now() < end) {
  }
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const SpanRecord& find(const std::vector<SpanRecord>& spans, Stage stage) {
  for (const SpanRecord& span : spans)
    if (span.stage == stage) return span;
  throw std::runtime_error("no such span");
}

// A call with `tasks` tasks on the pool, each a product with an inner span.
void call(WorkerPool& pool, Profile& profile, Direction direction, int tasks, int us) {
  const auto claim = pool.claim();
  Call call(&profile, direction);
  {
    const Span route(call.caller(), Stage::route);
    spin_us(us);
  }
  call.describe(64, 512, 16, 40);
  call.begin_tasks();
  pool.parallel_for(tasks, [&](int task, int worker) {
    Recorder* recorder = &profile.recorder(static_cast<std::size_t>(worker));
    Span product(recorder, Stage::gate_up, {task % profile.shards(), task, 32});
    product.count({1000, 10, 1});
    spin_us(us);
    const Span activation(recorder, Stage::activation);
    spin_us(us / 4);
  });
  call.end_tasks();
}

double coverage(const Profile& profile) {
  Ticks covered = 0, wall = 0;
  for (const Direction d : {Direction::forward, Direction::backward})
    covered += profile.total(d).covered, wall += profile.total(d).wall;
  return static_cast<double>(covered) / static_cast<double>(wall * profile.threads());
}

}  // namespace

TEST_CASE("ticks are as long as the wall clock's seconds") {
  for (const bool tsc : {false, invariant_tsc()}) {
    const TickClock clock(tsc);
    CHECK(clock.tsc() == tsc);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const double rate = clock.seconds_per_tick(), wall = wall_seconds();
    const Ticks begin = clock.now();
    spin_us(20000);
    const double ticked = rate * static_cast<double>(clock.now() - begin);
    CHECK(std::abs(ticked / (wall_seconds() - wall) - 1) < 0.01);
  }
}

TEST_CASE("a young clock waits until its rate is known") {
  const TickClock clock;
  const double at_once = clock.seconds_per_tick();
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  CHECK(std::abs(at_once / clock.seconds_per_tick() - 1) < 1e-3);
}

TEST_CASE("without a profile a scope does nothing") {
  Span span(nullptr, Stage::down, {1, 2, 3});
  span.count({1, 1, 1});
  Call call(nullptr, Direction::forward);
  CHECK(call.caller() == nullptr);
  call.describe(1, 1, 1, 1);
  call.begin_tasks();
  call.end_tasks();
}

TEST_CASE("time goes to the innermost span") {
  Profile profile({0}, 1, kMany);
  Recorder* recorder = &profile.recorder(0);
  {
    Span outer(recorder, Stage::down, {0, 7, 33});
    outer.count({5, 0, 0});
    spin_us(100);
    {
      Span inner(recorder, Stage::pack_weights);
      inner.count({0, 64, 0});
      const Span innermost(recorder, Stage::wait);
      spin_us(300);
    }
    spin_us(100);
  }
  const std::vector<SpanRecord> spans = recorder->spans();
  REQUIRE(spans.size() == 3);
  const SpanRecord &outer = find(spans, Stage::down), &inner = find(spans, Stage::pack_weights),
                   &innermost = find(spans, Stage::wait);
  CHECK(outer.begin <= inner.begin);
  CHECK(inner.begin <= innermost.begin);
  CHECK(innermost.end <= inner.end);
  CHECK(inner.end <= outer.end);
  CHECK(outer.own == outer.end - outer.begin - (inner.end - inner.begin));
  CHECK(inner.own == inner.end - inner.begin - (innermost.end - innermost.begin));
  CHECK(outer.own + inner.own + innermost.own == outer.end - outer.begin);
  CHECK(outer.work.flops == 5);
  CHECK(outer.work.local == 0);
  CHECK(inner.work.local == 64);
  CHECK(inner.args.shard == 0);
  CHECK(outer.args.expert == 7);
  CHECK(outer.args.rows == 33);
  CHECK(inner.args.expert == -1);
  const auto sorted = in_order(*recorder);
  CHECK(sorted[0].stage == Stage::down);
  CHECK(sorted[1].stage == Stage::pack_weights);
  CHECK(sorted[2].stage == Stage::wait);
}

TEST_CASE("a span has the shard of the span around it, or the thread's first") {
  Profile profile({2}, 3, kMany);
  Recorder* recorder = &profile.recorder(0);
  {
    const Span alone(recorder, Stage::setup);
  }
  {
    const Span outer(recorder, Stage::down, {1});
    const Span inner(recorder, Stage::pack_weights);
  }
  const auto spans = recorder->spans();
  CHECK(find(spans, Stage::setup).args.shard == 2);
  CHECK(find(spans, Stage::pack_weights).args.shard == 1);
}

TEST_CASE("spans beyond the limit are dropped and counted, totals go on") {
  Profile profile({0, 0}, 1, 3000);  // 1500 a thread: more than a chunk, and a part of one
  for (int i = 0; i < 2000; ++i) {
    Span span(&profile.recorder(1), Stage::combine);
    span.count({1, 2, 3});
  }
  CHECK(profile.recorder(1).spans().size() == 1500);
  CHECK(profile.recorder(1).dropped() == 500);
  CHECK(profile.dropped_spans() == 500);
  const StageTotal& total = profile.recorder(1).total(Stage::combine);
  CHECK(total.spans == 2000);
  CHECK(total.work.remote == 6000);
}

TEST_CASE("spans of all threads cover a call") {
  for (const int threads : {1, 2}) {
    WorkerPool pool(threads);
    Profile profile(std::vector<int>(static_cast<std::size_t>(threads), 0), 1, kMany);
    for (int i = 0; i < 5; ++i)
      call(pool, profile, i % 2 == 0 ? Direction::forward : Direction::backward, 20, 200);
    CHECK(coverage(profile) > 0.95);
    CHECK(coverage(profile) < 1.0001);
    REQUIRE(profile.calls().size() == 5);
    Ticks own = 0, covered = 0;
    for (const CallRecord& c : profile.calls()) {
      CHECK(c.work.flops == 20 * 1000);
      CHECK(c.work.local == 200);
      CHECK(c.work.remote == 20);
      CHECK(c.tokens == 64);
      CHECK(c.most_rows == 40);
      covered += c.covered;
    }
    for (std::size_t t = 0; t < static_cast<std::size_t>(threads); ++t)
      for (std::size_t s = 0; s < kStages; ++s) own += profile.recorder(t).total(static_cast<Stage>(s)).own;
    CHECK(own == covered);  // so nothing is counted twice
  }
}

TEST_CASE("a thread without tasks is idle, the caller's own work is not") {
  Profile profile({0, 0}, 1, kMany);
  {
    Call call(&profile, Direction::forward);
    spin_us(100);
    call.begin_tasks();
    spin_us(100);
    {
      const Span task(&profile.recorder(0), Stage::down);
      spin_us(100);
    }
    spin_us(100);
    call.end_tasks();
  }
  const CallRecord& call = profile.calls().at(0);
  const auto total = [&](std::size_t thread, Stage stage) {
    return profile.recorder(thread).total(stage).own;
  };
  CHECK(total(1, Stage::idle) == call.end - call.begin);
  CHECK(profile.recorder(0).total(Stage::setup).spans == 2);
  CHECK(profile.recorder(0).total(Stage::idle).spans == 2);
  CHECK(total(0, Stage::setup) + total(0, Stage::idle) + total(0, Stage::down) <= call.end - call.begin);
  CHECK(call.covered > (call.end - call.begin) * 2 * 98 / 100);
}

TEST_CASE("a call that an exception ends is a call") {
  Profile profile({0}, 1, kMany);
  const auto fail = [&](bool in_tasks) {
    Call call(&profile, Direction::backward);
    if (in_tasks) call.begin_tasks();
    throw std::runtime_error("no");
  };
  CHECK_THROWS(fail(false));
  CHECK_THROWS(fail(true));
  CHECK(profile.calls().size() == 2);
  CHECK(profile.total(Direction::backward).calls == 2);
  const Span outside(&profile.recorder(0), Stage::down);
}
