// y = q(x) W^T + b for a packed W and few rows of x: every weight is read from memory once, by the warp that multiplies it.
//
//     legend  M rows of x, N rows of W, K columns; a step is 64 bytes of a row of W (STEP columns); lane = 4 g + t
//
// A warp owns 16 R rows of W and a part of K. Bulk copies of S steps (on older GPUs cp.async) bring them into its
// own ring of DEPTH stages in shared memory, so that no warp waits for another one. Thread t of a quad reads 16 bytes of rows g and
// g + 8. Unpacked as pairs (code i, code i + half of the word) these words are the A fragments of mma.m16n8k16 once the columns of a
// step are renumbered; x, the B operand, lies in shared memory in that order: one 16-byte read gives two fragments.
//
//     warps of a block   WR groups of 16 R rows, each dealt by K to WK warps; blocks deal the rest of K (gridDim.y)
//
// Codes of i4 and u4 with scales on the sums stay 128 + code; 128 + zero times the sum of x goes off the sums of a step. Sums of the
// parts of K are added in a fixed order: results do not vary from run to run.
// Source: the register layout of Frantar et al., MARLIN (2408.11743), here without repacking the weights.
//
// Constants: KIND 0 i4 1 u4 2 e2m1 3 i8 4 e4m3; HALF x is float16, else bfloat16; SCALED 0 no scales of blocks, 1 on the sums of a
// step, 2 on the weights; STYPE 0 f32 1 f16 2 bf16 3 e4m3 4 e8m0; G columns and SROWS rows of a scale; NT tiles of 8 rows of x;
// ONE for a single row of x; RAGGED K is no multiple of STEP (what is beyond it is zero); EXPERTS so many matrices, of which
// blockIdx.z picks one; POST 0 none 1 one scale 2 a scale per row; XKIND 0 x as it is 1 to e4m3 2 to int8; XRANGE 0
// one amax 1 rows, found here 2 rows, given; SVECTOR, ZVECTOR bytes of one copy of scales and zero points.

#define THREADS (32 * WK * WR)
#define CHAINS (R * NT <= 2 ? 2 : 1)
#define SLOT (S * R * 1024)

