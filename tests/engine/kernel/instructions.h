// The kernel's functions that hold instructions of the GPU, for `emulator.py`.

#if BF16
inline T narrow_one(float v) { unsigned u = bits<unsigned>(v); return (T)((u + 0x7fff + (u >> 16 & 1)) >> 16); }
inline float wide(T v) { return bits<float>((unsigned)v << 16); }
inline float2 wide(T2 v) { return {wide((T)v), wide((T)(v >> 16))}; }
#else
inline T narrow_one(float v) { return bits<T>((_Float16)v); }
inline float wide(T v) { return (float)bits<_Float16>(v); }
inline float2 wide(T2 v) { return {wide((T)v), wide((T)(v >> 16))}; }
#endif
inline T2 narrow(float a, float b) { return narrow_one(a) | (T2)narrow_one(b) << 16; }
inline int unhoisted(int v) { return v; }
inline void sync() { consumers.arrive_and_wait(); }
inline void fence() {}
inline ulonglong2 load2(const u64* p) { return {p[0], p[1]}; }
inline u64 load1(const u64* p) { return *p; }
inline void store(u64* p, u32 data, u32 tag) { *p = (u64)tag << 32 | data; }
// An mbarrier: arrivals of a phase that are still to come, their number, bytes still to come, and the phase's parity.
struct Barrier { short left, count; int bytes : 31; unsigned parity : 1; };
static_assert(sizeof(Barrier) == 8);
static std::mutex lock;
inline Barrier& barrier(u64* b) { return *(Barrier*)b; }
inline void settle(Barrier& b) { if (!b.left && !b.bytes) { b.left = b.count; b.parity ^= 1; } }
inline void barrier_init(u64* b, int n) { barrier(b) = {(short)n, (short)n, 0, 0}; }
inline void arrive(u64* b) { std::lock_guard g(lock); barrier(b).left--; settle(barrier(b)); }
inline void expect(u64* b, int bytes) { std::lock_guard g(lock); barrier(b).bytes += bytes; barrier(b).left--; settle(barrier(b)); }
inline void bulk_copy(void* to, const void* from, int bytes, u64* b, u64) {
  if ((u64)to % 16 || (u64)from % 16 || bytes % 16 || bytes <= 0) abort();
  memcpy(to, from, bytes);
  std::lock_guard g(lock);
  barrier(b).bytes -= bytes;
  settle(barrier(b));
}
inline void async_copy(void* to, const void* from, u64) { if ((u64)to % 16 || (u64)from % 16) abort(); memcpy(to, from, 16); }
inline void async_arrive(u64* b) { arrive(b); }
inline void wait(u64* b, u32 parity) { for (;; std::this_thread::yield()) { std::lock_guard g(lock); if (barrier(b).parity != parity) return; } }
// As PTX defines the fragments of m16n8k16: lane (g, t) has of A rows g and g + 8, and of B column g, features 2t, 2t + 1 and these + 8.
inline void mma_first(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  exchange({a0, a1, a2, a3, b0, b1}, [&](auto& all) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
      double sum = 0;
      for (int k = 0; k < 16; k++) {
        const int t = k % 8 / 2, high = k / 8;
        const u32 a = all[lane / 4 * 4 + t][high * 2 + i / 2], b = all[(lane % 4 * 2 + i % 2) * 4 + t][4 + high];
        sum += (double)(k & 1 ? wide((T2)a).y : wide((T2)a).x) * (k & 1 ? wide((T2)b).y : wide((T2)b).x);
      }
      c[i] = (float)sum;
    }
    return 0;
  });
}
inline void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  float d[4];
  mma_first(d, a0, a1, a2, a3, b0, b1);
  for (int i = 0; i < 4; i++) c[i] += d[i];
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
inline T2 minus(T2 a, T2 b) { const float2 x = wide(a), y = wide(b); return narrow(x.x - y.x, x.y - y.y); }
inline T2 multiply_add(T2 a, T2 b, T2 c) { const float2 x = wide(a), y = wide(b), z = wide(c); return narrow(x.x * y.x + z.x, x.y * y.y + z.y); }
inline u32 mask_or(u32 a, u32 mask, u32 b) { return (a & mask) | b; }
