// y = q(x) W^T + b for a packed W and some tens of rows of x: weights unpacked in registers, x in shared memory, wgmma (Hopper).
//
//     legend  as in `skinny.cu`; a block has 64 GROUPS rows of W, one warpgroup for 64 of them, and 8 NT rows of x
//
// One warp fetches stages of W (a box of the tensor map) and of x (contiguous after `prepare.cu`) into a ring of DEPTH; W may be fetched
// before the kernel ahead, which prepares x and writes nothing else, has ended. The words of a thread are A fragments of
// wgmma.m64nNk16 as they are of mma.m16n8k16. A step is unpacked in PIECES, each while the tensor cores work on those before it; sums
// that scales meet are kept twice, so that those of a step are scaled while the next one is multiplied.

#define PIECES 2
#define WARPS (4 * GROUPS)
#define THREADS (32 * WARPS + 32)
#define BLOCKS (2 * CHUNKS / PIECES)  // of 16 columns in a piece
#define W_STAGE (GROUPS * 64 * 64)
#define X_STAGE (NT * 8 * STEP * 2)
#define BUFFERS (SCALED == 1 ? 2 : 1)

__device__ __forceinline__ u64 described(u32 at) {  // 8 x 16 bytes are contiguous; then rows, then columns
  return (u64)(at >> 4 & 0x3FFF) | (u64)(NT * 128 >> 4) << 16 | (u64)(128 >> 4) << 32;
}

__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Sums may be read only behind a wait for them, which the compiler does not know.
template <int COUNT> __device__ __forceinline__ void settled(float (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

struct Words {  // of a step: 16 bytes of rows g and g + 8, with what scales and shifts their codes
  uint4 v[2];
  uint2 by[2][2];
  u32 minus[2];
};

extern "C" __global__ void __launch_bounds__(THREADS, GROUPS == 1 ? 2 : 1) broad(
    const __grid_constant__ Map map, const u8* __restrict__ x, const float* __restrict__ x_scales,
    const u8* __restrict__ s, const u8* __restrict__ z, const float* __restrict__ post, const u16* __restrict__ bias, u16* __restrict__ y,
    float4* __restrict__ parts, int* __restrict__ locks, int M, int N, int K, int s_row, int s_bytes) {
  extern __shared__ __align__(1024) uint4 memory[];
  __shared__ u64 barriers[2 * DEPTH];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int steps = K / STEP, splits = gridDim.y, split = blockIdx.y;
  const int first = split * steps / splits, last = (split + 1) * steps / splits, count = last - first, ahead = min(count, DEPTH);
  const int row0 = blockIdx.x * (64 * GROUPS);
  const u32 ring = address(memory), full = address(barriers), empty = full + 8 * DEPTH;
  const u32 xs = ring + DEPTH * W_STAGE, ss = xs + DEPTH * X_STAGE + warp * s_bytes;
  auto fetch_w = [&](int i, int slot) {  // arms the barrier for x, too
    arm(full + slot * 8, W_STAGE + X_STAGE);
    bulk_copy(ring + slot * W_STAGE, &map, row0, first + i, full + slot * 8);
  };
  if (thread == 32 * WARPS) {
    for (int i = 0; i < DEPTH; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + i * 8) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + i * 8), "r"(WARPS) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < ahead; ++i) fetch_w(i, i);
  }
  __syncthreads();

  if (warp == WARPS) {  // the warp that fetches
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (lane) return;
    const u8* x_from = x + ((u64)blockIdx.z * steps + first) * X_STAGE;
    auto fetch_x = [&](int i, int slot) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          ::"r"(xs + slot * X_STAGE), "l"(x_from + (u64)i * X_STAGE), "r"(X_STAGE), "r"(full + slot * 8) : "memory");
    };
    for (int i = 0; i < ahead; ++i) fetch_x(i, i);
    int slot = 0, phase = 0;
    for (int i = DEPTH; i < count; ++i) {
      wait_for(empty + slot * 8, phase);
      fetch_w(i, slot);
      fetch_x(i, slot);
      if (++slot == DEPTH) slot = 0, phase ^= 1;
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
  M -= blockIdx.z * 8 * NT, y += (u64)blockIdx.z * 8 * NT * N;

  float acc[1][NT][4] = {};
  float sums[BUFFERS][NT * 4] = {};
  float by_sum[BUFFERS][2] = {};
  u32 a[PIECES][BLOCKS][4];
  int slot = 0, next = 0, phase = 0;

  auto load = [&](int i, Words& to) {
    wait_for(full + next * 8, phase);
    const int step = first + i;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + g;
      to.v[h] = memory[next * (W_STAGE / 16) + warp * 64 + 32 * h + lane];
      to.by[h][0] = to.by[h][1] = make_uint2(0, 0), to.minus[h] = 0;
#if SCALED == 2
      const u32 from = ss + row * stride + ((step * STEP + t * EACH) / G - group0) * SBYTES;
      to.by[h][0] = to.by[h][1] = scale_pair(scale_value(from));
      if (G < EACH) to.by[h][1] = scale_pair(scale_value(from + SBYTES));
#endif
#if KIND == 1
      const u32 zero = ((const u8*)memory)[ss - ring + 16 * stride + row * z_stride + (step * STEP + (SCALED == 2 ? t * EACH : 0)) / G - group0];
      to.minus[h] = zero * 0x10001u | (HALF ? 0xE400E400u : 0xC300C300u);
#endif
    }
    if (++next == DEPTH) next = 0, phase ^= 1;
  };
  auto unpack = [&](int piece, const Words& from) {
    constexpr bool keep = SCALED == 2 && STYPE == 3;
#pragma unroll
    for (int k = 0; k < BLOCKS; k += 2)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = (piece * BLOCKS + k) / 2;
        const u32 words[4] = {from.v[h].x, from.v[h].y, from.v[h].z, from.v[h].w};
        const u32 v0 = words[FOUR ? j : 2 * j], v1 = words[FOUR ? j : 2 * j + 1];
        const uint2 f = from.by[h][j >= CHUNKS / 2];
        a[piece][k][h] = scaled(pair<0, keep>(v0, from.minus[h]), f);
        a[piece][k][2 + h] = scaled(pair<1, keep>(v0, from.minus[h]), f);
        a[piece][k + 1][h] = scaled(pair<FOUR ? 2 : 0, keep>(v1, from.minus[h]), f);
        a[piece][k + 1][2 + h] = scaled(pair<FOUR ? 3 : 1, keep>(v1, from.minus[h]), f);
      }
