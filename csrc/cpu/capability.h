// Which of the instruction sets this process uses.
#pragma once

#include <string>

namespace fastmargin::cpu {

enum class Capability { kScalar, kAvx2, kAvx512 };

// The best that the machine has, or what FASTMARGIN_CPU_CAPABILITY (scalar, avx2 or avx512) names
// if the machine has that. The variable is read once. Throws if it names anything else.
Capability capability();

std::string name(Capability level);

}  // namespace fastmargin::cpu
