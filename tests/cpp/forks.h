// Forked children of a process with threads.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

namespace kt::test {

// Whether f returns true in a child, within 20 s.
inline bool true_in_child(const std::function<bool()>& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// The same in some children, forked while another thread does `busy` over and over again.
inline bool true_in_children(const std::function<bool()>& f, const std::function<void()>& busy) {
  std::atomic<bool> over{false};
  std::atomic<int> rounds{0};
  std::thread other([&] {
    while (!over) busy(), ++rounds;
  });
  bool all = true;
  for (int child = 0; child < 50 && all; ++child) {
    for (const int before = rounds; rounds == before;) std::this_thread::yield();
    all = true_in_child(f);
  }
  over = true;
  other.join();
  return all;
}

}  // namespace kt::test
