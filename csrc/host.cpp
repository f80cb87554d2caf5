// fastmargin._host: how the compiled code was built, and records. Needs no torch at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "records.h"

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

template <typename T>
py::bytearray raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

template <typename Work>
auto without_gil(Work work) {
  py::gil_scoped_release release;
  return work();
}

void bind_records(py::module_ m) {
  namespace records = fastmargin::records;
  using Places = std::vector<int64_t>;
  m.doc() = "As fastmargin.data.plain_records; arrays come as their bytes.";
  m.def("scan", [](int descriptor, int64_t size) {
    return raw(without_gil([&] { return records::scan({descriptor, size}); }));
  });
  m.def("read", [](int descriptor, int64_t size, const Places& offsets, const Places& ends) {
    const auto found =
        without_gil([&] { return records::read({descriptor, size}, offsets, ends); });
    py::list payloads(found.size());
    for (size_t i = 0; i < found.size(); ++i) payloads[i] = py::bytes(found[i]);
    return payloads;
  });
  m.def("first_labels", [](int descriptor, int64_t size, const Places& offsets) {
    return raw(without_gil([&] { return records::first_labels({descriptor, size}, offsets); }));
  });
  m.def("parse_index", [](const py::bytes& text) {
    const std::string_view view = text;
    const auto found = without_gil([&] { return records::parse_index(view); });
    return std::pair(raw(found.first), raw(found.second));
  });
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const records::BadRecord& bad) {
      PyErr_SetObject(PyExc_ValueError, py::make_tuple(bad.place, bad.problem).ptr());
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "How the compiled code of fastmargin was built, and a reader of records.";
  m.def("build_info", &build_info);
  bind_records(m.def_submodule("records"));
}
