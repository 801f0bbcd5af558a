// The Python module _semimoe_fast. It takes addresses, not tensors: Python checks and allocates the tensors. So the
// module builds without PyTorch and keeps working when PyTorch is upgraded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "batch_norm.hpp"
#include "blur.hpp"
#include "distance.hpp"
#ifdef SEMIMOE_CUDA_VERSION
#include "distance_cuda.hpp"
#endif
#include "objective.hpp"
#include "pooling.hpp"

namespace py = pybind11;

namespace {

constexpr int kAbi = 8;  // raise it with every change of a signature below, and in semimoe_fast/ops/_native.py

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const semimoe::Kernels& kernels_named(const std::string& name) {
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels())
    if (kernels->name == name) return *kernels;
  throw std::invalid_argument("this processor or this build has no kernels for " + name);
}

void squared_distance(std::uintptr_t labels, int element_size, bool instances, std::int64_t batch, std::int64_t height,
                      std::int64_t width, std::uintptr_t out, const std::string& instruction_set, int threads) {
  semimoe::squared_distance(kernels_named(instruction_set),
                            {at<const void>(labels), element_size, instances, batch, height, width},
                            at<std::int32_t>(out), threads);
}

void distance_targets(std::uintptr_t labels, int element_size, bool instances, std::int64_t batch, std::int64_t height,
                      std::int64_t width, std::int32_t squared_ring_radius, std::uintptr_t sdf, std::uintptr_t boundary,
                      const std::string& instruction_set, int threads) {
  semimoe::distance_targets(kernels_named(instruction_set),
                            {at<const void>(labels), element_size, instances, batch, height, width},
                            squared_ring_radius, at<float>(sdf), at<std::uint8_t>(boundary), threads);
}

// The address of a tensor, and its strides of image, channel and pixel, in elements.
using Place = std::array<std::int64_t, 4>;

template <class T>
semimoe::Planes<T> planes(const Place& place) {
  return {at<T>(static_cast<std::uintptr_t>(place[0])), place[1], place[2], place[3]};
}

// Places: mask, sdf and boundary of the first set, then of the second set, and so on.
template <class T>
std::vector<semimoe::Prediction<T>> predictions(const std::vector<Place>& places) {
  std::vector<semimoe::Prediction<T>> sets;
  for (std::size_t i = 0; i < places.size(); i += 3)
    sets.push_back({planes<T>(places[i]), planes<T>(places[i + 1]), planes<T>(places[i + 2])});
  return sets;
}

semimoe::Objective objective(const std::array<std::int64_t, 4>& sizes, const std::vector<Place>& logits,
                             const std::array<Place, 3>& targets) {
  const auto [batch, pixels, mask_classes, boundary_classes] = sizes;
  if (std::min(mask_classes, boundary_classes) < 1 || std::max(mask_classes, boundary_classes) > semimoe::kMostClasses)
    throw std::invalid_argument("the objective takes 1 to 255 classes");
  return {batch,
          pixels,
          static_cast<int>(mask_classes),
          static_cast<int>(boundary_classes),
          predictions<const float>(logits),
          planes<const std::uint8_t>(targets[0]),
          planes<const float>(targets[1]),
          planes<const std::uint8_t>(targets[2])};
}

// sizes: images, pixels of an image, mask classes, boundary classes.
void objective_terms(const std::array<std::int64_t, 4>& sizes, const std::vector<Place>& logits,
                     const std::array<Place, 3>& targets, std::uintptr_t terms, std::uintptr_t alpha,
                     std::uintptr_t beta, const std::string& instruction_set, int threads) {
  semimoe::objective_terms(*kernels_named(instruction_set).objective, objective(sizes, logits, targets), threads,
                           at<float>(terms), at<float>(alpha), at<float>(beta));
}

void objective_gradients(const std::array<std::int64_t, 4>& sizes, const std::vector<Place>& logits,
                         const std::array<Place, 3>& targets, std::uintptr_t alpha, std::uintptr_t beta,
                         std::uintptr_t grad_output, const std::vector<Place>& gradients,
                         const std::string& instruction_set, int threads) {
  semimoe::objective_gradients(*kernels_named(instruction_set).objective, objective(sizes, logits, targets), threads,
                               at<const float>(alpha), at<const float>(beta), at<const float>(grad_output),
                               predictions<float>(gradients));
}

