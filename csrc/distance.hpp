// Exact Euclidean distance of every pixel to the nearest pixel of another label, on the CPU. The labels of a mask are
// foreground and background; those of an instance map are its instances and the background.
//
// One pass over the columns and one over the rows compute all labels together. Let gap(y, x) be the distance to the
// nearest pixel of another label in column x. Call the runs of equal labels in a row odd and even in turn. Then
//
//     d^2(y, x) = min over x' of (x - x')^2 + (gap(y, x')^2 if x' is in a run of the same parity, else 0).
//
// The nearest pixels of the other parity end the run of x. Other runs of its parity are farther away than these, so
// that it does no harm that their gaps are those of other labels.
//
// kernels.cpp searches outwards for the minimum, in bytes and 16-bit words; that suffices for most images. Rows with a
// distance beyond the search's reach are computed by the linear algorithm of envelope.hpp. Scratch: 2 bytes per pixel
// of an image, and 2 more per pixel of such rows. The squared distances use the memory of the sdf until it is written.
#pragma once

#include <atomic>
#include <memory>

#include "envelope.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "pixel.hpp"

namespace semimoe {

constexpr int kStripRows = 16;

// The labels of a batch of images, (batch, height, width), integers of element_size bytes. 0 is background. With
// instances every other value is a label of its own, else all are one label.
struct Labels {
  const void* data;
  int element_size;  // 1, 2, 4 or 8
  bool instances;
  std::int64_t batch;
  std::int64_t height;
  std::int64_t width;

  std::int64_t pixels() const { return height * width; }
  const void* image(std::int64_t i) const { return static_cast<const char*>(data) + i * pixels() * element_size; }
  bool starts_with_foreground(std::int64_t i) const {
    const char* first = static_cast<const char*>(image(i));
    return std::any_of(first, first + element_size, [](char byte) { return byte != 0; });
  }
};

// Calls body(begin, end) for strips that cover [0, length).
template <class Body>
void for_each_strip(int length, int strip, const Workers& workers, const Body& body) {
  workers.each((length + strip - 1) / strip, [&](std::int64_t i) {
    const int begin = static_cast<int>(i) * strip;
    body(begin, std::min(begin + strip, length));
  });
}

struct Image {
  const std::uint8_t* marks;  // (height, width)
  int height;
  int width;

  std::int64_t row(int y) const { return static_cast<std::int64_t>(y) * width; }
};

// Writes the squared distances of an image with several labels, and returns the largest ones.
inline Deepest squared_distance(const Kernels& kernels, const Image& image, const Workers& workers,
                                std::int32_t* squared) {
  std::vector<Deepest> deepest(image.height);  // by row
  {
    const std::unique_ptr<std::uint8_t[]> gaps(new std::uint8_t[image.row(image.height)]);
    for_each_strip(image.width, kStripColumns, workers, [&](int begin, int end) {
      kernels.near_gaps(image.marks, image.height, image.width, begin, end, gaps.get());
    });
    for_each_strip(image.height, kStripRows, workers, [&](int begin, int end) {
      const std::unique_ptr<std::uint16_t[]> scratch(new std::uint16_t[kernels.row_scratch(image.width)]);
      kernels.search_rows(image.marks + image.row(begin), gaps.get() + image.row(begin), end - begin, image.width,
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
      kernels.far_gaps(image.marks, image.height, image.width, begin, end, far_rows.data(), count, gaps.get());
    });
    for_each_strip(count, kStripRows, workers, [&](int begin, int end) {
      Envelope envelope(image.width);
      for (int i = begin; i < end; ++i) {
        const int y = far_rows[i];
        deepest[y] = finish_row(image.marks + image.row(y), gaps.get() + image.row(i), image.width, far, envelope,
                                squared + image.row(y));
      }
    });
  }

  Deepest overall;
  for (const Deepest& row : deepest) overall.include(row);
  return overall;
}

// Calls body(image number, image, workers) for every image of a batch; the image is nullptr if it has only one label.
template <class Body>
void for_each_image(const Kernels& kernels, const Labels& labels, int threads, const Body& body) {
  const std::int64_t pixels = labels.pixels();
  if (labels.batch * pixels == 0) return;
  // Threads take whole images, which need no barrier, unless there are too few: then all share one after another.
  const bool across = labels.batch >= threads || pixels < 2 * kWorkOfThread;
  const Workers images(across ? threads : 1, labels.batch * pixels);
  const Workers workers(across ? 1 : threads, pixels);
  const int height = static_cast<int>(labels.height), width = static_cast<int>(labels.width);
  images.each(labels.batch, [&](std::int64_t i) {
    const std::unique_ptr<std::uint8_t[]> marks(new std::uint8_t[pixels]);
    std::atomic<bool> differs{false};
    for_each_strip(height, kStripRows, workers, [&](int begin, int end) {
      const int any = kernels.mark_rows(labels.image(i), labels.element_size, labels.instances, height, width, begin,
                                        end, marks.get());
      if (any & (kDiffersAbove | kDiffersLeft)) differs = true;
    });
    const Image image{marks.get(), height, width};
    body(i, differs ? &image : nullptr, workers);
  });
}

// Writes squared distances, int32 (batch, height, width).
inline void squared_distance(const Kernels& kernels, const Labels& labels, std::int32_t* out, int threads) {
  check_size(labels.batch, labels.height, labels.width);
  prefer_large_pages(out, labels.batch * labels.pixels() * 4);
  for_each_image(kernels, labels, threads, [&](std::int64_t i, const Image* image, const Workers& workers) {
    std::int32_t* squared = out + i * labels.pixels();
    if (image)
      squared_distance(kernels, *image, workers, squared);
    else
      std::fill_n(squared, labels.pixels(), kNoDistance);
  });
}

// Writes sdf, float32 (batch, height, width), and boundary, uint8 (batch, height, width).
inline void distance_targets(const Kernels& kernels, const Labels& labels, std::int32_t squared_ring_radius, float* sdf,
                             std::uint8_t* boundary, int threads) {
  check_size(labels.batch, labels.height, labels.width);
  prefer_large_pages(sdf, labels.batch * labels.pixels() * 4);
  prefer_large_pages(boundary, labels.batch * labels.pixels());
  for_each_image(kernels, labels, threads, [&](std::int64_t i, const Image* image, const Workers& workers) {
    const std::int64_t first = i * labels.pixels();
    if (!image) {
      std::fill_n(sdf + first, labels.pixels(), labels.starts_with_foreground(i) ? 1.0f : -1.0f);
      std::fill_n(boundary + first, labels.pixels(), std::uint8_t{0});
      return;
    }
    std::int32_t* squared = reinterpret_cast<std::int32_t*>(sdf + first);
    const Deepest deepest = squared_distance(kernels, *image, workers, squared);
    for_each_strip(image->height, kStripRows, workers, [&](int begin, int end) {
      const std::int64_t start = image->row(begin);
      kernels.write_targets(image->marks + start, image->row(end) - start, deepest, squared_ring_radius,
                            squared + start, boundary + first + start);
    });
  });
}

}  // namespace semimoe
