// Launchers of csrc/distance.cu. They only enqueue work on the stream: no allocation, no synchronization.
#pragma once

#include "pixel.hpp"

namespace semimoe {

constexpr int kSlabRows = 32;      // rows of a slab: the bits of a word
constexpr int kMostSlabs = 8;      // of a cluster: the largest that every device allows
constexpr int kTileColumns = 256;  // columns whose distances a block computes

// A batch of masks on the device, its results, and scratch, which the caller allocates. Every slab is 32 rows.
struct Problem {
  const void* mask;  // (batch, height, width), integers of element_size bytes; any non-zero value is foreground
  int element_size;  // 1, 2, 4 or 8
  std::int64_t batch;
  int height;
  int width;
  std::uint32_t* bits;    // (batch, slabs, width): scratch, column by column the classes of 32 rows
  Gap* gaps;              // (batch, height, width): scratch, vertical distances to the opposite class
  std::uint8_t* far;      // (batch, slabs, tiles): scratch, 1 where a distance is beyond the reach of the search
  std::int32_t* state;    // (batch, 4): scratch, see State
  std::int32_t* squared;  // (batch, height, width)
  std::int32_t squared_ring_radius;
  float* sdf;              // (batch, height, width), or null for squared distances alone; may share memory with squared
  std::uint8_t* boundary;  // (batch, height, width), or null

  SEMIMOE_HOST_DEVICE int slabs() const { return (height + kSlabRows - 1) / kSlabRows; }
  SEMIMOE_HOST_DEVICE int tiles() const { return (width + kTileColumns - 1) / kTileColumns; }
  SEMIMOE_HOST_DEVICE std::int64_t pixels() const { return batch * height * width; }
  // Whether one cluster of blocks, a slab each, holds an image.
  SEMIMOE_HOST_DEVICE bool fits_a_cluster() const { return slabs() <= kMostSlabs && tiles() <= 1; }
};

// Fills problem.squared or, unless it is null, problem.sdf together with problem.boundary.
void launch(const Problem& problem, void* stream);

}  // namespace semimoe
