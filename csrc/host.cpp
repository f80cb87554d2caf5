// fastmargin._host: how the compiled code was built. Needs no torch at run time.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string target_version() {
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  return std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff);
}

py::dict build_info() {
  const std::string release = CUDA_RELEASE, archs = CUDA_ARCHS;
  py::dict info;
  info["compiler"] = compiler();
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["torch_built_against"] = TORCH_VERSION;
  info["torch_abi_target"] = target_version();
  info["cuda_version"] = release.empty() ? py::object(py::none()) : py::str(release);
  py::list list;
  for (size_t start = 0; start < archs.size();) {
    const size_t stop = std::min(archs.find(';', start), archs.size());
    list.append(archs.substr(start, stop - start));
    start = stop + 1;
  }
  info["cuda_architectures"] = list;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "How the compiled code of fastmargin was built.";
  m.def("build_info", &build_info);
}