extern "C" __global__ void __launch_bounds__(THREADS) skinny(
    const __grid_constant__ Map map, const uint4* __restrict__ x, const u8* __restrict__ w, const u8* __restrict__ s, const u8* __restrict__ z,
    const float* __restrict__ post, const float* __restrict__ x_amax, const u16* __restrict__ bias, u16* __restrict__ y,
    float4* __restrict__ parts, int* __restrict__ locks, const int* __restrict__ offsets, int rows, int N, int K, int s_row, int s_expert,
    int x_bytes, int s_bytes) {
  extern __shared__ __align__(1024) uint4 memory[];
  __shared__ float x_scale[8 * NT];
  __shared__ u64 barriers[WK * WR * DEPTH];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int wk = warp % WK, wr = warp / WK;
  const int steps = (K + STEP - 1) / STEP, splits = gridDim.y, split = blockIdx.y;
  const int begin = split * steps / splits, end = (split + 1) * steps / splits;
  const int first = begin + wk * (end - begin) / WK, last = begin + (wk + 1) * (end - begin) / WK;
  const int row0 = (blockIdx.x * WR + wr) * (16 * R);
  const u32 xs = address(memory), ring = xs + x_bytes + warp * (DEPTH * SLOT), barrier = address(barriers + warp * DEPTH);
  const u32 ss = xs + x_bytes + WK * WR * (DEPTH * SLOT) + warp * s_bytes;
  const u64 w_row = (u64)K * (FOUR ? 4 : 8) / 8;
  int w_row0 = row0;
#if BULK
  if (thread == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
  if (lane < DEPTH) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + lane * 8) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __syncwarp();
#endif
  int M = ONE ? 1 : rows;
#if EXPERTS  // rows offsets[e] to offsets[e + 1] of x are multiplied by matrix e; slice z has the z-th expert that has rows
  int found = -1, left = blockIdx.z;
  for (int i0 = 0; i0 < EXPERTS && found < 0; i0 += 32) {
    const int i = min(i0 + lane, EXPERTS - 1);
    u32 who = __ballot_sync(~0u, i == i0 + lane && offsets[i] < offsets[i + 1]);
    const int here = __popc(who);
    for (int skip = min(left, here); skip; --skip) who &= who - 1;
    if (left < here) found = i0 + __ffs(who) - 1;
    left -= here;
  }
  if (found < 0) return;
  const u64 e = found;
  const int from = offsets[e];
  M = offsets[e + 1] - from;
  if (M <= 0) return;
  x += (u64)from * (K / 8), y += (u64)from * N, w += e * N * w_row, w_row0 += e * N, s += e * s_expert * SBYTES;
  if (KIND == 1) z += e * s_expert;
  if (POST) post += POST == 2 ? e * N : e;
  if (bias) bias += e * N;
#endif

  // The first loads of x go ahead of those of W, behind which they would wait. Bits of an index: t, m (if M > 1), chunk, m / 2, step.
  const int pairs = M > 1, high_rows = (M + 1) / 2, count = (end - begin) * CHUNKS * high_rows << (2 + pairs);
  const float inverse = 1.0f / high_rows;
  uint4 v[4];
  int to[4], from_row[4], at[4];
  auto load_x = [&](int i0) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = i0 + u * THREADS;
      int rest = i >> 2, m = 0;
      if (pairs) m = rest & 1, rest >>= 1;
      const int chunk = rest % CHUNKS, step = ONE ? rest / CHUNKS : (int)((rest / CHUNKS + 0.5f) * inverse);
      m += 2 * (rest / CHUNKS - step * high_rows);
      const bool real = !RAGGED || (begin + step) * (STEP / 8) + (i & 3) * CHUNKS + chunk < K / 8;
      to[u] = i < count && m < M ? ((step * CHUNKS + chunk) * M + m) * 4 + (i & 3) : -1;
      from_row[u] = m, at[u] = step * CHUNKS + chunk;
      v[u] = to[u] >= 0 && real ? x[(u64)m * (K / 8) + (begin + step) * (STEP / 8) + (i & 3) * CHUNKS + chunk] : make_uint4(0, 0, 0, 0);
    }
  };
  load_x(thread);
  const Ends ends = ends_of(row0, N, post, bias, lane);
  const float x_top = XKIND && XRANGE == 0 ? first_load(x_amax) : 0.0f;
  if (splits > 1 && lane == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(locks + blockIdx.x * WR + wr));

  // Scales and zero points of this warp's rows and columns, then the first stages of the weight.
  const int groups = SCALED ? ((last * STEP - 1) / G - first * STEP / G + 1) : 0, group0 = first * STEP / G;
  const int stride = (groups * SBYTES + 15 & ~15 | 16), z_stride = (groups + 15 & ~15 | 16);
#if SCALED
  const int there = RAGGED ? min(groups, (K - 1) / G + 1 - group0) : groups;
#if RAGGED
  for (int i = lane; i < s_bytes / 4; i += 32) asm volatile("st.shared.u32 [%0], %1;" ::"r"(ss + i * 4), "r"(0) : "memory");
  __syncwarp();
#endif
  copy_rows<SVECTOR>(ss, stride, s + group0 * SBYTES, (u64)s_row * SBYTES, there * SBYTES, row0, N, lane);
#if KIND == 1
  copy_rows<ZVECTOR>(ss + 16 * R * stride, z_stride, z + group0, s_row, there, row0, N, lane);
#endif
  commit();
