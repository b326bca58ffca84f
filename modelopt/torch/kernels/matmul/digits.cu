// x as the B operand of `one.cu`: fixed-point numbers in digits, or float16; in shared memory, in the order of the codes of W.
//
// x is a fixed-point number X with one power of two for all columns, 2^TOP over the largest of them, cut into DIGITS signed bytes:
// X = d0 + 256 d1 + ...  The digits are columns of B in mma.m16n8k32, so that the products with all digits cost one instruction.
// With GS groups of scales in a step the digits stand in other columns for each group (zeros elsewhere): sums come out by groups.
//
//     GS 1       column g is digit g & 3
//     GS 2       column g is digit g & 3 of the threads t with t / 2 = g / 4
//     GS 4 (8)   column g is digit g & 1 (+ 2 in the second of PASSES) of the thread t = g / 2 (of each half of its words)
//
// Halves of bytes of i4 and u4 stay where they are: code with 16 X, 16 x code with X. The tensor cores take i4 as code + 8; what that
// adds (for u4: what a zero point takes off) are sums of digits, in a table behind x. Where codes become float16 X is one, with
// 2^15 above its largest: 29 binades below that are exact. Constants: see `one.cu`.

#define THREADS (32 * WK * WR)
#define SLOT (S * 1024)
#define FLOATS (KIND == 2 || KIND == 4)
#define HALVES_OF_BYTES (KIND < 2)
#define GS (SCALED && G < STEP ? STEP / G : 1)
#define HALVES (GS == 8 ? 2 : 1)
#define PASSES (!FLOATS && GS >= 4 ? 2 : 1)
#define DIGITS (FLOATS || (KIND == 3 && XKIND == 2 && !SCALED) ? 1 : 4)
#define QUADS ((FOUR ? 2 : 1) * (FLOATS ? 2 : 1))
#define X_QUAD (DIGITS * 64 + (GS > 1 ? 16 : 0))
#define X_STEP (QUADS * X_QUAD)
#define T_STEP (HALVES_OF_BYTES ? PASSES * HALVES * 64 : 0)
#define TOP (FLOATS ? 15 : HALVES_OF_BYTES ? 26 : 30)
#define FITTED (XKIND == 0 && !(FLOATS && HALF))  // X depends on the largest of x
#define MAGIC 0x4B400000
#define WHOLE (KIND == 3 && !SCALED)  // integer sums over all of K

// The digits of four fixed-point numbers, those of the same weight in one word.
__device__ __forceinline__ void digits(const int* fixed, u32* words) {
  u32 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = ((u32)fixed[i] + 0x00808080u) ^ 0x00808080u;
  const u32 a = prmt(v[0], v[1], 0x5140), b = prmt(v[2], v[3], 0x5140);
  words[0] = prmt(a, b, 0x5410);
  if (DIGITS == 1) return;
  const u32 c = prmt(v[0], v[1], 0x7362), d = prmt(v[2], v[3], 0x7362);
  words[1] = prmt(a, b, 0x7632), words[2] = prmt(c, d, 0x5410), words[3] = prmt(c, d, 0x7632);
}

// The largest magnitude of eight neighbours, as float bits; NaN if there is one.
__device__ __forceinline__ u32 top_of(uint4 v) {
  const u32 all[4] = {v.x, v.y, v.z, v.w};
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if HALF
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(top) : "r"(all[i] & 0x7FFF7FFFu));
#else
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(top) : "r"(all[i] & 0x7FFF7FFFu));
#endif
  }
  return max(__float_as_uint(low(top)), __float_as_uint(high(top)));
}

__device__ __forceinline__ u32 halves(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Put eight neighbouring columns, the i-th eight of the block, into shared memory, and what their sums add to the table. All lanes come.
__device__ __forceinline__ void place(uint4 v, int i, bool valid, float by, float pre, float unit, u32 xs, u32 table) {
  const u32 pairs[4] = {rounded(v.x, by), rounded(v.y, by), rounded(v.z, by), rounded(v.w, by)};
#if FLOATS
  u32 f[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) f[p] = HALF ? pairs[p] : halves(low(pairs[p]) * pre * unit, high(pairs[p]) * pre * unit);
  if (valid)
    to_shared16(xs + (FOUR ? (i >> 4) * X_STEP + (i & 3) * X_QUAD + (i >> 2 & 3) * 16 : (i >> 3) * X_STEP + (i & 1) * X_QUAD + (i >> 1 & 3) * 16),
        FOUR ? make_uint4(prmt(f[0], f[1], 0x5410), prmt(f[2], f[3], 0x5410), prmt(f[0], f[1], 0x7632), prmt(f[2], f[3], 0x7632))
             : make_uint4(f[0], f[1], f[2], f[3]));
#else
  int fixed[2][4];
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float value = (h ? high(pairs[p]) : low(pairs[p])) * (HALF || XKIND ? 1.0f : pre) * (HALVES_OF_BYTES && h == 0 ? 16.0f * unit : unit);
      fixed[HALVES_OF_BYTES ? h : p / 2][HALVES_OF_BYTES ? p : p % 2 * 2 + h] = __float2int_rn(value);
    }
  u32 first[4], second[4];
  digits(fixed[0], first), digits(fixed[1], second);
  const u32 to = xs + (FOUR ? (i >> 4) * X_STEP + (i >> 1 & 1) * X_QUAD + (i >> 2 & 3) * 16 : (i >> 3) * X_STEP + (i >> 1 & 3) * 16) + (i & 1) * 8;
#pragma unroll
  for (int d = 0; d < DIGITS; ++d)
    if (valid) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to + d * 64), "r"(first[d]), "r"(second[d]) : "memory");
#if HALVES_OF_BYTES
  constexpr int span = STEP / GS / 8;
  int sums[4];
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    sums[d] = __dp4a((int)first[d], 0x01010101, __dp4a((int)second[d], 0x10101010, 0));
#pragma unroll
    for (int o = 1; o < span; o *= 2) sums[d] += __shfl_xor_sync(~0u, sums[d], o);
    sums[d] = KIND == 1 ? -sums[d] : MAGIC - 8 * sums[d];
  }
  if (!valid || i % span) return;
  const int group = (i & 15) / span;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const int entry = GS == 1 ? p : GS == 2 ? group * 2 + p : GS == 4 ? p * 4 + group : (p * 2 + (group & 1)) * 4 + group / 2;
    to_shared16(table + (i >> 4) * T_STEP + entry * 16, make_uint4(sums[2 * p], sums[2 * p + 1], sums[2 * p], sums[2 * p + 1]));
  }
#endif
#endif
}
