// What the kernels of packed products share: copies, unpacking of codes, scales, and the end of a tile. Constants: see `skinny.cu`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
typedef unsigned short u16;

struct __align__(64) Map {  // of the codes, as [K / STEP, N, 64 bytes]
  u64 opaque[16];
};

#define FOUR (KIND < 3)
#define EACH (FOUR ? 32 : 16)
#define STEP (4 * EACH)
#define CHUNKS (EACH / 8)
#define SBYTES (STYPE == 0 ? 4 : STYPE < 3 ? 2 : 1)
#ifndef SHIFTED
#define SHIFTED (KIND < 2 && SCALED == 1)  // codes keep the 128 (float16: 1024) that turns them into floats
#endif
#define BASE (HALF ? 1024.0f : 128.0f)
#define BULK (__CUDA_ARCH__ >= 900)

__device__ __forceinline__ u32 address(const void* p) {
  u32 a;
  asm("{ .reg .u64 v; cvta.to.shared.u64 v, %1; cvt.u32.u64 %0, v; }" : "=r"(a) : "l"(p));
  return a;
}

template <int N> __device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if (N == 16) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// As many of 16 bytes as are real, then zeros.
__device__ __forceinline__ void copy_async_or_zero(u32 to, const void* from, int real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void arm(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_copy(u32 to, const Map* map, int row, int step, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(map), "r"(0), "r"(row), "r"(step), "r"(barrier) : "memory");
}

__device__ __forceinline__ void bulk_copy_2d(u32 to, const Map* map, int byte, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(map), "r"(byte), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, int phase) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }"
      ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void to_shared16(u32 to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ uint4 from_shared16(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

__device__ __forceinline__ int byte_of(u32 from) {
  int v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
#if HALF
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <u32 HOW> __device__ __forceinline__ u32 lop3(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(HOW));
  return d;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
#if HALF
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

#define ONES (HALF ? 0x3C003C00u : 0x3F803F80u)
#define MINUS_ONES (ONES ^ 0x80008000u)
#define MINUS_ZERO 0x80008000u

__device__ __forceinline__ u32 mul2(u32 a, u32 b) { return fma2(a, b, MINUS_ZERO); }
__device__ __forceinline__ u32 add2(u32 a, u32 b) { return fma2(a, ONES, b); }

__device__ __forceinline__ u32 pack2(float low, float high) {
  u32 d;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}

__device__ __forceinline__ float from_f16(u16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}

__device__ __forceinline__ float low(u32 v) { return HALF ? from_f16(v & 0xFFFF) : __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return HALF ? from_f16(v >> 16) : __uint_as_float(v & 0xFFFF0000u); }

// The pair of codes i and i + half of a word, as values; `minus` is the negative offset of u4 (its zero point and the mantissa's one).
template <int I, bool KEEP> __device__ __forceinline__ u32 pair(u32 w, u32 minus) {
#if KIND == 0
  u32 d = lop3<0x6A>(w >> (4 * I), 0x000F000Fu, HALF ? 0x64086408u : 0x43084308u);
  return SHIFTED ? d : add2(d, HALF ? 0xE408E408u : 0xC308C308u);
#elif KIND == 1
  u32 d = lop3<0xEA>(w >> (4 * I), 0x000F000Fu, HALF ? 0x64006400u : 0x43004300u);
  return SHIFTED ? d : add2(d, minus);
#elif KIND == 3 && HALF
  return add2(lop3<0x6A>(w >> (8 * I), 0x00FF00FFu, 0x64806480u), 0xE480E480u);
#elif KIND == 3
  u32 v = w >> (8 * I);
  return fma2(lop3<0xEA>(v, 0x00800080u, 0x43004300u), MINUS_ONES, lop3<0xEA>(v, 0x007F007Fu, 0x43004300u));
#else
  constexpr int width = FOUR ? 3 : 7, at = I * (FOUR ? 4 : 8);
  constexpr int top = (HALF ? 9 : 6) - (FOUR ? 0 : 2);
  constexpr int magnitude = at - top, sign = at - (15 - width);
  u32 v = magnitude > 0 ? w >> (magnitude & 31) : w << (-magnitude & 31);
  u32 s = (sign > 0 ? w >> (sign & 31) : w << (-sign & 31)) & 0x80008000u;
  u32 d = lop3<0xEA>(v, (u32)((1 << width) - 1 << top) * 0x10001u, s);
  return KEEP ? d : mul2(d, FOUR ? (HALF ? 0x74007400u : 0x7E807E80u) : (HALF ? 0x5C005C00u : 0x7B807B80u));
#endif
}

// Scales of blocks as operands: two equal halves of the rounded scale, and of the rest (float scales).
__device__ __forceinline__ float scale_value(u32 from) {
#if STYPE == 0
  float f;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(from));
  return f;
#else
  u16 h;
#if STYPE < 3
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(h) : "r"(from));
  return STYPE == 1 ? from_f16(h) : __uint_as_float((u32)h << 16);
#else
  asm volatile("{ .reg .u32 v; ld.shared.u8 v, [%1]; cvt.u16.u32 %0, v; }" : "=h"(h) : "r"(from));
#if STYPE == 3  // the value times 2^-120
  return __uint_as_float((u32)h << 20);
#else
  return __uint_as_float(h == 0 ? 0x00400000u : h == 255 ? 0x7FC00000u : (u32)h << 23);
#endif
#endif
#endif
}


__device__ __forceinline__ uint2 scale_pair(float s) {
#if STYPE == 3  // times 2^119 (float16: 2^7), where the codes are 2^-126 (2^-14) of their values: FACTOR has the rest, 2^7
  s = s * 1.329227995784916e36f * (HALF ? 128.0f : 6.646139978924579e35f);
#endif
  u32 v = pack2(s, s);
  float rest = s - low(v);
  return make_uint2(v, STYPE < 3 ? pack2(rest, rest) : 0);
}

__device__ __forceinline__ u32 scaled(u32 v, uint2 s) {
#if SCALED == 2
  return STYPE < 3 ? fma2(v, s.x, mul2(v, s.y)) : mul2(v, s.x);
#else
  return v;
#endif
}

// Copy `bytes` of each of 16 R rows (SROWS rows of W share one) to shared rows of `stride`, by one warp. VECTOR bytes divide all sizes.
template <int VECTOR> __device__ __forceinline__ void copy_rows(u32 to, int stride, const u8* from, u64 row_bytes, int bytes, int row0, int N, int lane) {
  int each = bytes / VECTOR, row = lane / each, at = lane % each;
  for (; row < 16 * R; ) {
    int source = min(row0 + row, N - 1) / SROWS;
    const u8* p = from + source * row_bytes + at * VECTOR;
    u32 q = to + row * stride + at * VECTOR;
    if (VECTOR >= 4) copy_async<VECTOR >= 16 ? 16 : 4>(q, p);
    else asm volatile("{ .reg .u32 v; ld.global.u8 v, [%1]; st.shared.u8 [%0], v; }" ::"r"(q), "l"(p) : "memory");
    at += 32;
    while (at >= each) { at -= each; ++row; }
  }
}

__device__ __forceinline__ float row_scale(float amax) {
  float s = __fdiv_rn(amax, XKIND == 1 ? 448.0f : 127.0f);
  return s == 0.0f ? 1.0f : s;
}

// Round two neighbours of x as codes / their scale.
__device__ __forceinline__ u32 rounded(u32 v, float s) {
#if XKIND == 0
  return v;
#else
  float a = __fdiv_rn(low(v), s), b = __fdiv_rn(high(v), s);
#if XKIND == 1
  u16 codes;
  u32 halves;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return pack2(from_f16(halves & 0xFFFF), from_f16(halves >> 16));
#else
  return pack2(fminf(fmaxf(rintf(a), -128.0f), 127.0f), fminf(fmaxf(rintf(b), -128.0f), 127.0f));
#endif
#endif
}

__device__ __forceinline__ float largest(uint4 v) {
  const u32 all[4] = {v.x, v.y, v.z, v.w};
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) top = fmaxf(top, fmaxf(fabsf(low(all[i])), fabsf(high(all[i]))));
  return top;
}

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 how) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(how));
  return d;
}

