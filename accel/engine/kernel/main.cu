// The kernel.

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(const Record* records, int count, const long long* positions, u32* epoch, u32* arrived, int* failed, int* error, u32 limit) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int tid = threadIdx.x, lane = tid % 32;
  const bool copies = lane < COPIERS && (tid < 32 || tid >= THREADS);  // of the first warp and of the producer
  const int4* const list = (const int4*)records;
  for (int i = tid; i < SLOTS * SLOT_BYTES / 16; i += blockDim.x) ((int4*)s.ring)[i] = make_int4(0, 0, 0, 0);
  if (copies) ((int4*)(tid < 32 ? s.consumed : s.produced))[lane] = list[lane];
  if (tid < ROWS) s.position[tid] = positions ? (int)positions[tid] : 0;
  if (tid < 2) s.bias_key[tid] = -1;
  if (tid == 0) {
    s.tag = *(volatile u32*)epoch + 1;
    s.failed = *(volatile int*)failed;
    for (int i = 0; i < SLOTS; i++) { barrier_init(&s.full[i], COPYING); barrier_init(&s.empty[i], WARPS); }
    for (int i = 0; i < 2; i++) { barrier_init(&s.norm_full[i], COPYING); barrier_init(&s.norm_empty[i], WARPS); }
    __threadfence();
    if (atomicAdd(arrived, 1) == BLOCKS - 1) {  // all blocks have read the epoch
      *arrived = 0;
      __threadfence();
      *(volatile u32*)epoch = s.tag;
    }
  }
  fence();
  __syncthreads();
  if (s.failed) return;  // an earlier launch gave up, and the host hasn't seen it yet
  const u32 tag = s.tag;
  Ring<SLOTS> ring{0, 0};
  Ring<2> norms{0, 0};
  if (tid >= THREADS) {
    u64 once, keep;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(keep));
    Producer to{{0, 0}, {0, 0}, 0};
    int4 next;
    if (copies && count > 1) next = list[COPIERS + lane];
#pragma unroll 1
    for (int i = 0; i < count; i++) {  // records are read two operations ahead
      if (copies && i + 1 < count) ((int4*)&s.produced[(i + 1) % RECORDS])[lane] = next;
      if (copies && i + 2 < count) next = list[(i + 2) * COPIERS + lane];
      const Record& op = s.produced[i % RECORDS];
      delay(i, tag);
      switch (op.shape) { PRODUCE }
      __syncwarp();
    }
    return;
  }
  // Every operation has a barrier. So when a block's warp reads record i + 1 after those of operation i, it is there, and no
  // warp reads record i - 1 any more when record i + 3 replaces it.
  int4 next;
  if (copies && count > 1) next = list[COPIERS + lane];
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const Record& op = s.consumed[i % RECORDS];
    const Watch watch{failed, error, i, limit};
    if (copies && i + 1 < count) ((int4*)&s.consumed[(i + 1) % RECORDS])[lane] = next;
    if (copies && i + 2 < count) next = list[(i + 2) * COPIERS + lane];
    delay(i, tag);
    switch (op.shape) { CONSUME }
  }
}
