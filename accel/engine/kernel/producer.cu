// What the producer warp copies for each operation.

// The producer's place in the ring. Few copies are under way at once: enough for the memory's bandwidth, and no queue in which
// the words that blocks exchange would wait.
constexpr int IN_FLIGHT = COPIES < SLOTS ? COPIES : SLOTS;  // slots that are being copied at a time, of the ring's
struct Producer {
  Ring<SLOTS> ring, oldest;
  int under_way;
  // Wait until the next slot is free, and the number of copies under way is below LIMIT.
  template <int LIMIT = IN_FLIGHT> __device__ __forceinline__ void acquire(Shared& s) {
    if constexpr (LOW_BITS) {                      // operations have different limits
      for (; under_way >= LIMIT; under_way--) { wait(&s.full[oldest.slot], oldest.phase); oldest.next(); }
      under_way++;
    } else if (under_way == IN_FLIGHT) { wait(&s.full[oldest.slot], oldest.phase); oldest.next(); } else under_way++;
    wait(&s.empty[ring.slot], ring.phase ^ 1);
  }
};

// Copy entries [k0, k0 + count) of a head and row to a slot of the ring, each out of the row of the cache that computed it. Entries
// side by side that one row computed are one copy. Entry k is that of the last position up to the new one's that falls on k.
template <class C> __device__ __forceinline__ void copy_by_ancestry(const Shared& s, const Record& op, unsigned char* to, const T* cache, int task, int k0, int count, u64* full, u64 keep) {
  constexpr int BYTES = C::D * 2;
  const int lane = this_thread() % 32, head = task % C::KV, b = task / C::KV, last = s.position[b], place = last % op.length;
  const int* const table = (const int*)op.p[ANCESTRY] + (size_t)b * op.positions + last - place;
  auto row_of = [&](int k) { return table[k > place ? k - op.length : k]; };
  auto from = [&](int row, int k) { return (const char*)(cache + ((size_t)(row * C::KV + head) * op.length + k) * C::D); };
#if BULK
#pragma unroll 1
  for (int i0 = 0; i0 < count; i0 += 32) {
    const int i = i0 + lane, row = i < count ? row_of(k0 + i) : -1;
    const u32 starts = __ballot_sync(~0u, row != __shfl_up_sync(~0u, row, 1) || !lane), later = starts & ~((2u << lane) - 1);
    const int end = later ? __ffs(later) - 1 : 32;
    if (row >= 0 && starts >> lane & 1) copy(to + i * BYTES, from(row, k0 + i), (end - lane) * BYTES, full, keep);
  }
#else
#pragma unroll 4
  for (int unit = lane; unit < count * BYTES / 16; unit += 32) {
    const int i = unit / (BYTES / 16), k = k0 + i;
    async_copy(to + unit * 16, from(row_of(k), k) + unit % (BYTES / 16) * 16, keep);
  }
#endif
}
// The producer's part of an operation.
template <class C> __device__ __forceinline__ void produce_attention(Shared& s, const Record& op, Producer& to, u64 keep) {
  constexpr int CHUNK = keys_in_slot(C::D);
#pragma unroll 1
  for (int item = BLOCKS - 1 - this_block(); item < C::KV * ROWS * C::SPLITS; item += BLOCKS) {
    const Share share = share_of_keys<C>(s, op, item);
    if (share.part >= share.parts) continue;
#pragma unroll 1
    for (int k0 = share.begin; k0 < share.end; k0 += CHUNK) for (int which = 0; which < 2; which++) {
      const int bytes = min(CHUNK, share.end - k0) * C::D * 2;
      to.acquire(s);
      u64* const full = &s.full[to.ring.slot];
      begin_copies(full, bytes);
      const T* const cache = (const T*)op.p[which ? VALUES : KEYS];
      if constexpr (C::BY_ANCESTRY) copy_by_ancestry<C>(s, op, s.ring[to.ring.slot], cache, share.task, k0, bytes / (C::D * 2), full, keep);
      else if (this_lane_copies()) copy(s.ring[to.ring.slot], cache + ((size_t)share.task * op.length + k0) * C::D, bytes, full, keep);
      end_copies(full);
      to.ring.next();
    }
  }
}
template <class C> __device__ __forceinline__ void produce_norm(Shared& s, const Record& op, Ring<2>& norms, u64 keep) {
  if constexpr (C::NORM != NO_NORM) {
    wait(&s.norm_empty[norms.slot], norms.phase ^ 1);
    u64* const full = &s.norm_full[norms.slot];
    begin_copies(full, C::K * 2 * (C::NORM_WEIGHT + C::NORM_BIAS));
    if (this_lane_copies()) {
      if (C::NORM_WEIGHT) copy(s.norm[norms.slot][0], op.p[1], C::K * 2, full, keep);
      if (C::NORM_BIAS) copy(s.norm[norms.slot][1], op.p[2], C::K * 2, full, keep);
    }
    end_copies(full);
    norms.next();
  }
}
template <class C> __device__ __forceinline__ void produce_normalize(Shared& s, const Record& op, Ring<2>& norms, u64 keep) {
  if (blockIdx.x < ROWS) produce_norm<C>(s, op, norms, keep);
}
template <class C> __device__ __forceinline__ void produce_product(Shared& s, const Record& op, Producer& to, Ring<2>& norms, u64 once, u64 keep) {
  using R = Rows<C>;
  constexpr int ROW = R::COPIED;
  constexpr int SCALES_OF_ROWS = R::BLOCKS_EACH * UNITS * R::ENTRY, SCALES_OF_SLOT = R::FEATURES / R::BLOCK * UNITS * R::ENTRY;
  // Of slots that are half empty, more: each slot of the ring once, so that no copy's phase is missed.
  constexpr int MORE = IN_FLIGHT * (ROW <= SEGMENT / 4 ? 4 : ROW <= SEGMENT / 2 ? 2 : 1);
  constexpr int LIMIT = C::BITS == 16 ? IN_FLIGHT : MORE < SLOTS ? MORE : SLOTS;
  const int lane = this_thread() % 32;
  int first, count;
  share<C>(first, count);
  if (!count) return;
  produce_norm<C>(s, op, norms, keep);
  constexpr bool PAIRED = C::BITS < 16 && R::SEGMENTS > 1;  // two groups are multiplied together: the first slot of both, the second, ...
#pragma unroll 1
  for (int g = first; g < first + count * (PAIRED ? R::SEGMENTS : 1); g++) {
    int group = g, begin = 0, end = ROW;
    if constexpr (PAIRED) {
      const int pair = (g - first) / (2 * R::SEGMENTS), place = (g - first) % (2 * R::SEGMENTS), groups = min(2, count - 2 * pair);
      group = first + 2 * pair + place % groups;
      begin = place / groups * SEGMENT;
      end = begin + 1;
    }
    const int part = part_of<C>(group);
    const bool gated = C::gated(part);
    const int rows = min(UNITS, gated ? 2 * (C::n(part) - group * 4) : C::n(part) - group * UNITS);
    auto weights_of = [&](int unit) -> const char* {  // null beyond the last row
      const int row = gated ? group * 4 + unit % 4 : group * UNITS + unit;
      return row < C::n(part) ? (const char*)op.p[pointer(part, gated && unit >= 4 ? GATE : WEIGHT)] + (size_t)row * R::BYTES : nullptr;
    };
    const char* const mine = BULK && lane < UNITS ? weights_of(lane) : nullptr;
#pragma unroll 1
    for (int k = begin; k < end; k += SEGMENT) {
      const int bytes = min(SEGMENT, ROW - k), from = k / SEGMENT * SCALES_OF_SLOT;  // first byte of the scales
      const int scale_bytes = C::BITS < 16 ? min(SCALES_OF_SLOT, SCALES_OF_ROWS - from) : 0;
      to.template acquire<LIMIT>(s);
      u64* const full = &s.full[to.ring.slot];
      begin_copies(full, bytes * rows + scale_bytes);
      unsigned char* const slot = s.ring[to.ring.slot];
      if constexpr (BULK) { if (mine) copy(slot + lane * R::UNIT, mine + k, bytes, full, once); }
      else {
#pragma unroll 1
        for (int unit = 0; unit < UNITS; unit++) if (const char* weights = weights_of(unit)) copy(slot + unit * R::UNIT, weights + k, bytes, full, once);
      }
      if (C::BITS < 16 && this_lane_copies()) copy(slot + UNITS * UNIT_BYTES, (const char*)op.p[pointer(part, SCALES)] + (size_t)group * SCALES_OF_ROWS + from, scale_bytes, full, once);
      end_copies(full);
      to.ring.next();
    }
  }
}
