// What the producer warp copies for each operation.

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
      if (this_lane_copies()) copy(s.ring[to.ring.slot], (const T*)op.p[which ? VALUES : KEYS] + ((size_t)share.task * op.length + k0) * C::D, bytes, full, keep);
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
  const int lane = this_thread() % 32;
  int first, count;
  share<C>(first, count);
  if (!count) return;
  produce_norm<C>(s, op, norms, keep);
#pragma unroll 1
  for (int g = first; g < first + count; g++) {
    int group = g;
    const int part = part_of<C>(group);
    const bool gated = C::gated(part);
    const int rows = min(UNITS, gated ? 2 * (C::n(part) - group * 4) : C::n(part) - group * UNITS);
    auto weights_of = [&](int unit) -> const T* {  // null beyond the last row
      const int row = gated ? group * 4 + unit % 4 : group * UNITS + unit;
      return row < C::n(part) ? (const T*)op.p[pointer(part, gated && unit >= 4 ? GATE : WEIGHT)] + (size_t)row * C::K : nullptr;
    };
    const T* const mine = BULK && lane < UNITS ? weights_of(lane) : nullptr;
#pragma unroll 1
    for (int k = 0; k < C::K; k += SEGMENT) {
      const int bytes = min(SEGMENT, C::K - k) * 2;
      to.acquire(s);
      u64* const full = &s.full[to.ring.slot];
      begin_copies(full, bytes * rows);
      unsigned char* const slot = s.ring[to.ring.slot];
      if constexpr (BULK) { if (mine) copy(slot + lane * UNIT_BYTES, mine + k, bytes, full, once); }
      else {
#pragma unroll 1
        for (int unit = 0; unit < UNITS; unit++) if (const T* weights = weights_of(unit)) copy(slot + unit * UNIT_BYTES, weights + k, bytes, full, once);
      }
      end_copies(full);
      to.ring.next();
    }
  }
}
