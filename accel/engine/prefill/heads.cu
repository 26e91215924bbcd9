// Cut the heads of queries, keys and values out of rows of features, norm, scale and rotate them, and write queries as
// [B, N, H, D], as rows of torch's attention are, keys and values as [B, H, N, D], as caches are.
//
// Compiled behind numbers.cu. Before both: BF16, WIDE_ANGLES (cosines and sines are FP32), ROTARY (features that are rotated; 0: none),
// INTERLEAVED, ANGLES (of `enum Angles`), and lists with a number for queries, keys and values: COUNT (heads), START, PER_GROUP,
// GROUP_STRIDE, STRIDE, SIZE, SCALE, NORM, EPSILON. `Heads` in operations/attention.py says what they are. All are even, but counts.

#if WIDE_ANGLES
typedef float Angle;
__device__ __forceinline__ float number(Angle v) { return v; }
#else
typedef T Angle;
__device__ __forceinline__ float number(Angle v) { return wide(v); }
#endif

constexpr int COUNTS[] = {COUNT}, STARTS[] = {START}, IN_GROUP[] = {PER_GROUP}, GROUP_STRIDES[] = {GROUP_STRIDE};
constexpr int STRIDES[] = {STRIDE}, SIZES[] = {SIZE}, NORMS[] = {NORM};
constexpr float SCALES[] = {SCALE}, EPSILONS[] = {EPSILON};
constexpr int ROWS_OF_BLOCK = 4;                   // one a warp

__device__ __forceinline__ int angle(int i) { return ANGLES == FULL ? i : ANGLES == HALVES ? i % (ROTARY / 2) : i / 2; }

// One head of one row, by a warp. A lane has two neighbouring features at a time.
template <int P> __device__ __forceinline__ void cut(const T* rows, long long stride, const T* weight, const Angle* cosines,
                                                     const Angle* sines, T* out, int head, int row, int length) {
  constexpr int D = SIZES[P];
  const int lane = threadIdx.x % 32;
  const T* x = rows + row * stride + STARTS[P] + head / IN_GROUP[P] * GROUP_STRIDES[P] + head % IN_GROUP[P] * STRIDES[P];
  float mean = 0.f, factor = 1.f;
  if (NORMS[P] != NO_NORM) {
    float sum = 0.f, squares = 0.f;
    for (int i = lane * 2; i < D; i += 64) {
      const float2 v = wide(*(const T2*)(x + i));
      sum += v.x + v.y;
      squares += v.x * v.x + v.y * v.y;
    }
    if (NORMS[P] == LAYER) {
      mean = total(sum) / D;
      squares = 0.f;
      for (int i = lane * 2; i < D; i += 64) {
        const float2 v = wide(*(const T2*)(x + i));
        squares += (v.x - mean) * (v.x - mean) + (v.y - mean) * (v.y - mean);
      }
    }
    factor = rsqrtf(total(squares) / D + EPSILONS[P]);
  }
  auto pair = [&](int i) {
    float2 v = wide(*(const T2*)(x + i));
    if (NORMS[P] != NO_NORM) {
      v = make_float2((v.x - mean) * factor, (v.y - mean) * factor);
      if (weight != nullptr) {
        const float2 w = wide(*(const T2*)(weight + i));
        v = make_float2(v.x * w.x, v.y * w.y);
      }
    }
    return make_float2(v.x * SCALES[P], v.y * SCALES[P]);
  };
  const long long place = P == 0 ? (long long)row * COUNTS[P] + head : ((long long)(row / length) * COUNTS[P] + head) * length + row % length;
  T* to = out + place * D;
  for (int i = lane * 2; i < D; i += 64) {
    float2 v = pair(i);
    if (P < 2 && i < ROTARY) {
      float2 partner;
      if (INTERLEAVED) {
        partner = make_float2(-v.y, v.x);
      } else {
        partner = pair(i < ROTARY / 2 ? i + ROTARY / 2 : i - ROTARY / 2);
        if (i < ROTARY / 2) partner = make_float2(-partner.x, -partner.y);
      }
      v.x = v.x * number(cosines[angle(i)]) + partner.x * number(sines[angle(i)]);
      v.y = v.y * number(cosines[angle(i + 1)]) + partner.y * number(sines[angle(i + 1)]);
    }
    *(T2*)(to + i) = narrow(v.x, v.y);
  }
}

// Blocks: rows / ROWS_OF_BLOCK by heads of queries, keys and values. Strides are from one row to the next; 0: all rows have the same
// cosines or sines. A missing weight of a norm is null.
extern "C" __global__ void __launch_bounds__(ROWS_OF_BLOCK * 32)
heads(const T* query, long long query_stride, const T* key, long long key_stride, const T* value, long long value_stride,
      const T* query_norm, const T* key_norm, const T* value_norm, const Angle* cosines, long long cosine_stride, const Angle* sines,
      long long sine_stride, T* queries, T* keys, T* values, int rows, int length) {
  const int row = blockIdx.x * ROWS_OF_BLOCK + threadIdx.x / 32;
  int head = blockIdx.y;
  if (row >= rows) return;
  cosines += row * cosine_stride;
  sines += row * sine_stride;
  if (head < COUNTS[0]) return cut<0>(query, query_stride, query_norm, cosines, sines, queries, head, row, length);
  head -= COUNTS[0];
  if (head < COUNTS[1]) return cut<1>(key, key_stride, key_norm, cosines, sines, keys, head, row, length);
  cut<2>(value, value_stride, value_norm, cosines, sines, values, head - COUNTS[1], row, length);
}
