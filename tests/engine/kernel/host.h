// What CUDA has built in and C++ hasn't, for `emulator.py`.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
using std::max; using std::min;
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __builtin_assume(v)
struct Index { int x, y; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim{288, 1};
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct ulonglong2 { unsigned long long x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static int4 make_int4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class A, class B> static A bits(B b) { A a; static_assert(sizeof(a) == sizeof(b)); memcpy(&a, &b, sizeof a); return a; }
static float __uint_as_float(unsigned v) { return bits<float>(v); }
static unsigned __float_as_uint(float v) { return bits<unsigned>(v); }
static float rsqrtf(float v) { return 1 / sqrtf(v); }
#define __expf expf
static int __ffs(int v) { return __builtin_ffs(v); }
static int atomicAdd(unsigned* at, int v) { *at += v; return *at - v; }
static int atomicMax(int* at, int v) { int old = *at; *at = max(old, v); return old; }
static void __threadfence() {}
static unsigned long long __cvta_generic_to_shared(const void* p) { return (unsigned long long)p; }
static std::barrier<> everyone(288), consumers(256);
static void __syncthreads() { everyone.arrive_and_wait(); }
struct Warp { std::barrier<> all{32}; unsigned values[32][8]; };
static Warp warps[9];
static Warp& warp() { return warps[threadIdx.x / 32]; }
static void __syncwarp() { warp().all.arrive_and_wait(); }
// Let each lane write 8 words, and run `read` when all have.
template <class F> static auto exchange(std::initializer_list<unsigned> mine, F read) {
  std::copy(mine.begin(), mine.end(), warp().values[threadIdx.x % 32]);
  __syncwarp();
  auto result = read(warp().values);
  __syncwarp();
  return result;
}
template <class V> static V __shfl_xor_sync(unsigned, V v, int o) { return exchange({bits<unsigned>(v)}, [&](auto& all) { return bits<V>(all[threadIdx.x % 32 ^ o][0]); }); }
template <class V> static V __shfl_up_sync(unsigned, V v, int o) { return exchange({bits<unsigned>(v)}, [&](auto& all) { return bits<V>(all[max(0, threadIdx.x % 32 - o)][0]); }); }
static unsigned __ballot_sync(unsigned, bool v) { return exchange({v}, [&](auto& all) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (unsigned)(all[i][0] & 1) << i; return r; }); }
