#include "weights/safetensors.h"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "temp_files.h"

using namespace kt;
using namespace kt::test;

namespace {

SafetensorsHeader header_of(const std::filesystem::path& path) {
  return read_safetensors_header(OpenFile(path));
}

// The message with which a file of these bytes is refused; it always names the file.
std::string refusal(const std::string& bytes) {
  const TempDir dir;
  const auto path = write(dir / "hostile.safetensors", bytes);
  const auto message = message_of<ValueError>([&] { header_of(path); });
  CHECK(contains(message, "hostile.safetensors"));
  return message;
}

std::string header_refusal(const std::string& header, const std::string& data = "") {
  return refusal(file_bytes(header, data));
}

// A U8 tensor of 4 bytes at [begin, end).
std::string tensor(const std::string& name, const std::string& begin, const std::string& end) {
  return message("\"{}\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[{},{}]}", name, begin, end);
}

std::string object(const std::string& members) { return message("{{}}", members); }

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return message("{\"a\":{\"dtype\":{},\"shape\":{},\"data_offsets\":{}}}", dtype, shape, offsets);
}

}  // namespace

TEST_CASE("tensors have their dtype, shape and place, in the order of their names") {
  const TempDir dir;
  const auto path = Writer()
                        .add("b", "BF16", {2, 3}, 2)
                        .add("a", "F32", {}, 4)
                        .add("zero", "I64", {0, 5}, 8)
                        .write_to(dir / "m.safetensors");
  const auto header = header_of(path);
  REQUIRE(header.rows.size() == 3);
  CHECK(header.data_offset + 16 == std::filesystem::file_size(path));
  const auto& [name, b] = header.rows[1];
  CHECK(name == "b");
  CHECK(b.type->name == "BF16");
  CHECK(b.type->dtype == DType::bf16);
  CHECK(b.shape == std::vector<index_t>{2, 3});
  CHECK(b.offset == header.data_offset);
  CHECK(b.nbytes == 12);
  const auto& a = header.rows[0].tensor;
  CHECK(header.rows[0].name == "a");
  CHECK(a.shape.empty());
  CHECK(a.offset == header.data_offset + 12);
  CHECK(a.nbytes == 4);
  CHECK(header.rows[2].tensor.nbytes == 0);
}

TEST_CASE("the order of the header is not the order of the data") {
  const TempDir dir;
  const auto header =
      header_of(write(dir / "m.safetensors",
                      file_bytes(object(tensor("z", "4", "8") + "," + tensor("y", "0", "4")), "abcdefgh")));
  CHECK(header.rows[0].tensor.offset == header.data_offset);
  CHECK(header.rows[1].tensor.offset == header.data_offset + 4);
}

TEST_CASE("a file without tensors, with and without metadata") {
  const TempDir dir;
  for (const std::string text : {"{}", R"({"__metadata__":{"format":"pt","empty":""}})"})
    CHECK(header_of(write(dir / "m.safetensors", file_bytes(text))).rows.empty());
}

