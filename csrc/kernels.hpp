// A table of the inner loops of the distance targets, of the objective, of batch normalization, of pooling and of blur.
// csrc/kernels.cpp is compiled once for each supported instruction set; when the module is loaded, it selects the best
// set that the processor has.
#pragma once

#include <vector>

#include "batch_norm_kernels.hpp"
#include "blur_kernels.hpp"
#include "objective_kernels.hpp"
#include "pixel.hpp"
#include "pooling_kernels.hpp"

namespace semimoe {

constexpr int kStripColumns = 512;  // two rows of gaps fit into the L1 cache

// What the inner loops know of a pixel, one byte. A neighbor differs if its label does; outside the image none does.
enum Mark : std::uint8_t {
  kTouches = 1,       // foreground with another instance above, below, left or right
  kDiffersAbove = 2,  // from the pixel above
  kDiffersLeft = 4,   // from the pixel to the left
  kOdd = 8,           // one of the first, third, ... runs of equal labels of a row or, in all rows, of the others
  kForeground = 128,
};

// A comparison, because GCC does not vectorize selections by a bit.
static inline bool is_foreground(std::uint8_t mark) { return mark >= kForeground; }

struct Kernels {
  const char* name;

  // The longest distance that the search finds. Gaps are at most reach, and a squared distance of reach * reach means
  // reach * reach or more.
  int reach;

  // Number of 16-bit words of scratch that search_rows needs for rows of `width` pixels.
  std::int64_t (*row_scratch)(int width);

  // Marks of the rows [begin, end) of an image of labels, integers of element_size bytes, 0 is background. With
  // instances every other value is a label of its own, else all are one. Returns the union of the marks.
  std::uint8_t (*mark_rows)(const void* labels, int element_size, bool instances, int height, int width, int begin,
                            int end, std::uint8_t* marks);

  // Gaps of the columns [begin, end), at most kStripColumns of them. near_gaps: of all rows, at most reach. far_gaps:
  // of the listed rows only, which ascend, without a limit.
  void (*near_gaps)(const std::uint8_t* marks, int height, int width, int begin, int end, std::uint8_t* gaps);
  void (*far_gaps)(const std::uint8_t* marks, int height, int width, int begin, int end, const int* rows, int count,
                   Gap* gaps);

  // Squared distances of `rows` rows from their gaps, and the largest ones of each row in `deepest`.
  void (*search_rows)(const std::uint8_t* marks, const std::uint8_t* gaps, int rows, int width, std::uint16_t* scratch,
                      std::int32_t* squared, Deepest* deepest);

  // Replaces squared distances (int32) by signed distances (float32) in the same memory, and writes the boundary.
  void (*write_targets)(const std::uint8_t* marks, std::int64_t count, const Deepest& deepest,
                        std::int32_t squared_ring_radius, void* squared_to_sdf, std::uint8_t* boundary);

  const ObjectiveKernels* objective;
  const BatchNormKernels* batch_norm;  // by Element
  const BlurKernels* blur;
  const PoolingKernels* pooling;  // by Element
};

namespace plain {
extern const Kernels kernels;  // for every processor of the family
}
#ifdef SEMIMOE_STANDARD_KERNELS
namespace standard {
extern const Kernels kernels;  // likewise, in standard C++ alone; for tests
}
#endif
#ifdef SEMIMOE_X86_KERNELS
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The kernels that this processor can run, the best first.
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
#ifdef SEMIMOE_STANDARD_KERNELS
  supported.push_back(&standard::kernels);
#endif
  return supported;
}

}  // namespace semimoe