// Add the parts of K of a warp's tile: each split writes its own to `parts`, and the last one to arrive adds them in order. Returns
// whether this warp has the sums.
__device__ __forceinline__ bool combined(float (&acc)[R][NT][4], float4* parts, int* lock, int split, int splits, int lane) {
  float4* base = parts + lane;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n)
      __stcg(base + (split * R * NT + r * NT + n) * 32, make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]));
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(lock, 1);
  if (__shfl_sync(~0u, arrived, 0) != splits - 1) return false;
  __threadfence();
  if (lane == 0) *lock = 0;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int n = 0; n < NT; ++n) acc[r][n][0] = acc[r][n][1] = acc[r][n][2] = acc[r][n][3] = 0.0f;
  for (int p = 0; p < splits; ++p)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 v = __ldcg(base + (p * R * NT + r * NT + n) * 32);
        acc[r][n][0] += v.x, acc[r][n][1] += v.y, acc[r][n][2] += v.z, acc[r][n][3] += v.w;
      }
  return true;
}

// What scales and shifts the rows of a warp at the end. Loaded first: a load that is issued behind those of W waits for them.
struct Ends {
  float factor[R][2], offset[R][2];
};

__device__ __forceinline__ float first_load(const float* from) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}

__device__ __forceinline__ Ends ends_of(int row0, int N, const float* post, const u16* bias, int lane) {
  Ends ends;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(row0 + 16 * r + 8 * h + (lane >> 2), N - 1);
      ends.factor[r][h] = FACTOR * (POST ? first_load(post + (POST == 2 ? row : 0)) : 1.0f);
      u16 v = 0;
      if (bias) asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(bias + row));
      ends.offset[r][h] = low(v);
    }
  return ends;
}

// Scale a warp's sums, add the bias, and store two neighbours of a row of y at once (rows and columns of 8 x 8 change places).
__device__ __forceinline__ void finish(float (&acc)[R][NT][4], const Ends& ends, int row0, int M, int N, const float* x_scale, u16* y, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + 16 * r + 8 * h;
      const float factor = ends.factor[r][h], offset = ends.offset[r][h];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float a = acc[r][n][2 * h] * factor, b = acc[r][n][2 * h + 1] * factor;
        if (x_scale) a *= x_scale[min(n * 8 + 2 * t, M - 1)], b *= x_scale[min(n * 8 + 2 * t + 1, M - 1)];
        u32 v = pack2(a + offset, b + offset);
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
        const int m = n * 8 + g, at = row + 2 * t;
        u16* to = y + (u64)m * N + at;
        if (m >= M) continue;
        if (N % 2 == 0 && at < N) *(u32*)to = v;
        else {
          if (at < N) to[0] = v & 0xFFFF;
          if (at + 1 < N) to[1] = v >> 16;
        }
      }
    }
}