#endif
  auto fetch = [&](int stage, int slot) {
    const int at = first + stage * S;
#if BULK
    if (at < last && lane == 0) {
      arm(barrier + slot * 8, SLOT);
#if RAGGED
      for (int i = 0; i < S; ++i) bulk_copy_2d(ring + slot * SLOT + i * (R * 1024), &map, (at + i) * 64, w_row0, barrier + slot * 8);
#else
      bulk_copy(ring + slot * SLOT, &map, w_row0, at, barrier + slot * 8);
#endif
    }
#else
    for (int i = 0; i < min(last - at, S) * 2 * R; ++i) {
      const int row = i % (2 * R) * 8 + g, step = i / (2 * R), byte = (at + step) * 64 + t * 16;
      const bool real = !RAGGED || byte < w_row;
      copy_async_or_zero(ring + slot * SLOT + (step * 16 * R + row) * 64 + t * 16, w + min(row0 + row, N - 1) * w_row + (real ? byte : 0), real ? 16 : 0);
    }
    commit();
#endif
  };
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) fetch(i, i);

  // x of this block's columns, rounded and renumbered.
#if XKIND
#if XRANGE == 1
  if (M == 1 && splits == 1 && count <= 4 * THREADS) {
    if (thread == 0) x_scale[0] = 0.0f;
    __syncthreads();
    float top = 0.0f;
#pragma unroll
    for (int u = 0; u < 4; ++u) top = fmaxf(top, largest(v[u]));
    u32 bits = __reduce_max_sync(~0u, __float_as_uint(top));
    if (lane == 0) atomicMax((u32*)x_scale, bits);
    __syncthreads();
    top = x_scale[0];
    __syncthreads();
    if (thread == 0) x_scale[0] = row_scale(top);
  } else
#endif
  for (int m = warp; m < M; m += WK * WR) {
#if XRANGE == 1
    float top = 0.0f;
    for (int i = lane; i < K / 8; i += 32) top = fmaxf(top, largest(x[(u64)m * (K / 8) + i]));
    top = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(top)));
#else
    const float top = XRANGE == 0 ? x_top : x_amax[m];
#endif
    if (lane == 0) x_scale[m] = row_scale(top);
  }
  __syncthreads();
#endif
  float* x_sums = (float*)((u8*)memory + (end - begin) * STEP * M * 2);
  for (int i0 = thread;;) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (XKIND && !SHIFTED && to[u] < 0) continue;
      const float by = XKIND && to[u] >= 0 ? x_scale[from_row[u]] : 1.0f;
      const u32 a = rounded(v[u].x, by), b = rounded(v[u].y, by), c = rounded(v[u].z, by), d = rounded(v[u].w, by);
#if SHIFTED
      float sum = low(a) + high(a) + (low(b) + high(b)) + (low(c) + high(c) + (low(d) + high(d)));
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      sum += __shfl_xor_sync(~0u, sum, 4 << pairs);
      sum += __shfl_xor_sync(~0u, sum, 8 << pairs);
      if (to[u] >= 0 && (to[u] & 3) == 0 && at[u] % CHUNKS == 0) x_sums[at[u] / CHUNKS * M + from_row[u]] = sum;
#endif
      if (to[u] >= 0)
        to_shared16(xs + to[u] * 16, FOUR
            ? make_uint4(prmt(a, c, 0x5410), prmt(a, c, 0x7632), prmt(b, d, 0x5410), prmt(b, d, 0x7632))
            : make_uint4(prmt(a, b, 0x5410), prmt(a, b, 0x7632), prmt(c, d, 0x5410), prmt(c, d, 0x7632)));
    }
    i0 += 4 * THREADS;
    if (i0 - thread >= count) break;
    load_x(i0);
  }
  if (SCALED && BULK) wait<0>();
  __syncthreads();

  float acc[R][NT][4] = {};
  const uint4* x_at[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) x_at[n] = memory + ((first - begin) * CHUNKS * M + min(n * 8 + g, M - 1)) * 4 + t;
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
      if (in && step >= last) break;
      uint4 words[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          words[r][h] = memory[(ring - xs) / 16 + slot * (SLOT / 16) + ((in * R + r) * 2 + h) * 32 + lane];
      float sums[CHAINS][R][NT][4];
      uint2 by[R][2][2] = {};
      u32 minus[R][2][2] = {};
      float by_sum[R][2] = {}, offset[R][2] = {};
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * r + 8 * h + g;
#if SCALED == 1
          by_sum[r][h] = scale_value(ss + row * stride + (step * STEP / G - group0) * SBYTES);
          offset[r][h] = -BASE - 8.0f;
#elif SCALED == 2
          const int group = (step * STEP + t * EACH) / G - group0;
          by[r][h][0] = by[r][h][1] = scale_pair(scale_value(ss + row * stride + group * SBYTES));
          if (G < EACH) by[r][h][1] = scale_pair(scale_value(ss + row * stride + (group + 1) * SBYTES));
#endif
#if KIND == 1
          const u32 zero = ((const u8*)memory)[ss - xs + 16 * R * stride + row * z_stride + (step * STEP + (SCALED == 2 ? t * EACH : 0)) / G - group0];
          minus[r][h][0] = minus[r][h][1] = zero * 0x10001u | (HALF ? 0xE400E400u : 0xC300C300u);
          offset[r][h] = -BASE - (float)zero;
#endif
        }
