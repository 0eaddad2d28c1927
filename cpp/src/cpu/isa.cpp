#include "cpu/isa.hpp"

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>

#include "moesaic/error.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace moesaic::cpu {
namespace {

struct Features {
  bool avx2 = false;        ///< with FMA and F16C, which every such CPU has
  bool avxvnni = false;     ///< VEX-encoded VNNI, a feature of its own
  bool avx512vnni = false;  ///< with AVX-512 F, BW, DQ and VL
  bool amx = false;         ///< with int8, beside avx512vnni; the system must permit it too
  bool neon = false;        ///< with dot products, int8 matrix products and f16 arithmetic
};

#if defined(__x86_64__) || defined(__i386__)

/// Bits of the register states that the operating system saves when it switches threads.
std::uint64_t xgetbv0() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

Features detect() {
  const auto bit = [](std::uint32_t word, int n) { return ((word >> n) & 1U) != 0; };
  Features features;
  std::uint32_t a = 0;
  std::uint32_t b = 0;
  std::uint32_t c = 0;
  std::uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return features;
  const bool fma = bit(c, 12);
  const bool osxsave = bit(c, 27);
  const bool avx = bit(c, 28);
  const bool f16c = bit(c, 29);
  if (!osxsave || !avx) return features;
  const std::uint64_t saved = xgetbv0();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = (saved & 0xe6) == 0xe6;
  const bool tiles = (saved & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  const std::uint32_t last_subleaf = a;
  features.avx2 = ymm && bit(b, 5) && fma && f16c;
  features.avx512vnni =
      features.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
  features.amx = features.avx512vnni && tiles && bit(d, 24) && bit(d, 25);
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    features.avxvnni = features.avx2 && bit(a, 4);
  }
  return features;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detect() {
  constexpr unsigned long kHalf = 1UL << 10;        // HWCAP_ASIMDHP
  constexpr unsigned long kDotProduct = 1UL << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long kInt8Matrix = 1UL << 13;  // HWCAP2_I8MM
  const unsigned long first = getauxval(AT_HWCAP);
  Features features;
  features.neon = (first & kHalf) != 0 && (first & kDotProduct) != 0 &&
                  (getauxval(AT_HWCAP2) & kInt8Matrix) != 0;
  return features;
}

#elif defined(__aarch64__) && defined(__APPLE__)

Features detect() {
  const auto has = [](const char* name) {
    int value = 0;
    std::size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  Features features;
  features.neon = has("hw.optional.arm.FEAT_FP16") && has("hw.optional.arm.FEAT_DotProd") &&
                  has("hw.optional.arm.FEAT_I8MM");
  return features;
}

#else

Features detect() { return {}; }

#endif

const Features& features() {
  static const Features detected = detect();
  return detected;
}

/// Asks Linux to let this process use the tiles that its CPU has. It grants that for the life of the
/// process and to children by fork; each thread gets the memory for its tiles when it first uses
/// one. It refuses where the alternative signal stack of a thread has no room for tiles, and
/// afterwards refuses to set one that has none (AT_MINSIGSTKSZ tells the size). Returns 0 or the
/// errno value.
int ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

/// What ask_for_tiles said; asked once, when somebody first wants to know.
int tiles_error() {
  static const int error = features().amx ? ask_for_tiles() : 0;
  return error;
}

/// By ascending speed.
constexpr CpuIsa kAll[] = {CpuIsa::Scalar,  CpuIsa::Neon,       CpuIsa::Avx2,
                           CpuIsa::AvxVnni, CpuIsa::Avx512Vnni, CpuIsa::Amx};

bool built(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::Auto:
    case CpuIsa::Scalar:
      return true;
#ifdef MOESAIC_HAVE_AVX2
    case CpuIsa::Avx2:
      return true;
#endif
#ifdef MOESAIC_HAVE_AVXVNNI
    case CpuIsa::AvxVnni:
      return true;
#endif
#ifdef MOESAIC_HAVE_AVX512VNNI
    case CpuIsa::Avx512Vnni:
      return true;
#endif
#ifdef MOESAIC_HAVE_AMX
    case CpuIsa::Amx:
      return true;
#endif
#ifdef MOESAIC_HAVE_NEON
    case CpuIsa::Neon:
      return true;
#endif
    default:
      return false;
  }
}

}  // namespace

bool cpu_has(CpuIsa isa) noexcept {
  switch (isa) {
    case CpuIsa::Auto:
    case CpuIsa::Scalar:
      return true;
    case CpuIsa::Avx2:
      return features().avx2;
    case CpuIsa::AvxVnni:
      return features().avxvnni;
    case CpuIsa::Avx512Vnni:
      return features().avx512vnni;
    case CpuIsa::Amx:
      return features().amx && tiles_error() == 0;
    case CpuIsa::Neon:
      return features().neon;
  }
  return false;
}

std::string amx_refusal() {
  return tiles_error() == 0 ? "" : "arch_prctl: " + std::generic_category().message(tiles_error());
}

bool supported(CpuIsa isa) noexcept { return built(isa) && cpu_has(isa); }

std::vector<CpuIsa> supported_isas() {
  std::vector<CpuIsa> isas;
  for (const CpuIsa isa : kAll) {
    if (supported(isa)) isas.push_back(isa);
  }
  return isas;
}

CpuIsa best_isa() noexcept {
  CpuIsa best = CpuIsa::Scalar;
  for (const CpuIsa isa : kAll) {
    if (supported(isa)) best = isa;
  }
  return best;
}

CpuIsa active_isa(const Tuning& tuning) {
  const CpuIsa asked = tuning.cpu_isa != CpuIsa::Auto ? tuning.cpu_isa : Tuning::process().cpu_isa;
  if (asked == CpuIsa::Auto) return best_isa();
  require<UnsupportedError>(supported(asked), [&] {
    std::string usable;
    for (const CpuIsa isa : supported_isas()) {
      if (!usable.empty()) usable += ", ";
      usable += name_of(isa);
    }
    return Problem{"cpu backend", "cpu_isa", usable, name_of(asked),
                   cpu_has(asked) ? "this build has no kernels for it"
                                  : "this CPU or operating system lacks it"};
  });
  return asked;
}

}  // namespace moesaic::cpu
