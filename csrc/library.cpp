// The module anchorops._C. Importing it registers the operators of csrc/cpu/ with torch;
// to Python itself it offers only the record of its build.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

namespace py = pybind11;

namespace {

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::none() : py::object(py::str(text));
}

py::dict build_info() {
#if defined(__clang__)
  const std::string compiler = __VERSION__;
#else
  const std::string compiler = "GCC " __VERSION__;
#endif
  constexpr auto target = TORCH_TARGET_VERSION;
  py::dict info;
  info["version"] = ANCHOROPS_VERSION;
  info["compiler"] = compiler;
  info["cxx_standard"] = __cplusplus;
  info["torch"] = TORCH_VERSION;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff);
  info["cuda"] = text_or_none(ANCHOROPS_CUDA);
  info["cuda_arch_list"] = text_or_none(ANCHOROPS_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of anchorops";
  m.def("build_info", &build_info, "What this extension was built with.");
}
