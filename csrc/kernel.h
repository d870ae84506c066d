// Self-registration of kernels: FASTRLHF_KERNEL(gae_float32, gae<float>) makes gae<float> callable
// from Python as _cpu.gae_float32(...). Tensors cross as addresses (Tensor.data_ptr()).
// A file of csrc/cuda is compiled once, as the instruction set "cuda", and a kernel of it takes the
// stream as its last argument: _cuda.gae_float32(..., stream).
//
// A kernel file of csrc/cpu is compiled once per instruction set, so nothing with external linkage
// may be emitted here or there: the linker keeps one copy of an inline function, perhaps the
// AVX-512 one. Hence everything lives in namespace FASTRLHF_ISA, C headers only, no pybind11.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

namespace fastrlhf {

union Value {
  int64_t i;
  double d;
};

struct Kernel {
  const char* name;
  const char* isa;
  const char* signature;  // a letter an argument: p address, i integer, d floating point
  void (*call)(const Value*);
  Kernel* next;
};

void add_kernel(Kernel* kernel);  // in module.h

}  // namespace fastrlhf

#ifdef FASTRLHF_ISA
#define FASTRLHF_TEXT_(X) #X
#define FASTRLHF_TEXT(X) FASTRLHF_TEXT_(X)

namespace FASTRLHF_ISA {

template <class T>
constexpr char code_of() {
  return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'd' : 'i';
}

template <class T>
static inline T take(fastrlhf::Value v) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(v.i);
  else if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(v.d);
  else
    return static_cast<T>(v.i);
}

template <auto F>
struct Bound;

template <class... A, void (*F)(A...)>
struct Bound<F> {
  static constexpr char signature[] = {code_of<A>()..., 0};
  template <size_t... I>
  static void unpack(const fastrlhf::Value* v, std::index_sequence<I...>) {
    F(take<A>(v[I])...);
  }
  static void call(const fastrlhf::Value* v) { unpack(v, std::index_sequence_for<A...>{}); }
};

struct Add {
  fastrlhf::Kernel kernel;
  Add(const char* name, const char* signature, void (*call)(const fastrlhf::Value*))
      : kernel{name, FASTRLHF_TEXT(FASTRLHF_ISA), signature, call, nullptr} {
    fastrlhf::add_kernel(&kernel);
  }
};

}  // namespace FASTRLHF_ISA

// NAME is what Python sees; the rest is the function, which may hold commas: f<float, int>
#define FASTRLHF_KERNEL(NAME, ...)                                                        \
  static FASTRLHF_ISA::Add add_##NAME(#NAME, FASTRLHF_ISA::Bound<__VA_ARGS__>::signature, \
                                      FASTRLHF_ISA::Bound<__VA_ARGS__>::call);
#endif
