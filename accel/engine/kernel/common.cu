// One persistent kernel runs the fused operations of a plan: one block a multiprocessor, which reads the list of operations.
//
// A producer warp streams this block's slices of all weights and caches, in the order of the list, through a ring in shared
// memory, and never waits for activations. Eight consumer warps wait for the input of each operation by polling it: values
// that blocks exchange are 64-bit words of data and a tag that counts launches, so there is no barrier over the grid.
//
// The files are compiled as one: macros (ROWS, BLOCKS, BF16, BULK, MEMORY in bytes of shared memory, RECORD_BYTES, MAX_K, MAX_NORM, WIDE_X,
// MAX_BIAS, MAX_GROUP, MAX_HEAD, MAX_KEYS, LEAST_SLOTS, COPIES, SCALE_BYTES), numbers.cu, common.cu, low_bits.cu, product.cu, attention.cu, producer.cu, the shapes of all operations, the
// lists CONSUME and PRODUCE of their cases, main.cu. `launch.py` puts them together. Tests set two more: MISSING_STORE, the
// address of a word that is never written, and DELAYS, the most nanoseconds that warps wait before an operation.

enum Format { WORDS, WORDS_F32, PLAIN, PLAIN_F32 };  // {T2, tag}; {float, tag}; T; float

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int SEGMENT = 2048;                      // bytes of a weight's row in one slot of the ring
constexpr int UNITS = 8;                           // rows of weights in one slot
constexpr int UNIT_BYTES = SEGMENT + 64;           // 64 bytes of padding: no bank conflicts between units
constexpr bool LOW_BITS = SCALE_BYTES > 0;         // there are weights of 8 or 4 bits, whose scales are behind the units
constexpr int SLOT_BYTES = UNITS * UNIT_BYTES + SCALE_BYTES;
constexpr int KV_BYTES = UNITS * SEGMENT;          // bytes for keys or values in one slot
__device__ constexpr int keys_in_slot(int size) { return KV_BYTES / (size * 2) / WARPS * WARPS; }  // the same for each warp
constexpr int ROUND = ROWS <= 2 ? 16 : ROWS <= 4 ? 8 : 4;  // groups of units between two epilogues
constexpr int LOOK = 2048;                         // features to be polled from which on a few lanes look first; measured
constexpr int RECORDS = 4;                         // operations whose records are at hand

// shape: case of CONSUME; length: of a cache; set: of biases; positions: in a row of the table of ancestry
struct alignas(16) Record { int shape, length, set, positions; const void* p[34]; };
constexpr int COPIERS = sizeof(Record) / 16;
static_assert(sizeof(Record) == RECORD_BYTES, "the list of operations is written with other records");

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
  int bias_key[2], position[ROWS], failed;
  u64 norm_full[2], norm_empty[2];
  u32 tag;
};
constexpr int SLOTS = (MEMORY - (int)sizeof(Rest) - 128) / (SLOT_BYTES + 16);
static_assert(SLOTS >= 2, "a block has too little shared memory for so many rows and features");
struct alignas(128) Shared : Rest {
  u64 full[SLOTS], empty[SLOTS];
  alignas(128) unsigned char ring[SLOTS][SLOT_BYTES];
};
static_assert(sizeof(Shared) <= MEMORY, "more shared memory than there is");

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u64* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(n)); }
__device__ __forceinline__ void arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory"); }
__device__ __forceinline__ void expect(u64* b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory"); }
// A copy to shared memory, of a multiple of 16 bytes. The producer warp calls `begin_copies`, `copy` and `end_copies` for the
// copies that complete one barrier. From compute capability 9.0 on (BULK) one lane copies all of a row, by one instruction; before
// it, all lanes call `copy`, and each copies 16 bytes at a time.
#if BULK
constexpr int COPYING = 1;                         // arrivals at a barrier that copies complete
#define WAIT "mbarrier.try_wait"
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, u64* b, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)), "l"(policy) : "memory");
}
__device__ __forceinline__ void begin_copies(u64* b, int bytes) { if (threadIdx.x % 32 == 0) expect(b, bytes); __syncwarp(); }
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, u64* b, u64 policy) { bulk_copy(to, from, bytes, b, policy); }
__device__ __forceinline__ void end_copies(u64*) {}
__device__ __forceinline__ void fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
constexpr int COPYING = 32;
#define WAIT "mbarrier.test_wait"
__device__ __forceinline__ void async_copy(void* to, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "l"(policy) : "memory");
}
__device__ __forceinline__ void async_arrive(u64* b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address(b)) : "memory"); }
__device__ __forceinline__ void begin_copies(u64*, int) {}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, u64*, u64 policy) {
#pragma unroll 1
  for (int at = threadIdx.x % 32 * 16; at < bytes; at += 512) async_copy((char*)to + at, (const char*)from + at, policy);
}
__device__ __forceinline__ void end_copies(u64* b) { async_arrive(b); }
__device__ __forceinline__ void fence() {}
#endif
__device__ __forceinline__ bool this_lane_copies() { return !BULK || threadIdx.x % 32 == 0; }  // what the warp copies in one row
__device__ __forceinline__ void wait(u64* b, u32 parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN: " WAIT ".parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(address(b)), "r"(parity) : "memory");
}
// The indices of thread and block, from which nothing is computed ahead for other operations: kept for all shapes, that would take
// more registers than there are.
__device__ __forceinline__ int unhoisted(int v) {
  asm volatile("" : "+r"(v));
  __builtin_assume(v >= 0);                        // so that divisions by powers of two stay shifts
  return v;
}
__device__ __forceinline__ int this_thread() { return unhoisted(threadIdx.x); }
__device__ __forceinline__ int this_block() { return unhoisted(blockIdx.x); }
__device__ __forceinline__ void sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }  // consumers
__device__ __forceinline__ ulonglong2 load2(const u64* p) { ulonglong2 v; asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ u64 load1(const u64* p) { u64 v; asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ void store(u64* p, u32 data, u32 tag) {
#ifdef MISSING_STORE
  if ((u64)p == MISSING_STORE) return;
#endif
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(((u64)tag << 32) | data) : "memory");
}
__device__ __forceinline__ bool has(u64 v, u32 tag) { return (u32)(v >> 32) == tag; }
__device__ __forceinline__ bool has(ulonglong2 v, u32 tag) { return has(v.x, tag) && has(v.y, tag); }
__device__ __forceinline__ float2 both(u64 v) { return wide((T2)v); }
// D[16 x 8] += A[16 x 16] (rows of x) * B[16 x 8] (units of W)
__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// D = A * B
__device__ __forceinline__ void mma_first(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};" : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}
// a - b and a * b + c, of two numbers each.
#if BF16
__device__ __forceinline__ T2 minus(T2 a, T2 b) { T2 v; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u)); return v; }  // by 1
#else
__device__ __forceinline__ T2 minus(T2 a, T2 b) { T2 v; asm("sub.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b)); return v; }
#endif
__device__ __forceinline__ T2 multiply_add(T2 a, T2 b, T2 c) { T2 v; asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c)); return v; }
// (a & mask) | b, by one instruction.
__device__ __forceinline__ u32 mask_or(u32 a, u32 mask, u32 b) { u32 v; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(a), "r"(mask), "r"(b)); return v; }

