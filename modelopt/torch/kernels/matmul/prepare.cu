// x as `broad.cu` reads it: rounded, its columns renumbered for the codes of W, in the order of the tensor cores' shared memory.
//
//     block of 8 NT rows | step of K | group of 8 columns | row | 8 values (16 bytes)
//
// blockIdx.x is the row, whose columns blockIdx.y may share; a thread holds HOLD chunks of 8 columns. Also made: the row's scale, and
// (SHIFTED) the sum of each of its steps.

extern "C" __global__ void __launch_bounds__(THREADS) prepare(
    const uint4* __restrict__ x, const float* __restrict__ x_amax, u32* __restrict__ out, float* __restrict__ sums,
    float* __restrict__ scales, int K) {
  __shared__ u32 top_bits;
  const int thread = threadIdx.x, m = blockIdx.x, rows = 8 * NT, steps = K / STEP;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (!XKIND) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  float given = XKIND && XRANGE != 1 ? first_load(x_amax + (XRANGE == 0 ? 0 : m)) : 0.0f;
  x += (u64)m * (K / 8);
  uint4 v[HOLD];
  float scale = 1.0f, top = 0.0f;
#pragma unroll
  for (int u = 0; u < HOLD; ++u) {
    const int i = (blockIdx.y * HOLD + u) * THREADS + thread;
    v[u] = i < K / 8 ? x[i / 4 / CHUNKS * (STEP / 8) + (i & 3) * CHUNKS + i / 4 % CHUNKS] : make_uint4(0, 0, 0, 0);
    top = fmaxf(top, largest(v[u]));
  }
#if XKIND
#if XRANGE == 1
  if (thread == 0) top_bits = 0;
  __syncthreads();
  const u32 bits = __reduce_max_sync(~0u, __float_as_uint(top));
  if (thread % 32 == 0) atomicMax(&top_bits, bits);
  __syncthreads();
  scale = row_scale(__uint_as_float(top_bits));
#else
  scale = row_scale(given);
#endif
#if XKIND && __CUDA_ARCH__ >= 900  // not before the loads have come: they would wait for those of W, which the next kernel begins with
  asm volatile("griddepcontrol.launch_dependents;" ::"f"(scale + top) : "memory");
#endif
  if (thread == 0 && blockIdx.y == 0) scales[m] = scale;
#endif
  const u64 block = (u64)(m / rows) * steps, row = m % rows;
#pragma unroll
  for (int u = 0; u < HOLD; ++u) {
    const int i = (blockIdx.y * HOLD + u) * THREADS + thread, chunk = i / 4 % CHUNKS, step = i / 4 / CHUNKS;  // bits: t, chunk, step
    const u32 a = rounded(v[u].x, scale), b = rounded(v[u].y, scale), c = rounded(v[u].z, scale), d = rounded(v[u].w, scale);
    const u32 pairs[4] = {FOUR ? prmt(a, c, 0x5410) : prmt(a, b, 0x5410), FOUR ? prmt(a, c, 0x7632) : prmt(a, b, 0x7632),
                          FOUR ? prmt(b, d, 0x5410) : prmt(c, d, 0x5410), FOUR ? prmt(b, d, 0x7632) : prmt(c, d, 0x7632)};
    if (i < K / 8)
#pragma unroll
      for (int p = 0; p < 4; ++p) out[(((block + step) * (4 * CHUNKS) + chunk * 4 + p) * rows + row) * 4 + (i & 3)] = pairs[p];
#if SHIFTED
    float sum = low(a) + high(a) + (low(b) + high(b)) + (low(c) + high(c) + (low(d) + high(d)));
#pragma unroll
    for (int bit = 1; bit < 16; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (i < K / 8 && i % 16 == 0) sums[(block + step) * rows + row] = sum;
#endif
  }
}
