// Memory on NUMA nodes, by system calls: no libnuma. Nodes by the numbers the kernel gives them.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace kt {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Asks that pages of [memory, memory + bytes), whole ones of an anonymous mapping, come from `nodes` when
// they are first touched: from the only one while it has some, or from all in turn. No nodes: nothing is
// asked. False where the kernel refuses: the memory is as good, only further away.
bool place_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept;

// The same for pages that hold something: a copy on those nodes takes their place, all at once, so that who
// reads or forks meanwhile sees what was there; nobody may write. Not by migration, because huge pages would
// take neighbours along.
bool move_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept;

// The node of the page behind each address; -1 where there is no page yet, or the kernel does not tell.
std::vector<int> nodes_of(std::span<const void* const> addresses);

}  // namespace kt