// sizes: images, channels, pixels of an image, groups, elements from pixel to pixel of y and dy (or `channels`).
// element: 0 float32, 1 bfloat16, 2 float16.
semimoe::FeatureMaps feature_maps(const std::array<std::int64_t, 5>& sizes, int element, bool channels_last) {
  const auto [batch, channels, pixels, groups, joined] = sizes;
  if (element < 0 || element >= semimoe::kElements) throw std::invalid_argument("unknown element type");
  if (std::min({batch, channels, pixels, groups}) < 1 || batch % groups != 0)
    throw std::invalid_argument("batch normalization takes no empty feature maps and only equal groups");
  if (joined != channels &&
      (!channels_last || joined < channels || channels % semimoe::kMostLanes != 0 || joined % semimoe::kMostLanes != 0))
    throw std::invalid_argument("a concatenation joins multiples of 16 channels, which are last");
  return {static_cast<semimoe::Element>(element), channels_last, batch, channels, pixels, groups, joined};
}

semimoe::Statistics statistics(const std::array<std::uintptr_t, 4>& addresses) {
  const auto [weight, bias, mean, inverse_deviation] = addresses;
  return {at<const float>(weight), at<const float>(bias), at<const float>(mean), at<const float>(inverse_deviation)};
}

// Addresses: weight, bias, mean, inverse deviation. The last two are outputs here.
void batch_norm_relu_forward(const std::array<std::int64_t, 5>& sizes, int element, bool channels_last,
                             std::uintptr_t x, const std::array<std::uintptr_t, 4>& addresses, double eps,
                             std::uintptr_t y, const std::string& instruction_set, int threads) {
  const auto [weight, bias, mean, inverse_deviation] = addresses;
  semimoe::batch_norm_relu_forward(kernels_named(instruction_set).batch_norm,
                                   feature_maps(sizes, element, channels_last), threads, at<const void>(x),
                                   at<const float>(weight), at<const float>(bias), eps, at<float>(mean),
                                   at<float>(inverse_deviation), at<void>(y));
}

// Addresses: running mean and variance, which are outputs, mean and inverse deviation.
void batch_norm_update_running(std::int64_t groups, std::int64_t channels, std::int64_t values,
                               const std::array<std::uintptr_t, 4>& addresses, float momentum, double eps) {
  const auto [running_mean, running_var, mean, inverse_deviation] = addresses;
  if (values < 2) throw std::invalid_argument("a variance takes at least 2 values");
  semimoe::update_running(groups, channels, values, at<const float>(mean), at<const float>(inverse_deviation), momentum,
                          eps, at<float>(running_mean), at<float>(running_var));
}

void batch_norm_relu_eval(const std::array<std::int64_t, 5>& sizes, int element, bool channels_last, std::uintptr_t x,
                          const std::array<std::uintptr_t, 4>& addresses, std::uintptr_t y,
                          const std::string& instruction_set, int threads) {
  semimoe::batch_norm_relu_eval(kernels_named(instruction_set).batch_norm, feature_maps(sizes, element, channels_last),
                                threads, at<const void>(x), statistics(addresses), at<void>(y));
}

void batch_norm_relu_backward(const std::array<std::int64_t, 5>& sizes, int element, bool channels_last,
                              std::uintptr_t x, std::uintptr_t grad_output,
                              const std::array<std::uintptr_t, 4>& addresses, std::uintptr_t grad_x,
                              std::uintptr_t grad_weight, std::uintptr_t grad_bias, const std::string& instruction_set,
                              int threads) {
  semimoe::batch_norm_relu_backward(kernels_named(instruction_set).batch_norm,
                                    feature_maps(sizes, element, channels_last), threads, at<const void>(x),
                                    at<const void>(grad_output), statistics(addresses), at<void>(grad_x),
                                    at<float>(grad_weight), at<float>(grad_bias));
}

// sizes: images, channels, rows, columns.
void blur(const std::array<std::int64_t, 4>& sizes, std::uintptr_t images, std::uintptr_t weights, std::int64_t radius,
          const std::string& instruction_set, int threads) {
  const auto [batch, channels, height, width] = sizes;
  if (radius < 0 || radius >= std::min(height, width))
    throw std::runtime_error("the radius of a blur is at least 0 and less than both sides, " + std::to_string(height) +
                             " and " + std::to_string(width) + ", not " + std::to_string(radius));
  semimoe::blur(*kernels_named(instruction_set).blur, threads, at<const float>(weights), radius, batch, channels,
                height, width, at<float>(images));
}

