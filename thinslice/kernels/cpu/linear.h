// out = rows times matrices: prepares the rows once, then shares the panels among threads.
#pragma once

#include "types.h"

namespace thinslice {

struct Target {
  const uint8_t* panels;
  Format format;
  Width width;
  int64_t out_features;
  Epilogue epilogue;
};

struct LinearJob {
  const float* x;
  int64_t rows;
  int64_t in_features;
  int64_t x_stride;
  Target targets[kMaxTargets];  // all packed, all bf16 or all f32
  int num_targets;
  bool is_swiglu;  // targets are gate and up; the result goes where gate's epilogue says
};

void linear(const LinearJob& job);

// Reads memory on all threads, to measure what there is to reach.
uint32_t read_memory(const uint8_t* data, int64_t num_bytes);

}  // namespace thinslice
