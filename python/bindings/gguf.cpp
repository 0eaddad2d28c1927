#include "gguf.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "arrays.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "pickling.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

using File = std::shared_ptr<GgufFile>;

void require_open(const GgufFile& file, const char* operation) {
  require<DeviceError>(!file.closed(), [&] {
    return Problem{operation, file.path().string(), "an open file", "a closed one", {}};
  });
}

/// One tensor of the index, and the file, which it keeps alive.
struct TensorObject {
  File file;
  const GgufTensor* tensor;
};

struct MetadataObject {
  File file;
};
struct TensorsObject {
  File file;
};

struct ToPython {
  py::object operator()(bool value) const { return py::bool_(value); }
  py::object operator()(std::int64_t value) const { return py::int_(value); }
  py::object operator()(std::uint64_t value) const { return py::int_(value); }
  py::object operator()(double value) const { return py::float_(value); }
  py::object operator()(const std::string& value) const { return text_to_python(value); }
  py::object operator()(const GgufArray& array) const {
    switch (array.element) {
      case GgufType::String: {
        const std::vector<std::string> strings = array.as_strings();
        py::list list(strings.size());
        for (std::size_t i = 0; i < strings.size(); ++i) list[i] = text_to_python(strings[i]);
        return list;
      }
      case GgufType::F32:
      case GgufType::F64:
        return py::cast(array.as_numbers());
      case GgufType::Bool: {
        py::list list;
        for (const std::int64_t value : array.as_integers()) list.append(py::bool_(value != 0));
        return list;
      }
      default:
        return py::cast(array.as_integers());
    }
  }
};

/// Raises KeyError with any key, whether it could be one of a file or not.
[[noreturn]] void raise_key_error(const py::object& key) {
  PyErr_SetObject(PyExc_KeyError, key.ptr());
  throw py::error_already_set();
}

const GgufEntry* find_entry(const MetadataObject& self, const py::object& key) {
  const std::optional<std::string> text = text_from_python(key);
  return text ? self.file->find(*text) : nullptr;
}

const GgufTensor* find_tensor(const TensorsObject& self, const py::object& name) {
  const std::optional<std::string> text = text_from_python(name);
  return text ? self.file->tensor(*text) : nullptr;
}

py::object metadata_value(const MetadataObject& self, const py::object& key) {
  const GgufEntry* entry = find_entry(self, key);
  if (entry == nullptr) raise_key_error(key);
  return std::visit(ToPython{}, entry->value);
}

py::list metadata_keys(const MetadataObject& self) {
  py::list keys;
  for (const GgufEntry& entry : self.file->metadata()) keys.append(text_to_python(entry.key));
  return keys;
}

py::list tensor_names(const TensorsObject& self) {
  py::list names;
  for (const GgufTensor& tensor : self.file->tensors()) names.append(text_to_python(tensor.name));
  return names;
}

TensorObject tensor_by_name(const TensorsObject& self, const py::object& name) {
  const GgufTensor* tensor = find_tensor(self, name);
  if (tensor == nullptr) raise_key_error(name);
  return {self.file, tensor};
}

py::tuple shape_of(const GgufTensor& tensor) {
  py::tuple shape(tensor.rank);
  for (int i = 0; i < tensor.rank; ++i) shape[static_cast<std::size_t>(i)] = tensor.shape[i];
  return shape;
}

/// "Q4_K"; "type 144" for one that this library does not know.
std::string quant_of(const GgufTensor& tensor) {
  if (tensor.quant == QuantType::Unknown) return "type " + std::to_string(tensor.type_id);
  return std::string(traits(tensor.quant).name);
}

py::array data_of(const TensorObject& self) {
  GgufBytes bytes = [&] {
    const InterruptibleRelease release;  // a file without a mapping is read here
    return self.file->bytes(*self.tensor);
  }();
  return numpy_view(DType::U8, {static_cast<std::int64_t>(bytes.bytes.size())}, bytes.bytes.data(),
                    std::move(bytes.owner));
}

File open_file(const std::filesystem::path& path, bool mmap) {
  File file;
  {
    const InterruptibleRelease release;
    file = GgufFile::open(path, GgufFile::Options{mmap});
  }
  remember_file(file);
  return file;
}

/// A class that behaves as collections.abc.Mapping[str, ...] with our own lookups.
template <class T>
void define_mapping(py::module_& m, py::class_<T>& type, py::list (*keys)(const T&)) {
  const py::object mapping = py::module_::import("collections.abc").attr("Mapping");
  type.def("__iter__", [keys](const T& self) { return py::iter(keys(self)); });
  for (const char* name : {"get", "keys", "items", "values", "__eq__", "__ne__"})
    type.attr(name) = mapping.attr(name);
  type.attr("__hash__") = py::none();
  mapping.attr("register")(type);
  static_cast<void>(m);
}

}  // namespace

