// The extension module fastrlhf._cpu: one function for every kernel of the chosen instruction set.
#include "module.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace fastrlhf {

static std::string choose_isa() {
  std::vector<std::string> usable = {"base"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      usable.push_back("avx512");
  }
#endif
  const char* wanted = std::getenv("FASTRLHF_ISA");
  if (!wanted || !*wanted) return usable.back();
  for (const auto& isa : usable)
    if (isa == wanted) return isa;
  std::string all;
  for (const auto& isa : usable) all += " " + isa;
  throw std::runtime_error("FASTRLHF_ISA=" + std::string(wanted) + ", but this machine runs only" +
                           all);
}

}  // namespace fastrlhf

PYBIND11_MODULE(_cpu, m) {
  const std::string isa = fastrlhf::choose_isa();
  m.attr("isa") = isa;
  for (const auto* k = fastrlhf::first; k; k = k->next)
    if (isa == k->isa)
      m.attr(k->name) = py::cpp_function([k](const py::args& args) { fastrlhf::call(k, args); },
                                         py::name(k->name));
}
