// x as `broad.cu` reads it: rounded, its columns renumbered for the codes of W, in the order of the tensor cores' shared memory.
//
//     block of 8 NT rows | step of K | group of 8 columns | row | 8 values (16 bytes)
//
// A thread brings the EACH columns of a step that thread t of a quad multiplies. A warp has 8 rows, so that it stores whole lines; a row
// whose range is found here has a block to itself, whose threads hold HOLD such pieces. Also made: the row's scale.

#define ALONE (XKIND && XRANGE == 1)

extern "C" __global__ void __launch_bounds__(THREADS) prepare(
    const uint4* __restrict__ x, const float* __restrict__ x_amax, u32* __restrict__ out, float* __restrict__ scales, int K, int M) {
  const int thread = threadIdx.x, t = thread & 3, rows = 8 * NT, steps = K / STEP;
  const int m = ALONE ? blockIdx.x : blockIdx.x * 8 + (thread >> 2 & 7), step0 = ALONE ? thread / 4 : blockIdx.y * (THREADS / 32) + thread / 32;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (!XKIND) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const float given = XKIND && !ALONE ? first_load(x_amax + (XRANGE == 0 ? 0 : min(m, M - 1))) : 0.0f;
  uint4 v[HOLD][CHUNKS];
  float scale = 1.0f, top = 0.0f;
#pragma unroll
  for (int u = 0; u < HOLD; ++u)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int step = step0 + u * (THREADS / 4);
      v[u][c] = m < M && step < steps ? x[(u64)m * (K / 8) + (step * 4 + t) * CHUNKS + c] : make_uint4(0, 0, 0, 0);
      top = fmaxf(top, largest(v[u][c]));
    }
#if ALONE
  __shared__ u32 top_bits;
  if (thread == 0) top_bits = 0;
  __syncthreads();
  const u32 bits = __reduce_max_sync(~0u, __float_as_uint(top));
  if (thread % 32 == 0) atomicMax(&top_bits, bits);
  __syncthreads();
  scale = row_scale(__uint_as_float(top_bits));
#elif XKIND
  scale = row_scale(given);
#endif
#if XKIND && __CUDA_ARCH__ >= 900  // not before the loads have come: they would wait for those of W, which the next kernel begins with
  asm volatile("griddepcontrol.launch_dependents;" ::"f"(scale + top) : "memory");
#endif
  if (XKIND && m < M && step0 == 0 && t == 0) scales[m] = scale;
  const u64 block = (u64)(m / rows) * steps, row = m % rows;
#pragma unroll
  for (int u = 0; u < HOLD; ++u) {
    const int step = step0 + u * (THREADS / 4);
    if (m >= M || step >= steps) continue;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const uint4 w = v[u][chunk];
      const u32 a = rounded(w.x, scale), b = rounded(w.y, scale), c = rounded(w.z, scale), d = rounded(w.w, scale);
      const u32 pairs[4] = {FOUR ? prmt(a, c, 0x5410) : prmt(a, b, 0x5410), FOUR ? prmt(a, c, 0x7632) : prmt(a, b, 0x7632),
                            FOUR ? prmt(b, d, 0x5410) : prmt(c, d, 0x5410), FOUR ? prmt(b, d, 0x7632) : prmt(c, d, 0x7632)};
#pragma unroll
      for (int p = 0; p < 4; ++p) out[(((block + step) * (4 * CHUNKS) + chunk * 4 + p) * rows + row) * 4 + t] = pairs[p];
    }
  }
}
