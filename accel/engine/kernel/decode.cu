// One persistent kernel runs the fused operations of a plan: one block a multiprocessor, which reads the list of operations.
//
// A producer warp streams this block's slices of all weights and caches, in the order of the list, through a ring in shared
// memory, and never waits for activations. Eight consumer warps wait for the input of each operation by polling it: values
// that blocks exchange are 64-bit words of data and a tag that counts launches, so there is no barrier over the grid.
//
// The compiling code puts before this text: ROWS, BLOCKS, BF16, MEMORY (bytes of shared memory), MAX_K, MAX_NORM, WIDE_X,
// MAX_BIAS, MAX_GROUP, MAX_HEAD, MAX_KEYS; and after it the shapes of all operations, the lists CONSUME and PRODUCE, and main.cu.

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

enum Format { WORDS, WORDS_F32, PLAIN, PLAIN_F32 };  // {T2, tag}; {float, tag}; T; float
enum Activation { NONE, RELU, GELU, GELU_TANH, SILU, QUICK_GELU, TANH, SIGMOID, SOFTCAP };
enum Norm { NO_NORM, RMS, LAYER };
enum Angles { FULL, HALVES, PAIRS };

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int SEGMENT = 1024;                      // features of a weight's row in one slot of the ring
constexpr int UNITS = 8;                           // rows of weights in one slot
constexpr int UNIT_BYTES = SEGMENT * 2 + 64;       // 64 bytes of padding: no bank conflicts between units
constexpr int SLOT_BYTES = UNITS * UNIT_BYTES;
constexpr int KV_BYTES = UNITS * SEGMENT * 2;      // bytes of keys or values in one slot
constexpr int ROUND = ROWS <= 2 ? 16 : ROWS <= 4 ? 8 : 4;  // groups of units between two epilogues
constexpr int IN_FLIGHT = 2;                       // slots that are being copied at a time; measured
constexpr int LOOK = 2048;                         // features to be polled from which on a few lanes look first; measured
constexpr int RECORDS = 4;                         // operations whose records are at hand

// shape: case of CONSUME; length: of a cache; set: of biases
struct alignas(16) Record { int shape, length, set, pad; const void* p[30]; };
constexpr int COPIERS = sizeof(Record) / 16;

