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

// Checks of arguments, which in torch or numpy would take longer than a small kernel.
static bool rises(intptr_t address, int64_t count, int64_t last, int64_t least) {
  const auto* bounds = reinterpret_cast<const int32_t*>(address);
  bool good = bounds[0] == 0 && bounds[count - 1] == last;
  for (int64_t i = 1; i < count; i++)
    good &= static_cast<int64_t>(bounds[i]) - bounds[i - 1] >= least;
  return good;
}

static bool within(intptr_t address, int64_t count, int64_t bound) {
  const auto* indices = reinterpret_cast<const int64_t*>(address);
  bool good = true;
  for (int64_t i = 0; i < count; i++) good &= indices[i] >= 0 && indices[i] < bound;
  return good;
}

}  // namespace fastrlhf

PYBIND11_MODULE(_cpu, m) {
  const std::string isa = fastrlhf::choose_isa();
  m.attr("isa") = isa;
  for (const auto* k = fastrlhf::first; k; k = k->next)
    if (isa == k->isa) m.attr(k->name) = fastrlhf::function_of(k);
  m.def("rises", fastrlhf::rises, "whether int32 at an address rise from 0 to last by >= least");
  m.def("within", fastrlhf::within, "whether int64 at an address are in [0, bound)");
}
