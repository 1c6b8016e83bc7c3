// Files for the tests of the weights floor, written by hand so that they can be wrong.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/view.h"
#include "weights/json.h"

namespace kt::test {

class TempDir {
 public:
  TempDir() : path_(std::filesystem::temp_directory_path() / "kt_moe_test_XXXXXX") {
    auto name = path_.native();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::filesystem::path write(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

inline std::string little_endian(std::uint64_t n) {
  std::string bytes(sizeof n, '\0');
  std::memcpy(bytes.data(), &n, sizeof n);
  return bytes;
}

// A file of `header` as it stands and `data`.
inline std::string file_bytes(std::string_view header, std::string_view data = {}) {
  return little_endian(header.size()) + std::string(header) + std::string(data);
}

// Lays tensors out one after the other. Data byte i of the file is i % 251, so every view can be told apart.
class Writer {
 public:
  Writer& add(std::string_view name, std::string_view dtype, const std::vector<index_t>& shape, int size) {
    std::size_t bytes = static_cast<std::size_t>(size);
    for (const index_t n : shape) bytes *= static_cast<std::size_t>(n);
    std::string data(bytes, '\0');
    for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<char>((data_.size() + i) % 251);
    return add_bytes(name, dtype, shape, data);
  }
  // Data of one's own, as many elements as `shape` says or, to be wrong, not.
  template <class T>
  Writer& add(std::string_view name, std::string_view dtype, const std::vector<index_t>& shape,
              const std::vector<T>& elements) {
    return add_bytes(name, dtype, shape,
                     {reinterpret_cast<const char*>(elements.data()), elements.size() * sizeof(T)});
  }

  std::filesystem::path write_to(const std::filesystem::path& path) const {
    auto header = (header_.empty() ? "{" : header_) + "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    return write(path, file_bytes(header, data_));
  }

 private:
  Writer& add_bytes(std::string_view name, std::string_view dtype, const std::vector<index_t>& shape,
                    std::string_view data) {
    header_ +=
        message("{}{}:{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}", header_.empty() ? "{" : ",",
                quote(name), dtype, shape_text(shape), data_.size(), data_.size() + data.size());
    data_ += data;
    return *this;
  }

  std::string header_, data_;
};

// The message of the E that `action` throws; fails the test by another exception or by none.
template <class E, class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  }
  throw std::logic_error("nothing was thrown");
}

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

}  // namespace kt::test