struct alignas(16) Rest {  // of the shared memory, beside the ring
  alignas(16) T x[ROWS][MAX_K + 32];
  alignas(16) float wide_x[WIDE_X ? ROWS : 1][WIDE_X ? MAX_NORM : 4];  // FP32 input of a norm
  alignas(16) T norm[2][2][MAX_NORM];
  alignas(16) float part[ROUND][ROWS][UNITS][WARPS];
  alignas(16) Record consumed[RECORDS], produced[RECORDS];
  alignas(16) float raw[MAX_GROUP + 2][MAX_HEAD], query[MAX_GROUP][MAX_HEAD];
  alignas(16) T fresh[2][MAX_HEAD];                // the new key and value
  alignas(16) float weights[WARPS][MAX_GROUP][MAX_KEYS], partial[MAX_GROUP][WARPS][MAX_HEAD];
  alignas(16) float squares[ROWS][MAX_NORM / 128 + 4], sums[ROWS][MAX_NORM / 128 + 4];
  float top[MAX_GROUP][WARPS + 1], mass[MAX_GROUP][WARPS + 1];
  float bias[2][MAX_BIAS];                         // of two sets
  int bias_key[2], position[ROWS];
  u64 norm_full[2], norm_empty[2];
  u32 tag;
};
constexpr int SLOTS = (MEMORY - (int)sizeof(Rest) - 128) / (SLOT_BYTES + 16);
static_assert(SLOTS >= 2, "the ring needs two slots");
struct alignas(128) Shared : Rest {
  u64 full[SLOTS], empty[SLOTS];
  alignas(128) unsigned char ring[SLOTS][SLOT_BYTES];
};
static_assert(sizeof(Shared) <= MEMORY, "more shared memory than there is");

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u64* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(n)); }
__device__ __forceinline__ void arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory"); }
__device__ __forceinline__ void expect(u64* b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory"); }
__device__ __forceinline__ void wait(u64* b, u32 parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(address(b)), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, u64* b, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)), "l"(policy) : "memory");
}
__device__ __forceinline__ void sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }  // consumers
__device__ __forceinline__ ulonglong2 load2(const u64* p) { ulonglong2 v; asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ u64 load1(const u64* p) { u64 v; asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ void store(u64* p, u32 data, u32 tag) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(((u64)tag << 32) | data) : "memory"); }
__device__ __forceinline__ bool has(u64 v, u32 tag) { return (u32)(v >> 32) == tag; }
__device__ __forceinline__ bool has(ulonglong2 v, u32 tag) { return has(v.x, tag) && has(v.y, tag); }
__device__ __forceinline__ float2 both(u64 v) { return wide((T2)v); }
__device__ __forceinline__ u64 now() { u64 t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); return t; }
__device__ __forceinline__ float total(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
// D[16 x 8] += A[16 x 16] (rows of x) * B[16 x 8] (units of W)
__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int N> struct Ring {
  int slot; u32 phase;
  __device__ __forceinline__ void next() { if (++slot == N) { slot = 0; phase ^= 1; } }
};

// The producer's place in the ring. Few copies are under way at once: enough for the memory's bandwidth, and no queue in which
// the words that blocks exchange would wait.
struct Producer {
  Ring<SLOTS> ring, oldest;
  int under_way;
  // Wait until the next slot is free, and the number of copies under way is below IN_FLIGHT.
  __device__ __forceinline__ void acquire(Shared& s) {
    if (under_way == IN_FLIGHT) { wait(&s.full[oldest.slot], oldest.phase); oldest.next(); } else under_way++;
    wait(&s.empty[ring.slot], ring.phase ^ 1);
  }
};

// A wait for words that never come ends with an error that names the operation. From then on nothing is waited for.
struct Watch { int* error; int index; u32 limit; };
__device__ __noinline__ bool overdue(const Watch& watch) {
  atomicCAS(watch.error, 0, watch.index + 1);
  return true;
}
__device__ __forceinline__ ulonglong2 poll2(const u64* p, u32 tag, const Watch& watch) {
  ulonglong2 w;
  u32 spins = 0;
  do { w = load2(p); if (++spins == watch.limit && overdue(watch)) break; } while (!has(w, tag));
  return w;
}
__device__ __forceinline__ u64 poll1(const u64* p, u32 tag, const Watch& watch) {
  u64 w;
  u32 spins = 0;
  do { w = load1(p); if (++spins == watch.limit && overdue(watch)) break; } while (!has(w, tag));
  return w;
}
struct Quad { float2 a, b; };
__device__ __forceinline__ Quad quad(ulonglong2 w) { return {both(w.x), both(w.y)}; }
// Four features from `at` on; `format` is a constant where this is used, as below.
__device__ __forceinline__ Quad load_quad(int format, const void* data, int at, u32 tag, const Watch& watch) {
  if (format == WORDS) return quad(poll2((const u64*)data + at / 2, tag, watch));
  if (format == WORDS_F32) {
    const ulonglong2 w = poll2((const u64*)data + at, tag, watch), z = poll2((const u64*)data + at + 2, tag, watch);
    return {make_float2(__uint_as_float((u32)w.x), __uint_as_float((u32)w.y)), make_float2(__uint_as_float((u32)z.x), __uint_as_float((u32)z.y))};
  }
  if (format == PLAIN) { const uint2 w = *(const uint2*)((const T*)data + at); return {wide((T2)w.x), wide((T2)w.y)}; }
  const float4 w = *(const float4*)((const float*)data + at);
  return {make_float2(w.x, w.y), make_float2(w.z, w.w)};
}
// One feature.
__device__ __forceinline__ float load_one(int format, const void* data, int at, u32 tag, const Watch& watch) {
  if (format == WORDS) { const float2 f = both(poll1((const u64*)data + at / 2, tag, watch)); return at & 1 ? f.y : f.x; }
  if (format == WORDS_F32) return __uint_as_float((u32)poll1((const u64*)data + at, tag, watch));
  return format == PLAIN ? wide(((const T*)data)[at]) : ((const float*)data)[at];
}
// Write features `at` and `at` + 1; `second`: the other exists.
__device__ __forceinline__ void write_pair(int format, void* data, int at, float a, float b, bool second, u32 tag) {
  if (format == WORDS) store((u64*)data + at / 2, narrow(a, b), tag);
  if (format == WORDS_F32) {
    store((u64*)data + at, __float_as_uint(a), tag);
    if (second) store((u64*)data + at + 1, __float_as_uint(b), tag);
  }
  if (format == PLAIN) {
    ((T*)data)[at] = narrow(a);
    if (second) ((T*)data)[at + 1] = narrow(b);
  }
  if (format == PLAIN_F32) {
    ((float*)data)[at] = a;
    if (second) ((float*)data)[at + 1] = b;
  }
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

// Read x [ROWS, K] into shared memory, normalised. A warp takes every eighth tile of 128 features.
template <class C> __device__ __forceinline__ void load_x(Shared& s, const Record& op, Ring<2>& norms, u32 tag, const Watch& watch) {
  constexpr int TILES = (C::K + 127) / 128, MINE = (ROWS * TILES + WARPS - 1) / WARPS, PADDED = (C::K + 31) & ~31;
  constexpr int FLIGHT = MINE < 4 ? MINE : 4;  // tiles of a warp that are loaded at once
  constexpr bool WIDE = C::NORM != NO_NORM && (C::IN == WORDS_F32 || C::IN == PLAIN_F32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u64* const from = (const u64*)op.p[0];
  if (C::IN == WORDS) {
    // Polling slows everyone's memory: where much is to be read, a few lanes look first, at one word of each tile.
    if (ROWS * C::K >= LOOK) {
      if (lane < FLIGHT && warp + lane * WARPS < ROWS * TILES) {
        const int n = warp + lane * WARPS, at = (n / TILES) * C::K + min(n % TILES * 128 + 126, C::K - 2);
        poll1(from + at / 2, tag, watch);
      }
      __syncwarp();
    }
  }
#pragma unroll 1
  for (int n0 = warp; n0 < ROWS * TILES; n0 += WARPS * FLIGHT) {
    ulonglong2 first[FLIGHT];
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
      const int n = n0 + f * WARPS, b = n / TILES, k = n % TILES * 128 + lane * 4;
      if (C::IN == WORDS && (b < ROWS && k < C::K)) first[f] = load2(from + (b * C::K + k) / 2);
    }
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
      const int n = n0 + f * WARPS, b = n / TILES, k = n % TILES * 128 + lane * 4;
      if (b >= ROWS) break;
      Quad v = {make_float2(0, 0), make_float2(0, 0)};
      if (k < C::K) {
        if constexpr (C::IN == WORDS) {
          if (!has(first[f], tag)) first[f] = poll2(from + (b * C::K + k) / 2, tag, watch);
          v = quad(first[f]);
        } else v = load_quad(C::IN, op.p[0], b * C::K + k, tag, watch);
      }
      if (k < PADDED) {
        if (WIDE) *(float4*)(s.wide_x[WIDE ? b : 0] + k) = make_float4(v.a.x, v.a.y, v.b.x, v.b.y);
        else *(uint2*)(s.x[b] + k) = make_uint2(narrow(v.a.x, v.a.y), narrow(v.b.x, v.b.y));
      }
      if (C::NORM != NO_NORM) {
        const float squares = total(v.a.x * v.a.x + v.a.y * v.a.y + v.b.x * v.b.x + v.b.y * v.b.y);
        const float sum = C::NORM == LAYER ? total(v.a.x + v.a.y + v.b.x + v.b.y) : 0.f;
        if (!lane) { s.squares[b][k / 128] = squares; s.sums[b][k / 128] = sum; }
      }
    }
  }
  sync();
  if constexpr (C::NORM != NO_NORM) {
    wait(&s.norm_full[norms.slot], norms.phase);
    const T *weight = s.norm[norms.slot][0], *bias = s.norm[norms.slot][1];
    float mean = 0, factor = 0;
    int row = -1;
#pragma unroll 1
    for (int n = warp; n < ROWS * TILES; n += WARPS) {
      const int b = n / TILES, k = n % TILES * 128 + lane * 4;
      if (b != row) {
        float squares = 0, sum = 0;
#pragma unroll
        for (int i = 0; i < TILES; i++) { squares += s.squares[b][i]; if (C::NORM == LAYER) sum += s.sums[b][i]; }
        mean = sum * (1.f / C::K);
        factor = rsqrtf(squares * (1.f / C::K) - mean * mean + C::epsilon());
        row = b;
      }
      if (k >= C::K) continue;
      Quad v;
      if constexpr (WIDE) { const float4 w = *(const float4*)(s.wide_x[b] + k); v = {make_float2(w.x, w.y), make_float2(w.z, w.w)}; }
      else { const uint2 w = *(const uint2*)(s.x[b] + k); v = {wide((T2)w.x), wide((T2)w.y)}; }
      if (C::NORM == LAYER) { v.a.x -= mean; v.a.y -= mean; v.b.x -= mean; v.b.y -= mean; }
      v.a.x *= factor; v.a.y *= factor; v.b.x *= factor; v.b.y *= factor;
      if (C::NORM_WEIGHT) { const uint2 w = *(const uint2*)(weight + k); const float2 p = wide((T2)w.x), q = wide((T2)w.y); v.a.x *= p.x; v.a.y *= p.y; v.b.x *= q.x; v.b.y *= q.y; }
      if (C::NORM_BIAS) { const uint2 w = *(const uint2*)(bias + k); const float2 p = wide((T2)w.x), q = wide((T2)w.y); v.a.x += p.x; v.a.y += p.y; v.b.x += q.x; v.b.y += q.y; }
      *(uint2*)(s.x[b] + k) = make_uint2(narrow(v.a.x, v.a.y), narrow(v.b.x, v.b.y));
    }
    __syncwarp();
    if (!lane) arrive(&s.norm_empty[norms.slot]);
    norms.next();
    sync();
  }
}

// The groups of units that a block computes of a product: [first, first + count).
template <class C> __device__ __forceinline__ void share(int& first, int& count) {
  constexpr int EACH = C::GROUPS / BLOCKS, EXTRA = C::GROUPS % BLOCKS;
  first = blockIdx.x * EACH + min((int)blockIdx.x, EXTRA);
  count = EACH + ((int)blockIdx.x < EXTRA);
}
// The part that group `group` belongs to; `group` becomes its index there.
template <class C> __device__ __forceinline__ int part_of(int& group) {
  int part = 0;
#pragma unroll
  for (int p = 0; p + 1 < C::PARTS; p++) if (part == p && group >= C::groups(p)) { group -= C::groups(p); part = p + 1; }
  return part;
}
// Pointers of a product's record: x, weight and bias of the norm, five for each part, residuals.
enum { WEIGHT, GATE, BIAS, GATE_BIAS, OUT, PART_POINTERS };
__device__ __forceinline__ constexpr int pointer(int part, int which) { return 3 + part * PART_POINTERS + which; }

// Products of x [ROWS, K] with the rows of weights that are this block's.
template <class C> __device__ __forceinline__ void product(Shared& s, const Record& op, Ring<SLOTS>& ring, Ring<2>& norms, u32 tag, const Watch& watch) {
  constexpr int SEGMENTS = (C::K + SEGMENT - 1) / SEGMENT, CHUNKS = (C::K + 31) / 32;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  int first, count;
  share<C>(first, count);
  if (!count) { sync(); return; }
  // What this thread writes of its e-th number: known before x is waited for, like the residuals and the bias.
  struct Target { int part, b, row, at; bool ok, up; float bias; u64 residual[C::RESIDUALS ? C::RESIDUALS : 1]; };
  auto target = [&](int e, int r0, int groups) {
    Target to;
    const int unit = e % UNITS, i = e / UNITS / ROWS;
    int group = first + r0 + min(i, groups - 1);
    to.part = part_of<C>(group);
    to.b = e / UNITS % ROWS;
    const bool gated = C::gated(to.part);
    to.row = gated ? group * 4 + unit % 4 : group * UNITS + unit;
    to.up = gated && unit >= 4;
    to.ok = i < groups && to.row < C::n(to.part);
    to.at = to.b * C::n(to.part) + to.row;
    to.bias = 0;
    if (C::BIASES && to.ok) {
      const T* bias = (const T*)op.p[pointer(to.part, to.up ? GATE_BIAS : BIAS)];
      if (bias) to.bias = wide(bias[to.row]);
    }
#pragma unroll
    for (int r = 0; r < C::RESIDUALS; r++) if (C::residual(r) == WORDS && to.ok) to.residual[r] = load1((const u64*)op.p[pointer(C::PARTS, r)] + to.at / 2);
    return to;
  };
  Target to = target(tid, 0, min(ROUND, count));
  load_x<C>(s, op, norms, tag, watch);
  int4 w[2][4], a[4], h[4];
  float sums[2][2][4];
  auto fetch = [&](int4* w, int seg) {  // this lane's share of the weights in the next slot
    wait(&s.full[ring.slot], ring.phase);
    const unsigned char* p = s.ring[ring.slot] + g * UNIT_BYTES + t * 16 + warp * 64;
#pragma unroll
    for (int c = 0; c < 4; c++) w[c] = *(const int4*)(p + c * WARPS * 64);
    __syncwarp();
    if (!lane) arrive(&s.empty[ring.slot]);
    ring.next();
  };
  auto load = [&](int seg) {  // its share of x
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int chunk = (seg * 4 + c) * WARPS + warp;
      const bool inside = CHUNKS % (4 * WARPS) == 0 || chunk < CHUNKS;
      a[c] = g < ROWS && inside ? *(const int4*)(s.x[g < ROWS ? g : 0] + chunk * 32 + t * 8) : make_int4(0, 0, 0, 0);
      h[c] = ROWS > 8 && g + 8 < ROWS && inside ? *(const int4*)(s.x[g + 8 < ROWS ? g + 8 : 0] + chunk * 32 + t * 8) : make_int4(0, 0, 0, 0);
    }
  };
  auto clear = [&](int u) { for (int i = 0; i < 4; i++) sums[u][0][i] = sums[u][1][i] = 0; };
  auto multiply = [&](int u) {
#pragma unroll
    for (int c = 0; c < 4; c++) if (c * WARPS < CHUNKS) {
      mma(sums[u][0], a[c].x, h[c].x, a[c].y, h[c].y, w[u][c].x, w[u][c].y);
      mma(sums[u][1], a[c].z, h[c].z, a[c].w, h[c].w, w[u][c].z, w[u][c].w);
    }
  };
  auto keep = [&](int i, int u) {  // c0, c1: row g, units 2t and 2t + 1; c2, c3: row g + 8
    if (g < ROWS) { float (*to)[WARPS] = s.part[i][g < ROWS ? g : 0]; to[2 * t][warp] = sums[u][0][0] + sums[u][1][0]; to[2 * t + 1][warp] = sums[u][0][1] + sums[u][1][1]; }
    if (ROWS > 8 && g + 8 < ROWS) { float (*to)[WARPS] = s.part[i][g + 8 < ROWS ? g + 8 : 0]; to[2 * t][warp] = sums[u][0][2] + sums[u][1][2]; to[2 * t + 1][warp] = sums[u][0][3] + sums[u][1][3]; }
  };
  if (SEGMENTS == 1) load(0);
#pragma unroll 1
  for (int r0 = 0; r0 < count; r0 += ROUND) {
    const int groups = min(ROUND, count - r0);
    if constexpr (SEGMENTS == 1) {
#pragma unroll 1
      for (int i = 0; i < groups; i += 2) {
        const bool two = i + 1 < groups;
        fetch(w[0], 0);
        if (two) fetch(w[1], 0);
        clear(0); clear(1);
        multiply(0);
        if (two) multiply(1);
        keep(i, 0);
        if (two) keep(i + 1, 1);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < groups; i++) {
        clear(0); clear(1);
#pragma unroll 1
        for (int seg = 0; seg < SEGMENTS; seg += 2) {
          const bool two = SEGMENTS % 2 == 0 || seg + 1 < SEGMENTS;
          fetch(w[0], seg);
          if (two) fetch(w[1], seg + 1);
          load(seg);
          multiply(0);
          if (two) { load(seg + 1); multiply(1); }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) { sums[0][0][j] += sums[1][0][j]; sums[0][1][j] += sums[1][1][j]; }
        keep(i, 0);
      }
    }
    sync();
#pragma unroll 1
    for (int e0 = 0; e0 < groups * ROWS * UNITS; e0 += THREADS) {
      if (r0 + e0) to = target(e0 + tid, r0, groups);
      const int e = e0 + tid;
      float v = 0;
      if (to.ok) {
        const float4* q = (const float4*)s.part[e / UNITS / ROWS][to.b][e % UNITS];
        const float4 y = q[0], z = q[1];
        v = ((y.x + y.y) + (y.z + y.w)) + ((z.x + z.y) + (z.z + z.w));
      }
#pragma unroll
      for (int p = 0; p < C::PARTS; p++) if (C::PARTS == 1 || to.part == p) {
        if (C::gated(p) && to.up) v += to.bias;
        else v = activate(v * C::alpha(p) + to.bias, C::act(p), C::limit(p));
      }
      if (C::GATES) {  // by all lanes: parts of one warp may differ
        const float factor = __shfl_xor_sync(~0u, v, 4);
        if (C::gated(to.part)) v *= factor;
      }
      if (C::PARTS == 1) v *= C::beta(0);
      else {
#pragma unroll
        for (int p = 0; p < C::PARTS; p++) if (to.part == p) v *= C::beta(p);
      }
#pragma unroll
      for (int r = 0; r < C::RESIDUALS; r++) if (to.ok) {
        if (C::residual(r) == WORDS && has(to.residual[r], tag)) { const float2 f = both(to.residual[r]); v += to.row & 1 ? f.y : f.x; }
        else v += load_one(C::residual(r), op.p[pointer(C::PARTS, r)], to.at, tag, watch);
      }
      const float next = __shfl_xor_sync(~0u, v, 1);
      if (to.ok && !to.up && !(to.row & 1)) {
        if (C::PARTS == 1 || C::SAME_OUT) write_pair(C::out(0), (void*)op.p[pointer(to.part, OUT)], to.at, v, next, to.row + 1 < C::n(to.part), tag);
        else {
#pragma unroll
          for (int p = 0; p < C::PARTS; p++) if (to.part == p) write_pair(C::out(p), (void*)op.p[pointer(p, OUT)], to.at, v, next, to.row + 1 < C::n(p), tag);
        }
      }
    }
    if (r0 + ROUND < count) sync();
  }
}

