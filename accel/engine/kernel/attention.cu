// Attention: the consumers' part.

__device__ __forceinline__ float number(int format, const void* p, int at) { return format == PLAIN ? wide(((const T*)p)[at]) : ((const float*)p)[at]; }

// Pointers of an attention's record.
enum { ROW_Q, ROW_K, ROW_V, HEADS_OUT, KEYS, VALUES, COS, SIN, WEIGHT_Q, WEIGHT_K, PARTS_OUT, ANCESTRY, BIAS_0 };
// A block's share of an attention: keys [begin, end) of the `keys` in the cache of one head and row, which are cut into `parts`.
// There is more than one part where each block has LEAST_SLOTS of keys to read, so that a short cache costs no exchange. Part 0
// also has the new key, and puts the parts together.
struct Share { int task, keys, part, parts, begin, end; };
template <class C> __device__ __forceinline__ Share share_of_keys(const Shared& s, const Record& op, int item) {
  constexpr int CHUNK = keys_in_slot(C::D), TASKS = C::KV * ROWS;
  const int task = item % TASKS, keys = C::SELF ? min(s.position[task / C::KV], op.length) : op.length;
  if (C::SPLITS == 1) return {task, keys, 0, 1, 0, keys};
  const int chunks = (keys + CHUNK - 1) / CHUNK, part = item / TASKS, parts = max(1, min(C::SPLITS, chunks / LEAST_SLOTS));
  return {task, keys, part, parts, chunks * part / parts * CHUNK, min(keys, chunks * (part + 1) / parts * CHUNK)};
}
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
  for (int d = this_thread() % 32; d < C::D; d += 32) squares += s.raw[z][d] * s.raw[z][d];
  return rsqrtf(total(squares) * (1.f / C::D) + H::epsilon());
}

// The sums over keys of one query: those with weights exp(score - top).
struct Sums { float top, mass; float2 values; };
// What parts write for part 0: of each query D sums of values, `top` and `mass`, in words of one number.
template <class C> __device__ __forceinline__ u64* words_of_part(const Record& op, int task, int part) {
  return (u64*)op.p[PARTS_OUT] + ((size_t)(part - 1) * C::KV * ROWS + task) * C::G * (C::D + 2);
}
// Read the other parts' sums to where those of this block's warps were.
template <class C> __device__ __forceinline__ void gather(Shared& s, const Record& op, u32 tag, const Watch& watch, const Share& share) {
  constexpr int PAIRS = C::D / 2 + 1, EACH = C::G * PAIRS, FLIGHT = 4;  // pairs of words of a query, of a part; loaded at once
  static_assert(C::SPLITS <= WARPS, "the other parts take the places of warps");
  const int count = (share.parts - 1) * EACH;
  auto from = [&](int i) { return words_of_part<C>(op, share.task, 1 + i / EACH) + i % EACH * 2; };
#pragma unroll 1
  for (int i0 = this_thread(); i0 < count; i0 += THREADS * FLIGHT) {
    ulonglong2 w[FLIGHT];
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) if (i0 + f * THREADS < count) w[f] = load2(from(i0 + f * THREADS));
#pragma unroll
    for (int f = 0; f < FLIGHT; f++) {
      const int i = i0 + f * THREADS, z = i % EACH / PAIRS, pair = i % PAIRS;
      if (i >= count) break;
      if (!has(w[f], tag)) w[f] = poll2(from(i), tag, watch);
      const float2 v = make_float2(__uint_as_float((u32)w[f].x), __uint_as_float((u32)w[f].y));
      if (pair < C::D / 2) *(float2*)(s.partial[z][i / EACH] + pair * 2) = v;
      else { s.top[z][i / EACH] = v.x; s.mass[z][i / EACH] = v.y; }
    }
  }
}

