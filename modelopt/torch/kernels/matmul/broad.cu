// y = q(x) W^T + b for a packed W and some tens of rows of x: weights unpacked in registers, x in shared memory, wgmma (Hopper).
//
//     legend  as in `skinny.cu`; a block has 64 GROUPS rows of W, one warpgroup for 64 of them, and 8 NT rows of x
//
// One warp fetches stages of W (a box of the tensor map) and of x (contiguous after `prepare.cu`) into a ring of DEPTH; W may be fetched
// before the kernel ahead, which prepares x and writes nothing else, has ended. The words of a thread are A fragments of
// wgmma.m64nNk16 as they are of mma.m16n8k16. While the tensor cores work on a step, the next one is unpacked.

#define WARPS (4 * GROUPS)
#define THREADS (32 * WARPS + 32)
#define BLOCKS (2 * CHUNKS)  // of 16 columns in a step
#define W_STAGE (GROUPS * 64 * 64)
#define X_STAGE (NT * 8 * STEP * 2)

__device__ __forceinline__ u64 described(u32 at) {  // 8 x 16 bytes are contiguous; then rows, then columns
  return (u64)(at >> 4 & 0x3FFF) | (u64)(NT * 128 >> 4) << 16 | (u64)(128 >> 4) << 32;
}

__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS) broad(
    const __grid_constant__ Map map, const u8* __restrict__ x, const float* __restrict__ x_sums, const float* __restrict__ x_scales,
    const u8* __restrict__ s, const u8* __restrict__ z, const float* __restrict__ post, const u16* __restrict__ bias, u16* __restrict__ y,
    float4* __restrict__ parts, int* __restrict__ locks, int M, int N, int K, int s_row, int s_bytes) {
  extern __shared__ __align__(1024) uint4 memory[];
  __shared__ u64 barriers[2 * DEPTH];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int steps = K / STEP, splits = gridDim.y, split = blockIdx.y;
  const int first = split * steps / splits, last = (split + 1) * steps / splits, count = last - first;
  const int row0 = blockIdx.x * (64 * GROUPS);
  const u32 ring = address(memory), full = address(barriers), empty = full + 8 * DEPTH;
  const u32 xs = ring + DEPTH * W_STAGE, ss = xs + DEPTH * X_STAGE + warp * s_bytes;
  if (thread < DEPTH) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + thread * 8) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + thread * 8), "r"(WARPS) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();

  if (warp == WARPS) {  // the warp that fetches
    if (lane) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      return;
    }
    const u8* x_from = x + ((u64)blockIdx.z * steps + first) * X_STAGE;
    auto fetch_x = [&](int i) {
      const int slot = i % DEPTH;
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          ::"r"(xs + slot * X_STAGE), "l"(x_from + (u64)i * X_STAGE), "r"(X_STAGE), "r"(full + slot * 8) : "memory");
    };
    const int ahead = min(count, DEPTH);
    for (int i = 0; i < ahead; ++i) {
      arm(full + i * 8, W_STAGE + X_STAGE);
      bulk_copy(ring + i * W_STAGE, &map, row0, first + i, full + i * 8);
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    for (int i = 0; i < ahead; ++i) fetch_x(i);
    for (int i = DEPTH; i < count; ++i) {
      const int slot = i % DEPTH;
      wait_for(empty + slot * 8, (i / DEPTH - 1) & 1);
      arm(full + slot * 8, W_STAGE + X_STAGE);
      bulk_copy(ring + slot * W_STAGE, &map, row0, first + i, full + slot * 8);
      fetch_x(i);
    }
    return;
  }

  const int my_row0 = row0 + 16 * warp, tile = (blockIdx.z * gridDim.x + blockIdx.x) * WARPS + warp;
  const Ends ends = ends_of(my_row0, N, post, bias, lane);
  if (splits > 1 && lane == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(locks + tile));
  const int groups = SCALED ? ((last * STEP - 1) / G - first * STEP / G + 1) : 0, group0 = first * STEP / G;
  const int stride = (groups * SBYTES + 15 & ~15 | 16), z_stride = (groups + 15 & ~15 | 16);
#if SCALED
  copy_rows<SVECTOR>(ss, stride, s + group0 * SBYTES, (u64)s_row * SBYTES, groups * SBYTES, my_row0, N, lane);
#if KIND == 1
  copy_rows<ZVECTOR>(ss + 16 * stride, z_stride, z + group0, s_row, groups, my_row0, N, lane);
