// Feature maps in memory, cut into contiguous pieces that the kernels of batch normalization take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "batch_norm_kernels.hpp"
#include "parallel.hpp"

namespace semimoe {

constexpr std::int64_t kPieceElements = 1 << 16;  // about as many as a core's caches hold

// A part of the feature maps that is contiguous: rows of `columns` elements, and a last row of only `rest` elements.
struct Piece {
  std::int64_t group;
  std::int64_t channel;  // of its first element
  std::int64_t first;    // element in memory
  std::int64_t rows, rest;
};

// Feature maps (batch, channels, pixels), or (batch, pixels, channels) if channels are last. The images are `groups`
// equal runs.
//
// A matrix of them has so many elements in a row that every row starts with the same channel and is a multiple of
// kStrip. So the kernels need no other form, whatever the number of channels; with channels first it is one channel.
//
// Channels that are last may also lie among those of a concatenation, `joined` elements from pixel to pixel; both
// numbers are then multiples of 16.
class FeatureMaps {
 public:
  const Element element;
  const bool channels_last;
  const std::int64_t batch, channels, pixels, groups;
  const std::int64_t images, values;        // of a group; of a channel in a group
  const std::int64_t interleaved, columns;  // channels of a row, and its elements
  const std::int64_t joined;
  const std::int64_t pieces_of_run, pieces;

  FeatureMaps(Element element, bool channels_last, std::int64_t batch, std::int64_t channels, std::int64_t pixels,
              std::int64_t groups, std::int64_t joined)
      : element(element),
        channels_last(channels_last),
        batch(batch),
        channels(channels),
        pixels(pixels),
        groups(groups),
        images(batch / groups),
        values(images * pixels),
        interleaved(channels_last ? channels : 1),
        columns(kStrip / std::gcd<std::int64_t>(kStrip, interleaved) * interleaved),
        joined(joined),
        pieces_of_run((run_size() + piece_size() - 1) / piece_size()),
        pieces((channels_last ? groups : batch * channels) * pieces_of_run) {
    for (std::int64_t j = 0; has_gaps() && j < columns; ++j) places_.push_back(joined_place(j));
  }

  std::int64_t element_size() const { return element == kFloat32 ? 4 : 2; }
  std::int64_t bytes() const { return batch * channels * pixels * element_size(); }

  bool has_gaps() const { return joined != channels; }
  std::int64_t joined_bytes() const { return bytes() + (batch * pixels - 1) * (joined - channels) * element_size(); }
  Spread spread() const { return {joined_place(columns), has_gaps() ? places_.data() : nullptr}; }

  Workers workers(int most) const { return Workers(most, batch * channels * pixels); }

  Piece piece(std::int64_t number) const {
    const std::int64_t run = number / pieces_of_run, start = number % pieces_of_run * piece_size();
    const std::int64_t size = std::min(piece_size(), run_size() - start);
    const std::int64_t group = channels_last ? run : run / channels / images;
    return {group, channels_last ? 0 : run % channels, run * run_size() + start, size / columns, size % columns};
  }

  // The pieces with a channel of a group are numbered from 0; this is the place of the channel in the i-th one, among
  // the `interleaved` channels of each of all pieces.
  std::int64_t pieces_with_channel() const { return (channels_last ? 1 : images) * pieces_of_run; }
  std::int64_t place(std::int64_t group, std::int64_t channel, std::int64_t i) const {
    if (channels_last) return (group * pieces_of_run + i) * channels + channel;
    const std::int64_t image = group * images + i / pieces_of_run;
    return (image * channels + channel) * pieces_of_run + i % pieces_of_run;
  }

  // From numbers by group and channel (or by channel, if they are the same for all groups), those of a piece's columns.
  void copy_by_column(const Piece& piece, const float* numbers, bool same_for_groups, float* result) const {
    const float* first = numbers + (same_for_groups ? 0 : piece.group * channels) + piece.channel;
    if (interleaved == 1)
      std::fill_n(result, columns, *first);
    else
      for (std::int64_t j = 0; j < columns; j += interleaved) std::copy_n(first, interleaved, result + j);
  }

  // The memory of a piece.
  const char* at(const Piece& piece, const void* memory) const {
    return static_cast<const char*>(memory) + piece.first * element_size();
  }
  char* at(const Piece& piece, void* memory) const { return static_cast<char*>(memory) + piece.first * element_size(); }

  // The same in a concatenation.
  const char* joined_at(const Piece& piece, const void* memory) const {
    return static_cast<const char*>(memory) + joined_place(piece.first) * element_size();
  }
  char* joined_at(const Piece& piece, void* memory) const {
    return static_cast<char*>(memory) + joined_place(piece.first) * element_size();
  }
  std::int64_t joined_place(std::int64_t element) const {
    return has_gaps() ? element / channels * joined + element % channels : element;
  }

 private:
  // A run is a group's memory, or with channels first one plane.
  std::int64_t run_size() const { return channels_last ? values * channels : pixels; }
  std::int64_t piece_size() const { return std::max<std::int64_t>(kPieceElements / columns, 1) * columns; }

  std::vector<std::int64_t> places_;  // in a concatenation, of the elements of a row
};

// The rest of a piece as a row of a matrix for the kernels, padded with zeros; `joined` if it lies in a concatenation.
// Without memory all are zeros.
class PaddedRest {
 public:
  PaddedRest(const FeatureMaps& maps, const Piece& piece, const void* memory, bool joined = false)
      : maps_(maps),
        joined_(joined && maps.has_gaps()),
        first_(piece.first + piece.rows * maps.columns),
        size_(piece.rest),
        copy_(columns() * maps.element_size()) {
    if (memory == nullptr) return;
    each_run([=](char* copy, std::int64_t offset, std::int64_t bytes) {
      std::memcpy(copy, static_cast<const char*>(memory) + offset, bytes);
    });
  }

  std::int64_t columns() const { return (size_ + kStrip - 1) / kStrip * kStrip; }
  Spread spread() const { return {columns(), nullptr}; }
  char* data() { return copy_.data(); }
  void write_to(void* memory) {
    each_run([=](const char* copy, std::int64_t offset, std::int64_t bytes) {
      std::memcpy(static_cast<char*>(memory) + offset, copy, bytes);
    });
  }

 private:
  // Calls body(copy, offset in memory, bytes) for all parts without gaps.
  template <class Body>
  void each_run(const Body& body) {
    const std::int64_t run = joined_ ? maps_.channels : size_, bytes = maps_.element_size();
    for (std::int64_t i = 0; i < size_; i += run) {
      const std::int64_t place = joined_ ? maps_.joined_place(first_ + i) : first_ + i;
      body(copy_.data() + i * bytes, place * bytes, run * bytes);
    }
  }

  const FeatureMaps& maps_;
  const bool joined_;
  const std::int64_t first_, size_;
  std::vector<char> copy_;
};

}  // namespace semimoe
