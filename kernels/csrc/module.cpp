#include <nanobind/nanobind.h>
NB_MODULE(_kernels, m) { m.def("ping", [] { return 1; }); }
