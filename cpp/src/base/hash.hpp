#pragma once

/// Hashes that tell bytes from others by chance, not from those that somebody made to look alike.

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

namespace moesaic {

/// FNV-1a in 64 bits over parts, each with its length (Fowler, Noll, Vo;
/// http://www.isthe.com/chongo/tech/comp/fnv). For a few kilobytes: it goes byte by byte.
class Hash {
 public:
  void add(std::string_view text) {
    add(text.size());
    for (const char c : text) step(static_cast<unsigned char>(c));
  }
  void add(std::span<const std::byte> bytes) {
    add(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  void add(std::uint64_t number) {
    for (int i = 0; i < 8; ++i) step(static_cast<unsigned char>(number >> (8 * i)));
  }
  std::uint64_t value() const { return value_; }

 private:
  void step(unsigned char byte) { value_ = (value_ ^ byte) * 0x100000001b3U; }
  std::uint64_t value_ = 0xcbf29ce484222325U;
};

/// A hash of gigabytes, in blocks of 64 bytes: eight lanes that wait for none of the others. Each
/// step maps a lane one to one, so a change of a single word is never lost.
class BlockHash {
 public:
  static constexpr std::size_t kBlock = 64;

  /// `bytes` is a multiple of kBlock.
  void add(std::span<const std::byte> bytes) {
    for (std::size_t at = 0; at < bytes.size(); at += kBlock) {
      std::array<std::uint64_t, kLanes> words;
      std::memcpy(words.data(), bytes.data() + at, kBlock);
      for (std::size_t i = 0; i < kLanes; ++i) {
        lanes_[i] = std::rotl(lanes_[i] ^ words[i], 29) * 0x9e3779b97f4a7c15U;
      }
    }
    count_ += bytes.size();
  }
  std::uint64_t value() const {
    Hash hash;
    hash.add(count_);
    for (const std::uint64_t lane : lanes_) hash.add(lane);
    return hash.value();
  }

 private:
  static constexpr std::size_t kLanes = kBlock / sizeof(std::uint64_t);
  std::array<std::uint64_t, kLanes> lanes_{1, 2, 3, 4, 5, 6, 7, 8};
  std::uint64_t count_ = 0;
};

}  // namespace moesaic
