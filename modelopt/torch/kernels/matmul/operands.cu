// x, codes and scales as `tens.cu` multiplies them.
//
// FLOATS: codes of e4m3 become float16 in one instruction for two, and so do those of e2m1 once they are bytes of e4m3. x in bfloat16
// becomes float16 times a power of two of its row (FITTED), with 2^14 or more for the largest of the block's columns: 29 binades below
// that are exact. A NaN or an infinity makes the whole row NaN. Else x keeps its type, and only its columns change places.

#define EXPANDED (STYPE == 4 && SCALED == 1)  // scales are powers of two that become bfloat16 on their way into shared memory
#define S_BYTES (EXPANDED ? 2 : SBYTES)  // of a scale there
#define BUFFERS (SCALED != 1 || G % 128 == 0 ? 1 : G < 128 ? 128 / G : 2)  // blocks of scales in a unit
#define AT_ONCE (FOUR && SCALED == 1 && G <= 64)  // the scales of a unit are loaded at once
#define FITTED (FLOATS && !HALF)

#if FLOATS
__device__ __forceinline__ void halves_of(u32 bytes, u32& first, u32& second) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(first), "=r"(second) : "r"(bytes));
}

// The codes 0 2, 4 6, 1 3 and 5 7 of a word of e2m1, 2^-6 times their values. The signs are cut out once: the compiler would do it twice.
__device__ __forceinline__ void values_of(u32 w, u32& a, u32& b, u32& c, u32& d) {
  u32 signs;
  asm("and.b32 %0, %1, 0x88888888;" : "=r"(signs) : "r"(w));
  halves_of(lop3<0xE2>(w << 2, 0x1C1C1C1Cu, signs << 4), a, b);
  halves_of(lop3<0xE2>(w >> 2, 0x1C1C1C1Cu, signs), c, d);
}

// Scales in e4m3 of the first and the last columns of a thread, each twice; TWO: they differ.
template <bool TWO> __device__ __forceinline__ uint2 half_scales(u32 from) {
  u32 v;
  if (TWO) asm volatile("{ .reg .b16 h; ld.shared.b16 h, [%1]; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(v) : "r"(from));
  else asm volatile("{ .reg .b16 h; .reg .u32 b; ld.shared.u8 b, [%1]; cvt.u16.u32 h, b; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(v) : "r"(from));
  return make_uint2(prmt(v, v, 0x1010), prmt(v, v, TWO ? 0x3232 : 0x1010));
}

__device__ __forceinline__ u32 times(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 halves(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
#endif

#if FITTED
// The largest magnitude of eight neighbours, as float bits; NaN if there is one.
__device__ __forceinline__ u32 top_of(uint4 v) {
  const u32 all[4] = {v.x, v.y, v.z, v.w};
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(top) : "r"(all[i] & 0x7FFF7FFFu));
  return max(top << 16, top & 0xFFFF0000u);
}

// The power of two that brings a row to 2^14 and more, as two of bfloat16; and what undoes it.
__device__ __forceinline__ u32 unit_of(u32 top) { return (268 - max(top >> 23, 15u)) * 0x00800080u; }

__device__ __forceinline__ float back_of(u32 top) {
  return top >= 0x7F800000u ? __uint_as_float(0x7FFFFFFFu) : __uint_as_float((max(top >> 23, 15u) - 14) << 23);
}
#endif

// Eight neighbouring columns of x as the pairs that the codes come in.
__device__ __forceinline__ void pairs_of(uint4 v, u32 unit, u32 (&to)[4]) {
#if FITTED
  const u32 a = mul2(v.x, unit), b = mul2(v.y, unit), c = mul2(v.z, unit), d = mul2(v.w, unit);
  if (FOUR) to[0] = halves(low(a), low(b)), to[1] = halves(low(c), low(d)), to[2] = halves(high(a), high(b)), to[3] = halves(high(c), high(d));
  else to[0] = halves(low(a), high(a)), to[1] = halves(low(b), high(b)), to[2] = halves(low(c), high(c)), to[3] = halves(low(d), high(d));
#elif FLOATS
  if (FOUR) to[0] = prmt(v.x, v.y, 0x5410), to[1] = prmt(v.z, v.w, 0x5410), to[2] = prmt(v.x, v.y, 0x7632), to[3] = prmt(v.z, v.w, 0x7632);
  else to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
#else
  if (FOUR) to[0] = prmt(v.x, v.z, 0x5410), to[1] = prmt(v.x, v.z, 0x7632), to[2] = prmt(v.y, v.w, 0x5410), to[3] = prmt(v.y, v.w, 0x7632);
  else to[0] = prmt(v.x, v.y, 0x5410), to[1] = prmt(v.x, v.y, 0x7632), to[2] = prmt(v.z, v.w, 0x5410), to[3] = prmt(v.z, v.w, 0x7632);
#endif
}

// Two exponents, bits 0 to 7 and 8 to 15, as powers of two in bfloat16.
__device__ __forceinline__ u32 powers_of(u32 exponents) {
  u32 two = (exponents & 0xFF) << 7 | (exponents & 0xFF00) << 15;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 e = exponents >> 8 * i & 0xFF;
    if (e == 0 || e == 255) two |= 0x40u << 16 * i;  // 2^-127, and NaN
  }
  return two;
}

#if AT_ONCE
// The scales of one row for a unit.
__device__ __forceinline__ void unit_scales(u32 from, float (&to)[BUFFERS]) {
#if S_BYTES == 4
  if (BUFFERS == 4) asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[BUFFERS - 2]), "=f"(to[BUFFERS - 1]) : "r"(from));
  else asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(from));
#else
  u32 two[2] = {};
  if (BUFFERS == 4) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(two[0]), "=r"(two[1]) : "r"(from));
  else asm volatile("ld.shared.u32 %0, [%1];" : "=r"(two[0]) : "r"(from));
#pragma unroll
  for (int q = 0; q < BUFFERS; ++q) {
    const u32 v = two[q / 2];
    to[q] = STYPE == 1 ? from_f16(q % 2 ? v >> 16 : v & 0xFFFF) : __uint_as_float(q % 2 ? v & 0xFFFF0000u : v << 16);
  }
#endif
}

// Their zero points as the negative offsets of `pair`.
__device__ __forceinline__ void unit_zeros(u32 from, u32 (&to)[BUFFERS]) {
  u32 v = 0;
  if (BUFFERS == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  else asm volatile("{ .reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h; }" : "=r"(v) : "r"(from));
#pragma unroll
  for (int q = 0; q < BUFFERS; ++q) to[q] = prmt(v, HALF ? 0xE4u : 0xC3u, 0x4040 + 0x0101 * q);
}
#endif
