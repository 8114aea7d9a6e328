// Numbers of one float type to another: by way of fp32, rounded once, to nearest even.
#include "simd.h"
#include "vector_kernels.h"

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

template <typename From, typename To>
void convert_all(const void* from, void* to, int64_t count) {
  const From* x = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) vstore(out + i, vload(x + i));
  if (i < count) vstore_some(out + i, vload_some(x + i, count - i), count - i);
}

template <typename From>
void convert_from(const void* from, void* to, Dtype to_dtype, int64_t count) {
  if (to_dtype == Dtype::f32) {
    convert_all<From, float>(from, to, count);
  } else if (to_dtype == Dtype::bf16) {
    convert_all<From, bf16>(from, to, count);
  } else {
    convert_all<From, f16>(from, to, count);
  }
}

}  // namespace

void convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count) {
  if (from_dtype == to_dtype) {
    memcpy(to, from, count * size_of(to_dtype));
  } else if (from_dtype == Dtype::f32) {
    convert_from<float>(from, to, to_dtype, count);
  } else if (from_dtype == Dtype::bf16) {
    convert_from<bf16>(from, to, to_dtype, count);
  } else {
    convert_from<f16>(from, to, to_dtype, count);
  }
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice
