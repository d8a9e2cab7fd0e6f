// The record of the build, which anchorops._libraries.build_info reads. Nothing in csrc/ uses
// Python: one library works with all its versions.
#include <torch/headeronly/version.h>

#include <string>

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

std::string json() {
  constexpr auto target = TORCH_TARGET_VERSION;
  std::string text = "{";
  const auto add = [&](const std::string& name, const std::string& value) {
    text += (text.size() > 1 ? ", \"" : "\"") + name + "\": \"" + value + "\"";
  };
  add("version", ANCHOROPS_VERSION);
  add("compiler", kCompiler);
  add("cxx_standard", std::to_string(__cplusplus));
  add("torch", TORCH_VERSION);
  add("torch_target", std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff));
  add("cuda", ANCHOROPS_CUDA);
  add("cuda_arch_list", ANCHOROPS_CUDA_ARCHS);
  add("cuda_choice", ANCHOROPS_CUDA_CHOICE);
  add("cuda_obstacle", ANCHOROPS_CUDA_OBSTACLE);
  return text + "}";
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* anchorops_build_info() {
  static const std::string text = json();
  return text.c_str();
}
