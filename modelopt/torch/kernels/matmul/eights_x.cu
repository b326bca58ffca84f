// x as `eights.cu` reads it: codes of 8 bits and a scale per row, in the order of the tensor cores' shared memory.
//
//     step of 128 columns | row (8 NT) | 8 pieces of 16 codes, piece p of row m in place p ^ (m & 7)
//
// blockIdx.x is the row, whose columns blockIdx.y may share unless its range has to be seen (WHOLE); a thread holds HOLD pieces. Columns
// after the last, of its step, are zero. Rows after the last are not written: they meet nothing that is stored.
//
// `eights.cu` may start at once, to be there when its processors are free, and waits at the gate before it fetches W, which a kernel
// ahead may have written. The gate is set here before it starts. It is open where a product is still under way (gate[1] counts its
// blocks): that is the kernel ahead then, it writes no weights, and all before it had ended when it began. Else it is opened when the
// kernels ahead have ended. Nobody waits at it from before, since this kernel starts when all blocks of a product ahead have passed.

__device__ __forceinline__ u32 larger(u32 a, u32 b) {  // of two magnitudes each, as bits: a NaN is the largest
  u32 d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ float limited(float v, float least, float most) {  // a NaN stays (FP8), or becomes zero (INT8)
  float d;
  if (XKIND == 2 && v != v) v = 0.0f;
  asm("{ .reg .f32 t; min.NaN.f32 t, %1, %2; max.NaN.f32 %0, t, %3; }" : "=f"(d) : "f"(v), "f"(most), "f"(least));
  return d;
}

#define WHOLE (XRANGE == 1 || XKIND == 2)
#define LEAST (XKIND == 1 ? -448.0f : -128.0f)
#define LARGEST (XKIND == 1 ? 448.0f : 127.0f)

// x / scale for x of 11 bits, on the right side of every tie of the codes: see `triton_math.quotient`.
struct Quotient {
  float scale, k, r, rest, near_one;
  bool plain;
  __device__ __forceinline__ explicit Quotient(float s) : scale(s) {
    const int exponent = __float_as_int(s) >> 23 & 0xFF;
    plain = exponent > 1 && exponent < 253;
    k = __int_as_float((254 - exponent) << 23);
    near_one = s * k;
    r = __fdiv_rn(1.0f, near_one);
    rest = __fmaf_rn(-near_one, r, 1.0f) * (r * 0.9999998807907104f);  // 1 - 2^-23
  }
  __device__ __forceinline__ float of(float x) const {
    if (!plain) return limited(__fdiv_rn(x, scale), LEAST, LARGEST);
    const float a = XRANGE == 1 ? x * k : limited(x * k, LEAST * near_one, LARGEST * near_one);
    return __fmaf_rn(a, r, a * rest);
  }
};

__device__ __forceinline__ u32 two_codes(u32 v, const Quotient& q) {
  const float a = q.of(low(v)), b = q.of(high(v));
#if XKIND == 1
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
  return codes;
#else
  return prmt(__float_as_uint(a + 12582912.0f), __float_as_uint(b + 12582912.0f), 0x0040);  // 1.5 * 2^23: the low byte is the integer
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) eights_x(
    const uint4* __restrict__ x, const float* __restrict__ x_amax, uint4* __restrict__ out, float* __restrict__ scales,
    int* __restrict__ gate, int K) {
  __shared__ u32 tops[32];
  const int thread = threadIdx.x, m = blockIdx.x, pieces = K / 16;
  if (thread == 0) {
    if (m == 0 && blockIdx.y == 0) {
      int under_way;
      asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(under_way) : "l"(gate + 1) : "memory");
      asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(gate), "r"((int)(under_way > 0)) : "memory");
      __threadfence();
    }
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (thread == 0 && m == 0 && blockIdx.y == 0) asm volatile("st.release.gpu.s32 [%0], 1;" ::"l"(gate) : "memory");
  float scale = XRANGE == 0 ? row_scale(first_load(x_amax)) : 0.0f;
  x += (u64)m * (K / 8);
  uint4 v[HOLD][2];
#pragma unroll
  for (int i = 0; i < HOLD; ++i) {
    const int at = (blockIdx.y * HOLD + i) * THREADS + thread;
#pragma unroll
    for (int h = 0; h < 2; ++h) v[i][h] = at < pieces ? x[2 * at + h] : make_uint4(0, 0, 0, 0);
  }
#if WHOLE
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < HOLD; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 all[4] = {v[i][h].x, v[i][h].y, v[i][h].z, v[i][h].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) top = larger(top, all[j] & 0x7FFF7FFF);
    }
  top = __reduce_max_sync(~0u, max(top & 0xFFFF, top >> 16));
  if (thread % 32 == 0) tops[thread / 32] = top;
  __syncthreads();
  const float range = low(__reduce_max_sync(~0u, thread % 32 < THREADS / 32 ? tops[thread % 32] : 0));
  scale = XRANGE == 1 || range != range ? row_scale(range) : scale;  // INT8 has no NaN: its row does
#endif
  if (thread == 0 && blockIdx.y == 0) scales[m] = scale;
  const Quotient q(scale);
#pragma unroll
  for (int i = 0; i < HOLD; ++i) {
    const int at = (blockIdx.y * HOLD + i) * THREADS + thread;
    u32 codes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4& from = v[i][j / 2];
      codes[j] = prmt(two_codes(j % 2 ? from.z : from.x, q), two_codes(j % 2 ? from.w : from.y, q), 0x5410);
    }
    if (at < (K + 127) / 128 * 8) out[(at / 8 * (8 * NT) + m) * 8 + (at % 8 ^ m % 8)] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
  }
}
