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
