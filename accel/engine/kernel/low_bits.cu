// Products with integers of 8 or 4 bits, as `MatMulNBits` stores them: what a warp adds up before the epilogue of `product`.

// Integers that stand for 0, as what is subtracted from numbers that have an integer in their last bits; see `numbers`.
struct Zero { T2 low, high; };
template <int BITS> __device__ __forceinline__ Zero zero_of(u32 zero) {
#if BF16
  const u32 low = BITS == 4 ? 0x4300 + zero : zero;          // 128 + zero; zero
#else
  const u32 low = 0x6400 + zero;                             // 1024 + zero
#endif
  return {low * 0x10001u, (0xd400 + zero * 16) * 0x10001u};  // -(64 + zero) in FP16
}
// Two of the integers in a word, less `zero`, which is exact: 1024 + n in FP16 is n in the last bits below 0x64, 128 + n in BF16 below 0x43,
// and 2^23 + n in FP32 below 0x4b0000. Of 8 bits, the numbers 2 `pair` and the next. Of 4 bits, `pair` and `pair` + 4, which one
// instruction can take out (after Kim et al., https://arxiv.org/abs/2211.10017); x is put in the same order.
template <int BITS> __device__ __forceinline__ T2 numbers(u32 word, int pair, Zero zero) {
#if BF16
  if (BITS == 4) return minus(mask_or(word >> pair * 4, 0x000f000fu, 0x43004300u), zero.low);
  const float a = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + pair * 2)), b = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7441 + pair * 2));
  const float less = 8388608.f + (float)(zero.low & 0xffff);
  return narrow(a - less, b - less);
#else
  if (BITS == 8) return minus(__byte_perm(word, 0x64646464u, pair ? 0x4342 : 0x4140), zero.low);
  const u32 shifted = pair < 2 ? word : word >> 8;
  if (pair % 2 == 0) return minus(mask_or(shifted, 0x000f000fu, 0x64006400u), zero.low);
  return multiply_add(mask_or(shifted, 0x00f000f0u, 0x64006400u), 0x2c002c00u, zero.high);  // (1024 + 16 n) / 16 - (64 + zero)
#endif
}

