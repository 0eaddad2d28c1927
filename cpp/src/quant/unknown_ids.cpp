#include <algorithm>
#include <iterator>

#include "moesaic/quant.hpp"

namespace moesaic {
namespace {

struct Remark {
  std::uint32_t id;
  std::string_view text;
};

#define PRIVATE_TYPE(name) "ik_llama.cpp private type " name

// By ascending id.
constexpr Remark kRemarks[] = {
    {4, "removed from ggml (Q4_2)"},
    {5, "removed from ggml (Q4_3)"},
    {31, "removed from ggml (Q4_0_4_4)"},
    {32, "removed from ggml (Q4_0_4_8)"},
    {33, "removed from ggml (Q4_0_8_8)"},
    {36, "removed from ggml (IQ4_NL_4_4; ik_llama.cpp uses the id for I2_S)"},
    {37, "removed from ggml (IQ4_NL_4_8)"},
    {38, "removed from ggml (IQ4_NL_8_8)"},
    {97, PRIVATE_TYPE("Q8_0_X4")},
    {98, PRIVATE_TYPE("Q8_1_X4")},
    {99, PRIVATE_TYPE("Q8_2_X4")},
    {133, PRIVATE_TYPE("Q6_0")},
    {134, PRIVATE_TYPE("IQ1_BN")},
    {135, PRIVATE_TYPE("IQ2_BN")},
    {136, PRIVATE_TYPE("Q8_K64")},
    {137, PRIVATE_TYPE("IQ2_K")},
    {138, PRIVATE_TYPE("IQ3_K")},
    {139, PRIVATE_TYPE("IQ4_K")},
    {140, PRIVATE_TYPE("IQ5_K")},
    {141, PRIVATE_TYPE("IQ6_K")},
    {142, PRIVATE_TYPE("IQ2_TN")},
    {143, PRIVATE_TYPE("IQ1_TN")},
    {144, PRIVATE_TYPE("IQ4_KS")},
    {145, PRIVATE_TYPE("IQ2_KS")},
    {146, PRIVATE_TYPE("IQ4_KSS")},
    {147, PRIVATE_TYPE("Q8_K16")},
    {148, PRIVATE_TYPE("Q8_K32")},
    {149, PRIVATE_TYPE("Q8_KR8")},
    {150, PRIVATE_TYPE("Q8_K128")},
    {151, PRIVATE_TYPE("Q8_KV")},
    {152, PRIVATE_TYPE("IQ5_KS")},
    {153, PRIVATE_TYPE("IQ2_KT")},
    {154, PRIVATE_TYPE("IQ3_KT")},
    {155, PRIVATE_TYPE("IQ4_KT")},
    {156, PRIVATE_TYPE("IQ3_KS")},
    {157, PRIVATE_TYPE("IQ2_KL")},
    {158, PRIVATE_TYPE("IQ1_KT")},
};

#undef PRIVATE_TYPE

}  // namespace

std::string_view quant_id_remark(std::uint32_t id) noexcept {
  if (quant_type_from_id(id)) return "";
  const auto* const found =
      std::lower_bound(std::begin(kRemarks), std::end(kRemarks), id,
                       [](const Remark& r, std::uint32_t i) { return r.id < i; });
  if (found != std::end(kRemarks) && found->id == id) return found->text;
  if (id >= 202 && id <= 399) return "ik_llama.cpp private type with interleaved rows";
  return "unknown";
}

}  // namespace moesaic