#pragma unroll
    for (int k = 0; k < BLOCKS; ++k) asm volatile("" : "+r"(a[piece][k][0]), "+r"(a[piece][k][1]), "+r"(a[piece][k][2]), "+r"(a[piece][k][3]));  // now, not behind a wait
  };
  auto add_sums = [&](int q) {
    settled(sums[q]);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float v = sums[q][4 * n + c];
        acc[0][n][c] = SCALED == 1 ? fmaf(v, by_sum[q][c / 2], acc[0][n][c]) : v;
      }
  };
  // Start the products of step i, with sums q; meanwhile load the words of the next one and end the one before.
  auto work = [&](int i, int q, const Words& now, Words& then) {
    const u64 b = described(xs + slot * X_STAGE);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PIECES - 1) : "memory");
      unpack(piece, now);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < BLOCKS; ++k)
        wgmma(sums[q], a[piece][k], b + (piece * BLOCKS + k) * (2 * NT * 128 >> 4), SCALED == 1 ? piece + k > 0 : 1);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (piece == 0 && i + 1 < count) load(i + 1, then);
    }
    if (i > 0 && lane == 0) arrive(empty + (slot ? slot - 1 : DEPTH - 1) * 8);
#if SCALED == 1
    if (i > 0) add_sums(1 - q);
#pragma unroll
    for (int h = 0; h < 2; ++h) by_sum[q][h] = scale_value(ss + (8 * h + g) * stride + ((first + i) * STEP / G - group0) * SBYTES);
#endif
    if (++slot == DEPTH) slot = 0;
  };
  Words even, odd;
  load(0, even);
  work(0, 0, even, odd);  // not in the loop: the compiler must see that as many products are under way whenever it begins
  int i = 1;
#pragma unroll 1
  for (; i + 1 < count; i += 2) {
    work(i, BUFFERS - 1, odd, even);
    work(i + 1, 0, even, odd);
  }
  if (i < count) {
    work(i, BUFFERS - 1, odd, even);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    add_sums(BUFFERS - 1);
  } else {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    add_sums(0);
  }
  if (splits > 1 && !combined(acc, parts + (u64)tile * splits * (NT * 32), locks + tile, split, splits, lane)) return;
  finish(acc, ends, my_row0, M, N, x_scales ? x_scales + blockIdx.z * 8 * NT : nullptr, y, lane);
}
