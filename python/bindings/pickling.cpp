#include "pickling.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <filesystem>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/hash.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

// Neither table is ever destroyed: they hold Python objects, and end after Python.

std::unordered_map<PyTypeObject*, Reduce>& reducers() {
  static auto* const table = new std::unordered_map<PyTypeObject*, Reduce>;
  return *table;
}

struct Origin {
  std::weak_ptr<const void> object;
  py::object reduced;
};

std::unordered_map<const void*, Origin>& origins() {
  static auto* const table = new std::unordered_map<const void*, Origin>;
  return *table;
}

struct AddValue {
  Hash& hash;
  void operator()(bool value) const { hash.add(std::uint64_t{value}); }
  void operator()(std::int64_t value) const { hash.add(static_cast<std::uint64_t>(value)); }
  void operator()(std::uint64_t value) const { hash.add(value); }
  void operator()(double value) const { hash.add(std::to_string(value)); }
  void operator()(const std::string& value) const { hash.add(value); }
  // Vocabularies are long, and no layer depends on them.
  void operator()(const GgufArray& value) const {
    constexpr std::size_t kLong = 4096;
    hash.add(value.count);
    if (value.bytes.size() > kLong) return;
    hash.add(value.bytes);
  }
};

/// The hash of the tensor infos and of the metadata, in which long arrays count by their lengths.
std::uint64_t hash_of(const GgufFile& file) {
  Hash hash;
  for (const GgufTensor& tensor : file.tensors()) {
    hash.add(tensor.name);
    for (const std::uint64_t number :
         {std::uint64_t{tensor.type_id}, std::uint64_t{tensor.shard}, tensor.offset}) {
      hash.add(number);
    }
    for (int i = 0; i < tensor.rank; ++i) hash.add(static_cast<std::uint64_t>(tensor.shape[i]));
  }
  for (const GgufEntry& entry : file.metadata()) {
    hash.add(entry.key);
    std::visit(AddValue{hash}, entry.value);
  }
  return hash.value();
}

}  // namespace

void reduce_by(py::handle type, Reduce reduce) {
  reducers()[reinterpret_cast<PyTypeObject*>(type.ptr())] = std::move(reduce);
}

py::object reduce(const py::object& self) {
  const auto found = reducers().find(Py_TYPE(self.ptr()));
  if (found == reducers().end()) {
    throw py::type_error("cannot pickle or copy a " + std::string(Py_TYPE(self.ptr())->tp_name));
  }
  return found->second(self);
}

py::object pickling_function(const char* name) {
  return py::module_::import("moesaic._pickling").attr(name);
}

void remember_origin(const std::shared_ptr<const void>& object, py::object reduced) {
  // What is dropped may run code of Python, so it is dropped when the table is whole again.
  std::vector<py::object> dropped;
  auto& table = origins();
  for (auto at = table.begin(); at != table.end();) {
    if (at->second.object.expired()) {
      dropped.push_back(std::move(at->second.reduced));
      at = table.erase(at);
    } else {
      ++at;
    }
  }
  table.insert_or_assign(object.get(), Origin{object, std::move(reduced)});
}

py::object find_origin(const std::shared_ptr<const void>& object) {
  const auto found = origins().find(object.get());
  if (found == origins().end() || found->second.object.expired()) return py::none();
  return found->second.reduced;
}

py::object origin_of(const std::shared_ptr<const void>& object, const char* label) {
  py::object reduced = find_origin(object);
  require<DTypeError>(!reduced.is_none(), [&] {
    return Problem{"pickle", label, "one read from files, which are read again",
                   "one made of arrays or parts", "save it, or send what it is made of"};
  });
  return reduced;
}

void remember_file(const std::shared_ptr<GgufFile>& file) {
  py::list shards;
  for (const std::filesystem::path& path : file->shard_paths()) {
    std::error_code ignored;  // a shard that is gone differs from any that is there
    const auto size = static_cast<std::int64_t>(std::filesystem::file_size(path, ignored));
    const auto time = std::filesystem::last_write_time(path, ignored).time_since_epoch();
    shards.append(py::make_tuple(path_to_python(path.filename()), size,
                                 static_cast<std::int64_t>(time.count())));
  }
  py::object source =
      call_python(pickling_function("GgufSource"),
                  py::make_tuple(path_to_python(std::filesystem::absolute(file->path())),
                                 file->mapped(), shards, hash_of(*file)));
  remember_origin(file, std::move(source));
}

py::object source_of(const std::shared_ptr<GgufFile>& file) { return find_origin(file); }

py::object html_of(const std::string& label, const py::dict& fields) {
  return call_python(py::module_::import("moesaic._report").attr("html_of_fields"),
                     py::make_tuple(label, fields));
}

}  // namespace moesaic::python
