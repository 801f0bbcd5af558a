// relu(batch_norm(x)) with the statistics of each group of images, on the CPU, and its gradients.
//
// Forward reads x twice and writes y; backward reads x and dy twice and writes dx. Sums are double, in an order that
// does not depend on the threads. The second pass goes backward, because the end of x may still be in the caches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "batch_norm_kernels.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace semimoe {

constexpr std::int64_t kPieceElements = 1 << 16;
constexpr std::int64_t kElementsPerThread = 1 << 17;  // fewer do not pay for a thread

// A part of the feature maps that is contiguous: rows of `columns` elements, and a last row of only `rest` elements.
struct Piece {
  std::int64_t number;
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
struct FeatureMaps {
  Element element;
  bool channels_last;
  std::int64_t batch, channels, pixels, groups;

  std::int64_t element_size() const { return element == kFloat32 ? 4 : 2; }
  std::int64_t size() const { return batch * channels * pixels; }
  std::int64_t images() const { return batch / groups; }     // of a group
  std::int64_t values() const { return images() * pixels; }  // of a channel in a group
  std::int64_t interleaved() const { return channels_last ? channels : 1; }
  std::int64_t columns() const { return kStrip / std::gcd<std::int64_t>(kStrip, interleaved()) * interleaved(); }

  // A run is a group's memory, or with channels first one plane.
  std::int64_t runs() const { return channels_last ? groups : batch * channels; }
  std::int64_t run_size() const { return channels_last ? values() * channels : pixels; }
  std::int64_t piece_size() const { return std::max<std::int64_t>(kPieceElements / columns(), 1) * columns(); }
  std::int64_t pieces_of_run() const { return (run_size() + piece_size() - 1) / piece_size(); }
  std::int64_t pieces() const { return runs() * pieces_of_run(); }

  Piece piece(std::int64_t number) const {
    const std::int64_t run = number / pieces_of_run(), start = number % pieces_of_run() * piece_size();
    const std::int64_t size = std::min(piece_size(), run_size() - start);
    const std::int64_t group = channels_last ? run : run / channels / images();
    return {number,           group,           channels_last ? 0 : run % channels, run * run_size() + start,
            size / columns(), size % columns()};
  }

  // The pieces with a channel of a group are numbered from 0; this is the place of the channel in the i-th one, among
  // the `interleaved` channels of each of all pieces.
  std::int64_t pieces_with_channel() const { return (channels_last ? 1 : images()) * pieces_of_run(); }
  std::int64_t place(std::int64_t group, std::int64_t channel, std::int64_t i) const {
    if (channels_last) return (group * pieces_of_run() + i) * channels + channel;
    const std::int64_t image = group * images() + i / pieces_of_run();
    return (image * channels + channel) * pieces_of_run() + i % pieces_of_run();
  }

  // For each column of a piece the number of its channel, from one number for each channel of the piece's group.
  std::vector<float> by_column(const Piece& piece, const float* by_channel) const {
    std::vector<float> result(columns());
    for (std::int64_t j = 0; j < columns(); j += interleaved())
      std::copy_n(by_channel + piece.channel, interleaved(), result.begin() + j);
    return result;
  }

  // Calls body(piece) for all pieces.
  template <class Body>
  void for_each_piece(Workers& workers, const Body& body) const {
    workers.each(pieces(), [&](std::int64_t number) { body(piece(number)); });
  }
  template <class Body>
  void for_each_piece_backward(Workers& workers, const Body& body) const {
    workers.each(pieces(), [&](std::int64_t number) { body(piece(pieces() - 1 - number)); });
  }

  std::int64_t threads(int most) const {
    return std::clamp<std::int64_t>(size() / kElementsPerThread, 1, std::max(most, 1));
  }
};

// The rest of a piece as a row of a matrix for the kernels, padded with zeros.
class PaddedRest {
 public:
  PaddedRest(const FeatureMaps& maps, const Piece& piece, const void* memory)
      : offset_((piece.first + piece.rows * maps.columns()) * maps.element_size()),
        bytes_(piece.rest * maps.element_size()),
        columns_((piece.rest + kStrip - 1) / kStrip * kStrip),
        copy_(columns_ * maps.element_size()) {
    std::memcpy(copy_.data(), static_cast<const char*>(memory) + offset_, bytes_);
  }

  std::int64_t columns() const { return columns_; }
  char* data() { return copy_.data(); }
  void write_to(void* memory) const { std::memcpy(static_cast<char*>(memory) + offset_, copy_.data(), bytes_); }

