#include "capability.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

namespace fastmargin::cpu {
namespace {

Capability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
#endif
  return Capability::kScalar;
}

Capability chosen() {
  const char* wish = std::getenv("FASTMARGIN_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') return best();
  for (Capability level : {Capability::kScalar, Capability::kAvx2, Capability::kAvx512}) {
    if (name(level) != wish) continue;
    STD_TORCH_CHECK(level <= best(), "FASTMARGIN_CPU_CAPABILITY=", wish,
                    ", but this machine has only ", name(best()));
    return level;
  }
  STD_TORCH_CHECK(false, "FASTMARGIN_CPU_CAPABILITY must be scalar, avx2 or avx512, not ", wish);
}

}  // namespace

Capability capability() {
  static const Capability level = chosen();
  return level;
}

std::string name(Capability level) {
  switch (level) {
    case Capability::kScalar:
      return "scalar";
    case Capability::kAvx2:
      return "avx2";
    case Capability::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::string capability_name() { return name(capability()); }

}  // namespace fastmargin::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastmargin, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastmargin, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fastmargin::cpu::capability_name));
}