// A thread's share of products of x with the rows in two slots of the ring, which one instruction multiplies: its 16 rows are those of
// the slots, and its columns the rows of x. A lane reads PIECE words side by side of each PIECE * 16 bytes of a weight's row.
template <class C> struct Integers {
  using R = Rows<C>;
  static constexpr int WORD = 32 / C::BITS, VECTORS = 16 / C::BITS;  // integers in a word; 16 bytes of x for 16 bytes of weights
  static constexpr int PIECE = R::PIECE, IN_CHUNK = R::BLOCK < R::CHUNK ? R::CHUNK / R::BLOCK : 1;  // of a chunk
  static_assert(ROWS <= 8 && R::FEATURES % R::BLOCK == 0 && (R::BLOCK % R::CHUNK == 0 || R::CHUNK % R::BLOCK == 0) && PIECE * WORD >= 8, "not supported");
  static constexpr bool KEPT = R::SEGMENTS == 1 && (R::CHUNKS + WARPS - 1) / WARPS * VECTORS <= 8;  // x in 32 registers, for all groups
  const int warp, g, t;
  u32 x[4][VECTORS * 4];
  float sums[4];                                   // of unit g and the rows 2t and 2t + 1 of x: of the first slot, of the second

  // This thread's share of x for a chunk of each warp.
  __device__ __forceinline__ void load(const Shared& s, int seg, int c) {
    const int chunk = (seg * 4 + c) * WARPS + warp;
    const bool inside = g < ROWS && (R::CHUNKS % (4 * WARPS) == 0 || chunk < R::CHUNKS);
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int word = v * 8 / WORD, at = chunk * R::CHUNK + (word / PIECE * PIECE * 4 + t * PIECE + word % PIECE) * WORD;
      const int4 y = inside ? *(const int4*)(s.x[g < ROWS ? g : 0] + at) : make_int4(0, 0, 0, 0);
      u32* const to = x[c] + v * 4;
      if (C::BITS == 8) { to[0] = y.x; to[1] = y.y; to[2] = y.z; to[3] = y.w; }
      else { to[0] = __byte_perm(y.x, y.z, 0x5410); to[1] = __byte_perm(y.x, y.z, 0x7632); to[2] = __byte_perm(y.y, y.w, 0x5410); to[3] = __byte_perm(y.y, y.w, 0x7632); }
    }
  }
  __device__ __forceinline__ void load_kept(const Shared& s) {
#pragma unroll
    for (int c = 0; c < 4; c++) if (KEPT) load(s, 0, c);
  }
  __device__ __forceinline__ void multiply(const Shared& s, int seg, const unsigned char* first, const unsigned char* second) {
    const int at = g * R::UNIT + t * PIECE * 4 + warp * 64;
#pragma unroll
    for (int c = 0; c < 4; c++) if (c * WARPS < R::CHUNKS) {
      if (!KEPT) load(s, seg, c);
#pragma unroll
      for (int block = 0; block < IN_CHUNK; block++) {
        const int index = (c * WARPS + warp) * R::CHUNK / R::BLOCK + block;
        u32 a[PIECE], b[PIECE];
        float scale_a, scale_b, d[4];
        const Zero zero_a = scale_and_zero(first, index, scale_a), zero_b = scale_and_zero(second, index, scale_b);
#pragma unroll
        for (int j = 0; j < 4 / IN_CHUNK; j++) {
          const int word = block * (4 / IN_CHUNK) + j, bytes = at + c * WARPS * 64 + word * 16;
          if (j % PIECE == 0) { read(a, first + bytes); read(b, second + bytes); }
#pragma unroll
          for (int n = 0; n < WORD / 2; n += 2) {
            const u32 va = a[j % PIECE], vb = b[j % PIECE], *const mine = x[c] + word * WORD / 2 + n;
            const T2 a0 = numbers<C::BITS>(va, n, zero_a), a1 = numbers<C::BITS>(vb, n, zero_b), a2 = numbers<C::BITS>(va, n + 1, zero_a), a3 = numbers<C::BITS>(vb, n + 1, zero_b);
            if (j + n) mma(d, a0, a1, a2, a3, mine[0], mine[1]);
            else mma_first(d, a0, a1, a2, a3, mine[0], mine[1]);
          }
        }
        sums[0] += d[0] * scale_a;
        sums[2] += d[2] * scale_b;
        if (ROWS > 1) { sums[1] += d[1] * scale_a; sums[3] += d[3] * scale_b; }
      }
    }
  }
  __device__ __forceinline__ void keep(Shared& s, int i, bool two) const {
#pragma unroll
    for (int r = 0; r < 2; r++) if (2 * t + r < ROWS) {
      s.part[i][2 * t + r][g][warp] = sums[r];
      if (two) s.part[i + 1][2 * t + r][g][warp] = sums[2 + r];
    }
  }

 private:
  static __device__ __forceinline__ void read(u32 (&to)[PIECE], const unsigned char* from) {
    if constexpr (PIECE == 4) { const int4 v = *(const int4*)from; to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w; }
    else if constexpr (PIECE == 2) { const uint2 v = *(const uint2*)from; to[0] = v.x; to[1] = v.y; }
    else to[0] = *(const u32*)from;
  }
  __device__ __forceinline__ Zero scale_and_zero(const unsigned char* slot, int block, float& scale) const {
    const unsigned char* const entry = slot + UNITS * UNIT_BYTES + (block * UNITS + g) * R::ENTRY;
    scale = wide(*(const T*)entry);
    return zero_of<C::BITS>(C::ZEROS ? *(const unsigned short*)(entry + 2) : 1 << (C::BITS - 1));
  }
};

// Add up the products with `groups` groups of units, and write the sums of this warp's features to `part`.
template <class C> __device__ __forceinline__ void multiply_integers(Shared& s, Integers<C>& mine, Ring<SLOTS>& ring, int groups) {
  constexpr int SEGMENTS = Rows<C>::SEGMENTS;
#pragma unroll 1
  for (int i = 0; i < groups; i += 2) {
    const bool two = i + 1 < groups;
    for (int j = 0; j < 4; j++) mine.sums[j] = 0;
#pragma unroll 1
    for (int seg = 0; seg < SEGMENTS; seg++) {
      const int first = ring.slot;
      wait(&s.full[ring.slot], ring.phase);
      ring.next();
      const int second = two ? ring.slot : first;
      if (two) { wait(&s.full[ring.slot], ring.phase); ring.next(); }
      mine.multiply(s, seg, s.ring[first], s.ring[second]);
      __syncwarp();
      if (mine.g + mine.t == 0) { arrive(&s.empty[first]); if (two) arrive(&s.empty[second]); }
    }
    mine.keep(s, i, two);
  }
}
