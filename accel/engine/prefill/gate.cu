// x = activation(x) * y * BETA, element by element, in place. Compiled behind numbers.cu. Before both: BF16, ACTIVATION (of `enum
// Activation`), LIMIT, BETA. A thread has eight elements.

extern "C" __global__ void __launch_bounds__(256) gate(T* x, const T* y, long long count) {
  const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= count) return;
  uint4 a = *(const uint4*)(x + i);
  const uint4 b = *(const uint4*)(y + i);
  T2* to = (T2*)&a;
  const T2* factors = (const T2*)&b;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 v = wide(to[j]), w = wide(factors[j]);
    to[j] = narrow(activate(v.x, ACTIVATION, LIMIT) * w.x * BETA, activate(v.y, ACTIVATION, LIMIT) * w.y * BETA);
  }
  *(uint4*)(x + i) = a;
}
