// The Python module on_host: what the tests set in the emulator, and the planted faults.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device_on_host.h"
#include "planted_faults.h"

PYBIND11_MODULE(on_host, module) {
  namespace py = pybind11;
  using namespace anchorops;
  module.def("set_hardware", &on_host::set_hardware, py::arg("multiprocessors"),
             py::arg("shared_kilobytes"), "Multiprocessors, and KB of shared memory of each.");
  module.def("set_order", &on_host::set_order, py::arg("seed"),
             "The order in which threads run: a seed, or 0 for the usual one.");
  module.def("launched_kernels", &on_host::launched_kernels,
             "The kernels launched since the last call, by their addresses in the library.");
  module.def(
      "rotate", &rotate, py::arg("fault"), py::arg("numbers"),
      "The numbers of each block of 64, rotated by one position by a kernel with this fault.");
}
