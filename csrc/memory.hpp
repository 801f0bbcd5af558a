// Large results in large pages.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace semimoe {

// Asks for pages of 2 MiB where whole ones lie in this memory. Results are mostly fresh memory, and its first use then
// costs one page fault for 2 MiB instead of 512, which take as long as a fifth of the distance targets. A system that
// refuses costs nothing.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
  constexpr std::uintptr_t kPage = 1 << 21;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace semimoe
