// State that a forked child must not take over: threads that it does not have may have held its locks, or
// have been about to change it.
#pragma once

#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <utility>

namespace kt {

// A T for every process. The parent's is left where it is in a child, where a new one is made when it is
// first asked for; of several threads that ask at once, one replaces it. Thread-safe as T is.
template <class T>
class PerProcess {
 public:
  using Make = std::function<std::unique_ptr<T>()>;

  explicit PerProcess(Make make = [] { return std::make_unique<T>(); })
      : make_(std::move(make)), own_(new Own{getpid(), make_()}) {}
  ~PerProcess() {
    if (const Own* own = own_.load(); own->process == getpid()) delete own;
  }
  PerProcess(const PerProcess&) = delete;
  PerProcess& operator=(const PerProcess&) = delete;

  // Throws what making one throws.
  T& get() const {
    Own* own = own_.load();
    if (own->process == getpid()) return *own->state;
    std::unique_ptr<Own> fresh(new Own{getpid(), make_()});
    return own_.compare_exchange_strong(own, fresh.get()) ? *fresh.release()->state : *own->state;
  }

 private:
  struct Own {
    pid_t process;
    std::unique_ptr<T> state;
  };
  Make make_;
  mutable std::atomic<Own*> own_;
};

}  // namespace kt
