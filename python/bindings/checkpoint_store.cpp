/// MoeExpertStore.from_safetensors: what Python says of a checkpoint's experts, for the disk tier.

#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "checkpoints.hpp"
#include "gil.hpp"
#include "offload.hpp"
#include "pickling.hpp"
#include "quant.hpp"
#include "text.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

using Store = std::shared_ptr<MoeExpertStore>;

constexpr const char* kFromCheckpoint = "MoeExpertStore.from_safetensors";

/// A field that is one of some words.
template <class E>
void read_word(const py::dict& fields, const char* key, E& to,
               std::initializer_list<std::pair<const char*, E>> words) {
  if (!fields.contains(key)) return;
  const auto word = fields[key].cast<std::string>();
  for (const auto& [name, value] : words) {
    if (word == name) {
      to = value;
      return;
    }
  }
  throw FormatError(Problem{kFromCheckpoint, key, "a word that is known", word, {}});
}

template <class T>
void read_field(const py::dict& fields, const char* key, T& to) {
  if (fields.contains(key)) to = fields[key].cast<T>();
}

/// f32 values of an array, none for None.
std::vector<float> read_values(const py::dict& fields, const char* key) {
  if (!fields.contains(key) || fields[key].is_none()) return {};
  return import_floats(fields[key], kFromCheckpoint, key);
}

offload::StoredRole stored_role(const py::dict& fields) {
  using offload::Code8;
  using offload::ScaleType;
  using offload::StoredForm;
  offload::StoredRole role;
  read_word(fields, "form", role.form,
            {{"rows", StoredForm::Rows},
             {"floats", StoredForm::Floats},
             {"codes8", StoredForm::Codes8},
             {"mxfp4", StoredForm::Mxfp4},
             {"nvfp4", StoredForm::Nvfp4},
             {"q4_words", StoredForm::Q4Words},
             {"int4", StoredForm::Int4}});
  if (fields.contains("type")) {
    role.type = parse_quant_type(fields["type"].cast<std::string>(), kFromCheckpoint, "type");
  }
  read_field(fields, "values", role.values);
  read_field(fields, "scales", role.scales);
  read_field(fields, "zeros", role.zeros);
  read_field(fields, "matrix_rows", role.matrix_rows);
  read_field(fields, "first_row", role.first_row);
  read_field(fields, "row_step", role.row_step);
  read_field(fields, "transposed", role.transposed);
  read_word(fields, "code", role.code,
            {{"F8_E4M3", Code8::E4m3}, {"F8_E5M2", Code8::E5m2}, {"I8", Code8::Int8}});
  read_word(fields, "scale", role.scale,
            {{"F32", ScaleType::F32},
             {"F16", ScaleType::F16},
             {"BF16", ScaleType::Bf16},
             {"F64", ScaleType::F64},
             {"F8_E8M0", ScaleType::E8m0}});
  read_field(fields, "scale_factor", role.scale_factor);
  if (fields.contains("grid")) {
    std::tie(role.grid_rows, role.grid_cols, role.grid_parts) =
        fields["grid"].cast<std::tuple<std::int64_t, std::int64_t, std::int64_t>>();
  }
  read_field(fields, "group_size", role.group_size);
  if (fields.contains("format")) {
    role.format = parse_name<CheckpointFormat>(fields["format"].cast<std::string>(),
                                               kFromCheckpoint, "format");
  }
  read_field(fields, "scale_f32", role.scale_f32);
  read_field(fields, "symmetric", role.symmetric);
  role.factor = read_values(fields, "factor");
  role.bias = read_values(fields, "bias");
  role.source = fields["source"].cast<Text>().bytes;
  role.decision = fields["decision"].cast<Text>().bytes;
  role.reason = fields["reason"].cast<Text>().bytes;
  for (const py::handle name : fields["names"]) role.names.push_back(name.cast<Text>().bytes);
  return role;
}

