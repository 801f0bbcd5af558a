// Runs the phases of csrc/distance.cu on the CPU, thread by thread. The order of a phase's threads must not matter, so
// `reversed` picks the other one.
#include "../../csrc/distance_phases.hpp"

template <class Phase>
void for_each(const Phase& phase, const semimoe::Problem& problem, std::int64_t count, bool reversed) {
  for (std::int64_t i = 0; i < count; ++i) phase(problem, reversed ? count - 1 - i : i);
}

extern "C" void run_phases(const std::uint8_t* mask, std::int64_t batch, int height, int width, std::uint16_t* gaps,
                           std::int32_t* squared, std::int32_t* deepest, std::int32_t squared_ring_radius, float* sdf,
                           std::uint8_t* boundary, bool reversed) {
  const semimoe::Problem problem{mask, batch,   height, width, gaps, squared, deepest, squared_ring_radius,
                                 sdf,  boundary};
  for_each(semimoe::column_phase, problem, problem.columns(), reversed);
  for_each(semimoe::row_phase, problem, problem.pixels(), reversed);
  for_each(semimoe::target_phase, problem, problem.pixels(), reversed);
}
