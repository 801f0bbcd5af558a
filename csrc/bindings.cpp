// The Python module _semimoe_fast. It knows no tensors: Python checks, allocates and passes addresses, so that the
// module neither needs PyTorch to build nor breaks when PyTorch is upgraded.
#include <pybind11/pybind11.h>

#include "distance.hpp"
#ifdef SEMIMOE_CUDA_VERSION
#include "distance_cuda.hpp"
#endif

namespace py = pybind11;

namespace {

constexpr int kAbi = 2;  // raise it with every change of a signature below, together with semimoe_fast/_native.py

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const semimoe::Kernels& kernels_named(const std::string& name) {
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels())
    if (kernels->name == name) return *kernels;
  throw std::invalid_argument("this processor or this build has no kernels for " + name);
}

void squared_distance(std::uintptr_t mask, std::int64_t batch, std::int64_t height, std::int64_t width,
                      std::uintptr_t out, const std::string& instruction_set, int threads) {
  semimoe::squared_distance(kernels_named(instruction_set), at<const std::uint8_t>(mask), batch, height, width,
                            at<std::int32_t>(out), threads);
}

void distance_targets(std::uintptr_t mask, std::int64_t batch, std::int64_t height, std::int64_t width,
                      std::int32_t squared_ring_radius, std::uintptr_t sdf, std::uintptr_t boundary,
                      const std::string& instruction_set, int threads) {
  semimoe::distance_targets(kernels_named(instruction_set), at<const std::uint8_t>(mask), batch, height, width,
                            squared_ring_radius, at<float>(sdf), at<std::uint8_t>(boundary), threads);
}

#ifdef SEMIMOE_CUDA_VERSION
// Without sdf (0) the squared distances are the result; with it, squared may be its address.
void distance_cuda(std::uintptr_t mask, int element_size, std::int64_t batch, std::int64_t height, std::int64_t width,
                   std::uintptr_t bits, std::uintptr_t gaps, std::uintptr_t far, std::uintptr_t state,
                   std::uintptr_t squared, std::int32_t squared_ring_radius, std::uintptr_t sdf,
                   std::uintptr_t boundary, std::uintptr_t stream) {
  semimoe::check_size(batch, height, width);
  semimoe::launch({at<void>(mask), element_size, batch, static_cast<int>(height), static_cast<int>(width),
                   at<std::uint32_t>(bits), at<semimoe::Gap>(gaps), at<std::uint8_t>(far), at<std::int32_t>(state),
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
  module.doc() = "Native operations of semimoe_fast on raw addresses; semimoe_fast._native is the way to call them.";
  module.attr("abi") = kAbi;
  module.attr("built_with") = built_with();
  py::list instruction_sets;
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) instruction_sets.append(kernels->name);
  module.attr("instruction_sets") = py::tuple(instruction_sets);
  module.def("squared_distance", &squared_distance, py::arg("mask"), py::arg("batch"), py::arg("height"),
             py::arg("width"), py::arg("out"), py::arg("instruction_set"), py::arg("threads"), without_gil);
  module.def("distance_targets", &distance_targets, py::arg("mask"), py::arg("batch"), py::arg("height"),
             py::arg("width"), py::arg("squared_ring_radius"), py::arg("sdf"), py::arg("boundary"),
             py::arg("instruction_set"), py::arg("threads"), without_gil);
#ifdef SEMIMOE_CUDA_VERSION
  module.def("distance_cuda", &distance_cuda, py::arg("mask"), py::arg("element_size"), py::arg("batch"),
             py::arg("height"), py::arg("width"), py::arg("bits"), py::arg("gaps"), py::arg("far"), py::arg("state"),
             py::arg("squared"), py::arg("squared_ring_radius"), py::arg("sdf"), py::arg("boundary"), py::arg("stream"),
             without_gil);
#endif
}
