#pragma once

/// Packing experts into units (layout.h) and reading them back, on the host. Nothing is lost: what
/// the bytes of the file say can be read back bit for bit.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "layout.h"
#include "moesaic/expert_stack.hpp"

namespace moesaic::cuda {

/// Why the weights cannot be packed, as static text; empty when they can. What can be packed are
/// rows of a type of formats.inc, and INT4 panels.
std::string_view pack_refusal(const WeightRef& source);

/// Whether gate and up can share 16-row units: same type, shape and, for INT4, same columns.
bool can_share_units(const WeightRef& gate, const WeightRef& up);

/// How `source` will lie when packed, without memory: base, table and slot_map are null,
/// int4.gather is still the source's. expert_stride is PackedLayout::expert_bytes, row_stride the
/// bytes of a row block's codes.
WeightRef packed_ref(const WeightRef& source, UnitHalf half);

/// What layout.h needs to know of a weight, packed or not.
PackedFacts packed_facts(const WeightRef& weight, UnitHalf half);

/// Writes expert `expert` to `out`, expert_stride bytes. `other` is null for UnitHalf::Alone; else
/// `source` is the first half and `other` the second.
void pack_expert(const WeightRef& source, const WeightRef* other, std::int32_t expert,
                 std::byte* out);

/// Row `row` of a role of a packed expert in host memory, as in the file: row_bytes(type, cols)
/// bytes. Not for INT4.
void unpack_row_bytes(const WeightRef& packed, const std::byte* expert, std::int64_t row,
                      std::byte* out);

/// Row `row` of a role of a packed expert in host memory, decoded to f32 [cols]; also for INT4.
/// `index` is the number of the expert, which can have an INT4 gather of its own.
void unpack_row(const WeightRef& packed, const std::byte* expert, std::int64_t row, float* out,
                std::int32_t index = 0);

}  // namespace moesaic::cuda