#endif
  commit();
  wait<0>();
  __syncwarp();
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  x_sums += ((u64)blockIdx.z * steps + first) * (8 * NT);
  M -= blockIdx.z * 8 * NT, y += (u64)blockIdx.z * 8 * NT * N;

  float acc[1][NT][4] = {};
  float sums[NT * 4] = {};
  float by_sum[2] = {}, offset[2] = {};
  float2 of_x[NT] = {};
  int slot = 0, phase = 0;

  auto add_sums = [&]() {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float v = sums[4 * n + c];
        if (SHIFTED) v = fmaf(offset[c / 2], c % 2 ? of_x[n].y : of_x[n].x, v);
        acc[0][n][c] = SCALED == 1 ? fmaf(v, by_sum[c / 2], acc[0][n][c]) : v;
      }
  };

  // Unpack a step and start its product; with scales on the sums, first add those of the step before.
  auto work = [&](int i, u32 (&a)[BLOCKS][4]) {
    const int step = first + i;
    wait_for(full + slot * 8, phase);
    const uint4 low_row = memory[slot * (W_STAGE / 16) + warp * 64 + lane], high_row = memory[slot * (W_STAGE / 16) + warp * 64 + 32 + lane];
    const u32 words[2][4] = {{low_row.x, low_row.y, low_row.z, low_row.w}, {high_row.x, high_row.y, high_row.z, high_row.w}};
    uint2 by[2][2] = {};
    u32 minus[2] = {}, zero[2] = {8, 8};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + g;
#if SCALED == 2
      const int group = (step * STEP + t * EACH) / G - group0;
      by[h][0] = by[h][1] = scale_pair(scale_value(ss + row * stride + group * SBYTES));
      if (G < EACH) by[h][1] = scale_pair(scale_value(ss + row * stride + (group + 1) * SBYTES));
#endif
#if KIND == 1
      zero[h] = ((const u8*)memory)[ss - ring + 16 * stride + row * z_stride + (step * STEP + (SCALED == 2 ? t * EACH : 0)) / G - group0];
      minus[h] = zero[h] * 0x10001u | (HALF ? 0xE400E400u : 0xC300C300u);
#endif
    }
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        constexpr bool keep = SCALED == 2 && STYPE == 3;
        const u32 v0 = words[h][FOUR ? j : 2 * j], v1 = words[h][FOUR ? j : 2 * j + 1];
        const uint2 f = by[h][j >= CHUNKS / 2];
        a[2 * j][h] = scaled(pair<0, keep>(v0, minus[h]), f);
        a[2 * j][2 + h] = scaled(pair<1, keep>(v0, minus[h]), f);
        a[2 * j + 1][h] = scaled(pair<FOUR ? 2 : 0, keep>(v1, minus[h]), f);
        a[2 * j + 1][2 + h] = scaled(pair<FOUR ? 3 : 1, keep>(v1, minus[h]), f);
      }
#if SCALED == 1
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (i > 0) add_sums();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      by_sum[h] = scale_value(ss + (8 * h + g) * stride + (step * STEP / G - group0) * SBYTES);
      offset[h] = -BASE - (float)zero[h];
    }
#if SHIFTED
#pragma unroll
    for (int n = 0; n < NT; ++n) of_x[n] = *(const float2*)(x_sums + i * (8 * NT) + n * 8 + 2 * t);
#endif
#endif
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const u64 b = described(xs + slot * X_STAGE);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) wgmma(sums, a[j], b + j * (2 * NT * 128 >> 4), SCALED == 1 ? j > 0 : 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (SCALED != 1) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (i > 0 && lane == 0) arrive(empty + (slot ? slot - 1 : DEPTH - 1) * 8);
    if (++slot == DEPTH) slot = 0, phase ^= 1;
  };
  u32 a0[BLOCKS][4], a1[BLOCKS][4];
  int i = 0;
#pragma unroll 1
  for (; i + 1 < count; i += 2) {
    work(i, a0);
    work(i + 1, a1);
  }
  if (i < count) work(i, a0);
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  add_sums();
  if (splits > 1 && !combined(acc, parts + (u64)tile * splits * (NT * 32), locks + tile, split, splits, lane)) return;
  finish(acc, ends, my_row0, M, N, x_scales ? x_scales + blockIdx.z * 8 * NT : nullptr, y, lane);
}
