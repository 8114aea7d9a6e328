#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include "cpuid.h"
#include "linear_amx.h"
#endif

namespace thinslice {

namespace portable {
const KernelTable& table();
}
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}

namespace {

// The tile unit multiplies; everything else is AVX-512's.
#if defined(__x86_64__)
KernelTable make_amx_table(KernelTable table) {
  table.name = "amx";
  table.panel_times_rows = amx::panel_times_rows;
  table.enter = amx::enter;
  table.leave = amx::leave;
  return table;
}
#endif

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*>* usable = [] {
    auto* found = new std::vector<const KernelTable*>;
#if defined(__x86_64__)
    const CpuFeatures cpu = detect_cpu();
    if (cpu.has_amx) found->push_back(new KernelTable(make_amx_table(avx512::table())));
    if (cpu.has_avx512) found->push_back(&avx512::table());
    if (cpu.has_avx2) found->push_back(&avx2::table());
#endif
    found->push_back(&portable::table());
    return found;
  }();
  return *usable;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{tables().front()};
  return table;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : tables()) names.emplace_back(table->name);
  return names;
}

const KernelTable& kernels() { return *current().load(std::memory_order_acquire); }

void set_isa(const std::string& name) {
  for (const KernelTable* table : tables()) {
    if (name == table->name) {
      current().store(table, std::memory_order_release);
      return;
    }
  }
  throw std::invalid_argument("no kernels named " + name + " for this processor");
}

}  // namespace thinslice
