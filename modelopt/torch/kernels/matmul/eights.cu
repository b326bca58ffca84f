// y = sx sw (x W^T) + b, codes of 8 bits times codes of 8 bits: both in shared memory, as they lie, for wgmma (Hopper).
//
//     legend  M x K codes of x, N x K of W; a step is BOXES times 128 columns; a tile is ROWS rows of W times the 8 NT rows of x
//
// The steps of all tiles, in a row, are dealt to the blocks in equal shares. One warp fetches steps of W (boxes of the tensor map) and of
// x (contiguous after `eights_x.cu`) into a ring of DEPTH; that of W may be fetched while x is rounded, which hides it. A warpgroup for
// each 64 rows multiplies; what it reads behind the last row of a tile is not stored. Where a tile has several parts, pairs of blocks
// (PAIR = 2: a cluster, which deals the steps of a part) add theirs through shared memory, and what is left is added through the L2 cache
// by the block that arrives last; both in the order of the columns.
//
// The kernel ahead is always `eights_x.cu`, which says there when W may be fetched.

#define GROUPS ((ROWS + 63) / 64)
#define WARPS (4 * GROUPS)
#define THREADS (32 * WARPS + 32)
#define W_STAGE (BOXES * ROWS * 128)
#define X_STAGE (BOXES * NT * 1024)
#define STAGE (W_STAGE + X_STAGE)
#define MINE (NT / PAIR)  // of a warp's NT sums of 16 x 8 in the end: with PAIR every second

#if PAIR > 1
#define CLUSTERED __cluster_dims__(PAIR, 1, 1)
#else
#define CLUSTERED
#endif

struct __align__(16) Four {
  Sum v[4];
};

__device__ __forceinline__ u64 described(u32 at) {  // rows of 128 bytes, the 16-byte pieces of 8 rows having changed places
  return (u64)(at >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Store to the other block of the cluster, which hears of it by its barrier.
__device__ __forceinline__ void send(u32 to, u32 barrier, int rank, const Four& s) {
  const int4 v = *(const int4*)&s;
  asm volatile("{ .reg .u32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 b, %1, %2;\n\t"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [a], {%3, %4, %5, %6}, [b]; }"
      ::"r"(to), "r"(barrier), "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void wait_for_cluster(u32 barrier) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0; @p bra done; bra again; done: }"
      ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void add(Four& a, const Four& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
}

// Add the parts of a warp's sums: each block writes its own, the last one to arrive adds them in order and has them.
__device__ __forceinline__ bool added(Four (&v)[MINE], int4* parts, int* lock, int part, int count, int lane) {
  int4* at = parts + lane;
#pragma unroll
  for (int i = 0; i < MINE; ++i) __stcg(at + (part * MINE + i) * 32, *(const int4*)&v[i]);
  __threadfence();
  __syncwarp();
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(lock, 1);
  if (__shfl_sync(~0u, arrived, 0) != count - 1) return false;
  __threadfence();
  if (lane == 0) *lock = 0;
  constexpr int CHUNK = MOST >= 16 ? 1 : MINE < 16 / MOST ? MINE : 16 / MOST;  // what registers hold of all parts
#pragma unroll
  for (int i0 = 0; i0 < MINE; i0 += CHUNK) {
    int4 other[CHUNK][MOST];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
#pragma unroll
      for (int p = 0; p < MOST; ++p)
        if (p < count && i0 + i < MINE) other[i][p] = __ldcg(at + (p * MINE + i0 + i) * 32);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      Four sum = {};
#pragma unroll
      for (int p = 0; p < MOST; ++p)
        if (p < count) add(sum, *(const Four*)&other[i][p]);
      if (i0 + i < MINE) v[i0 + i] = sum;
    }
  }
  return true;
}

// Store 16 neighbours of a row of y: a thread has two of each half of them, and gets four, so that whole sectors are written.
__device__ __forceinline__ void store(const u32 (&two)[2], int row0, int end, int m, int M, int N, u16* y, int lane) {
  const int from = (lane & ~3) | (lane & 1) * 2, upper = lane & 2;
  u32 four[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 low_half = __shfl_sync(~0u, two[0], from + i), high_half = __shfl_sync(~0u, two[1], from + i);
    four[i] = upper ? high_half : low_half;
  }
  const int row = row0 + (lane & 3) * 4;
  u16* to = y + (u64)m * N + row;
  if (m >= M) return;
  if (N % 4 == 0 && row < end) *(uint2*)to = make_uint2(four[0], four[1]);
  else
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i < end) to[i] = four[i / 2] >> (i % 2 * 16);
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1) eights(
    const __grid_constant__ Map map, const u8* __restrict__ x, const float* __restrict__ x_scales, const float* __restrict__ post,
    const u16* __restrict__ bias, u16* __restrict__ y, int4* __restrict__ parts, int* __restrict__ locks,
    int* gate, int M, int N, int K) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ u64 barriers[2 * DEPTH + WARPS];
  __shared__ float2 sx[NT * 4];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int steps = (K + BOXES * 128 - 1) / (BOXES * 128), units = (N + ROWS - 1) / ROWS * steps;
  const int rank = blockIdx.x % PAIR, blocks = gridDim.x / PAIR, block = blockIdx.x / PAIR;
  const int begin = block * units / blocks, size = (block + 1) * units / blocks - begin;  // PAIR: all of one tile
  const int first = begin + size * rank / PAIR, last = begin + size * (rank + 1) / PAIR;
  const u32 ring = address(memory), full = address(barriers), empty = full + 8 * DEPTH, met = empty + 8 * DEPTH;

  if (warp == WARPS) {  // the warp that fetches
    if (lane == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    if (lane < DEPTH) init(full + lane * 8, 1), init(empty + lane * 8, WARPS);
    if (PAIR == 2 && lane < WARPS) init(met + lane * 8, 1), arm(met + lane * 8, MINE * 512);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    if (PAIR == 2) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    if (lane) {  // these do not wait for the kernel ahead: the one that fetches W would wait with them
      if (PAIR == 2) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
      return;
    }
    const int count = last - first, ahead = min(count, AHEAD);
    int tile = first / steps, step = first - tile * steps;
    auto fetch_w = [&](int slot) {
      arm(full + slot * 8, STAGE);
#pragma unroll
      for (int c = 0; c < BOXES; ++c)
        bulk_copy_2d(ring + slot * STAGE + c * (ROWS * 128), &map, (step * BOXES + c) * 128, tile * ROWS, full + slot * 8);
      if (++step == steps) step = 0, ++tile;
    };
    auto fetch_x = [&](int slot, int at) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          ::"r"(ring + slot * STAGE + W_STAGE), "l"(x + (u64)at * X_STAGE), "r"(X_STAGE), "r"(full + slot * 8) : "memory");
    };
    int x_step = step;
    int open;
    do asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(open) : "l"(gate) : "memory");
    while (!open);
    asm volatile("fence.proxy.async;" ::: "memory");
    for (int i = 0; i < ahead; ++i) fetch_w(i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < ahead; ++i, x_step = x_step + 1 == steps ? 0 : x_step + 1) fetch_x(i, x_step);
    const int counted = atomicAdd(gate + 1, 1);  // under way, behind all kernels ahead; the next one may start when that is seen
    auto tell = [&]() { asm volatile("griddepcontrol.launch_dependents;" ::"r"(counted) : "memory"); };
    for (int i = ahead, slot = ahead % DEPTH, phase = 1 ^ (ahead == DEPTH); i < count; ++i) {
      if (i >= DEPTH) wait_for(empty + slot * 8, phase);
      const int at = step;
      fetch_w(slot);
      fetch_x(slot, at);
      if (i == DEPTH) tell();
      if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
    tell();
    if (PAIR == 2) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    return;
  }

  __syncthreads();
  if (PAIR == 2) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (thread < NT * 8) ((float*)sx)[thread] = thread < M ? x_scales[thread] : 0.0f;
  asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory");

  const int g = lane >> 2, t = lane & 3;
  const u64 a0 = described(ring + warp / 4 * 8192), b0 = described(ring + W_STAGE);
  int slot = 0, phase = 0;
