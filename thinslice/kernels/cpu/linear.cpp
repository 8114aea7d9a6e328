#include "linear.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "scratch.h"
#include "threads.h"

namespace thinslice {

namespace {

// Rows quantised at a time: bounds the scratch memory at 512 * 1.375 bytes per input feature (2.625
// where a product is wide) while the weights are read again once per 512 rows, when the products
// take far longer than the reading.
constexpr int64_t kRowsAtOnce = 512;

// The same of rows that stay fp32: 1024 bytes per input feature.
constexpr int64_t kNumberRowsAtOnce = 256;

// A thread takes about this many bytes of weights at a time.
constexpr int64_t kBytesAtOnce = 1024 * 1024;

// Quantised rows that stay in the second-level cache while a thread's panels pass over them. AMX,
// 4096 inputs, one thread: 256 rows (1.4 MiB) 0.78 TOP/s, 512 rows 0.64.
constexpr int64_t kCachedBytes = 1024 * 1024;

// Bytes of a group: a plane of codes, the scale and two sums; of wide codes a plane and two sums
// more.
constexpr int64_t kNarrowBytes = kGroup + 12;
constexpr int64_t kWideBytes = kGroup + 8;

QuantizedRows carve(uint8_t* memory, int64_t rows, int64_t groups, bool has_wide) {
  const int64_t count = padded_rows(rows) * groups;
  auto take = [&memory, count](int64_t bytes) {
    uint8_t* taken = memory;
    memory += count * bytes;
    return taken;
  };
  QuantizedRows x{};
  x.rows = rows;
  x.groups = groups;
  x.high = reinterpret_cast<int8_t*>(take(kGroup));
  if (has_wide) x.low = reinterpret_cast<int8_t*>(take(kGroup));
  x.scales = reinterpret_cast<float*>(take(4));
  for (int width = kNarrow; width <= (has_wide ? kWide : kNarrow); ++width) {
    x.negated_sums[width] = reinterpret_cast<int32_t*>(take(4));
    x.scaled_sums[width] = reinterpret_cast<float*>(take(4));
  }
  return x;
}

int64_t carved_bytes(int64_t rows, int64_t groups, bool has_wide) {
  return padded_rows(rows) * groups * (kNarrowBytes + (has_wide ? kWideBytes : 0));
}

bool has_wide(const LinearJob& job) {
  return std::any_of(job.targets, job.targets + job.num_targets,
                     [](const Target& target) { return target.width == kWide; });
}

int64_t num_panels(const Target& target) {
  return (target.out_features + kPanelRows - 1) / kPanelRows;
}

// Rows first.. of x, at most `count`; first is a multiple of the block height.
QuantizedRows part_of(const QuantizedRows& x, int64_t first, int64_t count) {
  const int64_t rows = std::min(count, x.rows - first);
  return x.low ? rows_of<kWide>(x, first, rows) : rows_of<kNarrow>(x, first, rows);
}

Numbers part_of(const Numbers& x, int64_t first, int64_t count) {
  return {std::min(count, x.rows - first), x.in_features, x.stride, x.data + first * x.stride};
}

// Bytes of a row that every panel reads.
int64_t row_bytes(const QuantizedRows& x) { return x.groups * kGroup; }
int64_t row_bytes(const Numbers& x) { return x.stride * 4; }

void multiply(const uint8_t* panel, const Target& target, int columns, const QuantizedRows& x,
              float* acc) {
  (void)columns;  // a packed panel is filled up
  kernels().panel_times_rows(panel, target.format, target.width, x, acc);
}

void multiply(const uint8_t* panel, const Target& target, int columns, const Numbers& x,
              float* acc) {
  kernels().numbers_times_rows(panel, target.format, columns, x, acc);
}

// One panel of one target, and for SwiGLU the same panel of the other.
template <typename Rows>
void multiply_panel(const LinearJob& job, int index, const Rows& x, int64_t first_row,
                    int64_t panel, float* acc) {
  const Target& target = job.targets[index];
  const int64_t column = panel * kPanelRows;
  const int columns =
      static_cast<int>(std::min<int64_t>(kPanelRows, target.out_features - column));
  const auto panel_of = [&](const Target& one) {
    return one.panels + panel * panel_bytes(one.format, job.in_features);
  };
  multiply(panel_of(target), target, columns, x, acc);
  if (!job.is_swiglu) {
    kernels().store(target.epilogue, acc, first_row, x.rows, column, columns);
    return;
  }
  const Target& up = job.targets[1];
  float* up_acc = acc + padded_rows(x.rows) * kPanelRows;
  multiply(panel_of(up), up, columns, x, up_acc);
  kernels().store_swiglu(target.epilogue, acc, up_acc, first_row, x.rows, column, columns);
}

// Panels of one target, on one thread.
template <typename Rows>
void multiply_panels(const LinearJob& job, int index, const Rows& x, int64_t first_row,
                     int64_t first, int64_t last) {
  const int64_t cached = kCachedBytes / row_bytes(x) / kBlockRows * kBlockRows;
  const int64_t rows = std::min(x.rows, std::max<int64_t>(kBlockRows, cached));
  const std::size_t acc_bytes = 2 * padded_rows(rows) * kPanelRows * sizeof(float);
  float* acc = reinterpret_cast<float*>(thread_scratch(acc_bytes));
  kernels().enter();
  for (int64_t row = 0; row < x.rows; row += rows) {
    const Rows part = part_of(x, row, rows);
    for (int64_t panel = first; panel < last; ++panel) {
      multiply_panel(job, index, part, first_row + row, panel, acc);
    }
  }
  kernels().leave();
}

template <typename Rows>
void multiply_rows(const LinearJob& job, const Rows& x, int64_t first_row) {
  const int count = job.is_swiglu ? 1 : job.num_targets;
  int64_t total = 0, bytes = 0;
  for (int i = 0; i < count; ++i) {
    total += num_panels(job.targets[i]);
    bytes += num_panels(job.targets[i]) * panel_bytes(job.targets[i].format, job.in_features);
  }
  if (job.is_swiglu) bytes *= 2;
  const int64_t by_bytes = std::max<int64_t>(1, kBytesAtOnce * total / std::max<int64_t>(1, bytes));
  const int64_t by_share = std::max<int64_t>(1, total / (2 * num_threads()));
  parallel_for(total, std::min(by_bytes, by_share), [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t end = start + num_panels(job.targets[i]);
      const int64_t from = std::max(first, start), to = std::min(last, end);
      if (from < to) multiply_panels(job, i, x, first_row, from - start, to - start);
      start = end;
    }
  });
}

void multiply_packed(const LinearJob& job) {
  const int64_t groups = job.in_features / kGroup;
  const bool is_wide = has_wide(job);
  uint8_t* memory = call_scratch(carved_bytes(std::min(job.rows, kRowsAtOnce), groups, is_wide));
  for (int64_t first = 0; first < job.rows; first += kRowsAtOnce) {
    const QuantizedRows x = carve(memory, std::min(kRowsAtOnce, job.rows - first), groups, is_wide);
    const int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows;
    parallel_for(blocks, 2, [&](int64_t from, int64_t to) {
      kernels().quantize_rows(job.x + first * job.x_stride, job.x_stride, x, from, to);
    });
    multiply_rows(job, x, first);
  }
}

void multiply_numbers(const LinearJob& job) {
  const int64_t stride = (job.in_features + kNumbers - 1) / kNumbers * kNumbers;
  const int64_t most = std::min(job.rows, kNumberRowsAtOnce);
  float* memory = reinterpret_cast<float*>(call_scratch(most * stride * sizeof(float)));
  const bool is_paired = job.targets[0].format == Format::bf16;
  for (int64_t first = 0; first < job.rows; first += most) {
    const Numbers x = {std::min(most, job.rows - first), job.in_features, stride, memory};
    parallel_for(x.rows, 8, [&](int64_t from, int64_t to) {
      kernels().arrange_numbers(job.x + first * job.x_stride, job.x_stride, is_paired, x, from, to);
    });
    multiply_rows(job, x, first);
  }
}

}  // namespace

void linear(const LinearJob& job) {
  const ScratchLease lease;
  if (is_numbers(job.targets[0].format)) {
    multiply_numbers(job);
  } else {
    multiply_packed(job);
  }
}

uint32_t read_memory(const uint8_t* data, int64_t num_bytes) {
  const int64_t pieces = (num_bytes + kBytesAtOnce - 1) / kBytesAtOnce;
  std::atomic<uint32_t> sum{0};
  parallel_for(pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = i * kBytesAtOnce;
      sum ^= kernels().read_bytes(data + at, std::min(kBytesAtOnce, num_bytes - at));
    }
  });
  return sum;
}

}  // namespace thinslice
