// The GPU's properties, cleared memory and launches, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace anchorops {

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Zeroes memory, in the order of the stream.
inline void fill_zero(void* memory, size_t bytes, Stream stream) {
  if (bytes) check(cudaMemsetAsync(memory, 0, bytes, stream), "anchorops: cudaMemsetAsync");
}

// The largest shared memory that a launch may request, on every GPU from sm_80 on: sm_86, sm_89 and
// sm_120 have 99 KB for a block, others more. Of that at most 3 KB are variables of the kernel.
constexpr size_t MAX_SHARED_BYTES = 96 << 10;

// What the division of work depends on, besides shapes.
struct Hardware {
  int multiprocessors;
  // Bytes of shared memory: of a multiprocessor, and of each block in addition to what it requests.
  size_t shared_bytes, reserved_bytes;
};

// Hardware of the current device, read once for each device.
inline Hardware hardware() {
  static std::mutex mutex;
  static std::map<int, Hardware> by_device;
  int device = 0;
  check(cudaGetDevice(&device), "anchorops: cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto entry = by_device.find(device);
  if (entry != by_device.end()) return entry->second;
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "anchorops: cudaDeviceGetAttribute");
    return value;
  };
  const auto bytes = [&](cudaDeviceAttr which) { return static_cast<size_t>(attribute(which)); };
  return by_device[device] = {attribute(cudaDevAttrMultiProcessorCount),
                              bytes(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                              bytes(cudaDevAttrReservedSharedMemoryPerBlock)};
}

// The number of multiprocessors of the current device: 132 of an H200, 108 of an A100.
inline int64_t multiprocessors() { return hardware().multiprocessors; }

// For how many blocks a multiprocessor of the current device has shared memory. It has 228 KB on
// sm_90 and sm_100, 164 KB on sm_80, 100 KB on sm_86, sm_89 and sm_120.
inline int64_t blocks_in_shared(size_t bytes_of_block) {
  const Hardware device = hardware();
  return static_cast<int64_t>(device.shared_bytes / (bytes_of_block + device.reserved_bytes));
}

// Configures a kernel at its first launch on a device. The limit is the same for all launches, so
// host threads that launch at the same time do not interfere. Shared memory that a kernel does not
// need is used as L1 cache. A kernel that requests none keeps only its variables, and the 1 KB that
// each block always needs.
inline void configure(const char* name, const void* kernel, bool asks_for_shared) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> configured;
  constexpr int PERCENT_FOR_BLOCKS = 14;  // 32 KB on sm_80 and sm_90, 14 KB on sm_86
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard lock(mutex);
  if (configured.count({device, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int{MAX_SHARED_BYTES}),
        name);
  check(cudaFuncSetAttribute(
            kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
            asks_for_shared ? int{cudaSharedmemCarveoutMaxShared} : PERCENT_FOR_BLOCKS),
        name);
  configured.insert({device, kernel});
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); no launch if the grid is empty. If
// the launch fails, throws an error with the kernel's name.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (size_t{grid.x} * grid.y * grid.z == 0) return;
  configure(name, reinterpret_cast<const void*>(kernel), shared_bytes > 0);
  const cudaLaunchConfig_t config{grid, block, shared_bytes, stream, nullptr, 0};
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace anchorops