#pragma unroll 1
  for (int unit = first, tile = first / steps; unit < last || PAIR == 2; ++tile) {
    const int stop = min(last, (tile + 1) * steps), row0 = tile * ROWS + warp * 16;
    const Ends ends = ends_of(row0, N, post, bias, lane);
    Sum acc[NT * 4] = {};
    int before = -1;
#pragma unroll 1
    for (; unit < stop; ++unit) {
      wait_for(full + slot * 8, phase);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      const u64 by = slot * (STAGE >> 4);
#pragma unroll
      for (int k = 0; k < 4 * BOXES; ++k)
        wgmma(acc, a0 + by + k / 4 * (ROWS * 128 >> 4) + k % 4 * 2, b0 + by + k / 4 * (NT * 1024 >> 4) + k % 4 * 2);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (before >= 0 && lane == 0) arrive(empty + before * 8);
      before = slot;
      if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < NT * 4; ++i) SETTLED(acc[i]);
    if (before >= 0 && lane == 0) arrive(empty + before * 8);

    Four v[MINE];
    auto sum_of = [&](int n) { return Four{{acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]}}; };
#if PAIR == 2
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    const u32 at = ring + DEPTH * STAGE + (warp * MINE * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const Four even = sum_of(2 * i), odd = sum_of(2 * i + 1);
      v[i] = rank ? odd : even;
      send(at + i * 512, met + warp * 8, 1 - rank, rank ? even : odd);
    }
    wait_for_cluster(met + warp * 8);
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const uint4 other = from_shared16(at + i * 512);
      add(v[i], *(const Four*)&other);
    }
    const int begins = tile * steps * blocks / units, parts_of = blocks * steps / units;
#else
#pragma unroll
    for (int i = 0; i < MINE; ++i) v[i] = sum_of(i);
    const int begins = ((tile * steps + 1) * blocks - 1) / units, parts_of = ((tile + 1) * steps * blocks - 1) / units - begins + 1;
#endif
    const int mine = (tile * PAIR + rank) * WARPS + warp;
    if (parts_of > 1 && !added(v, parts + (u64)mine * (MOST * MINE * 32), locks + mine, block - begins, parts_of, lane)) {
      if (PAIR == 2) break;
      continue;
    }
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const int n = PAIR * i + rank;
      const float2 s = sx[n * 4 + t];
      u32 two[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float f = ends.factor[0][h], o = ends.offset[0][h];
        two[h] = pack2((float)v[i].v[2 * h] * s.x * f + o, (float)v[i].v[2 * h + 1] * s.y * f + o);
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(two[h]));
      }
      store(two, row0, min(N, (tile + 1) * ROWS), n * 8 + g, M, N, y, lane);
    }
    if (PAIR == 2) break;
  }
  if (thread == 0) asm volatile("red.relaxed.gpu.global.add.s32 [%0], -1;" ::"l"(gate + 1) : "memory");
}
