#include "cpuid.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace thinslice {

#if defined(__x86_64__)

namespace {

uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only on request, once per process
// (Documentation/arch/x86/xstate.rst).
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

}  // namespace

// Bit numbers: Intel SDM volume 2A, CPUID.
CpuFeatures detect_cpu() {
  CpuFeatures features;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return features;
  const bool has_fma = bit(c, 12), has_f16c = bit(c, 29), has_avx = bit(c, 28);
  const uint64_t states = enabled_states();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const bool has_ymm = (states & 0x6) == 0x6;
  const bool has_zmm = (states & 0xe6) == 0xe6;
  const bool has_tiles = (states & 0x60000) == 0x60000;
  features.has_avx2 = has_ymm && has_avx && has_fma && has_f16c && bit(b, 5);
  const bool has_avx512_base = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  features.has_avx512 = features.has_avx2 && has_zmm && has_avx512_base && bit(c, 11);
  features.has_amx =
      features.has_avx512 && has_tiles && bit(d, 24) && bit(d, 25) && request_tiles();
  return features;
}

// "AuthenticAMD", four letters to a register: AMD64 manual volume 3, CPUID.
bool is_amd() {
  uint32_t a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541 && d == 0x69746e65 && c == 0x444d4163;
}

#else

CpuFeatures detect_cpu() { return {}; }
bool is_amd() { return false; }

#endif

}  // namespace thinslice
