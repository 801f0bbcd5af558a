// The three objectives of S sets of predictions against one set of targets, on the CPU, and their gradients. The
// formulas and the algorithm are those of kernels/objective.py.
//
// Forward and backward each read logits and targets once, in blocks of pixels that fit into the L1 cache. Sums within a
// block are float32, one per lane. All other sums are double, in an order that does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "objective_kernels.hpp"
#include "parallel.hpp"

namespace semimoe {

constexpr int kBlockPixels = 1024;
constexpr std::int64_t kObjectivePixelsPerThread = 1 << 17;  // pixels of all sets; fewer do not pay for a thread

// A tensor (images, channels, pixels) by its address and its strides, in elements.
template <class T>
struct Planes {
  T* data;
  std::int64_t image, channel, pixel;

  T* at(std::int64_t in_image, std::int64_t in_channel, std::int64_t in_pixel) const {
    return data + in_image * image + in_channel * channel + in_pixel * pixel;
  }
};

template <class T>
struct Prediction {
  Planes<T> mask;
  Planes<T> sdf;
  Planes<T> boundary;
};

struct Objective {
  std::int64_t batch, pixels;
  int mask_classes, boundary_classes;
  std::vector<Prediction<const float>> sets;
  Planes<const std::uint8_t> mask;  // an out-of-range value matches no class
  Planes<const float> sdf;
  Planes<const std::uint8_t> boundary;

  int classes() const { return mask_classes + boundary_classes; }
  std::int64_t columns() const { return sets.size() * classes(); }                    // columns of alpha and beta
  std::int64_t blocks() const { return (pixels + kBlockPixels - 1) / kBlockPixels; }  // blocks of an image
};

// A run of pixels of one image.
struct Block {
  std::int64_t number;  // in the batch
  std::int64_t image;
  std::int64_t first;  // first pixel of the run
  int pixels;
};

// Calls body(block) for every block of the batch.
template <class Body>
void for_each_block(const Objective& objective, int threads, const Body& body) {
  const std::int64_t pixels = objective.sets.size() * objective.batch * objective.pixels;
  const Workers workers(threads, pixels, kObjectivePixelsPerThread);
  workers.each(objective.batch * objective.blocks(), [&](std::int64_t number) {
    const std::int64_t first = number % objective.blocks() * kBlockPixels;
    const int pixels = static_cast<int>(std::min<std::int64_t>(kBlockPixels, objective.pixels - first));
    body(Block{number, number / objective.blocks(), first, pixels});
  });
}

// The pixels of a block, by channel, as the kernels need them: contiguous, and a multiple of kMostLanes. In place if
// the tensor is like that, else a zero-padded copy.
template <class T>
class Rows {
 public:
  Rows(const Planes<T>& planes, const Block& block, int channels)
      : planes_(planes), block_(block), channels_(channels) {
    if (planes.pixel == 1 && block.pixels % kMostLanes == 0) {
      data_ = planes.at(block.image, 0, block.first);
      stride_ = planes.channel;
    } else {
      copy_.resize(std::size_t{kBlockPixels} * channels);
      data_ = copy_.data();
      stride_ = kBlockPixels;
    }
  }

  T* data() const { return data_; }
  std::int64_t stride() const { return stride_; }

 protected:
  using Value = std::remove_const_t<T>;

  // Calls body(pixel of the tensor, pixel of the copy) for every pixel of the block, if there is a copy.
  template <class Body>
  void for_each_copied(const Body& body) {
    if (copy_.empty()) return;
    for (int k = 0; k < channels_; ++k)
      for (int i = 0; i < block_.pixels; ++i)
        body(*planes_.at(block_.image, k, block_.first + i), copy_[std::size_t{kBlockPixels} * k + i]);
  }

 private:
  const Planes<T> planes_;
  const Block block_;
  const int channels_;
  T* data_;
  std::int64_t stride_;
  std::vector<Value> copy_;
};

template <class T>
class Input : public Rows<const T> {
 public:
  Input(const Planes<const T>& planes, const Block& block, int channels = 1) : Rows<const T>(planes, block, channels) {
    this->for_each_copied([](const T& pixel, T& copy) { copy = pixel; });
  }
};

class Output : public Rows<float> {
 public:
  using Rows<float>::Rows;
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    for_each_copied([](float& pixel, const float& copy) { pixel = copy; });
  }
};

struct Targets {
  Input<std::uint8_t> mask;
  Input<float> sdf;
  Input<std::uint8_t> boundary;

  Targets(const Objective& objective, const Block& block)
      : mask(objective.mask, block), sdf(objective.sdf, block), boundary(objective.boundary, block) {}
};

inline DiceBlock dice_block(const Input<float>& logits, const Input<std::uint8_t>& target, int classes,
                            const Block& block) {
  return {logits.data(), logits.stride(), target.data(), classes, block.pixels};
}