File gguf_file(const py::object& file, const char* operation) {
  if (py::isinstance<GgufFile>(file)) return file.cast<File>();
  const bool path = py::isinstance<py::str>(file) || py::hasattr(file, "__fspath__");
  require<DTypeError>(path, [&] {
    return Problem{operation, "file", "a GgufFile, or a path", type_name(file), {}};
  });
  return open_file(file.cast<std::filesystem::path>(), true);
}

void bind_gguf(py::module_& m) {
  py::class_<TensorObject>(m, "GgufTensor", py::is_final())
      .def_property_readonly("name",
                             [](const TensorObject& t) { return text_to_python(t.tensor->name); })
      .def_property_readonly("quant", [](const TensorObject& t) { return quant_of(*t.tensor); })
      .def_property_readonly("shape", [](const TensorObject& t) { return shape_of(*t.tensor); })
      .def_property_readonly("nbytes", [](const TensorObject& t) { return t.tensor->nbytes; })
      .def_property_readonly("offset", [](const TensorObject& t) { return t.tensor->offset; })
      .def_property_readonly("shard", [](const TensorObject& t) { return t.tensor->shard; })
      .def_property_readonly("data", &data_of)
      .def("__repr__", [](const TensorObject& t) {
        return text_to_python("moesaic.GgufTensor(" + t.tensor->name + ", " + quant_of(*t.tensor) +
                              std::string(py::repr(shape_of(*t.tensor))) + ")");
      });

  py::class_<MetadataObject> metadata(m, "GgufMetadata", py::is_final());
  metadata.def("__getitem__", &metadata_value, py::arg("key"))
      .def("__len__", [](const MetadataObject& self) { return self.file->metadata().size(); })
      .def("__contains__", [](const MetadataObject& self,
                              const py::object& key) { return find_entry(self, key) != nullptr; })
      .def("__repr__", [](const MetadataObject& self) {
        return "moesaic.GgufMetadata(" + std::to_string(self.file->metadata().size()) + " keys)";
      });
  define_mapping<MetadataObject>(m, metadata, &metadata_keys);

  py::class_<TensorsObject> tensors(m, "GgufTensors", py::is_final());
  tensors.def("__getitem__", &tensor_by_name, py::arg("key"))
      .def("__len__", [](const TensorsObject& self) { return self.file->tensors().size(); })
      .def("__contains__", [](const TensorsObject& self,
                              const py::object& key) { return find_tensor(self, key) != nullptr; })
      .def("__repr__", [](const TensorsObject& self) {
        return "moesaic.GgufTensors(" + std::to_string(self.file->tensors().size()) + " tensors)";
      });
  define_mapping<TensorsObject>(m, tensors, &tensor_names);

  py::class_<GgufFile, File> type(m, "GgufFile", py::is_final());
  reduce_by(type, [](py::handle self) -> py::object {
    const File file = self.cast<File>();
    require_open(*file, "pickle");
    return reduced("gguf_file", source_of(file));
  });
  type.def(py::init(&open_file), py::arg("path"), py::kw_only(), py::arg("mmap") = true)
      .def_property_readonly("path", [](const GgufFile& f) { return path_to_python(f.path()); })
      .def_property_readonly("shard_paths",
                             [](const GgufFile& f) {
                               py::list paths;
                               for (const auto& path : f.shard_paths())
                                 paths.append(path_to_python(path));
                               return paths;
                             })
      .def_property_readonly("version", &GgufFile::version)
      .def_property_readonly("nbytes", &GgufFile::file_bytes)
      .def_property_readonly("metadata", [](const File& f) { return MetadataObject{f}; })
      .def_property_readonly("tensors", [](const File& f) { return TensorsObject{f}; })
      .def_property_readonly("moe_layers", &GgufFile::moe_layers)
      .def_property_readonly("closed", &GgufFile::closed)
      .def("_source", &source_of)
      .def("close", &GgufFile::close)
      .def("__enter__",
           [](const File& f) {
             require_open(*f, "GgufFile");
             return f;
           })
      .def("__exit__",
           [](GgufFile& f, const py::args& exc_info) {
             try {
               f.close();
             } catch (const DeviceError&) {
               // The frames of an exception on its way out may still hold views; it matters more.
               if (exc_info.empty() || exc_info[0].is_none()) throw;
             }
           })
      .def("__repr__", [](const GgufFile& f) {
        return text_to_python("moesaic.GgufFile(" + f.path().string() + ", " +
                              std::to_string(f.tensors().size()) + " tensors, " +
                              std::to_string(f.file_bytes()) + " bytes" +
                              (f.closed() ? ", closed)" : ")"));
      });
}

}  // namespace moesaic::python