// Rows are normalised by one block each.
template <class C> __device__ __forceinline__ void normalize(Shared& s, const Record& op, Ring<2>& norms, u32 tag, const Watch& watch) {
  if (blockIdx.x >= ROWS) { sync(); return; }
  const int b = blockIdx.x;
  load_x<C>(s, op, norms, tag, watch);
#pragma unroll 1
  for (int k = threadIdx.x * 2; k < C::K; k += THREADS * 2) {
    float2 v = wide(*(T2*)(s.x[b] + k));
#pragma unroll
    for (int r = 0; r < C::RESIDUALS; r++) { v.x += load_one(C::residual(r), op.p[pointer(1, r)], b * C::K + k, tag, watch); v.y += load_one(C::residual(r), op.p[pointer(1, r)], b * C::K + k + 1, tag, watch); }
    write_pair(C::out(0), (void*)op.p[pointer(0, OUT)], b * C::K + k, v.x, v.y, true, tag);
  }
}

__device__ __forceinline__ float number(int format, const void* p, int at) { return format == PLAIN ? wide(((const T*)p)[at]) : ((const float*)p)[at]; }

// Pointers of an attention's record.
enum { ROW_Q, ROW_K, ROW_V, HEADS_OUT, KEYS, VALUES, COS, SIN, WEIGHT_Q, WEIGHT_K, BIAS_0, BIAS_1 };
// One feature of a head, normed, rotated and scaled.
template <class C, class H> __device__ __forceinline__ float turned(const Shared& s, const Record& op, const T* weight, int head, int b, int d, float factor) {
  auto normed = [&](int i) { float v = s.raw[head][i]; return H::NORMED ? v * factor * wide(weight[i]) : v; };
  float v = normed(d);
  if (H::ROTATED && d < C::ROTATED) {
    constexpr int HALF = C::ROTATED / 2;
    const int partner = C::INTERLEAVED ? d ^ 1 : (d < HALF ? d + HALF : d - HALF);
    const bool minus = C::INTERLEAVED ? !(d & 1) : d < HALF;
    const int at = b * C::ANGLE_STRIDE + (C::ANGLES == FULL ? d : C::ANGLES == HALVES ? d % (HALF ? HALF : 1) : d / 2);
    const float other = normed(partner), cos = number(C::ANGLE_FORMAT, op.p[COS], at), sin = number(C::ANGLE_FORMAT, op.p[SIN], at);
    v = v * cos + (minus ? -other : other) * sin;
  }
  return v * H::scale();
}
template <class H> __device__ __forceinline__ float load_feature(const void* row, int head, int b, int d, u32 tag, const Watch& watch) {
  head *= H::REPEAT;                               // of repeated keys the first
  const int feature = H::START + head / H::PER_GROUP * H::GROUP_STRIDE + head % H::PER_GROUP * H::STRIDE + d;
  return load_one(H::FORMAT, row, b * H::WIDTH + feature, tag, watch);
}
template <class C, class H> __device__ __forceinline__ float head_factor(const Shared& s, int z) {
  if (!H::NORMED) return 1;
  float squares = 0;
#pragma unroll
  for (int d = threadIdx.x % 32; d < C::D; d += 32) squares += s.raw[z][d] * s.raw[z][d];
  return rsqrtf(total(squares) * (1.f / C::D) + H::epsilon());
}

