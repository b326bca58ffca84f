// y = q(x) W^T + b for a packed W and one row of x: integer codes go to the integer tensor cores almost as they are.
//
//     legend  N rows of W, K columns; a step is 64 bytes of a row of W (STEP columns); lane = 4 g + t
//
// `digits.cu` makes x a fixed-point number whose digits fill the columns of B. A thread's 16 bytes of a row of W are neighbouring
// columns; sums of products with the digits are exact, and scales (and zero points) of blocks meet them, never the weights. Sums
// start at 1.5 x 2^23, so that their bits are those of a float32. Codes of e4m3 become float16 in one instruction for two, those of
// e2m1 likewise after they have become e4m3.
//
// Warps, rings and parts of K are as in `skinny.cu`, and so are the constants, but: RAGGED K is no multiple of STEP; EVEN all warps
// have whole stages; HOLD pieces of eight columns of x that a thread holds.

__device__ __forceinline__ void mma_int(int* d, const u32* a, u32 b0, u32 b1, const int* c) {
#if HALVES_OF_BYTES
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#endif
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

__device__ __forceinline__ void mma_half(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One word of W as two registers of A, for its first and last columns; of i4 and u4 for the even and the odd ones.
__device__ __forceinline__ void operands(u32 w, u32& first, u32& second) {
#if KIND == 0
  first = lop3<0x6A>(w, 0x0F0F0F0Fu, 0x08080808u), second = lop3<0x6A>(w, 0xF0F0F0F0u, 0x80808080u);
#elif KIND == 1
  first = w & 0x0F0F0F0Fu, second = w & 0xF0F0F0F0u;
#else
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(first), "=r"(second) : "r"(w));
#endif
}

// The even (odd) codes of e2m1 in a word as bytes of e4m3, 2^-6 times their values. The signs of both are cut out once; the compiler
// would do it anew for either.
template <bool ODD> __device__ __forceinline__ u32 bytes_of(u32 w) {
  u32 signs;
  asm("and.b32 %0, %1, 0x88888888;" : "=r"(signs) : "r"(w));
  return lop3<0xE2>(ODD ? w >> 2 : w << 2, 0x1C1C1C1Cu, ODD ? signs : signs << 4);
}

// The scales of a step for the sums of this thread, rows g and g + 8, and of the second half of its words.
__device__ __forceinline__ void step_scales(float (&by)[2][2], u32 at, int rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#if GS == 8 && STYPE == 3
    u32 v;
    asm volatile("{ .reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h; }" : "=r"(v) : "r"(at + h * rows));
    by[h][0] = __uint_as_float(v << 20 & 0x07F00000u), by[h][1] = __uint_as_float(v << 12 & 0x07F00000u);
#else
    by[h][0] = scale_value(at + h * rows);
    if (HALVES == 2) by[h][1] = scale_value(at + h * rows + SBYTES);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) one(
    const __grid_constant__ Map map, const uint4* __restrict__ x, const u8* __restrict__ w, const u8* __restrict__ s, const u8* __restrict__ z,
    const float* __restrict__ post, const float* __restrict__ x_amax, const u16* __restrict__ bias, u16* __restrict__ y,
    float4* __restrict__ parts, int* __restrict__ locks, int N, int K, int s_row, int x_bytes, int s_bytes) {
  extern __shared__ __align__(1024) uint4 memory[];
  __shared__ u32 tops[32];
  __shared__ u64 barriers[WK * WR * DEPTH];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int wk = warp % WK, wr = warp / WK;
  const int steps = (K + STEP - 1) / STEP, splits = gridDim.y, split = blockIdx.y;
  const int begin = split * steps / splits, end = (split + 1) * steps / splits;
  const int first = begin + wk * (end - begin) / WK, last = begin + (wk + 1) * (end - begin) / WK;
  const int row0 = (blockIdx.x * WR + wr) * 16;
  const u32 xs = address(memory), table = xs + (end - begin) * X_STEP, ring = xs + x_bytes + warp * (DEPTH * SLOT), barrier = address(barriers + warp * DEPTH);
  const u32 ss = xs + x_bytes + WK * WR * (DEPTH * SLOT) + warp * s_bytes;
  const u64 w_row = (u64)K * (FOUR ? 4 : 8) / 8;
  auto fetch = [&](int stage, int slot) {
    const int at = first + stage * S;
#if BULK
    if (at < last && lane == 0) {
      arm(barrier + slot * 8, SLOT);
#if RAGGED
      for (int i = 0; i < S; ++i) bulk_copy_2d(ring + slot * SLOT + i * 1024, &map, (at + i) * 64, row0, barrier + slot * 8);
#else
      bulk_copy(ring + slot * SLOT, &map, row0, at, barrier + slot * 8);
#endif
    }
#else
    for (int i = 0; i < min(last - at, S) * 2; ++i) {
      const int row = i % 2 * 8 + g, byte = (at + i / 2) * 64 + t * 16;
      const int real = RAGGED && byte >= w_row ? 0 : 16;
      copy_async_or_zero(ring + slot * SLOT + (i / 2 * 16 + row) * 64 + t * 16, w + min(row0 + row, N - 1) * w_row + (real ? byte : 0), real);
    }
    commit();
#endif
  };
#if BULK
  if (thread == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
  if (lane < DEPTH) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + lane * 8) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __syncwarp();
#endif

  // The first loads of x go ahead of those of W, behind which they would wait.
  const int count = (end - begin) * (STEP / 8), real = RAGGED ? min(count, K / 8 - begin * (STEP / 8)) : count;
  const uint4* x_from = x + begin * (STEP / 8);
  uint4 v[HOLD];
  auto load_x = [&](int i0) {
#pragma unroll
    for (int u = 0; u < HOLD; ++u) v[u] = i0 + u * THREADS < real ? x_from[i0 + u * THREADS] : make_uint4(0, 0, 0, 0);
  };
  load_x(thread);
  const Ends ends = ends_of(row0, N, post, bias, lane);
  const float x_top = XKIND && XRANGE != 1 ? first_load(x_amax) : 0.0f;
  if (splits > 1 && lane == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(locks + blockIdx.x * WR + wr));

  // Scales and zero points of this warp's rows and columns, then the first stages of the weight.
  const int top_group = RAGGED ? (K - 1) / G : (last * STEP - 1) / G, group0 = first * STEP / G;
  const int groups = SCALED ? min((last * STEP - 1) / G, top_group) + 1 - group0 : 0, room = SCALED ? (last * STEP - 1) / G + 1 - group0 : 0;
  const int stride = (room * SBYTES + 15 & ~15 | 16), z_stride = (room + 15 & ~15 | 16);
#if SCALED
#if RAGGED
  for (int i = lane; i < s_bytes / 4; i += 32) asm volatile("st.shared.u32 [%0], %1;" ::"r"(ss + i * 4), "r"(0) : "memory");
  __syncwarp();
#endif
  if (groups > 0) {
    copy_rows<SVECTOR>(ss, stride, s + group0 * SBYTES, (u64)s_row * SBYTES, groups * SBYTES, row0, N, lane);
#if KIND == 1
    copy_rows<ZVECTOR>(ss + 16 * stride, z_stride, z + group0, s_row, groups, row0, N, lane);
#endif
  }
  commit();
#endif
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) fetch(i, i);

  // x of this block's columns.
  float by = 1.0f, pre = 1.0f, unit = XKIND == 1 && !FLOATS ? 512.0f : 1.0f, back = XKIND == 1 && !FLOATS ? 0.001953125f : 1.0f, undo = 1.0f;
#if FITTED || (XKIND && XRANGE == 1)
  {
    u32 top = 0;  // float bits
    auto more = [&](uint4 v) { top = max(top, XKIND ? __float_as_uint(largest(v)) : top_of(v)); };
    const uint4* row = XKIND ? x : x_from;
    const int pieces = XKIND ? K / 8 : real;
    if (pieces > HOLD * THREADS || (XKIND && splits > 1)) {
      for (int i = thread; i < pieces; i += THREADS) more(row[i]);
    } else {
#pragma unroll
      for (int u = 0; u < HOLD; ++u) more(v[u]);
    }
    u32 bits = __reduce_max_sync(~0u, top);
    if (lane == 0) tops[warp] = bits;
    __syncthreads();
    bits = __reduce_max_sync(~0u, lane < WK * WR ? tops[lane] : 0);
    if (XKIND) by = row_scale(__uint_as_float(bits));
    else {
      if (bits < 0x20000000u && !HALF) pre = 18446744073709551616.0f, undo = 5.421010862427522e-20f, bits = __float_as_uint(__uint_as_float(bits) * pre);
      const int exponent = max((int)(bits >> 23), TOP);
      unit = __uint_as_float((u32)(253 + TOP - exponent) << 23);
      back = bits >= 0x7F800000u ? __uint_as_float(0x7FFFFFFFu) : __uint_as_float((u32)(exponent + 1 - TOP) << 23);
    }
  }
#elif XKIND
  by = row_scale(x_top);
#endif
  const bool again = count > HOLD * THREADS;
  for (int i0 = thread;;) {
#pragma unroll
    for (int u = 0; u < HOLD; ++u) place(v[u], i0 + u * THREADS, i0 + u * THREADS < count, by, pre, unit, xs, table);
    i0 += HOLD * THREADS;
    if (!again || i0 - thread >= count) break;
    load_x(i0);
  }
  if (GS > 1)
    for (int i = thread; i < (end - begin) * QUADS; i += THREADS) to_shared16(xs + i * X_QUAD + DIGITS * 64, make_uint4(0, 0, 0, 0));
  if (SCALED && BULK) wait<0>();
  __syncthreads();

  float acc[PASSES][4] = {};
  int whole[4] = {};
  u32 x_at[PASSES];
#pragma unroll
  for (int p = 0; p < PASSES; ++p) {
    const bool mine = GS == 1 || (GS == 2 ? g / 4 == t / 2 : g / 2 == t);
    x_at[p] = xs + (first - begin) * X_STEP + (mine ? (DIGITS == 1 ? 0 : GS <= 2 ? g & 3 : 2 * p + (g & 1)) * 64 + t * 16 : DIGITS * 64);
  }
  u32 t_at = table + (first - begin) * T_STEP + t * 16;
  const int part = GS == 1 ? 0 : GS == 2 ? t / 2 : GS == 4 ? t : 2 * t;
  u32 s_at = ss + g * stride + part * SBYTES, z_at = ss + 16 * stride + g * z_stride + part;
  int slot = 0, phase = 0, stage = 0;
#pragma unroll 1
  for (int step = first; step < last;) {
#if BULK
    wait_for(barrier + slot * 8, phase);
#else
    wait<DEPTH - 1>();
    __syncwarp();
#endif
#pragma unroll
    for (int in = 0; in < S; ++in) {
      if (!EVEN && in && step >= last) break;
      const u32 from = ring + slot * SLOT + in * 1024 + lane * 16;
      const uint4 low_rows = from_shared16(from), high_rows = from_shared16(from + 512);
      const u32 words[2][4] = {{low_rows.x, low_rows.y, low_rows.z, low_rows.w}, {high_rows.x, high_rows.y, high_rows.z, high_rows.w}};
      const int at = G >= STEP ? step * STEP / G - group0 : (step - first) * GS;
      float by_row[2][2] = {};
#if SCALED
      step_scales(by_row, s_at + at * SBYTES, 8 * stride);
#endif
#if FLOATS
      float sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = SCALED ? 0.0f : acc[0][i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 a[4], more[4];
        operands(FOUR ? bytes_of<false>(words[0][j]) : words[0][j], a[0], a[2]);
        operands(FOUR ? bytes_of<false>(words[1][j]) : words[1][j], a[1], a[3]);
        const uint4 b = from_shared16(x_at[0] + in * X_STEP + (FOUR ? j : j / 2) * X_QUAD);
        mma_half(sums, a, !FOUR && j % 2 ? b.z : b.x, !FOUR && j % 2 ? b.w : b.y);
        if (FOUR) {
          operands(bytes_of<true>(words[0][j]), more[0], more[2]), operands(bytes_of<true>(words[1][j]), more[1], more[3]);
          mma_half(sums, more, b.z, b.w);
        }
        if (HALVES == 2 && j == 1) {
          acc[0][0] = fmaf(sums[0], by_row[0][0], acc[0][0]), acc[0][2] = fmaf(sums[2], by_row[1][0], acc[0][2]);
          sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
        }
      }
      if (SCALED) acc[0][0] = fmaf(sums[0], by_row[0][HALVES - 1], acc[0][0]), acc[0][2] = fmaf(sums[2], by_row[1][HALVES - 1], acc[0][2]);
      else acc[0][0] = sums[0], acc[0][1] = sums[1], acc[0][2] = sums[2], acc[0][3] = sums[3];
#else
      constexpr int tiles = FOUR ? 4 : 2;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        int sums[PASSES][4], start[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
        uint4 b[PASSES];
#pragma unroll
        for (int j = h * tiles / HALVES; j < (h + 1) * tiles / HALVES; ++j) {
          u32 a[4];
          if (FOUR) operands(words[0][j], a[0], a[2]), operands(words[1][j], a[1], a[3]);
          else a[0] = words[0][2 * j], a[1] = words[1][2 * j], a[2] = words[0][2 * j + 1], a[3] = words[1][2 * j + 1];
#pragma unroll
          for (int p = 0; p < PASSES; ++p) {
            if (j % 2 == 0) b[p] = from_shared16(x_at[p] + in * X_STEP + j / 2 * X_QUAD);
            const u32 b0 = j % 2 ? b[p].z : b[p].x, b1 = j % 2 ? b[p].w : b[p].y;
            if (WHOLE) mma_int(whole, a, b0, b1, whole);
            else if (j % (tiles / HALVES)) mma_int(sums[p], a, b0, b1, sums[p]);
            else {
#if HALVES_OF_BYTES
              const uint4 from_x = from_shared16(t_at + in * T_STEP + (p * HALVES + h) * 64);
              start[0] = from_x.x, start[1] = from_x.y, start[2] = from_x.z, start[3] = from_x.w;
#if KIND == 1
              const int z0 = byte_of(z_at + at + h), z1 = byte_of(z_at + at + h + 8 * z_stride);
              start[0] = start[0] * z0 + MAGIC, start[1] = start[1] * z0 + MAGIC, start[2] = start[2] * z1 + MAGIC, start[3] = start[3] * z1 + MAGIC;
#endif
#endif
              mma_int(sums[p], a, b0, b1, start);
            }
          }
        }
        if (!WHOLE)
#pragma unroll
          for (int p = 0; p < PASSES; ++p)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float sum = __int_as_float(sums[p][i]) - __int_as_float(MAGIC);
              acc[p][i] = SCALED ? fmaf(sum, by_row[i / 2][h], acc[p][i]) : acc[p][i] + sum;
            }
      }
#endif
      ++step;
    }
#pragma unroll
    for (int p = 0; p < PASSES; ++p) x_at[p] += S * X_STEP;
    t_at += S * T_STEP;
    __syncwarp();
    fetch(stage + DEPTH, slot);
    ++stage;
    if (++slot == DEPTH) slot = 0, phase ^= 1;
  }

  // Digits and groups of this thread, then of the quad; then the parts of K, of the block's warps and of other blocks.
  float rows[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float scale = DIGITS == 4 && GS <= 2 && t % 2 ? 65536.0f : 1.0f;
    const bool mine = DIGITS == 1 ? t % (4 / min(GS, 4)) == 0 : GS > 1 || t < 2;
    if (WHOLE) acc[0][2 * h] = (float)whole[2 * h], acc[0][2 * h + 1] = (float)whole[2 * h + 1];
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      const float sum = DIGITS == 1 ? acc[p][2 * h] : fmaf(acc[p][2 * h + 1], 256.0f, acc[p][2 * h]) * scale;
      rows[h] = p ? fmaf(sum, 65536.0f, rows[h]) : mine ? sum : 0.0f;
    }
    rows[h] += __shfl_xor_sync(~0u, rows[h], 1);
    rows[h] += __shfl_xor_sync(~0u, rows[h], 2);
    if (SCALED && STYPE == 3) rows[h] *= 1.329227995784916e36f;
    rows[h] = rows[h] * back * undo;
  }
  const int row = g + t % 2 * 8;
  float sum = t % 2 ? rows[1] : rows[0];
  if (WK > 1) {
    float* mine = (float*)memory + (ring - xs) / 4 + row;  // its ring is empty now
    if (wk && t < 2) *mine = sum;
    __syncthreads();
    if (wk) return;
    for (int p = 1; p < WK; ++p) sum += mine[p * (DEPTH * SLOT / 4)];
  }
  const int tile = blockIdx.x * WR + wr;
  if (splits > 1) {
    float all[1][1][4] = {{{sum, 0.0f, 0.0f, 0.0f}}};
    if (!combined(all, parts + (u64)tile * splits * 32, locks + tile, split, splits, lane)) return;
    sum = all[0][0][0];
  }
  sum = sum * (t % 2 ? ends.factor[0][1] : ends.factor[0][0]) * by + (t % 2 ? ends.offset[0][1] : ends.offset[0][0]);
  if (t < 2 && row0 + row < N) y[row0 + row] = pack2(sum, sum) & 0xFFFF;
}