// Returns the sum of 1 - ratio over the classes of one image, and writes alpha and beta. count: images times classes.
inline double finish_dice(const double* sums, int classes, bool squared, double count, float* alpha, float* beta) {
  const double smooth = squared ? 1 : 1e-8;
  const double *overlap = sums, *mass = sums + classes;
  double loss = 0;
  for (int k = 0; k < classes; ++k) {
    const double ratio = (2 * overlap[k] + smooth) / (mass[k] + smooth);
    const double scale = 1 / (count * (mass[k] + smooth));
    loss += 1 - ratio;
    alpha[k] = static_cast<float>(-2 * scale);
    beta[k] = static_cast<float>((squared ? 2 : 1) * ratio * scale);
  }
  return loss;
}

// Writes terms (3,), and alpha and beta (images, columns), whose columns are the mask classes of all sets, then the
// boundary classes of all sets.
inline void objective_terms(const ObjectiveKernels& kernels, const Objective& objective, int threads, float* terms,
                            float* alpha, float* beta) {
  const int K = objective.mask_classes, L = objective.boundary_classes;
  const std::int64_t sums_per_set = 2 * (K + L) + 1, width = objective.sets.size() * sums_per_set;
  std::vector<double> sums(objective.batch * objective.blocks() * width);
  for_each_block(objective, threads, [&](const Block& block) {
    const Targets targets(objective, block);
    double* sum = &sums[block.number * width];
    for (const Prediction<const float>& set : objective.sets) {
      const Input<float> mask(set.mask, block, K), raw(set.sdf, block), boundary(set.boundary, block, L);
      kernels.dice_sums(dice_block(mask, targets.mask, K, block), true, sum, sum + K);
      sum += 2 * K;
      kernels.dice_sums(dice_block(boundary, targets.boundary, L, block), false, sum, sum + L);
      sum += 2 * L;
      *sum++ = kernels.tanh_error(raw.data(), targets.sdf.data(), block.pixels);
    }
  });

  double mask_loss = 0, error = 0, boundary_loss = 0;
  for (std::int64_t image = 0; image < objective.batch; ++image) {
    std::vector<double> total(width);
    for (std::int64_t block = 0; block < objective.blocks(); ++block)
      for (std::int64_t i = 0; i < width; ++i) total[i] += sums[(image * objective.blocks() + block) * width + i];
    const double* sum = total.data();
    std::int64_t mask_column = image * objective.columns(), boundary_column = mask_column + objective.sets.size() * K;
    for (std::size_t set = 0; set < objective.sets.size();
         ++set, mask_column += K, boundary_column += L, sum += sums_per_set) {
      mask_loss += finish_dice(sum, K, true, objective.batch * K, alpha + mask_column, beta + mask_column);
      boundary_loss +=
          finish_dice(sum + 2 * K, L, false, objective.batch * L, alpha + boundary_column, beta + boundary_column);
      error += sum[2 * (K + L)];
    }
  }
  terms[0] = static_cast<float>(mask_loss / (objective.batch * K));
  terms[1] = static_cast<float>(error / (objective.batch * objective.pixels));
  terms[2] = static_cast<float>(boundary_loss / (objective.batch * L));
}

// Writes the gradients of the predictions, given alpha and beta of objective_terms and grad_output (3,), the gradient
// of the terms.
inline void objective_gradients(const ObjectiveKernels& kernels, const Objective& objective, int threads,
                                const float* alpha, const float* beta, const float* grad_output,
                                const std::vector<Prediction<float>>& gradients) {
  const int K = objective.mask_classes, L = objective.boundary_classes;
  const float error_scale = static_cast<float>(2.0 * grad_output[1] / (objective.batch * objective.pixels));
  for_each_block(objective, threads, [&](const Block& block) {
    const Targets targets(objective, block);
    std::int64_t mask_column = block.image * objective.columns(),
                 boundary_column = mask_column + objective.sets.size() * K;
    for (std::size_t set = 0; set < objective.sets.size(); ++set, mask_column += K, boundary_column += L) {
      const Prediction<const float>& logits = objective.sets[set];
      const Input<float> mask(logits.mask, block, K), raw(logits.sdf, block), boundary(logits.boundary, block, L);
      const Output mask_gradient(gradients[set].mask, block, K), raw_gradient(gradients[set].sdf, block, 1),
          boundary_gradient(gradients[set].boundary, block, L);
      kernels.dice_gradient(dice_block(mask, targets.mask, K, block), true, alpha + mask_column, beta + mask_column,
                            grad_output[0], mask_gradient.data(), mask_gradient.stride());
      kernels.dice_gradient(dice_block(boundary, targets.boundary, L, block), false, alpha + boundary_column,
                            beta + boundary_column, grad_output[2], boundary_gradient.data(),
                            boundary_gradient.stride());
      kernels.tanh_gradient(raw.data(), targets.sdf.data(), block.pixels, error_scale, raw_gradient.data());
    }
  });
}

}  // namespace semimoe