// One head of the cache and one row: its G queries over the cache's keys and the new one.
template <class C> __device__ __forceinline__ void attend(Shared& s, const Record& op, Ring<SLOTS>& ring, u32 tag, const Watch& watch, int task) {
  constexpr int D = C::D, G = C::G, HEADS = C::SELF ? G + 2 : G;
  constexpr int CHUNK = KV_BYTES / (D * 2), KEYS_EACH = CHUNK / WARPS;  // keys of a slot, and of a warp in it
  constexpr int LANES = D % 32 == 0 ? 4 : D % 16 == 0 ? 2 : 1;          // lanes that share a key
  constexpr int PAIRS_EACH = (D / 2 + 31) / 32;                         // pairs of features of a value a lane sums
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int head = task % C::KV, b = task / C::KV;
  const int keys = C::SELF ? s.position[b] : op.length, seen = C::SELF ? keys + 1 : keys;
  float* const biases = s.bias[op.set & 1];
  const int key = op.set * 65536 + task;        // layers share masks: they are loaded once
  if (C::BIASES && s.bias_key[op.set & 1] != key) {
#pragma unroll 1
    for (int k = tid; k < seen; k += THREADS) {    // while the query is computed elsewhere
#pragma unroll
      for (int z = 0; z < (C::PER_HEAD ? G : 1); z++) {
        float v = 0;
#pragma unroll
        for (int i = 0; i < C::BIASES; i++) {
          const int row = C::per_head(i) ? (C::batched(i) ? b : 0) * C::KV * G + head * G + z : (C::batched(i) ? b : 0);
          v += C::bias_scale(i) * number(C::bias_format(i), op.p[BIAS_0 + i], row * op.length + k);
        }
        biases[z * op.length + k] = v;
      }
    }
  }
#pragma unroll 1
  for (int i = tid; i < HEADS * D; i += THREADS) {
    const int z = i / D, d = i % D;
    if (z < G) s.raw[z][d] = load_feature<typename C::Query>(op.p[ROW_Q], head * G + z, b, d, tag, watch);
    else if constexpr (C::SELF) {
      if (z == G) s.raw[z][d] = load_feature<typename C::Key>(op.p[ROW_K], head, b, d, tag, watch);
      else s.raw[z][d] = load_feature<typename C::Value>(op.p[ROW_V], head, b, d, tag, watch);
    }
  }
  sync();
  if (!tid) s.bias_key[op.set & 1] = key;
#pragma unroll 1
  for (int z = warp; z < HEADS; z += WARPS) {
    if (z < G) {
      const float factor = head_factor<C, typename C::Query>(s, z);
#pragma unroll
      for (int d = lane; d < D; d += 32) s.query[z][d] = wide(narrow(turned<C, typename C::Query>(s, op, (const T*)op.p[WEIGHT_Q], z, b, d, factor))) * C::scale();
    } else if constexpr (C::SELF) {
      if (z == G) {
        const float factor = head_factor<C, typename C::Key>(s, z);
#pragma unroll
        for (int d = lane; d < D; d += 32) s.fresh[0][d] = narrow(turned<C, typename C::Key>(s, op, (const T*)op.p[WEIGHT_K], z, b, d, factor));
      } else {
#pragma unroll
        for (int d = lane; d < D; d += 32) s.fresh[1][d] = narrow(s.raw[z][d] * C::Value::scale());
      }
    }
  }
  sync();
  float mass[G], sum[G][PAIRS_EACH][2], tops[G];
#pragma unroll
  for (int z = 0; z < G; z++) {
    mass[z] = 0; tops[z] = -1e30f;
    for (int i = 0; i < PAIRS_EACH; i++) sum[z][i][0] = sum[z][i][1] = 0;
  }
  auto score = [&](float dot, int z, int k) {
    if (C::SOFT) dot = activate(dot, SOFTCAP, C::softcap());
    return C::BIASES ? dot + biases[(C::PER_HEAD ? z * op.length : 0) + k] : dot;
  };
  if (C::SELF && warp == WARPS - 1) {
#pragma unroll
    for (int z = 0; z < G; z++) {
      float dot = 0;
#pragma unroll
      for (int d = lane; d < D; d += 32) dot += s.query[z][d] * wide(s.fresh[0][d]);
      dot = total(dot);
      if (!lane) { s.top[z][WARPS] = score(dot, z, keys); s.mass[z][WARPS] = 1; }
    }
  }
  const int sub = lane % LANES, own = lane / LANES;
#pragma unroll 1
  for (int k0 = 0; k0 < keys; k0 += CHUNK) {
    wait(&s.full[ring.slot], ring.phase);
    const int here = max(0, min(KEYS_EACH, keys - k0 - warp * KEYS_EACH));
    float best[G];
#pragma unroll
    for (int z = 0; z < G; z++) best[z] = -1e30f;
#pragma unroll 1
    for (int i = 0; i < here; i += 32 / LANES) {
      const int k = i + own;
      float dot[G];
#pragma unroll
      for (int z = 0; z < G; z++) dot[z] = 0;
      if (k < here) {
        const unsigned char* p = s.ring[ring.slot] + (warp * KEYS_EACH + k) * D * 2 + sub * 16;
#pragma unroll
        for (int c = 0; c < D / 8 / LANES; c++) {
          const int4 w = *(const int4*)(p + c * LANES * 16);
          const float2 x0 = wide((T2)w.x), x1 = wide((T2)w.y), x2 = wide((T2)w.z), x3 = wide((T2)w.w);
#pragma unroll
          for (int z = 0; z < G; z++) {
            const float4* q = (const float4*)(s.query[z] + (c * LANES + sub) * 8);
            const float4 u = q[0], v = q[1];
            dot[z] += u.x * x0.x + u.y * x0.y + u.z * x1.x + u.w * x1.y + v.x * x2.x + v.y * x2.y + v.z * x3.x + v.w * x3.y;
          }
        }
      }
#pragma unroll
      for (int z = 0; z < G; z++) {
#pragma unroll
        for (int o = 1; o < LANES; o <<= 1) dot[z] += __shfl_xor_sync(~0u, dot[z], o);
        const float v = k < here ? score(dot[z], z, k0 + warp * KEYS_EACH + k) : -1e30f;
        best[z] = fmaxf(best[z], v);
        if (k < here && !sub) s.weights[warp][z][k] = v;
      }
    }
    __syncwarp();
    if (!lane) arrive(&s.empty[ring.slot]);
    ring.next();
#pragma unroll
    for (int z = 0; z < G; z++) {
#pragma unroll
      for (int o = LANES; o < 32; o <<= 1) best[z] = fmaxf(best[z], __shfl_xor_sync(~0u, best[z], o));
      const float next = fmaxf(tops[z], best[z]), old = __expf(tops[z] - next);
      tops[z] = next;
      float added = 0;
#pragma unroll 1
      for (int k = lane; k < here; k += 32) { const float e = __expf(s.weights[warp][z][k] - next); s.weights[warp][z][k] = e; added += e; }
      mass[z] = mass[z] * old + added;             // of this lane's keys
#pragma unroll
      for (int i = 0; i < PAIRS_EACH; i++) { sum[z][i][0] *= old; sum[z][i][1] *= old; }
    }
    __syncwarp();
    wait(&s.full[ring.slot], ring.phase);
#pragma unroll 8
    for (int k = 0; k < here; k++) {
      const T2* v = (const T2*)(s.ring[ring.slot] + (warp * KEYS_EACH + k) * D * 2);
#pragma unroll
      for (int i = 0; i < PAIRS_EACH; i++) if (D % 64 == 0 || lane + 32 * i < D / 2) {
        const float2 f = wide(v[lane + 32 * i]);
#pragma unroll
        for (int z = 0; z < G; z++) { const float e = s.weights[warp][z][k]; sum[z][i][0] += e * f.x; sum[z][i][1] += e * f.y; }
      }
    }
    __syncwarp();
    if (!lane) arrive(&s.empty[ring.slot]);
    ring.next();
  }
#pragma unroll
  for (int z = 0; z < G; z++) {
    mass[z] = total(mass[z]);
    if (!lane) { s.top[z][warp] = tops[z]; s.mass[z][warp] = mass[z]; }
#pragma unroll
    for (int i = 0; i < PAIRS_EACH; i++) if (lane + 32 * i < D / 2) *(float2*)(s.partial[z][warp] + 2 * (lane + 32 * i)) = make_float2(sum[z][i][0], sum[z][i][1]);
  }
  sync();
#pragma unroll 1
  for (int e = tid; e < G * D / 2; e += THREADS) {
    const int z = e / (D / 2), d = e % (D / 2) * 2;
    float highest = C::SELF ? s.top[z][WARPS] : -1e30f, whole = 0, x = 0, y = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, s.top[z][w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float f = __expf(s.top[z][w] - highest);
      const float2 v = *(const float2*)(s.partial[z][w] + d);
      whole += f * s.mass[z][w]; x += f * v.x; y += f * v.y;
    }
    if (C::SELF) {
      const float f = __expf(s.top[z][WARPS] - highest);
      const float2 v = wide(*(T2*)(s.fresh[1] + d));
      whole += f; x += f * v.x; y += f * v.y;
    }
    write_pair(C::OUT_FORMAT, (void*)op.p[HEADS_OUT], ((b * C::KV + head) * G + z) * D + d, x / whole, y / whole, true, tag);
  }
  if constexpr (C::SELF) {
    if (tid >= THREADS - D / 4) {                  // threads that write no output where there are few
      const int e = tid - (THREADS - D / 4), which = e / (D / 8), d = e % (D / 8) * 8;
      T* cache = (T*)op.p[which ? VALUES : KEYS];
      *(int4*)(cache + ((size_t)task * op.length + keys) * D + d) = *(const int4*)(s.fresh[which] + d);
    }
  }
}
template <class C> __device__ __forceinline__ void attention(Shared& s, const Record& op, Ring<SLOTS>& ring, u32 tag, const Watch& watch) {
  bool any = false;
#pragma unroll 1
  for (int task = BLOCKS - 1 - blockIdx.x; task < C::KV * ROWS; task += BLOCKS) {
    if (any) sync();  // before another task overwrites what was read
    attend<C>(s, op, ring, tag, watch, task);
    any = true;
  }
  if (!any) sync();
}

