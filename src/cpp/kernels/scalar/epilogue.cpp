#include <math.h>

#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A NaN stays one.
float at_most(float x, float most) { return x > most ? most : x; }
float clamp(float x, float most) { return at_most(x < -most ? -most : x, most); }

}  // namespace

void transpose(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst, ptrdiff_t dst_stride) {
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < rows; ++i) dst[j * dst_stride + i] = src[i * src_stride + j];
}

void sum_scaled(int n, int count, const float* const* x, const float* scale, float* y) {
  for (int i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < count; ++j) sum += scale[j] * x[j][i];
    y[i] = sum;
  }
}

void round_scaled(int n, float scale, const float* x, uint16_t* y) {
  for (int i = 0; i < n; ++i) y[i] = round(scale * x[i]);
}

// silu(g) = g * sigmoid(g) and its derivative sigmoid(g) * (1 + g * (1 - sigmoid(g))).
void silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h) {
  for (int i = 0; i < n; ++i) {
    g_saved[i] = round(g[i]);
    u_saved[i] = round(u[i]);
    h[i] = round(g[i] * sigmoid(g[i]) * u[i]);
  }
}

float silu_backward(int n, const float* dh, float weight, const uint16_t* g_saved, const uint16_t* u_saved,
                    uint16_t* dg, uint16_t* du, uint16_t* h) {
  float dot = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float g = widen(g_saved[i]), u = widen(u_saved[i]);
    const float s = sigmoid(g), act = g * s;
    dot += dh[i] * (act * u);
    dg[i] = round(weight * dh[i] * u * (s * (1.0f + g * (1.0f - s))));
    du[i] = round(weight * dh[i] * act);
    h[i] = round(act * u);
  }
  return dot;
}

// The derivative of g * sigmoid(alpha * g) is s + alpha * g * s * (1 - s), s = sigmoid(alpha * g).
void gpt_oss_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                     uint16_t* h) {
  for (int i = 0; i < n; ++i) {
    const float gate = at_most(g[i], kGptOssLimit), up = clamp(u[i], kGptOssLimit) + 1.0f;
    g_saved[i] = round(g[i] > kGptOssLimit ? g[i] * kBeyondLimit : g[i]);
    u_saved[i] = round(fabsf(u[i]) > kGptOssLimit ? u[i] * kBeyondLimit : u[i]);
    h[i] = round(gate * sigmoid(kGptOssAlpha * gate) * up);
  }
}

float gpt_oss_backward(int n, const float* dh, float weight, const uint16_t* g_saved, const uint16_t* u_saved,
                       uint16_t* dg, uint16_t* du, uint16_t* h) {
  float dot = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float g = widen(g_saved[i]), u = widen(u_saved[i]);
    const float gate = at_most(g, kGptOssLimit), up = clamp(u, kGptOssLimit) + 1.0f;
    const float s = sigmoid(kGptOssAlpha * gate), act = gate * s;
    const float slope = s + kGptOssAlpha * act * (1.0f - s);
    dot += dh[i] * (act * up);
    dg[i] = g > kGptOssLimit ? 0 : round(weight * dh[i] * up * slope);
    du[i] = fabsf(u) > kGptOssLimit ? 0 : round(weight * dh[i] * act);
    h[i] = round(act * up);
  }
  return dot;
}

void clamped_silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                          uint16_t* h) {
  for (int i = 0; i < n; ++i) {
    const float gate = at_most(g[i], kClampedSiluLimit), up = clamp(u[i], kClampedSiluLimit);
    g_saved[i] = round(g[i] > kClampedSiluLimit ? g[i] * kBeyondLimit : g[i]);
    u_saved[i] = round(fabsf(u[i]) > kClampedSiluLimit ? u[i] * kBeyondLimit : u[i]);
    h[i] = round(gate * sigmoid(gate) * up);
  }
}

float clamped_silu_backward(int n, const float* dh, float weight, const uint16_t* g_saved,
                            const uint16_t* u_saved, uint16_t* dg, uint16_t* du, uint16_t* h) {
  float dot = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float g = widen(g_saved[i]), u = widen(u_saved[i]);
    const float gate = at_most(g, kClampedSiluLimit), up = clamp(u, kClampedSiluLimit);
    const float s = sigmoid(gate), act = gate * s;
    const float slope = s + act * (1.0f - s);
    dot += dh[i] * (act * up);
    dg[i] = g > kClampedSiluLimit ? 0 : round(weight * dh[i] * up * slope);
    du[i] = fabsf(u) > kClampedSiluLimit ? 0 : round(weight * dh[i] * act);
    h[i] = round(act * up);
  }
  return dot;
}

// The derivative of g * sigmoid(z), z = slope * (g + cubic * g^3), is s + g * s * (1 - s) * dz / dg. z is
// taken of a g that is not far, so that no infinity meets the 0 of s or 1 - s.
void gelu_tanh_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                       uint16_t* h) {
  for (int i = 0; i < n; ++i) {
    const float near = clamp(g[i], kGeluFar);
    const float z = kGeluSlope * near * (1.0f + kGeluCubic * near * near);
    g_saved[i] = round(g[i]);
    u_saved[i] = round(u[i]);
    h[i] = round(g[i] * sigmoid(z) * u[i]);
  }
}

float gelu_tanh_backward(int n, const float* dh, float weight, const uint16_t* g_saved,
                         const uint16_t* u_saved, uint16_t* dg, uint16_t* du, uint16_t* h) {
  float dot = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float g = widen(g_saved[i]), u = widen(u_saved[i]), near = clamp(g, kGeluFar);
    const float square = near * near;
    const float z = kGeluSlope * near * (1.0f + kGeluCubic * square);
    const float z_by_g = kGeluSlope * (1.0f + 3.0f * kGeluCubic * square);
    const float s = sigmoid(z), act = g * s;
    const float slope = s + act * (1.0f - s) * z_by_g;
    dot += dh[i] * (act * u);
    dg[i] = round(weight * dh[i] * u * slope);
    du[i] = round(weight * dh[i] * act);
    h[i] = round(act * u);
  }
  return dot;
}

}  // namespace kt::scalar
