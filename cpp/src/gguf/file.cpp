#include <algorithm>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>

#include "base/hash.hpp"
#include "gguf/mapped_file.hpp"
#include "gguf/reader.hpp"
#include "gguf/shards.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic {
namespace {

/// One file of the model while it is open. The descriptor stays beside the mapping: a store reads
/// through it, and a path may lead to another file by then.
struct Shard {
  std::uint64_t size = 0;
  std::shared_ptr<const gguf::Mapping> mapping;
  std::shared_ptr<const gguf::InputFile> file;
};

using NameIndex = std::unordered_map<std::string_view, std::size_t>;

}  // namespace

struct GgufFile::Impl {
  std::filesystem::path path;
  std::vector<std::filesystem::path> shard_paths;
  std::uint32_t version = 0;
  std::uint64_t file_bytes = 0;
  bool mapped = true;
  std::uint64_t fingerprint = 0;

  gguf::HeadBytes metadata;  // what the arrays in `entries` point into
  std::vector<GgufEntry> entries;
  std::vector<GgufTensor> tensors;
  NameIndex entry_index, tensor_index;

  mutable LeafMutex mutex;  // guards what close() changes
  std::vector<Shard> shards;
  bool closed = false;

  void add_shard(std::shared_ptr<const gguf::InputFile> file, gguf::FileIndex& index,
                 const Options& options) {
    const auto number = static_cast<std::uint32_t>(shards.size());
    for (GgufTensor& tensor : index.tensors) {
      tensor.shard = number;
      tensors.push_back(std::move(tensor));
    }
    file_bytes += file->size();
    shard_paths.push_back(file->path());
    Shard shard;
    shard.size = file->size();
    if (options.mmap) shard.mapping = file->map();
    shard.file = std::move(file);
    shards.push_back(std::move(shard));
  }

  void add_metadata(gguf::FileIndex& index) {
    version = index.version;
    metadata = std::move(index.metadata);
    entries = std::move(index.entries);
  }

  /// The file of a tensor that bytes() may give.
  Shard shard_of(const GgufTensor& tensor) const;

  /// Call when all shards are there.
  void take_fingerprint() {
    Hash hash;
    for (const Shard& shard : shards) {
      hash.add(shard.size);
      hash.add(static_cast<std::uint64_t>(shard.file->changed_ns()));
    }
    for (const GgufTensor& tensor : tensors) {
      hash.add(tensor.name);
      for (const std::uint64_t number :
           {std::uint64_t{tensor.type_id}, std::uint64_t{tensor.shard}, tensor.offset}) {
        hash.add(number);
      }
      for (int i = 0; i < tensor.rank; ++i) hash.add(static_cast<std::uint64_t>(tensor.shape[i]));
    }
    fingerprint = hash.value();
  }

  /// Call last: the indexes view names in `entries` and `tensors`, which must not change any more.
  void build_indexes() {
    for (std::size_t i = 0; i < entries.size(); ++i) entry_index.emplace(entries[i].key, i);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto [other, added] = tensor_index.emplace(tensors[i].name, i);
      require<FormatError>(added, [&] {
        return Problem{
            "GgufFile",
            shard_paths[tensors[i].shard].string() + ": tensor " + gguf::quote(tensors[i].name),
            "unique tensor names",
            "the name also in " + shard_paths[tensors[other->second].shard].string(),
            {}};
      });
    }
  }
};

namespace {

struct OpenedFile {
  std::shared_ptr<const gguf::InputFile> file;
  gguf::FileIndex index;
  gguf::SplitInfo split;
};

OpenedFile open_one(const std::filesystem::path& path) {
  OpenedFile opened;
  opened.file = std::make_shared<const gguf::InputFile>(path);
  opened.index = gguf::read_index(*opened.file);
  opened.split = gguf::read_split(path, opened.index.entries, opened.index.tensors.size());
  return opened;
}

void require_shard(const std::filesystem::path& path, const char* key, std::int64_t expected,
                   std::int64_t got) {
  require<FormatError>(expected == got, [&] {
    return Problem{"GgufFile", path.string() + ": " + key, std::to_string(expected),
                   std::to_string(got), "the shards are not of one model"};
  });
}

}  // namespace

GgufFile::GgufFile() : impl_(std::make_unique<Impl>()) {}
GgufFile::~GgufFile() = default;

std::shared_ptr<GgufFile> GgufFile::open(const std::filesystem::path& path) {
  return open(path, Options{});
}