// One head of the cache and one row: its G queries over this block's share of the keys and the new one.
template <class C> __device__ __forceinline__ void attend(Shared& s, const Record& op, Ring<SLOTS>& ring, u32 tag, const Watch& watch, const Share& share) {
  constexpr int D = C::D, G = C::G, HEADS = C::SELF ? G + 2 : G;
  constexpr int CHUNK = keys_in_slot(D), KEYS_EACH = CHUNK / WARPS;  // keys of a slot, and of a warp in it
  static_assert(D % 8 == 0 && CHUNK == KEYS_EACH * WARPS, "warps must cover every key of a slot, in units of 16 bytes");
  constexpr int LANES = D % 32 == 0 ? 4 : D % 16 == 0 ? 2 : 1;          // lanes that share a key
  constexpr int PAIRS_EACH = (D / 2 + 31) / 32;                         // pairs of features of a value a lane sums
  const int tid = this_thread(), warp = tid / 32, lane = tid % 32;
  const int task = share.task, head = task % C::KV, b = task / C::KV, keys = share.keys;
  const int seen = C::SELF ? min(keys + 1, op.length) : keys;
  const int place = C::SELF ? s.position[b] % op.length : -1;  // of the new key; of a full cache that of the oldest one
  const bool is_first = C::SPLITS == 1 || share.part == 0;
  const int heads = is_first ? HEADS : G;       // to be loaded
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
  for (int i = tid; i < heads * D; i += THREADS) {
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
  for (int z = warp; z < heads; z += WARPS) {
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
  if (C::SELF && is_first && warp == WARPS - 1) {
#pragma unroll
    for (int z = 0; z < G; z++) {
      float dot = 0;
#pragma unroll
      for (int d = lane; d < D; d += 32) dot += s.query[z][d] * wide(s.fresh[0][d]);
      dot = total(dot);
      if (!lane) { s.top[z][WARPS] = score(dot, z, place); s.mass[z][WARPS] = 1; }
    }
  }
  const int sub = lane % LANES, own = lane / LANES;
#pragma unroll 1
  for (int k0 = share.begin; k0 < share.end; k0 += CHUNK) {
    wait(&s.full[ring.slot], ring.phase);
    const int here = max(0, min(KEYS_EACH, share.end - k0 - warp * KEYS_EACH));
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
        const int at = k0 + warp * KEYS_EACH + k;
        const float v = k < here && at != place ? score(dot[z], z, at) : -1e30f;
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
  constexpr int EACH = (G * D / 2 + THREADS - 1) / THREADS;  // pairs of features that a thread puts together
  Sums sums[EACH];
  auto add = [&](int places) {                   // what warps or other parts left
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int e = tid + i * THREADS, z = e / (D / 2), d = e % (D / 2) * 2;
      Sums& sum = sums[i];
      if (e >= G * D / 2) break;
      float top = sum.top;
#pragma unroll
      for (int w = 0; w < places; w++) top = fmaxf(top, s.top[z][w]);
      const float old = __expf(sum.top - top);
      sum = {top, sum.mass * old, make_float2(sum.values.x * old, sum.values.y * old)};
#pragma unroll
      for (int w = 0; w < places; w++) {
        const float f = __expf(s.top[z][w] - top);
        const float2 v = *(const float2*)(s.partial[z][w] + d);
        sum.mass += f * s.mass[z][w]; sum.values.x += f * v.x; sum.values.y += f * v.y;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = tid + i * THREADS, z = e / (D / 2) % G, d = e % (D / 2) * 2;
    sums[i] = {-1e30f, 0, make_float2(0, 0)};
    if (C::SELF && is_first) sums[i] = {s.top[z][WARPS], 1, wide(*(T2*)(s.fresh[1] + d))};
  }
  add(WARPS);
  if constexpr (C::SPLITS > 1) {
    if (is_first && share.parts > 1) {
      sync();
      gather<C>(s, op, tag, watch, share);
      sync();
      add(share.parts - 1);
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int e = tid + i * THREADS, z = e / (D / 2), d = e % (D / 2) * 2;
    const Sums& sum = sums[i];
    if (e >= G * D / 2) break;
    if (is_first) write_pair(C::OUT_FORMAT, (void*)op.p[HEADS_OUT], ((b * C::KV + head) * G + z) * D + d, sum.values.x / sum.mass, sum.values.y / sum.mass, true, tag);
    else {
      u64* const words = words_of_part<C>(op, task, share.part) + z * (D + 2);
      write_pair(WORDS_F32, words, d, sum.values.x, sum.values.y, true, tag);
      if (!d) write_pair(WORDS_F32, words, D, sum.top, sum.mass, true, tag);
    }
  }
  if constexpr (C::SELF) {
    if (is_first && tid >= THREADS - D / 4) {      // threads that write no output where there are few
      const int e = tid - (THREADS - D / 4), which = e / (D / 8), d = e % (D / 8) * 8;
      T* cache = (T*)op.p[which ? VALUES : KEYS];
      *(int4*)(cache + ((size_t)task * op.length + place) * D + d) = *(const int4*)(s.fresh[which] + d);
    }
  }
}
template <class C> __device__ __forceinline__ void attention(Shared& s, const Record& op, Ring<SLOTS>& ring, u32 tag, const Watch& watch) {
  bool any = false;
#pragma unroll 1
  for (int item = BLOCKS - 1 - this_block(); item < C::KV * ROWS * C::SPLITS; item += BLOCKS) {
    const Share share = share_of_keys<C>(s, op, item);
    if (share.part >= share.parts) continue;
    if (any) sync();  // before another item overwrites what was read
    attend<C>(s, op, ring, tag, watch, share);
    any = true;
  }
  if (!any) sync();
}
