// What the processor and the operating system let this process use.
#pragma once

namespace thinslice {

struct CpuFeatures {
  bool has_avx2 = false;    // with FMA and F16C
  bool has_avx512 = false;  // F, BW, DQ, VL and VNNI
  bool has_amx = false;     // tiles and int8, granted by the operating system
};

CpuFeatures detect_cpu();

// Whether AMD made the processor: what is measured, not architectural, differs by maker.
bool is_amd();

}  // namespace thinslice
