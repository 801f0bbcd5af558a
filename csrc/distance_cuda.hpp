// Launchers of csrc/distance.cu. They only enqueue work on the stream: no allocation, no synchronization.
#pragma once

#include "pixel.hpp"

namespace semimoe {

constexpr int kSlabRows = 32;      // rows of a slab, one bit of a word each
constexpr int kMostSlabs = 8;      // slabs of a cluster; 8 blocks is the largest portable size
constexpr int kTileColumns = 256;  // columns whose distances a block computes

// A batch of masks or instance maps on the device, its results and scratch memory. The caller allocates all of them.
struct Problem {
  const void* mask;  // (batch, height, width), integers of element_size bytes; 0 is background
  int element_size;  // 1, 2, 4 or 8
  bool instances;    // whether pixels with different values other than 0 are different instances
  std::int64_t batch;
  int height;
  int width;
  std::uint32_t* words;   // (5, batch, slabs, width): scratch, see general_path.cuh
  Gap* gaps;              // (batch, height, width): scratch, vertical distances in the rows that search_far computes
  std::uint32_t* far;     // (batch, slabs, tiles): scratch, bit i: row i of the tile has a distance beyond the reach
  std::int32_t* state;    // (batch, 3): scratch, see general_path.cuh
  std::int32_t* squared;  // (batch, height, width)
  std::int32_t squared_ring_radius;
  float* sdf;              // (batch, height, width), or null to compute only squared; may share memory with squared
  std::uint8_t* boundary;  // (batch, height, width), or null

  SEMIMOE_HOST_DEVICE int slabs() const { return (height + kSlabRows - 1) / kSlabRows; }
  SEMIMOE_HOST_DEVICE int tiles() const { return (width + kTileColumns - 1) / kTileColumns; }
  SEMIMOE_HOST_DEVICE std::int64_t pixels() const { return batch * height * width; }
  // Whether an image fits into one cluster of blocks, one slab per block.
  SEMIMOE_HOST_DEVICE bool fits_a_cluster() const { return slabs() <= kMostSlabs && tiles() <= 1; }
};

// Writes problem.sdf and problem.boundary or, if sdf is null, problem.squared.
void launch(const Problem& problem, void* stream);

// The newest CUDA that the driver can run, as 1000 major + 10 minor; 0 without a driver.
int driver_version();

}  // namespace semimoe