#pragma unroll
      for (int c = 0; c < CHAINS; ++c)
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[c][r][n][i] = SCALED == 1 || c ? 0.0f : acc[r][n][i];
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) {
        u32 a[R][2][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const u32 all[4] = {words[r][h].x, words[r][h].y, words[r][h].z, words[r][h].w};
            const u32 v0 = all[FOUR ? j : 2 * j], v1 = all[FOUR ? j : 2 * j + 1], m = minus[r][h][j >= CHUNKS / 2];
            const uint2 f = by[r][h][j >= CHUNKS / 2];
            constexpr bool keep = SCALED == 2 && STYPE == 3;
            a[r][0][h] = scaled(pair<0, keep>(v0, m), f);
            a[r][0][2 + h] = scaled(pair<1, keep>(v0, m), f);
            a[r][1][h] = scaled(pair<FOUR ? 2 : 0, keep>(v1, m), f);
            a[r][1][2 + h] = scaled(pair<FOUR ? 3 : 1, keep>(v1, m), f);
          }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint4 b = x_at[n][j * M * 4];
#pragma unroll
          for (int r = 0; r < R; ++r) {
            mma(sums[0][r][n], a[r][0], b.x, b.y);
            mma(sums[CHAINS - 1][r][n], a[r][1], b.z, b.w);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float x_sum[2] = {};
#if SHIFTED
        x_sum[0] = x_sums[(step - begin) * M + min(n * 8 + 2 * t, M - 1)], x_sum[1] = x_sums[(step - begin) * M + min(n * 8 + 2 * t + 1, M - 1)];
#endif
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float v = CHAINS == 2 ? sums[0][r][n][i] + sums[CHAINS - 1][r][n][i] : sums[0][r][n][i];
            if (SHIFTED) v = fmaf(offset[r][i / 2], x_sum[i % 2], v);
            acc[r][n][i] = SCALED == 1 ? fmaf(v, by_sum[r][i / 2], acc[r][n][i]) : v;
          }
        x_at[n] += CHUNKS * M * 4;
      }
      ++step;
    }
    __syncwarp();
    fetch(stage + DEPTH, slot);
    ++stage;
    if (++slot == DEPTH) slot = 0, phase ^= 1;
  }

  // Add the parts of K: those of the block's warps through shared memory, those of other blocks through global memory.
  if (WK > 1) {
    __syncthreads();
    float4* mine = (float4*)memory + wr * (WK - 1) * (R * NT * 32) + lane;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
        if (wk) mine[((wk - 1) * R * NT + r * NT + n) * 32] = make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]);
    __syncthreads();
    if (wk) return;
    for (int p = 0; p < WK - 1; ++p)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float4 v = mine[(p * R * NT + r * NT + n) * 32];
          acc[r][n][0] += v.x, acc[r][n][1] += v.y, acc[r][n][2] += v.z, acc[r][n][3] += v.w;
        }
  }
  const int tile = blockIdx.x * WR + wr;
  if (splits > 1 && !combined(acc, parts + (u64)tile * splits * (R * NT * 32), locks + tile, split, splits, lane)) return;
  finish(acc, ends, row0, M, N, XKIND ? x_scale : nullptr, y, lane);
}
