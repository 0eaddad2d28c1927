#include <algorithm>
#include <cmath>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/routing.hpp"

namespace moesaic {
namespace {

void check_bias(const std::vector<float>& bias, std::int32_t num_experts, const char* name) {
  require<ConfigError>(bias.empty() || std::cmp_equal(bias.size(), num_experts), [&] {
    return Problem{"RouterConfig", name, "no values or " + std::to_string(num_experts),
                   std::to_string(bias.size()) + " values", ""};
  });
  const auto bad = std::ranges::find_if_not(bias, [](float v) { return std::isfinite(v); });
  require<ConfigError>(bad == bias.end(), [&] {
    return Problem{"RouterConfig", name + ("[" + std::to_string(bad - bias.begin()) + "]"),
                   "a finite number", std::to_string(*bad), ""};
  });
}

}  // namespace

void RouterConfig::validate() const {
  // The texts are built on failure only: routing validates on every call and must not allocate.
  const auto check = [](bool ok, const char* what, auto&& expected, auto got) {
    require<ConfigError>(
        ok, [&] { return Problem{"RouterConfig", what, expected(), std::to_string(got), ""}; });
  };
  const auto up_to = [](std::int32_t last) { return "1 to " + std::to_string(last); };
  check(num_experts >= 1, "num_experts", [] { return "at least 1"; }, num_experts);
  check(
      identity_experts >= 0 && identity_experts < num_experts, "identity_experts",
      [&] { return "0 to " + std::to_string(num_experts - 1); }, identity_experts);
  check(top_k >= 1 && top_k <= num_experts, "top_k", [&] { return up_to(num_experts); }, top_k);
  check(
      num_groups >= 1 && num_experts % num_groups == 0, "num_groups",
      [&] { return "a divisor of " + std::to_string(num_experts) + " experts"; }, num_groups);
  check(
      groups_used >= 1 && groups_used <= num_groups, "groups_used",
      [&] { return up_to(num_groups); }, groups_used);
  const std::int32_t reachable = num_experts / num_groups * groups_used;
  check(
      top_k <= reachable, "top_k",
      [&] { return up_to(reachable) + " (the experts of the groups used)"; }, top_k);
  check(
      std::isfinite(scale) && scale >= 0.0F, "scale",
      [] { return "a finite number, not negative"; }, scale);
  check(
      guard == NormGuard::None || (std::isfinite(guard_eps) && guard_eps > 0.0F), "guard_eps",
      [] { return "a positive number"; }, guard_eps);
  check_bias(router_bias, num_experts, "router_bias");
  check_bias(selection_bias, num_experts, "selection_bias");
}

}  // namespace moesaic