// The producer's part of an operation.
template <class C> __device__ __forceinline__ void produce_attention(Shared& s, const Record& op, Producer& to, u64 keep) {
  constexpr int CHUNK = KV_BYTES / (C::D * 2);
#pragma unroll 1
  for (int task = BLOCKS - 1 - blockIdx.x; task < C::KV * ROWS; task += BLOCKS) {
    const int keys = C::SELF ? s.position[task / C::KV] : op.length;
#pragma unroll 1
    for (int k0 = 0; k0 < keys; k0 += CHUNK) for (int which = 0; which < 2; which++) {
      const int bytes = min(CHUNK, keys - k0) * C::D * 2;
      to.acquire(s);
      if (threadIdx.x % 32 == 0) {
        expect(&s.full[to.ring.slot], bytes);
        bulk_copy(s.ring[to.ring.slot], (const T*)op.p[which ? VALUES : KEYS] + ((size_t)task * op.length + k0) * C::D, bytes, &s.full[to.ring.slot], keep);
      }
      to.ring.next();
    }
  }
}
template <class C> __device__ __forceinline__ void produce_norm(Shared& s, const Record& op, Ring<2>& norms, u64 keep) {
  if constexpr (C::NORM != NO_NORM) {
    wait(&s.norm_empty[norms.slot], norms.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      expect(&s.norm_full[norms.slot], C::K * 2 * (C::NORM_WEIGHT + C::NORM_BIAS));
      if (C::NORM_WEIGHT) bulk_copy(s.norm[norms.slot][0], op.p[1], C::K * 2, &s.norm_full[norms.slot], keep);
      if (C::NORM_BIAS) bulk_copy(s.norm[norms.slot][1], op.p[2], C::K * 2, &s.norm_full[norms.slot], keep);
    }
    norms.next();
  }
}
template <class C> __device__ __forceinline__ void produce_normalize(Shared& s, const Record& op, Ring<2>& norms, u64 keep) {
  if (blockIdx.x < ROWS) produce_norm<C>(s, op, norms, keep);
}
template <class C> __device__ __forceinline__ void produce_product(Shared& s, const Record& op, Producer& to, Ring<2>& norms, u64 once, u64 keep) {
  const int lane = threadIdx.x % 32;
  int first, count;
  share<C>(first, count);
  if (!count) return;
  produce_norm<C>(s, op, norms, keep);
#pragma unroll 1
  for (int g = first; g < first + count; g++) {
    int group = g;
    const int part = part_of<C>(group);
    const bool gated = C::gated(part);
    const int row = gated ? group * 4 + lane % 4 : group * UNITS + lane;
    const bool mine = lane < UNITS && row < C::n(part);
    const T* weight = (const T*)op.p[pointer(part, gated && lane >= 4 ? GATE : WEIGHT)] + (size_t)row * C::K;
    const int rows = min(UNITS, gated ? 2 * (C::n(part) - group * 4) : C::n(part) - group * UNITS);
#pragma unroll 1
    for (int k = 0; k < C::K; k += SEGMENT) {
      const int bytes = min(SEGMENT, C::K - k) * 2;
      to.acquire(s);
      if (!lane) expect(&s.full[to.ring.slot], bytes * rows);
      __syncwarp();
      if (mine) bulk_copy(s.ring[to.ring.slot] + lane * UNIT_BYTES, weight + k, bytes, &s.full[to.ring.slot], once);
      to.ring.next();
    }
  }
}
