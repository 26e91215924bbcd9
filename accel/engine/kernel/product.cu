// Products and norms: the consumers' part.

// Read x [ROWS, K] into shared memory, normalised. A warp takes every eighth tile of 128 features.
template <class C> __device__ __forceinline__ void load_x(Shared& s, const Record& op, Ring<2>& norms, u32 tag, const Watch& watch) {
  constexpr int TILES = (C::K + 127) / 128, MINE = (ROWS * TILES + WARPS - 1) / WARPS, PADDED = (C::K + C::PAD - 1) & ~(C::PAD - 1);
  constexpr int FLIGHT = MINE < 4 ? MINE : 4;  // tiles of a warp that are loaded at once
  constexpr bool WIDE = C::NORM != NO_NORM && (C::IN == WORDS_F32 || C::IN == PLAIN_F32);
  const int tid = this_thread(), warp = tid / 32, lane = tid % 32;
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
      if (k < (WIDE ? C::K : PADDED)) {
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
      if (k >= C::K) {
        if (WIDE && k < PADDED) *(uint2*)(s.x[b] + k) = make_uint2(0, 0);
        continue;
      }
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
  const int block = this_block();
  first = block * EACH + min(block, EXTRA);
  count = EACH + (block < EXTRA);
}
// The part that group `group` belongs to; `group` becomes its index there.
template <class C> __device__ __forceinline__ int part_of(int& group) {
  int part = 0;
#pragma unroll
  for (int p = 0; p + 1 < C::PARTS; p++) if (part == p && group >= C::groups(p)) { group -= C::groups(p); part = p + 1; }
  return part;
}
// Pointers of a product's record: x, weight and bias of the norm, five for each part, residuals.
enum { WEIGHT, GATE, SCALES, BIAS, GATE_BIAS, OUT, PART_POINTERS };
__device__ __forceinline__ constexpr int pointer(int part, int which) { return 3 + part * PART_POINTERS + which; }
// Products of x [ROWS, K] with the rows of weights that are this block's.
template <class C> __device__ __forceinline__ void product(Shared& s, const Record& op, Ring<SLOTS>& ring, Ring<2>& norms, u32 tag, const Watch& watch) {
  using R = Rows<C>;
  constexpr int SEGMENTS = R::SEGMENTS, CHUNKS = R::CHUNKS;
  const int tid = this_thread(), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
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
  Integers<C> integers{warp, g, t};
  int4 w[2][4], a[4], h[4];
  float sums[2][2][4];
  auto fetch = [&](int u, int seg) {  // this lane's share of the weights in the next slot
    wait(&s.full[ring.slot], ring.phase);
    const unsigned char* p = s.ring[ring.slot] + g * UNIT_BYTES + t * 16 + warp * 64;
#pragma unroll
    for (int c = 0; c < 4; c++) w[u][c] = *(const int4*)(p + c * WARPS * 64);
    if constexpr (LOW_BITS && C::K % R::FEATURES) {  // behind the row is what was in the slot before, and no number in 16 bits
#pragma unroll
      for (int c = 0; c < 4; c++) if (((seg * 4 + c) * WARPS + warp) * 32 + t * 8 >= C::K) w[u][c] = make_int4(0, 0, 0, 0);
    }
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
  if constexpr (C::BITS < 16) integers.load_kept(s);
  else if (SEGMENTS == 1) load(0);
#pragma unroll 1
  for (int r0 = 0; r0 < count; r0 += ROUND) {
    const int groups = min(ROUND, count - r0);
    if constexpr (C::BITS < 16) multiply_integers(s, integers, ring, groups);
    else if constexpr (SEGMENTS == 1) {
#pragma unroll 1
      for (int i = 0; i < groups; i += 2) {
        const bool two = i + 1 < groups;
        fetch(0, 0);
        if (two) fetch(1, 0);
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
          const bool two = (SEGMENTS % 2 == 0 || seg + 1 < SEGMENTS);
          fetch(0, seg);
          if (two) fetch(1, seg + 1);
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
