// Memory on NUMA nodes, by system calls: no libnuma. Nodes by the numbers the kernel gives them.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace kt {

// Asks that pages of [memory, memory + bytes), a mapping of its own, come from `nodes` when they are first
// touched: from the only one while it has some, or from all in turn. No nodes: nothing is asked. With `move`,
// pages that are there already move. False where the kernel refuses: the memory is as good, only further
// away.
bool place_memory(void* memory, std::size_t bytes, std::span<const int> nodes, bool move = false) noexcept;

// The node of the page behind each address; -1 where there is no page yet, or the kernel does not tell.
std::vector<int> nodes_of(std::span<const void* const> addresses);

}  // namespace kt