offload::StoredLayer stored_layer(const py::dict& fields) {
  offload::StoredLayer layer;
  layer.block = fields["block"].cast<std::int32_t>();
  const auto [experts, hidden, intermediate] =
      fields["shape"].cast<std::tuple<std::int32_t, std::int64_t, std::int64_t>>();
  layer.shape = {experts, hidden, intermediate};
  const py::dict roles = fields["roles"];
  if (roles.contains("gate")) layer.gate = stored_role(roles["gate"]);
  layer.up = stored_role(roles["up"]);
  layer.down = stored_role(roles["down"]);
  const auto ranges = fields["ranges"].cast<py::array_t<std::int64_t, py::array::c_style>>();
  const auto view = ranges.unchecked<3>();
  for (py::ssize_t e = 0; e < view.shape(0); ++e) {
    offload::ExpertRanges& pieces = layer.ranges.emplace_back();
    for (py::ssize_t i = 0; i < view.shape(1); ++i) {
      pieces.push_back({static_cast<std::uint32_t>(view(e, i, 0)),
                        static_cast<std::uint64_t>(view(e, i, 1)), view(e, i, 2)});
    }
  }
  return layer;
}

/// The experts of a path, or those that were opened before, whose prefix was said then.
py::object checkpoint_experts(const py::object& source, const std::optional<py::str>& prefix) {
  const py::object kind = checkpoint_loader("CheckpointExperts");
  if (!py::isinstance(source, kind)) return call_python(kind, py::make_tuple(source, prefix));
  require<ConfigError>(!prefix, [] {
    return Problem{kFromCheckpoint, "prefix", "none beside CheckpointExperts", "one",
                   "CheckpointExperts(path, prefix) takes it"};
  });
  return source;
}

Store store_from_checkpoint(const py::object& source, const std::optional<py::str>& prefix,
                            std::int64_t memory_limit, std::int32_t staging,
                            std::int32_t io_threads, std::int32_t read_ahead,
                            std::optional<bool> direct_io) {
  const py::object experts = checkpoint_experts(source, prefix);
  const offload::StoredExperts stored = import_stored_experts(experts);
  const StoreOptions options{memory_limit, staging, io_threads, read_ahead, direct_io};
  const Store store = [&] {
    const InterruptibleRelease release;
    return MoeExpertStore::from_checkpoint(stored, options);
  }();
  remember_origin(store, reduced("checkpoint_store", experts, given_options(options)));
  return store;
}

}  // namespace

offload::StoredExperts import_stored_experts(const py::object& experts) {
  offload::StoredExperts stored;
  stored.name = experts.attr("name").cast<Text>().bytes;
  for (const py::handle file : experts.attr("files")) {
    const auto [path, bytes] = file.cast<std::pair<Text, std::int64_t>>();
    stored.files.push_back(path.bytes);
    stored.file_bytes.push_back(bytes);
  }
  for (const py::handle layer : experts.attr("layers")) {
    stored.layers.push_back(stored_layer(py::reinterpret_borrow<py::dict>(layer)));
  }
  return stored;
}

py::object checkpoint_of(const Store& store) {
  if (store->file() != nullptr) return py::none();
  const py::object origin = find_origin(store);
  if (origin.is_none()) return origin;
  return origin.cast<py::tuple>()[1].cast<py::tuple>()[0];
}

void bind_checkpoint_store(py::module_& m) {
  auto store = py::reinterpret_borrow<py::class_<MoeExpertStore, Store>>(m.attr("MoeExpertStore"));
  store.def_static("from_safetensors", &store_from_checkpoint, py::arg("path"), py::kw_only(),
                   py::arg("prefix") = py::none(), py::arg("memory_limit"), py::arg("staging") = 0,
                   py::arg("io_threads") = 16, py::arg("read_ahead") = 4,
                   py::arg("direct_io") = py::none());
}

}  // namespace moesaic::python