 private:
  std::int64_t offset_, bytes_, columns_;
  std::vector<char> copy_;
};

inline const char* at(const FeatureMaps& maps, const Piece& piece, const void* memory) {
  return static_cast<const char*>(memory) + piece.first * maps.element_size();
}
inline char* at(const FeatureMaps& maps, const Piece& piece, void* memory) {
  return static_cast<char*>(memory) + piece.first * maps.element_size();
}

// ------------------------------------------------------------------------------------------------------------ forward

// Number, mean, and sum of squared differences from the mean.
struct Moments {
  double count, mean, squares;
};

// The moments of all numbers whose parts have the moments part(0) ... part(parts - 1) (T. F. Chan, G. H. Golub and
// R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
template <class Part>
Moments merged(std::int64_t parts, const Part& part) {
  Moments all = {};
  const double origin = part(0).mean;  // keeps the sum small
  for (std::int64_t i = 0; i < parts; ++i) {
    const Moments one = part(i);
    all.count += one.count;
    all.mean += one.count * (one.mean - origin);
  }
  all.mean = origin + all.mean / all.count;
  for (std::int64_t i = 0; i < parts; ++i) {
    const Moments one = part(i);
    all.squares += one.squares + one.count * (one.mean - all.mean) * (one.mean - all.mean);
  }
  return all;
}

// Writes the moments of each channel of a piece.
inline void piece_moments(const BatchNormKernels& kernels, const FeatureMaps& maps, const Piece& piece, const void* x,
                          Moments* result) {
  const std::int64_t columns = maps.columns(), interleaved = maps.interleaved();
  std::vector<double> mean(columns), squares(columns), last(columns), unused(columns);
  if (piece.rows > 0) kernels.moments(at(maps, piece, x), piece.rows, columns, mean.data(), squares.data());
  if (piece.rest > 0) {
    PaddedRest rest(maps, piece, x);
    kernels.moments(rest.data(), 1, rest.columns(), last.data(), unused.data());
  }
  const std::int64_t whole = piece.rows > 0 ? columns / interleaved : 0;
  for (std::int64_t c = 0; c < interleaved; ++c) {
    const std::int64_t lasts = piece.rest / interleaved;
    result[c] = merged(whole + lasts, [&](std::int64_t i) {
      if (i >= whole) return Moments{1, last[c + (i - whole) * interleaved], 0};
      const std::int64_t j = c + i * interleaved;
      return Moments{static_cast<double>(piece.rows), mean[j], squares[j]};
    });
  }
}

// z = weight (x - mean) / deviation + bias, with weight and bias by channel, mean and inverse deviation also by group.
struct Statistics {
  const float *weight, *bias, *mean, *inverse_deviation;

  std::vector<float> scale(const FeatureMaps& maps) const {
    std::vector<float> result(maps.groups * maps.channels);
    for (std::size_t i = 0; i < result.size(); ++i) result[i] = weight[i % maps.channels] * inverse_deviation[i];
    return result;
  }
};

// The normalization of a piece, by column.
class PieceNormalization {
 public:
  PieceNormalization(const FeatureMaps& maps, const Piece& piece, const Statistics& statistics, const float* scale)
      : mean_(maps.by_column(piece, statistics.mean + piece.group * maps.channels)),
        scale_(maps.by_column(piece, scale + piece.group * maps.channels)),
        bias_(maps.by_column(piece, statistics.bias)) {}

  Normalization columns() const { return {mean_.data(), scale_.data(), bias_.data()}; }