std::shared_ptr<GgufFile> GgufFile::open(const std::filesystem::path& path, Options options) {
  std::shared_ptr<GgufFile> result(new GgufFile());
  Impl& impl = *result->impl_;
  impl.path = path;
  impl.mapped = options.mmap;

  OpenedFile given = open_one(path);
  const gguf::SplitInfo split = given.split;
  if (split.count == 1) {
    impl.add_metadata(given.index);
    impl.add_shard(std::move(given.file), given.index, options);
  } else {
    std::optional<std::int64_t> total;
    const std::vector<std::filesystem::path> paths = gguf::shard_paths(path, split);
    for (std::int64_t i = 0; i < split.count; ++i) {
      const std::filesystem::path& shard_path = paths[static_cast<std::size_t>(i)];
      OpenedFile shard = i == split.index ? std::move(given) : open_one(shard_path);
      require_shard(shard_path, "split.count", split.count, shard.split.count);
      require_shard(shard_path, "split.no", i, shard.split.index);
      if (!total) total = shard.split.tensors;
      require_shard(shard_path, "split.tensors.count", total.value_or(0),
                    shard.split.tensors.value_or(total.value_or(0)));
      // Only the first shard holds metadata besides the split.* keys.
      if (i == 0) impl.add_metadata(shard.index);
      impl.add_shard(std::move(shard.file), shard.index, options);
    }
    const auto found = static_cast<std::int64_t>(impl.tensors.size());
    require_shard(path, "split.tensors.count (of all shards)", total.value_or(found), found);
  }
  impl.take_fingerprint();
  impl.build_indexes();
  return result;
}

const std::filesystem::path& GgufFile::path() const { return impl_->path; }
std::span<const std::filesystem::path> GgufFile::shard_paths() const { return impl_->shard_paths; }
std::uint32_t GgufFile::version() const { return impl_->version; }
std::uint64_t GgufFile::file_bytes() const { return impl_->file_bytes; }
bool GgufFile::mapped() const { return impl_->mapped; }
std::uint64_t GgufFile::fingerprint() const { return impl_->fingerprint; }

std::filesystem::path GgufFile::weight_cache(const std::filesystem::path& parent) const {
  const std::filesystem::path& file = impl_->shard_paths.front();
  return (parent.empty() ? file.parent_path() : parent) / (file.filename().string() + ".panels");
}

std::span<const GgufEntry> GgufFile::metadata() const { return impl_->entries; }
std::span<const GgufTensor> GgufFile::tensors() const { return impl_->tensors; }

const GgufEntry* GgufFile::find(std::string_view key) const {
  const auto found = impl_->entry_index.find(key);
  return found == impl_->entry_index.end() ? nullptr : &impl_->entries[found->second];
}

const GgufTensor* GgufFile::tensor(std::string_view name) const {
  const auto found = impl_->tensor_index.find(name);
  return found == impl_->tensor_index.end() ? nullptr : &impl_->tensors[found->second];
}

Shard GgufFile::Impl::shard_of(const GgufTensor& tensor) const {
  Shard shard;
  {
    const std::lock_guard lock(mutex);
    require<DeviceError>(!closed, [&] {
      return Problem{"GgufFile::bytes", path.string(), "an open file", "a closed one", {}};
    });
    require<FormatError>(tensor.shard < shards.size(), [&] {
      return Problem{"GgufFile::bytes",
                     "tensor " + gguf::quote(tensor.name),
                     "a tensor of this file",
                     "shard " + std::to_string(tensor.shard),
                     {}};
    });
    shard = shards[tensor.shard];
  }
  require<UnsupportedError>(tensor.quant != QuantType::Unknown, [&] {
    return Problem{
        "GgufFile::bytes", "tensor " + gguf::quote(tensor.name), "a known ggml type",
        std::to_string(tensor.type_id) + ": " + std::string(quant_id_remark(tensor.type_id)),
        path.string()};
  });
  if (tensor.nbytes == 0) return shard;
  // This holds for every tensor of this file; a tensor of another file must not make it read
  // outside.
  require<FormatError>(
      tensor.nbytes <= shard.size && tensor.offset <= shard.size - tensor.nbytes, [&] {
        return Problem{
            "GgufFile::bytes",
            "tensor " + gguf::quote(tensor.name),
            "a tensor of this file",
            std::to_string(tensor.nbytes) + " bytes at byte " + std::to_string(tensor.offset),
            {}};
      });
  return shard;
}

