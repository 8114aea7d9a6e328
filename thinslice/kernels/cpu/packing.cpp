#include "packing.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace thinslice {

namespace {

// Weights or numbers a thread takes at a time: tens of microseconds, when taking them costs less
// than one.
constexpr int64_t kWeightsAtOnce = 64 * 1024;

template <typename Job>
uint32_t fill_panels(const Job& job,
                     uint32_t (*fill)(const Job& job, int64_t first_panel, int64_t last_panel)) {
  const int64_t panels = (job.rows + kPanelRows - 1) / kPanelRows;
  const int64_t weights = kPanelRows * kGroup * std::max<int64_t>(1, job.groups);
  std::atomic<uint32_t> status{kPacked};
  parallel_for(panels, std::max<int64_t>(1, kWeightsAtOnce / weights),
               [&](int64_t first, int64_t last) {
                 status.fetch_or(fill(job, first, last), std::memory_order_relaxed);
               });
  return status;
}

}  // namespace

uint32_t quantize(const QuantizeJob& job) { return fill_panels(job, kernels().quantize_panels); }

uint32_t repack(const RepackJob& job) { return fill_panels(job, kernels().repack_panels); }

void convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count) {
  const KernelTable& table = kernels();
  const uint8_t* source = static_cast<const uint8_t*>(from);
  uint8_t* target = static_cast<uint8_t*>(to);
  const int64_t from_size = size_of(from_dtype), to_size = size_of(to_dtype);
  parallel_for(count, kWeightsAtOnce, [&](int64_t first, int64_t last) {
    table.convert(source + first * from_size, from_dtype, target + first * to_size, to_dtype,
                  last - first);
  });
}

}  // namespace thinslice
