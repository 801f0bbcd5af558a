// Exact Euclidean distance of every pixel to the nearest pixel of the opposite class, on the CPU.
//
// One pass over the columns and one over the rows compute foreground and background together. Let gap(y, x) be the
// distance to the nearest pixel of the opposite class in column x. Then
//
//     d^2(y, x) = min over x' of (x - x')^2 + (gap(y, x')^2 if x' has the class of x, else 0).
//
// kernels.cpp searches outwards for the minimum, in bytes and 16-bit words; that suffices for most masks. Rows with a
// distance beyond the search's reach are computed by the linear algorithm of envelope.hpp. Scratch: 1 byte per pixel of
// an image, and 2 more per pixel of such rows. The squared distances use the memory of the sdf until it is written.
#pragma once

#include <memory>

#include "envelope.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "pixel.hpp"

namespace semimoe {

// A thread with fewer pixels takes longer to start than it saves.
constexpr std::int64_t kPixelsPerThread = 1 << 15;
constexpr int kStripRows = 16;

struct Image {
  const std::uint8_t* mask;  // (height, width), any non-zero value is foreground
  int height;
  int width;

  std::int64_t pixels() const { return static_cast<std::int64_t>(height) * width; }
  std::int64_t row(int y) const { return static_cast<std::int64_t>(y) * width; }
};

inline bool is_constant(const Image& image) {
  constexpr std::int64_t kBlock = 4096;
  const bool first = image.mask[0] != 0;
  for (std::int64_t begin = 0; begin < image.pixels(); begin += kBlock) {
    bool differs = false;
    for (std::int64_t i = begin; i < std::min(begin + kBlock, image.pixels()); ++i)
      differs |= (image.mask[i] != 0) != first;
    if (differs) return false;
  }
  return true;
}

// Calls body(begin, end) for strips that cover [0, length).
template <class Body>
void for_each_strip(int length, int strip, Workers& workers, const Body& body) {
  workers.each((length + strip - 1) / strip, [&](std::int64_t i) {
    const int begin = static_cast<int>(i) * strip;
    body(begin, std::min(begin + strip, length));
  });
}

// Writes the squared distances of an image with both classes, and returns the largest ones.
inline Deepest squared_distance(const Kernels& kernels, const Image& image, Workers& workers, std::int32_t* squared) {
  std::vector<Deepest> deepest(image.height);  // by row
  {
    const std::unique_ptr<std::uint8_t[]> gaps(new std::uint8_t[image.pixels()]);
    for_each_strip(image.width, kStripColumns, workers, [&](int begin, int end) {
      kernels.near_gaps(image.mask, image.height, image.width, begin, end, gaps.get());
    });
    for_each_strip(image.height, kStripRows, workers, [&](int begin, int end) {
      const std::unique_ptr<std::uint16_t[]> scratch(new std::uint16_t[kernels.row_scratch(image.width)]);
      kernels.search_rows(image.mask + image.row(begin), gaps.get() + image.row(begin), end - begin, image.width,
                          scratch.get(), squared + image.row(begin), &deepest[begin]);
    });
  }

  const std::int32_t far = kernels.reach * kernels.reach;
  std::vector<int> far_rows;
  for (int y = 0; y < image.height; ++y)
    if (std::max(deepest[y].inside, deepest[y].outside) >= far) far_rows.push_back(y);
  if (!far_rows.empty()) {
    const int count = static_cast<int>(far_rows.size());
    const std::unique_ptr<Gap[]> gaps(new Gap[image.row(count)]);
    for_each_strip(image.width, kStripColumns, workers, [&](int begin, int end) {
      kernels.far_gaps(image.mask, image.height, image.width, begin, end, far_rows.data(), count, gaps.get());
    });
    for_each_strip(count, kStripRows, workers, [&](int begin, int end) {
      Envelope envelope(image.width);
      for (int i = begin; i < end; ++i) {
        const int y = far_rows[i];
        deepest[y] = finish_row(image.mask + image.row(y), gaps.get() + image.row(i), image.width, far, envelope,
                                squared + image.row(y));
      }
    });
  }

  Deepest overall;
  for (const Deepest& row : deepest) overall.include(row);
  return overall;
}

// Calls body(image, first pixel, workers) for every image of a batch.
template <class Body>
void for_each_image(const std::uint8_t* masks, std::int64_t batch, std::int64_t height, std::int64_t width, int threads,
                    const Body& body) {
  const std::int64_t pixels = height * width;
  if (batch * pixels == 0) return;
  // Threads first get whole images, which need no barrier; if threads remain, several share an image.
  const auto useful = [](std::int64_t threads_wanted, std::int64_t work) {
    return static_cast<int>(
        std::clamp<std::int64_t>(work / kPixelsPerThread, 1, std::max<std::int64_t>(threads_wanted, 1)));
  };
  const int across = useful(std::min<std::int64_t>(threads, batch), batch * pixels);
  const int within = useful(threads / across, pixels);
  Workers(across).each(batch, [&](std::int64_t i) {
    Workers workers(within);
    body(Image{masks + i * pixels, static_cast<int>(height), static_cast<int>(width)}, i * pixels, workers);
  });
}

// masks (batch, height, width) -> out int32, same shape.
inline void squared_distance(const Kernels& kernels, const std::uint8_t* masks, std::int64_t batch, std::int64_t height,
                             std::int64_t width, std::int32_t* out, int threads) {
  check_size(batch, height, width);
  prefer_large_pages(out, batch * height * width * 4);
  for_each_image(masks, batch, height, width, threads, [&](const Image& image, std::int64_t first, Workers& workers) {
    if (is_constant(image))
      std::fill_n(out + first, image.pixels(), kNoDistance);
    else
      squared_distance(kernels, image, workers, out + first);
  });
}

// masks (batch, height, width) -> sdf float32 and boundary uint8, same shape.
inline void distance_targets(const Kernels& kernels, const std::uint8_t* masks, std::int64_t batch, std::int64_t height,
                             std::int64_t width, std::int32_t squared_ring_radius, float* sdf, std::uint8_t* boundary,
                             int threads) {
  check_size(batch, height, width);
  prefer_large_pages(sdf, batch * height * width * 4);
  prefer_large_pages(boundary, batch * height * width);
  for_each_image(masks, batch, height, width, threads, [&](const Image& image, std::int64_t first, Workers& workers) {
    if (is_constant(image)) {
      std::fill_n(sdf + first, image.pixels(), image.mask[0] ? 1.0f : -1.0f);
      std::fill_n(boundary + first, image.pixels(), std::uint8_t{0});
      return;
    }
    std::int32_t* squared = reinterpret_cast<std::int32_t*>(sdf + first);
    const Deepest deepest = squared_distance(kernels, image, workers, squared);
    for_each_strip(image.height, kStripRows, workers, [&](int begin, int end) {
      const std::int64_t start = image.row(begin);
      kernels.write_targets(image.mask + start, (end - begin) * std::int64_t{image.width}, deepest, squared_ring_radius,
                            squared + start, boundary + first + start);
    });
  });
}

}  // namespace semimoe
