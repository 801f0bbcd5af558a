// The inner loops of the distance targets, and the way to those of the objective. csrc/kernels.cpp is compiled once for
// each instruction set that is worth it; the best one that the processor has is chosen when the module is loaded.
#pragma once

#include <vector>

#include "objective_kernels.hpp"
#include "pixel.hpp"

namespace semimoe {

constexpr int kStripColumns = 512;  // two rows of gaps stay in the nearest cache

struct Kernels {
  const char* name;

  // The search follows the distance up to here. Gaps are cut off at reach, and a squared distance of reach * reach
  // stands for that much or more.
  int reach;

  // 16-bit words that the search needs as scratch for a row of `width` pixels.
  std::int64_t (*row_scratch)(int width);

  // Gaps of the columns [begin, end), at most kStripColumns of them: cut off for the whole image, or in full for the
  // rows listed, in ascending order.
  void (*near_gaps)(const std::uint8_t* mask, int height, int width, int begin, int end, std::uint8_t* gaps);
  void (*far_gaps)(const std::uint8_t* mask, int height, int width, int begin, int end, const int* rows, int count,
                   Gap* gaps);

  // Squared distances of `rows` rows from their gaps; deepest[i] becomes that of row i.
  void (*search_rows)(const std::uint8_t* mask, const std::uint8_t* gaps, int rows, int width, std::uint16_t* scratch,
                      std::int32_t* squared, Deepest* deepest);

  // Signed distances, in place of the squared ones (int32) in the same memory, and the ring.
  void (*write_targets)(const std::uint8_t* mask, std::int64_t count, const Deepest& deepest,
                        std::int32_t squared_ring_radius, void* squared_to_sdf, std::uint8_t* boundary);

  const ObjectiveKernels* objective;
};

namespace plain {
extern const Kernels kernels;  // what every processor of the family runs
}
#ifdef SEMIMOE_X86_KERNELS
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// Those that this processor can run, the best first.
inline std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported;
#ifdef SEMIMOE_X86_KERNELS
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) supported.push_back(&avx512::kernels);
  if (has_avx2) supported.push_back(&avx2::kernels);
#endif
  supported.push_back(&plain::kernels);
  return supported;
}

}  // namespace semimoe
