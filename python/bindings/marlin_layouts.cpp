/// One INT4 expert taken out of a stack: as codes and scales, repacked, or decoded.

#include <pybind11/stl.h>

#include <cstring>

#include "expert_stack.hpp"
#include "int4/marlin_layout.hpp"
#include "int4/p4_layout.hpp"
#include "marlin.hpp"

namespace moesaic::python {
namespace {

template <class T>
py::array copy_array(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  py::array_t<T> out(std::move(shape));
  if (!values.empty()) std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(T));
  return out;
}

py::object order_or_none(const std::vector<std::int32_t>& values) {
  if (values.empty()) return py::none();
  return copy_array(values, {static_cast<py::ssize_t>(values.size())});
}

py::dict unpack(const MarlinExpertStack& stack, std::int32_t expert) {
  const Int4Matrix m = stack.unpack(expert);
  py::dict out;
  out["codes"] = copy_array(m.codes, {m.k, m.n});
  out["scales"] = copy_array(m.scales, {m.groups, m.n});
  out["zeros"] = copy_array(m.zeros, {m.groups, m.n});
  out["g_idx"] = order_or_none(m.g_idx);
  return out;
}

py::dict repack(const MarlinExpertStack& stack, const std::string& layout, std::int32_t expert,
                bool interleave_gate_up) {
  py::dict out;
  if (layout == "marlin") {
    const int4::MarlinMatrix m = int4::to_marlin(stack.unpack(expert));
    out["qweight"] = copy_array(m.qweight, {m.k / 16, 2 * m.n});
    out["scales"] = copy_array(m.scales, {m.groups, m.n});
    out["qzeros"] = m.qzeros.empty() ? py::object(py::none())
                                     : py::object(copy_array(m.qzeros, {m.groups, m.n / 8}));
    out["perm"] = order_or_none(m.perm);
    return out;
  }
  require<ConfigError>(layout == "p4", [&] {
    return Problem{"MarlinExpertStack.repack", "layout", "marlin | p4", "'" + layout + "'", {}};
  });
  const int4::P4Matrix m = int4::to_p4(stack.unpack(expert), interleave_gate_up);
  const auto bytes = [](const std::vector<std::uint8_t>& values) {
    return copy_array(values, {static_cast<py::ssize_t>(values.size())});
  };
  out["bytes"] = bytes(m.bytes);
  out["side_scales"] = bytes(m.side_scales);
  out["side_zeros"] = bytes(m.side_zeros);
  out["row_block_bytes"] = m.row_block_bytes;
  out["packed_rows"] = m.packed_rows;
  out["packed_cols"] = m.packed_cols;
  out["perm"] = order_or_none(m.perm);
  return out;
}

}  // namespace

void define_marlin_layouts(MarlinClass& type) {
  type.def("unpack", &unpack, py::arg("expert"))
      .def("repack", &repack, py::arg("layout"), py::arg("expert"), py::kw_only(),
           py::arg("interleave_gate_up") = false)
      .def(
          "dequantize",
          [](const MarlinExpertStack& stack, std::int32_t expert) {
            return decoded_expert(stack.weights().ref, expert, "MarlinExpertStack.dequantize");
          },
          py::arg("expert"));
}

}  // namespace moesaic::python
