// Numbers of 16 bits (BF16: of which kind), and functions of one number, for all kernels.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short T;  // FP16 or BF16
typedef u32 T2;            // two of them, the first in the low half
#if BF16
#define TYPE "bf16"
__device__ __forceinline__ float wide(T v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ float2 wide(T2 v) { return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
#else
#define TYPE "f16"
__device__ __forceinline__ float wide(T v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ float2 wide(T2 v) { return make_float2(wide((T)v), wide((T)(v >> 16))); }
#endif
__device__ __forceinline__ T2 narrow(float a, float b) { T2 v; asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a)); return v; }
__device__ __forceinline__ T narrow(float a) { return (T)narrow(a, 0.f); }

enum Activation { NONE, RELU, GELU, GELU_TANH, SILU, QUICK_GELU, TANH, SIGMOID, SOFTCAP };
enum Norm { NO_NORM, RMS, LAYER };
enum Angles { FULL, HALVES, PAIRS };

__device__ __forceinline__ float total(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
__device__ __forceinline__ float activate(float v, int act, float limit) {  // with constant `act`
  switch (act) {
    case RELU: return fmaxf(v, 0.f);
    case GELU: return 0.5f * v * (1.f + erff(v * 0.70710678f));
    case GELU_TANH: return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case SILU: return v / (1.f + __expf(-v));
    case QUICK_GELU: return v / (1.f + __expf(-1.702f * v));
    case TANH: return tanhf(v);
    case SIGMOID: return 1.f / (1.f + __expf(-v));
    case SOFTCAP: return limit * tanhf(v / limit);
    default: return v;
  }
}