TEST_CASE("every dtype of the format has its size") {
  const std::vector<std::pair<std::string, int>> bits{
      {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
      {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
      {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
      {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
  for (const auto& [name, size] : bits) {
    CAPTURE(name);
    const TempDir dir;
    const auto header = one('"' + name + '"', "[4]", message("[0,{}]", size / 2));
    const auto path = write(dir / "m.safetensors",
                            file_bytes(header, std::string(static_cast<std::size_t>(size) / 2, 'x')));
    CHECK(header_of(path).rows[0].tensor.type->bits == size);
  }
}

TEST_CASE("the length of the header is checked against the file and the limit") {
  CHECK(contains(refusal(""), "0 bytes long"));
  CHECK(contains(refusal("1234567"), "7 bytes long"));
  CHECK(contains(refusal(little_endian(2)), "header length is 2, but only 0 bytes follow"));
  CHECK(contains(refusal(little_endian(3) + "{}"), "header length is 3, but only 2 bytes follow"));
  CHECK(contains(refusal(little_endian(100'000'001) + "{}"), "wanted at most 100000000"));
  CHECK(contains(refusal(little_endian(~0ull) + "{}"), "wanted at most 100000000"));
  CHECK(contains(refusal(little_endian(~0ull - 7) + "{}"), "wanted at most 100000000"));
}

TEST_CASE("what is not a JSON object is refused") {
  for (const std::string text : {"", " {}", "[]", "7", "null", "\"{}\"", "\xef\xbb\xbf{}", "hello"}) {
    CAPTURE(text);
    CHECK(contains(header_refusal(text), "does not begin with '{'"));
  }
  for (const std::string text :
       {"{", "{}}", "{} x", "{\"a\"}", "{\"__metadata__\":{},}", "{'a':1}", "{\"a\":nan}", "{/**/}",
        "{\"\xff\":{}}", "{\"\\ud800\":{}}", "{\"a\":1e999}"}) {
    CAPTURE(text);
    CHECK(contains(header_refusal(text), "syntax error"));
  }
  CHECK(contains(header_refusal(std::string("{}\0{\"a\"", 7)), "NUL byte at 2"));
}

TEST_CASE("nesting costs nothing") {
  const std::string deep(1'000'000, '[');
  header_refusal("{\"a\":" + deep);
  header_refusal(R"({"a":{"dtype":"U8","data_offsets":[0,0],"shape":)" + deep);
  header_refusal(R"({"__metadata__":)" + deep);
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  header_refusal(objects);
}

TEST_CASE("duplicate names and keys are refused") {
  const auto twice = object(tensor("a", "0", "4") + "," + tensor("a", "4", "8"));
  CHECK(contains(header_refusal(twice, "12345678"), R"(duplicate key "a")"));
  CHECK(contains(header_refusal(R"({"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}})", "1"),
                 R"(duplicate key "dtype")"));
  CHECK(contains(header_refusal(R"({"__metadata__":{"x":"","x":""}})"), R"(duplicate key "x")"));
  CHECK(contains(header_refusal(R"({"__metadata__":{},"__metadata__":{}})"), "duplicate key"));
  std::string many = R"("a":"")";
  for (int i = 0; i < 20; ++i) many += message(",\"{}\":\"\"", i);
  for (const std::string again : {"a", "3", "19"}) {
    const auto text = message(R"({"__metadata__":{{},"{}":""}})", many, again);
    CHECK(contains(header_refusal(text), message("duplicate key \"{}\"", again)));
  }
}

TEST_CASE("offsets outside the data, reversed, or of the wrong size are refused") {
  const auto refused = [](const std::string& begin, const std::string& end) {
    return header_refusal(object(tensor("a", begin, end)), "1234");
  };
  CHECK(contains(refused("0", "5"), "[0, 5]"));
  CHECK(contains(refused("1", "5"), R"(tensor "a")"));
  CHECK(contains(refused("4", "0"), "ordered pair"));
  CHECK(contains(refused("18446744073709551612", "18446744073709551615"), "within the 4 bytes"));
  CHECK(contains(refused("0", "3"), "span 3 bytes, but [4] of U8 takes 4"));
  for (const std::string bad : {"-1", "-0", "0.0", "1e3", "18446744073709551616", "null", "true", "\"0\""}) {
    CAPTURE(bad);
    CHECK(contains(refused(bad, "4"), "wanted non-negative integers"));
  }
  CHECK(contains(refused("[0]", "4"), "holds an array"));
  CHECK(contains(refused("{}", "4"), "holds an object"));
}

TEST_CASE("tensors must tile the data") {
  const auto two = [](const std::string& second_begin, const std::string& second_end, std::size_t size) {
    return header_refusal(object(tensor("a", "0", "4") + "," + tensor("b", second_begin, second_end)),
                          std::string(size, 'x'));
  };
  CHECK(contains(two("2", "6", 6), R"(tensors "a" and "b" overlap)"));
  CHECK(contains(two("0", "4", 4), "overlap"));
  CHECK(contains(two("5", "9", 9), R"("b" begins at 5, wanted 4)"));
  CHECK(contains(two("4", "8", 9), "end at byte 8 of 9"));
  CHECK(contains(header_refusal("{}", "x"), "end at byte 0 of 1"));
}

TEST_CASE("sizes that overflow or are no whole bytes are refused") {
  CHECK(contains(header_refusal(one("\"F32\"", "[4294967296,4294967296]", "[0,0]")), "overflows"));
  CHECK(contains(header_refusal(one("\"U8\"", "[2305843009213693952]", "[0,0]")), "overflows"));
  CHECK(contains(header_refusal(one("\"U8\"", "[9223372036854775808]", "[0,0]")), "less than 2^63"));
  CHECK(contains(header_refusal(one("\"F4\"", "[3]", "[0,2]"), "12"), "whole bytes"));
  std::string many = "[1";
  for (int i = 0; i < 64; ++i) many += ",1";
  CHECK(contains(header_refusal(one("\"U8\"", many + "]", "[0,1]"), "1"), "more than 64"));
}

TEST_CASE("fields of the wrong kind, unknown or absent are refused by name") {
  CHECK(contains(header_refusal(one("\"F7\"", "[]", "[0,1]"), "1"), R"(dtype "F7" is unknown)"));
  CHECK(contains(header_refusal(one("\"bf16\"", "[]", "[0,1]"), "1"), R"(dtype "bf16" is unknown)"));
  CHECK(contains(header_refusal(one("16", "[]", "[0,1]"), "1"), "dtype is a number, wanted a string"));
  CHECK(contains(header_refusal(one("\"U8\"", "4", "[0,4]"), "1234"), R"(a number as its "shape")"));
  CHECK(contains(header_refusal(one("\"U8\"", "{}", "[0,4]"), "1234"), "object as its shape"));
  CHECK(contains(header_refusal(one("\"U8\"", "[4.0]", "[0,4]"), "1234"), "shape holds"));
  CHECK(contains(header_refusal(one("\"U8\"", "[-4]", "[0,4]"), "1234"), "shape holds"));
  CHECK(contains(header_refusal(one("\"U8\"", "[4]", "[0]"), "1234"), "holds 1 numbers, wanted 2"));
  CHECK(contains(header_refusal(one("\"U8\"", "[4]", "[0,2,4]"), "1234"), "holds 3 numbers, wanted 2"));
  CHECK(contains(header_refusal(R"({"a":{"shape":[],"data_offsets":[0,1]}})", "1"), "no dtype"));
  CHECK(contains(header_refusal(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", "1"), "no shape"));
  CHECK(contains(header_refusal(R"({"a":{"dtype":"U8","shape":[]}})", "1"), "no data_offsets"));
  CHECK(contains(header_refusal(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":1}})", "1"),
                 "\"x\""));
  CHECK(contains(header_refusal(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":[]}})", "1"),
                 "\"x\""));
  CHECK(contains(header_refusal(R"({"a":[]})"), R"("a" is an array, wanted an object)"));
  CHECK(contains(header_refusal(R"({"a":"b"})"), R"("a" is a string, wanted an object)"));
  CHECK(contains(header_refusal(R"({"__metadata__":{"x":1}})"), R"(__metadata__ maps "x" to a number)"));
  CHECK(contains(header_refusal(R"({"__metadata__":{"x":{}}})"), R"(__metadata__ maps "x" to an object)"));
}

TEST_CASE("a message stays short and printable whatever the name") {
  const auto message = header_refusal("{\"" + std::string(1'000'000, 'n') + "\\u0000\\n\":1}");
  CHECK(message.size() < 1000);
  CHECK(contains(header_refusal(R"({"a\u0000\n":1})"), R"("a\u0000\n")"));
}

TEST_CASE("truncation at every byte is an error") {
  const TempDir dir;
  const auto whole =
      file_bytes(object(tensor("a", "0", "4") + R"(,"__metadata__":{"format":"pt"})") + " ", "1234");
  CHECK(header_of(write(dir / "m.safetensors", whole)).rows.size() == 1);
  for (std::size_t n = 0; n < whole.size(); ++n) {
    CAPTURE(n);
    refusal(whole.substr(0, n));
  }
}

TEST_CASE("what cannot be opened says why") {
  const TempDir dir;
  CHECK(contains(message_of<NotFoundError>([&] { header_of(dir / "none"); }), "none"));
  CHECK(contains(message_of<NotFoundError>([&] { header_of(write(dir / "f", "") / "below"); }), "below"));
  CHECK(contains(message_of<ValueError>([&] { header_of(dir.path()); }), "not a regular file"));
  CHECK(contains(message_of<ValueError>([&] { header_of("/dev/zero"); }), "not a regular file"));
  REQUIRE(::mkfifo((dir / "fifo").c_str(), 0600) == 0);
  CHECK(contains(message_of<ValueError>([&] { header_of(dir / "fifo"); }), "not a regular file"));
  std::filesystem::create_symlink(dir / "loop", dir / "loop");
  message_of<IoError>([&] { header_of(dir / "loop"); });
}