namespace {

/// A copy of `size` bytes of a tensor, from `begin` of its file on.
GgufBytes read_piece(const gguf::InputFile& file, const GgufTensor& tensor, std::uint64_t begin,
                     std::size_t size) {
  if (size == 0) return {};
  constexpr std::align_val_t kAlignment{64};
  auto* memory = static_cast<std::byte*>(::operator new(size, kAlignment, std::nothrow));
  require<OutOfMemoryError>(memory != nullptr, [&] {
    return Problem{"GgufFile::bytes",
                   "tensor " + gguf::quote(tensor.name),
                   std::to_string(size) + " bytes of memory",
                   "none",
                   {}};
  });
  const std::shared_ptr<std::byte> buffer(
      memory, [](std::byte* bytes) { ::operator delete(bytes, kAlignment); });
  file.read(begin, {buffer.get(), size});
  return {buffer, {buffer.get(), size}};
}

}  // namespace

GgufBytes GgufFile::bytes(const GgufTensor& tensor) const {
  return bytes(tensor, 0, tensor.nbytes);
}

GgufBytes GgufFile::bytes(const GgufTensor& tensor, std::uint64_t begin, std::uint64_t size) const {
  const Shard shard = impl_->shard_of(tensor);
  require<ShapeError>(begin <= tensor.nbytes && size <= tensor.nbytes - begin, [&] {
    return Problem{"GgufFile::bytes",
                   "tensor " + gguf::quote(tensor.name),
                   "some of " + std::to_string(tensor.nbytes) + " bytes",
                   std::to_string(size) + " from byte " + std::to_string(begin) + " on",
                   {}};
  });
  if (size == 0) return {};
  if (shard.mapping == nullptr) {
    return read_piece(*shard.file, tensor, tensor.offset + begin, static_cast<std::size_t>(size));
  }
  const auto piece = shard.mapping->bytes().subspan(static_cast<std::size_t>(tensor.offset + begin),
                                                    static_cast<std::size_t>(size));
  return {gguf::lend(shard.mapping, piece), piece};
}

GgufBytes GgufFile::read(const GgufTensor& tensor) const {
  const Shard shard = impl_->shard_of(tensor);
  return read_piece(*shard.file, tensor, tensor.offset, static_cast<std::size_t>(tensor.nbytes));
}

ReadBytes GgufFile::reader() const {
  struct Piece {
    std::span<const std::byte> mapped;
    std::shared_ptr<const gguf::InputFile> file;
  };
  std::vector<Piece> pieces;
  {
    const std::lock_guard lock(impl_->mutex);
    for (const Shard& shard : impl_->shards) {
      if (shard.mapping != nullptr) pieces.push_back({shard.mapping->bytes(), shard.file});
    }
  }
  if (pieces.empty()) return {};
  return [pieces = std::move(pieces)](const std::byte* at, std::span<std::byte> out) {
    for (const auto& [mapped, file] : pieces) {
      if (at < mapped.data() || at >= mapped.data() + mapped.size()) continue;
      file->read(static_cast<std::uint64_t>(at - mapped.data()), out);
      return;
    }
    throw FormatError(
        Problem{"GgufFile::reader", "bytes", "some of this file's mapping", "others", {}});
  };
}

void GgufFile::close() {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->closed) return;
  for (std::size_t i = 0; i < impl_->shards.size(); ++i) {
    const long holders = impl_->shards[i].mapping.use_count() - 1;
    require<DeviceError>(holders <= 0, [&] {
      return Problem{"GgufFile::close", impl_->shard_paths[i].string(),
                     "no holders of its tensors' bytes", std::to_string(holders),
                     "release the expert stacks and arrays made from it first"};
    });
  }
  impl_->shards.clear();
  impl_->closed = true;
}

bool GgufFile::closed() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->closed;
}

std::vector<std::shared_ptr<const gguf::InputFile>> GgufFile::input_files() const {
  const std::lock_guard lock(impl_->mutex);
  std::vector<std::shared_ptr<const gguf::InputFile>> files;
  for (const Shard& shard : impl_->shards) files.push_back(shard.file);
  return files;
}

bool GgufTensor::has_shape(std::initializer_list<std::int64_t> dims) const {
  const std::int64_t* const last = dims.end() - 1;
  const auto count = static_cast<int>(dims.size());
  for (int i = 0; i < std::max(rank, count); ++i) {
    if (ne(i) != (i < count ? *(last - i) : 1)) return false;
  }
  return true;
}

std::string GgufTensor::shape_text() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace moesaic