 private:
  std::vector<float> mean_, scale_, bias_;
};

inline void normalize_all(const BatchNormKernels& kernels, const FeatureMaps& maps, Workers& workers, const void* x,
                          const Statistics& statistics, void* y) {
  const std::vector<float> scale = statistics.scale(maps);
  prefer_large_pages(y, maps.size() * maps.element_size());
  maps.for_each_piece_backward(workers, [&](const Piece& piece) {
    const PieceNormalization normalization(maps, piece, statistics, scale.data());
    if (piece.rows > 0)
      kernels.normalize(at(maps, piece, x), piece.rows, maps.columns(), normalization.columns(), at(maps, piece, y));
    if (piece.rest > 0) {
      PaddedRest rest(maps, piece, x);
      kernels.normalize(rest.data(), 1, rest.columns(), normalization.columns(), rest.data());
      rest.write_to(y);
    }
  });
}

// With given mean and inverse deviation.
inline void batch_norm_relu_eval(const BatchNormKernels* kernels, const FeatureMaps& maps, int threads, const void* x,
                                 const Statistics& statistics, void* y) {
  Workers workers(maps.threads(threads));
  normalize_all(kernels[maps.element], maps, workers, x, statistics, y);
}

// With those of the feature maps themselves, which it writes; (groups, channels).
inline void batch_norm_relu_forward(const BatchNormKernels* kernels, const FeatureMaps& maps, int threads,
                                    const void* x, const float* weight, const float* bias, double eps, float* mean,
                                    float* inverse_deviation, void* y) {
  Workers workers(maps.threads(threads));
  std::vector<Moments> parts(maps.pieces() * maps.interleaved());
  maps.for_each_piece(workers, [&](const Piece& piece) {
    piece_moments(kernels[maps.element], maps, piece, x, &parts[piece.number * maps.interleaved()]);
  });
  for (std::int64_t group = 0; group < maps.groups; ++group)
    for (std::int64_t c = 0; c < maps.channels; ++c) {
      const Moments all =
          merged(maps.pieces_with_channel(), [&](std::int64_t i) { return parts[maps.place(group, c, i)]; });
      mean[group * maps.channels + c] = static_cast<float>(all.mean);
      inverse_deviation[group * maps.channels + c] = static_cast<float>(1 / std::sqrt(all.squares / all.count + eps));
    }
  normalize_all(kernels[maps.element], maps, workers, x, {weight, bias, mean, inverse_deviation}, y);
}

// ----------------------------------------------------------------------------------------------------------- backward

// Sum of dz, and sum of dz (x - mean).
struct GradientSums {
  double sum = 0, product = 0;
};

// Adds the sums of each channel of a piece.
inline void add_gradient_sums(const BatchNormKernels& kernels, const FeatureMaps& maps, const Piece& piece,
                              const void* x, const void* dy, const Normalization& normalization, GradientSums* result) {
  std::vector<double> sums(maps.columns()), products(maps.columns());
  const auto add = [&](std::int64_t columns) {
    for (std::int64_t j = 0; j < columns; j += maps.interleaved())
      for (std::int64_t c = 0; c < maps.interleaved(); ++c) {
        result[c].sum += sums[j + c];
        result[c].product += products[j + c];
      }
  };
  if (piece.rows > 0) {
    kernels.gradient_sums(at(maps, piece, x), at(maps, piece, dy), piece.rows, maps.columns(), normalization,
                          sums.data(), products.data());
    add(maps.columns());
  }
  if (piece.rest > 0) {
    PaddedRest last(maps, piece, x), last_dy(maps, piece, dy);
    kernels.gradient_sums(last.data(), last_dy.data(), 1, last.columns(), normalization, sums.data(), products.data());
    add(piece.rest);
  }
}

// dx = scale (dz - (sum dz + xhat sum dz xhat) / n), xhat = (x - mean) / deviation, with the sums of the group; the
// gradients of weight and bias are sum dz xhat and sum dz of all groups.
inline void batch_norm_relu_backward(const BatchNormKernels* kernels, const FeatureMaps& maps, int threads,
                                     const void* x, const void* dy, const Statistics& statistics, void* dx,
                                     float* grad_weight, float* grad_bias) {
  const BatchNormKernels& kernel = kernels[maps.element];
  const std::vector<float> scale = statistics.scale(maps);
  Workers workers(maps.threads(threads));
  std::vector<GradientSums> parts(maps.pieces() * maps.interleaved());
  maps.for_each_piece(workers, [&](const Piece& piece) {
    const PieceNormalization normalization(maps, piece, statistics, scale.data());
    add_gradient_sums(kernel, maps, piece, x, dy, normalization.columns(), &parts[piece.number * maps.interleaved()]);
  });

  std::vector<float> slope(maps.groups * maps.channels), offset(maps.groups * maps.channels);
  for (std::int64_t c = 0; c < maps.channels; ++c) {
    GradientSums total;
    for (std::int64_t group = 0; group < maps.groups; ++group) {
      GradientSums all;
      for (std::int64_t i = 0; i < maps.pieces_with_channel(); ++i) {
        const GradientSums& part = parts[maps.place(group, c, i)];
        all.sum += part.sum;
        all.product += part.product;
      }
      const std::int64_t k = group * maps.channels + c;
      const double inverse = statistics.inverse_deviation[k], share = -scale[k] / static_cast<double>(maps.values());
      slope[k] = static_cast<float>(share * inverse * inverse * all.product);
      offset[k] = static_cast<float>(share * all.sum);
      total.sum += all.sum;
      total.product += inverse * all.product;
    }
    grad_weight[c] = static_cast<float>(total.product);
    grad_bias[c] = static_cast<float>(total.sum);
  }

  prefer_large_pages(dx, maps.size() * maps.element_size());
  maps.for_each_piece_backward(workers, [&](const Piece& piece) {
    const PieceNormalization normalization(maps, piece, statistics, scale.data());
    const std::vector<float> slopes = maps.by_column(piece, slope.data() + piece.group * maps.channels),
                             offsets = maps.by_column(piece, offset.data() + piece.group * maps.channels);
    if (piece.rows > 0)
      kernel.differentiate(at(maps, piece, x), at(maps, piece, dy), piece.rows, maps.columns(), normalization.columns(),
                           slopes.data(), offsets.data(), at(maps, piece, dx));
    if (piece.rest > 0) {
      PaddedRest last(maps, piece, x), last_dy(maps, piece, dy);
      kernel.differentiate(last.data(), last_dy.data(), 1, last.columns(), normalization.columns(), slopes.data(),
                           offsets.data(), last.data());
      last.write_to(dx);
    }
  });
}

}  // namespace semimoe
