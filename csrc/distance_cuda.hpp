// Launchers of csrc/distance.cu. They only enqueue work on the stream: no allocation, no synchronisation.
#pragma once

#include "distance_phases.hpp"

namespace semimoe {

// Fills problem.squared; uses problem.gaps.
void launch_squared_distance(const Problem& problem, void* stream);

// Fills problem.sdf and problem.boundary; uses problem.gaps, problem.squared and problem.deepest.
void launch_distance_targets(const Problem& problem, void* stream);

}  // namespace semimoe
