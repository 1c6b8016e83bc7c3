// What the bytes of stored weights stand for, as the tables of formats and of kernels both know it. Plain
// enums: kernels compiled with -m flags include it.
#pragma once

#include <stdint.h>

namespace kt {

// A weight's code. bf16: itself, so there is nothing to decode. int8: two's complement. int4: two codes a
// byte, the lower bits first, each minus its zero point. e4m3: 8 bits, no infinities. e2m1: two a byte as in
// int4.
enum class CodeType : uint8_t { bf16, int8, int4, e4m3, e2m1 };
constexpr int kCodeTypes = 5;

// The scale of a block of codes. e8m0: 2^(e - 127), and NaN for 255. e4m3: times or over the matrix's global
// scale, as one operation in fp32.
enum class ScaleType : uint8_t { none, f32, bf16, e8m0, e4m3 };
constexpr int kScaleBytes[] = {0, 4, 2, 1, 1};  // of each

}  // namespace kt
