// What each instruction set defines, in its own namespace.
#pragma once

#include "types.h"

namespace thinslice {
namespace THINSLICE_ISA {

void quantize_rows(const float* x, int64_t stride, const QuantizedRows& out, int64_t first_block,
                   int64_t last_block);
void panel_times_rows(const uint8_t* panel, Format format, Width width, const QuantizedRows& x,
                      float* acc);
void arrange_numbers(const float* x, int64_t stride, bool is_paired, const Numbers& out,
                     int64_t first_row, int64_t last_row);
void numbers_times_rows(const void* panel, Format format, int num_columns, const Numbers& x,
                        float* acc);
void store(const Epilogue& epilogue, const float* acc, int64_t first_row, int64_t rows,
           int64_t column, int columns);
void store_swiglu(const Epilogue& epilogue, const float* gate, const float* up, int64_t first_row,
                  int64_t rows, int64_t column, int columns);
uint32_t read_bytes(const uint8_t* data, int64_t num_bytes);
void rms_norm(const RmsNormJob& job, int64_t first_row, int64_t last_row);
void rope(const RopeJob& job, int64_t first_row, int64_t last_row);
void silu_mul(const SiluMulJob& job, int64_t first_row, int64_t last_row);
void write_kv(const WriteKvJob& job, int64_t first_row, int64_t last_row);
int64_t attention_scratch_floats(const AttentionJob& job);
void attention(const AttentionJob& job, int64_t sequence, int64_t first_row, int64_t last_row,
               int64_t kv_head, float* scratch);
uint32_t quantize_panels(const QuantizeJob& job, int64_t first_panel, int64_t last_panel);
uint32_t repack_panels(const RepackJob& job, int64_t first_panel, int64_t last_panel);
void convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count);

}  // namespace THINSLICE_ISA
}  // namespace thinslice
