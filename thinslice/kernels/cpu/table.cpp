// The table of the instruction set this file is compiled for.
#include "vector_kernels.h"

#define THINSLICE_TEXT_OF(x) #x
#define THINSLICE_TEXT(x) THINSLICE_TEXT_OF(x)

namespace thinslice {
namespace THINSLICE_ISA {

namespace {

void nothing() {}

}  // namespace

const KernelTable& table() {
  static constexpr KernelTable kernels = {
      THINSLICE_TEXT(THINSLICE_ISA),
      quantize_rows,
      panel_times_rows,
      arrange_numbers,
      numbers_times_rows,
      nothing,
      nothing,
      store,
      store_swiglu,
      read_bytes,
      rms_norm,
      rope,
      silu_mul,
      write_kv,
      attention_scratch_floats,
      attention,
      quantize_panels,
      repack_panels,
      convert,
  };
  return kernels;
}

}  // namespace THINSLICE_ISA
}  // namespace thinslice