// sizes: images, channels, height, width.
semimoe::PooledMaps pooled_maps(const std::array<std::int64_t, 4>& sizes, int element) {
  const auto [batch, channels, height, width] = sizes;
  if (element < 0 || element >= semimoe::kElements) throw std::invalid_argument("unknown element type");
  if (std::min({batch, channels, height, width}) < 1 || height % 2 != 0 || width % 2 != 0 ||
      channels % semimoe::kMostLanes != 0)
    throw std::invalid_argument("pooling takes feature maps of even sides and a multiple of 16 channels");
  return {static_cast<semimoe::Element>(element), batch, channels, height, width};
}

void max_pool(const std::array<std::int64_t, 4>& sizes, int element, std::uintptr_t x, std::uintptr_t pooled,
              const std::string& instruction_set, int threads) {
  semimoe::max_pool(kernels_named(instruction_set).pooling, pooled_maps(sizes, element), threads, at<const void>(x),
                    at<void>(pooled));
}

void max_pool_backward(const std::array<std::int64_t, 4>& sizes, int element, std::uintptr_t x,
                       std::uintptr_t grad_pooled, std::uintptr_t dy, std::int64_t dy_stride, std::uintptr_t dx,
                       const std::string& instruction_set, int threads) {
  semimoe::max_pool_backward(kernels_named(instruction_set).pooling, pooled_maps(sizes, element), threads,
                             at<const void>(x), at<const void>(grad_pooled), at<const void>(dy), dy_stride,
                             at<void>(dx));
}

#ifdef SEMIMOE_CUDA_VERSION
// If sdf is 0, the squared distances are the result; else the targets are, and `squared` may be the address of sdf.
void distance_cuda(std::uintptr_t mask, int element_size, bool instances, std::int64_t batch, std::int64_t height,
                   std::int64_t width, std::uintptr_t words, std::uintptr_t gaps, std::uintptr_t far,
                   std::uintptr_t state, std::uintptr_t squared, std::int32_t squared_ring_radius, std::uintptr_t sdf,
                   std::uintptr_t boundary, std::uintptr_t stream) {
  semimoe::check_size(batch, height, width);
  semimoe::launch({at<void>(mask), element_size, instances, batch, static_cast<int>(height), static_cast<int>(width),
                   at<std::uint32_t>(words), at<semimoe::Gap>(gaps), at<std::uint32_t>(far), at<std::int32_t>(state),
                   at<std::int32_t>(squared), squared_ring_radius, at<float>(sdf), at<std::uint8_t>(boundary)},
                  at<void>(stream));
}
#endif

py::dict built_with() {
  py::dict result;
  result["compiler"] = SEMIMOE_COMPILER;
  result["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
#ifdef SEMIMOE_CUDA_VERSION
  result["cuda"] = SEMIMOE_CUDA_VERSION;
  result["cuda_archs"] = SEMIMOE_CUDA_ARCHS;
#else
  result["cuda"] = py::none();
  result["cuda_archs"] = "";
#endif
  return result;
}

}  // namespace

PYBIND11_MODULE(_semimoe_fast, module) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.doc() = "Native operations of semimoe_fast on raw addresses; call them through semimoe_fast.ops._native.";
  module.attr("abi") = kAbi;
  module.attr("built_with") = built_with();
  py::list instruction_sets;
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) instruction_sets.append(kernels->name);
  module.attr("instruction_sets") = py::tuple(instruction_sets);
  module.def("squared_distance", &squared_distance, without_gil);
  module.def("distance_targets", &distance_targets, without_gil);
  module.def("objective_terms", &objective_terms, without_gil);
  module.def("objective_gradients", &objective_gradients, without_gil);
  module.def("batch_norm_relu_forward", &batch_norm_relu_forward, without_gil);
  module.def("batch_norm_update_running", &batch_norm_update_running);
  module.def("batch_norm_relu_eval", &batch_norm_relu_eval, without_gil);
  module.def("batch_norm_relu_backward", &batch_norm_relu_backward, without_gil);
  module.def("blur", &blur, without_gil);
  module.def("max_pool", &max_pool, without_gil);
  module.def("max_pool_backward", &max_pool_backward, without_gil);
#ifdef SEMIMOE_CUDA_VERSION
  module.def("distance_cuda", &distance_cuda, without_gil);
  module.def("driver_version", &semimoe::driver_version);
#endif
}
