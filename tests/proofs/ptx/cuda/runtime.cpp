// The CUDA runtime of a computer without a GPU, for the host code of csrc/cuda as nvcc compiles it.
// The Python module cuda_sources gives Python the PTX in it, and passes launches, cleared memory
// and questions about the GPU to functions of Python (ptx/cuda_launches.py).
#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

// What nvcc's object files register: CUDA's header crt/host_runtime.h.
struct FatBinary {
  int magic, version;
  const char* data;
  void* filename;
};
struct FatBinaryHeader {
  unsigned magic;
  unsigned short version, header_bytes;
  unsigned long long bytes;  // after the header
};

using Dimensions = std::array<unsigned, 3>;
using Address = uintptr_t;

// Functions of Python. They return whether it went well; errors of Python are kept there.
struct Machine {
  std::function<bool(Address kernel, Dimensions grid, Dimensions block, size_t shared_bytes,
                     Address arguments)>
      launch;
  std::function<bool(Address memory, int value, size_t bytes)> fill;
  std::function<bool(Address kernel, int attribute, int value)> set_attribute;
  std::function<int(int attribute, int device)> device_attribute;
  std::function<int()> current_device;
};

// Never deleted: at the end of the process Python has ended before.
Machine& machine() {
  static auto* functions = new Machine;
  return *functions;
}

std::vector<std::string>& modules() {
  static auto* texts = new std::vector<std::string>;
  return *texts;
}

std::map<Address, std::string>& kernels() {
  static auto* names = new std::map<Address, std::string>;
  return *names;
}

Address address_of(const void* pointer) { return reinterpret_cast<Address>(pointer); }

cudaError_t result_of(bool went_well) { return went_well ? cudaSuccess : cudaErrorUnknown; }

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const char* data = static_cast<const FatBinary*>(wrapper)->data;
  FatBinaryHeader header;
  std::memcpy(&header, data, sizeof header);
  const std::string all(data, header.header_bytes + header.bytes);
  for (size_t begin = all.find(".version "); begin != std::string::npos;) {
    const size_t end = all.find('\0', begin);
    modules().push_back(all.substr(begin, end - begin));
    begin = all.find(".version ", end);
  }
  return nullptr;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[address_of(kernel)] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// Of launches by <<<…>>>, which csrc does not contain.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  return result_of(machine().launch(address_of(kernel), {grid.x, grid.y, grid.z},
                                    {block.x, block.y, block.z}, config->dynamicSmemBytes,
                                    address_of(arguments)));
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return result_of(machine().fill(address_of(memory), value, bytes));
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return result_of(machine().set_attribute(address_of(kernel), attribute, value));
}

cudaError_t cudaGetDevice(int* device) {
  *device = machine().current_device();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = machine().device_attribute(attribute, device);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "the PTX machine refused it"; }

// LibTorch's, for tensors of the CPU.
int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
int aoti_torch_create_device_guard(int, void** guard) {
  *guard = nullptr;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }
}

PYBIND11_MODULE(cuda_sources, module) {
  module.def("modules", [] { return modules(); }, "The PTX of each source file.");
  module.def(
      "kernels", [] { return kernels(); }, "Names of kernels in the PTX, by their addresses.");
  module.def(
      "connect",
      [](decltype(Machine::launch) launch, decltype(Machine::fill) fill,
         decltype(Machine::set_attribute) set_attribute,
         decltype(Machine::device_attribute) device_attribute,
         decltype(Machine::current_device) current_device) {
        machine() = {std::move(launch), std::move(fill), std::move(set_attribute),
                     std::move(device_attribute), std::move(current_device)};
      },
      pybind11::arg("launch"), pybind11::arg("fill"), pybind11::arg("set_attribute"),
      pybind11::arg("device_attribute"), pybind11::arg("current_device"));
}
