// Reading labels: what the distances need to know about a pixel, in one bit each.
//
// Instances differ by their labels, the pixels of a mask by whether their value is 0. A pixel's distance is the one to
// the nearest pixel of another label, for background to the nearest foreground. So only the places where the label
// changes matter, and the same code serves both: a pixel has an edge if its label differs from that of the pixel above,
// and an edge across if it differs from that of the pixel to the left. Pixels at the top and left border have none.
#pragma once

#include "cluster.cuh"
#include "distance_cuda.hpp"

namespace semimoe {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads == kTileColumns);

// A slab's pixels of a column, one bit each, the top one in the lowest bit.
struct Bits {
  std::uint32_t inside = 0;   // foreground
  std::uint32_t edges = 0;    // another label than the pixel above
  std::uint32_t across = 0;   // another label than the pixel to the left
  std::uint32_t touches = 0;  // foreground with a 4-neighbor in another instance
};

// The slab and the tile that a block computes.
struct Place {
  std::int64_t image;
  int slab, tile, rows, first_column, columns;
  std::int64_t first_pixel;  // of the tile, in the batch

  __device__ Place(const Problem& problem, int block)
      : image(block / problem.tiles() / problem.slabs()),
        slab(block / problem.tiles() % problem.slabs()),
        tile(block % problem.tiles()),
        rows(min(kSlabRows, problem.height - slab * kSlabRows)),
        first_column(tile * kTileColumns),
        columns(min(kTileColumns, problem.width - first_column)),
        first_pixel((image * problem.height + slab * kSlabRows) * problem.width + first_column) {}
};

// An image. Its border pixels repeat beyond it, so that there are no edges.
template <class Element>
struct Labels {
  const Element* image;
  int height, width;

  __device__ Element at(int y, int x) const {
    const int row = max(0, min(y, height - 1)), column = max(0, min(x, width - 1));
    return image[static_cast<std::int64_t>(row) * width + column];
  }

  // The foreground of the slab that begins at row `top`, in column x of the image.
  __device__ std::uint32_t inside(int top, int x) const {
    const Element* first = image + static_cast<std::int64_t>(top) * width + x;
    const int last = height - 1 - top;
    std::uint32_t word = 0;
#pragma unroll 8
    for (int i = 0; i < kSlabRows; ++i)
      word |= std::uint32_t{first[static_cast<unsigned>(min(i, last) * width)] != 0} << i;
    return word;
  }

  __device__ Bits instances(int top, int x) const {
    Bits bits;
    Element above = at(top - 1, x), here = at(top, x);
#pragma unroll 1
    for (int i = 0; i < kSlabRows; ++i) {
      const int y = top + i;
      const Element below = at(y + 1, x), left = at(y, x - 1), right = at(y, x + 1);
      const auto touches = [&](Element other) { return other != here && other != 0; };
      const bool touched = touches(above) || touches(below) || touches(left) || touches(right);
      bits.inside |= std::uint32_t{here != 0} << i;
      bits.edges |= std::uint32_t{here != above} << i;
      bits.across |= std::uint32_t{here != left} << i;
      bits.touches |= std::uint32_t{here != 0 && touched} << i;
      above = here;
      here = below;
    }
    return bits;
  }
};

// Called by all threads of a block: thread i reads column i of the tile. Ends with a barrier, after which inside[i] is
// the foreground of column i, also for the other threads.
template <class Element>
__device__ inline Bits read_labels(const Problem& problem, const Place& place, std::uint32_t* inside) {
  const int i = threadIdx.x, x = place.first_column + i, top = place.slab * kSlabRows;
  const std::int64_t pixels = static_cast<std::int64_t>(problem.height) * problem.width;
  const Labels<Element> labels{static_cast<const Element*>(problem.mask) + place.image * pixels, problem.height,
                               problem.width};
  Bits bits;
  if (i < place.columns) {
    if (problem.instances)
      bits = labels.instances(top, x);
    else
      bits.inside = labels.inside(top, x);
  }
  inside[i] = bits.inside;
  __syncthreads();
  if (i < place.columns && !problem.instances) {
    const std::uint32_t above = labels.at(top - 1, x) != 0;
    bits.edges = bits.inside ^ (bits.inside << 1 | (top > 0 ? above : bits.inside & 1));
    bits.across = bits.inside ^ (i > 0 ? inside[i - 1] : x > 0 ? labels.inside(top, x - 1) : bits.inside);
  }
  return bits;
}

__device__ inline Bits read_labels(const Problem& problem, const Place& place, std::uint32_t* inside) {
  switch (problem.element_size) {
    case 1:
      return read_labels<std::uint8_t>(problem, place, inside);
    case 2:
      return read_labels<std::uint16_t>(problem, place, inside);
    case 4:
      return read_labels<std::uint32_t>(problem, place, inside);
    default:
      return read_labels<std::uint64_t>(problem, place, inside);
  }
}

}  // namespace semimoe