// How the rows of a product's weights are stored: in 16 bits, or as integers of 8 or 4. A warp takes a chunk of 64 bytes at a time,
// of which four lanes read 16 each.
template <class C> struct Rows {
  static constexpr int FEATURES = SEGMENT * 8 / C::BITS;     // of a slot
  static constexpr int SEGMENTS = (C::K + FEATURES - 1) / FEATURES;
  static constexpr int CHUNK = 64 * 8 / C::BITS, CHUNKS = (C::K + CHUNK - 1) / CHUNK;
  static constexpr int BLOCK = C::BITS < 16 ? C::BLOCK : FEATURES, BLOCKS_EACH = (C::K + BLOCK - 1) / BLOCK;  // of a row
  static constexpr int BYTES = C::BITS < 16 ? BLOCKS_EACH * BLOCK * C::BITS / 8 : C::K * 2;  // from one row to the next
  static constexpr int COPIED = C::BITS < 16 ? (C::K * C::BITS / 8 + 15) & ~15 : C::K * 2;   // of them
  static constexpr int ENTRY = C::ZEROS ? 4 : 2;             // bytes of a scale, and of a zero point
  // Words that a lane reads side by side: its quarter of a block, or of a chunk. For several rows no more than 16 bytes of x belong to,
  // so that lanes read x without bank conflicts.
  static constexpr int QUARTER = BLOCK < CHUNK ? BLOCK * C::BITS / 128 : 4;
  static constexpr int PIECE = ROWS > 2 && C::BITS < 16 ? (QUARTER < C::BITS / 4 ? QUARTER : C::BITS / 4) : QUARTER;
  static constexpr int UNIT = SEGMENT + 16 * PIECE;          // bytes from one row to the next in a slot: no bank conflicts between them
};

template <int N> struct Ring {
  int slot; u32 phase;
  __device__ __forceinline__ void next() { if (++slot == N) { slot = 0; phase ^= 1; } }
};

// A wait for words that never come, which is a defect, ends after `limit` polls. Then all other waits of the launch end, too,
// and launches behind it return at once, until the host has cleared `failed`. Of all operations that gave up, `failed` names the
// earliest, counted down from FIRST; the host sees it in `error`.
struct Watch { int *failed, *error; int index; u32 limit; };
constexpr int FIRST = 0x7fffffff, PATIENCE = 64;  // polls between two looks at `failed`
__device__ __noinline__ bool overdue(const Watch& watch, u32 spins) {
  const int mine = FIRST - watch.index, known = *(volatile int*)watch.failed;
  if (!known && spins < watch.limit) return false;
  if (known < mine && atomicMax(watch.failed, mine) < mine) atomicMax(watch.error, mine);
  return true;
}
__device__ __forceinline__ ulonglong2 poll2(const u64* p, u32 tag, const Watch& watch) {
  ulonglong2 w;
  u32 spins = 0;
  do { w = load2(p); if (++spins % PATIENCE == 0 && overdue(watch, spins)) break; } while (!has(w, tag));
  return w;
}
__device__ __forceinline__ u64 poll1(const u64* p, u32 tag, const Watch& watch) {
  u64 w;
  u32 spins = 0;
  do { w = load1(p); if (++spins % PATIENCE == 0 && overdue(watch, spins)) break; } while (!has(w, tag));
  return w;
}
#ifdef DELAYS
// Let some warps wait, by a hash of block, warp, operation and launch.
__device__ __noinline__ void delay(int index, u32 tag) {
  u32 hash = blockIdx.x * 0x9e3779b1u + threadIdx.x / 32 * 0x85ebca77u + index * 0xc2b2ae3du + tag * 0x27d4eb2fu;
  hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
  hash ^= hash >> 12;
  if (hash % 4 == 0) __nanosleep(hash / 4 % DELAYS);
}
#else
__device__ __forceinline__ void delay(int, u32) {}
#endif
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
