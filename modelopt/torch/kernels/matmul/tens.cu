// y = x W^T + b for a packed W and up to some tens of rows of x, in one launch: each block brings its own columns of x (Hopper).
//
//     legend  as in `skinny.cu`; a unit is 128 columns; a block has 64 GROUPS rows of W, 8 NT rows of x and a part of K
//
// SPLITS blocks, a cluster, share the rows and deal K: each takes only its own columns of x into shared memory, and at the end they
// exchange sums through distributed shared memory, each for its share of the tiles; more PARTS (gridDim.y) are added through global
// memory. A warp streams its 16 rows of W through its own ring, as in `skinny.cu`; its words, unpacked, are A fragments of
// wgmma.m64nNk16 once the columns are renumbered, which is done to x on its way into shared memory (`operands.cu`).
//
// CHUNKED: thread t of a quad has word t of each 16 bytes, so that 32 columns, a block of scales, are multiplied by two wgmma.

#define WARPS (4 * GROUPS)
#define THREADS (32 * WARPS)
#define STEPS (FOUR ? 1 : 2)          // of the codes in a unit
#define W_STAGE (UNITS * STEPS * 1024)  // bytes of a warp
#define LEADING (NT * 128 + 16)       // bytes from 8 columns of x to the next 8; the 16 spread stores over the banks
#define X_UNIT (16 * LEADING)
#define QUADS (2 * NT)                // of rows of x

#define TWICE (SCALED && SBYTES > 1 && G <= 128)  // scales come in two parts, the second behind the first stages of W

#if SPLITS > 1
#define CLUSTERED __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTERED
#endif

__device__ __forceinline__ u64 described(u32 at) {  // 8 x 16 bytes are contiguous; then rows, then columns
  return (u64)(at >> 4 & 0x3FFF) | (u64)(LEADING >> 4) << 16 | (u64)(128 >> 4) << 32;
}

// Sums may be read only behind a wait for them, which the compiler does not know.
template <int COUNT> __device__ __forceinline__ void settled(float (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

__device__ __forceinline__ uint4 four_chunks(u32 from) {  // word t of row g of four 8 x 16 byte matrices
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1) tens(
    const __grid_constant__ Map map, const uint4* __restrict__ x, const u8* __restrict__ s, const u8* __restrict__ z,
    const float* __restrict__ post, const u16* __restrict__ bias, u16* __restrict__ y,
    float4* __restrict__ parts, int* __restrict__ locks, int M, int N, int K, int s_row, int s_bytes) {
  extern __shared__ __align__(1024) uint4 memory[];
  __shared__ u64 barriers[WARPS * DEPTH];
#if FITTED
  __shared__ u32 tops[8 * NT];
#endif
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int units = (K + 127) / 128, rank = blockIdx.x % SPLITS, splits = SPLITS * gridDim.y, split = blockIdx.y * SPLITS + rank;
  const int first = split * units / splits, last = (split + 1) * units / splits, count = last - first;
  const int block_row0 = blockIdx.x / SPLITS * (64 * GROUPS), row0 = block_row0 + 16 * warp, m0 = blockIdx.z * (8 * NT);
  const u32 base = address(memory), ring = base + warp * (DEPTH * W_STAGE), xs = base + WARPS * DEPTH * W_STAGE;
  const u32 ss = xs + MOST * X_UNIT + warp * s_bytes, barrier = address(barriers) + warp * (8 * DEPTH);
  if (thread == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
  if (lane < DEPTH) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + lane * 8) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#if FITTED
  if (thread < 8 * NT) tops[thread] = 0;
  __syncthreads();
#endif
  if (SPLITS > 1) cluster_arrive();  // waited for before another block's memory is written
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __syncwarp();

  // A task is 4 rows of x in one unit; a thread has two chunks of 8 columns of a row. The first loads go ahead of those of W.
  uint4 held[4][2];
  const int half = lane & 1, quad_row = lane >> 1 & 3, j = lane >> 3;
  const int chunk0 = !FOUR ? j / 2 * 8 + half * 4 + j % 2 : CHUNKED ? 4 * j + 2 * half : 8 * half + j;
  constexpr int chunk_step = !FOUR ? 2 : CHUNKED ? 1 : 4;
  auto load_x = [&](int task, int end, uint4 (&v)[2]) {
    const int unit = task / QUADS, m = m0 + task % QUADS * 4 + quad_row;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = (first + unit) * 16 + chunk0 + e * chunk_step;
      v[e] = task < end && m < M && (FOUR || at < K / 8) ? x[(u64)m * (K / 8) + at] : make_uint4(0, 0, 0, 0);
    }
  };
  auto store_x = [&](int quad, u32 unit_at, const uint4 (&v)[2]) {
    const int m = quad * 4 + quad_row;
    u32 pairs[2][4], unit = 0;
#if FITTED
    unit = unit_of(tops[m]);
#endif
    pairs_of(v[0], unit, pairs[0]), pairs_of(v[1], unit, pairs[1]);
    const u32 to = unit_at + 4 * j * LEADING + m * 16 + half * 8;
#pragma unroll
    for (int p = 0; p < 4; ++p) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to + p * LEADING), "r"(pairs[0][p]), "r"(pairs[1][p]) : "memory");
  };
  const int all = count * QUADS;
#pragma unroll
  for (int u = 0; u < 4; ++u) load_x(warp + u * WARPS, all, held[u]);
  const Ends ends = ends_of(row0, N, post, bias, lane);

  const int step0 = first * STEPS, step_end = min(last * STEPS, K / STEP);
  const int groups = SCALED ? ((step_end * STEP - 1) / G - step0 * STEP / G + 1) : 0, group0 = step0 * STEP / G;
  const int stride = (groups * S_BYTES + 15 & ~15 | 16), z_stride = (groups + 15 & ~15 | 16);
#if EXPANDED
  const int words_of_row = groups / 4;
  u32 exponents[8];
  auto load_exponents = [&](int first) {
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const int i = first + u * 32 + lane, row = i / words_of_row;
      exponents[u] = row < 16 ? *(const u32*)(s + (u64)min(row0 + row, N - 1) / SROWS * s_row + group0 + i % words_of_row * 4) : 0;
    }
  };
  load_exponents(0);
#elif SCALED
  const int soon = TWICE ? groups * SBYTES / 32 * 16 : groups * SBYTES, later = groups * SBYTES - soon;  // bytes of a row
  const u8* s_from = s + group0 * SBYTES;
  if (soon) copy_rows<SVECTOR>(ss, stride, s_from, (u64)s_row * SBYTES, soon, row0, N, lane);
#if KIND == 1
  copy_rows<ZVECTOR>(ss + 16 * stride, z_stride, z + group0, s_row, groups, row0, N, lane);
#endif
  commit();
#endif
  auto fetch = [&](int stage, int slot) {
    if (stage * UNITS < count && lane == 0) {
      arm(barrier + slot * 8, W_STAGE);
      bulk_copy(ring + slot * W_STAGE, &map, row0, step0 + stage * UNITS * STEPS, barrier + slot * 8);
    }
  };
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) fetch(i, i);
#if TWICE
  if (later) copy_rows<SVECTOR>(ss + soon, stride, s_from + soon, (u64)s_row * SBYTES, later, row0, N, lane);
  commit();
#endif

#if EXPANDED
  for (int from = 0;;) {
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const int i = from + u * 32 + lane, row = i / words_of_row;
      if (row >= 16) break;
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};"
          ::"r"(ss + row * stride + i % words_of_row * 8), "r"(powers_of(exponents[u])), "r"(powers_of(exponents[u] >> 16)) : "memory");
    }
    from += 256;
    if (from >= 16 * words_of_row) break;
    load_exponents(from);
  }
#endif
#if FITTED
  {
    constexpr bool same = WARPS % QUADS == 0;  // rows in all tasks of a warp
    u32 top = 0;
    auto more = [&](int quad) {
#pragma unroll
      for (int o = 1; o < 32; o = o == 1 ? 8 : 2 * o) top = max(top, __shfl_xor_sync(~0u, top, o));
      if (lane % 2 == 0 && lane < 8) atomicMax(&tops[quad * 4 + quad_row], top);
      top = 0;
    };
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      top = max(top, max(top_of(held[u][0]), top_of(held[u][1])));
      if (!same) more((warp + u * WARPS) % QUADS);
    }
    for (int task = warp + 4 * WARPS; task < all; task += WARPS) {
      uint4 v[2];
      load_x(task, all, v);
      top = max(top, max(top_of(v[0]), top_of(v[1])));
      if (!same) more(task % QUADS);
    }
    if (same) more(warp % QUADS);
    __syncthreads();
  }
#endif
  for (int task = warp;;) {
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (task + u * WARPS < all) store_x((task + u * WARPS) % QUADS, xs + (task + u * WARPS) / QUADS * X_UNIT, held[u]);
    task += 4 * WARPS;
    if (task >= all) break;
#pragma unroll
    for (int u = 0; u < 4; ++u) load_x(task + u * WARPS, all, held[u]);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (SCALED) wait<TWICE>();
  __syncthreads();

  float acc[NT * 4] = {};
  float sums[BUFFERS][NT * 4];
  float by_sum[2][BUFFERS] = {};
  u32 minus_of[2][BUFFERS] = {};
  u32 a[2][4][4];
  uint4 words[2];

  auto settle = [&]() {
#if SCALED == 1
#pragma unroll
    for (int q = 0; q < BUFFERS; ++q) settled(sums[q]);
#else
    settled(acc);
#endif
  };
  auto add_sums = [&]() {
    settle();
#if SCALED == 1
#pragma unroll
    for (int q = 0; q < BUFFERS; ++q)
#pragma unroll
      for (int i = 0; i < NT * 4; ++i) acc[i] = fmaf(sums[q][i], by_sum[i / 2 % 2][q], acc[i]);
#endif
  };
  auto load_words = [&](u32 from) {
    if (CHUNKED) {
      const int row = lane & 7;
      words[0] = four_chunks(from + row * 64 + ((lane >> 3 ^ row >> 1) << 4));
      words[1] = four_chunks(from + 512 + row * 64 + ((lane >> 3 ^ row >> 1) << 4));
    } else {
      words[0] = memory[(from - base) / 16 + lane], words[1] = memory[(from - base) / 16 + 32 + lane];
    }
  };
  // The 4 blocks of 16 columns of a half of unit i, as A fragments.
  auto unpack = [&](int i, int piece, u32 (&to)[4][4]) {
    const int step = min(step0 + i * STEPS + (FOUR ? 0 : piece), step_end - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + g;
      const u32 all_words[4] = {words[h].x, words[h].y, words[h].z, words[h].w};
      uint2 f = {};
      u32 minus = 0;
#if FLOATS
#if SCALED == 2
      f = half_scales<G < EACH>(ss + row * stride + (step * STEP + t * EACH) / G - group0);
#endif
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (FOUR) values_of(all_words[2 * piece + c], to[2 * c][h], to[2 * c][2 + h], to[2 * c + 1][h], to[2 * c + 1][2 + h]);
        else halves_of(all_words[2 * c], to[2 * c][h], to[2 * c][2 + h]), halves_of(all_words[2 * c + 1], to[2 * c + 1][h], to[2 * c + 1][2 + h]);
#if SCALED == 2
        const u32 by = piece ? f.y : f.x;
        to[2 * c][h] = times(to[2 * c][h], by), to[2 * c][2 + h] = times(to[2 * c][2 + h], by);
        to[2 * c + 1][h] = times(to[2 * c + 1][h], by), to[2 * c + 1][2 + h] = times(to[2 * c + 1][2 + h], by);
#endif
      }
#else
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int chunk = FOUR ? 2 * piece + c : c;
        if (KIND == 1 && AT_ONCE) minus = minus_of[h][chunk * BUFFERS / 4];
        else if (SCALED && (c == 0 || (CHUNKED && G < 64) || (!FOUR && G < EACH))) {
          const int column = CHUNKED ? chunk * 32 : SCALED == 1 ? 0 : t * EACH + (G < EACH && chunk >= CHUNKS / 2 ? G : 0);
          const int group = (step * STEP + column) / G - group0;
#if SCALED == 2
          f = scale_pair(scale_value(ss + row * stride + group * SBYTES));
#endif
#if KIND == 1
          minus = ((const u8*)memory)[ss - base + 16 * stride + row * z_stride + group] * 0x10001u | (HALF ? 0xE400E400u : 0xC300C300u);
#endif
        }
        constexpr bool keep = SCALED == 2 && STYPE == 3;
        const u32 v0 = all_words[FOUR ? chunk : 2 * c], v1 = all_words[FOUR ? chunk : 2 * c + 1];
        to[2 * c][h] = scaled(pair<0, keep>(v0, minus), f);
        to[2 * c][2 + h] = scaled(pair<1, keep>(v0, minus), f);
        to[2 * c + 1][h] = scaled(pair<FOUR ? 2 : 0, keep>(v1, minus), f);
        to[2 * c + 1][2 + h] = scaled(pair<FOUR ? 3 : 1, keep>(v1, minus), f);
      }
#endif
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) asm volatile("" : "+r"(to[k][0]), "+r"(to[k][1]), "+r"(to[k][2]), "+r"(to[k][3]));  // now, not behind a wait
  };
  auto multiply = [&](int piece, u64 of_x, u32 (&from)[4][4]) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const u64 b = of_x + piece * (8 * LEADING >> 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#if SCALED == 1
      const int block = piece * 4 + k, q = block * BUFFERS / 8;
      wgmma(sums[q], from[k], b + k * (2 * LEADING >> 4), block % (8 / BUFFERS) > 0);
#else
      wgmma(acc, from[k], b + k * (2 * LEADING >> 4), 1);
#endif
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };

  int slot = 0, phase = 0;
  u64 x_at = described(xs);
  const u32 s_at = ss + g * stride, z_at = ss + 16 * stride + g * z_stride;
  auto work = [&](int i, u32 from) {
    load_words(from);
#if KIND == 1 && AT_ONCE
    unit_zeros(z_at + i * BUFFERS, minus_of[0]), unit_zeros(z_at + 8 * z_stride + i * BUFFERS, minus_of[1]);
#endif
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(SCALED != 1 || BUFFERS == 1) : "memory");
    unpack(i, 0, a[0]);
#if SCALED == 1
    if (BUFFERS == 1) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (i > 0) add_sums();
#if AT_ONCE
#pragma unroll
    for (int h = 0; h < 2; ++h) unit_scales(s_at + 8 * h * stride + i * (BUFFERS * S_BYTES), by_sum[h]);
#else
#pragma unroll
    for (int q = 0; q < BUFFERS; ++q)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = G == STEP && FOUR ? i : ((step0 + i * STEPS) * STEP + q * (128 / BUFFERS)) / G - group0;
        const int group = FOUR ? at : min(at, groups - 1);  // half a unit may lie behind the last column
        by_sum[h][q] = scale_value(s_at + 8 * h * stride + group * SBYTES);
      }
#endif
#endif
    multiply(0, x_at, a[0]);
    if (!FOUR) load_words(from + 1024);
    if (SCALED != 1) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    unpack(i, 1, a[1]);
    multiply(1, x_at, a[1]);
    x_at += X_UNIT >> 4;
  };
#if TWICE
  int served = soon / SBYTES * G / 128;  // units whose scales are there
#endif
  auto all_scales = [&](int i) {
#if TWICE
    if (i <= served) return;
    wait<0>(), __syncwarp();
    served = count;
#endif
  };
  int i = 0;
#pragma unroll 1
  for (; i + UNITS <= count; i += UNITS) {
    all_scales(i + UNITS);
    wait_for(barrier + slot * 8, phase);
#pragma unroll
    for (int in = 0; in < UNITS; ++in) work(i + in, ring + slot * W_STAGE + in * (STEPS * 1024));
    __syncwarp();
    fetch(i / UNITS + DEPTH, slot);
    if (++slot == DEPTH) slot = 0, phase ^= 1;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  settle();
  if (i < count) {  // a part of a stage
    all_scales(count);
    wait_for(barrier + slot * 8, phase);
#pragma unroll 1
    for (u32 from = ring + slot * W_STAGE; i < count; ++i, from += STEPS * 1024) work(i, from);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  add_sums();

#if FITTED  // each part of K has a power of two of its own
#pragma unroll
  for (int i = 0; i < NT * 4; ++i) acc[i] *= back_of(tops[i / 4 * 8 + 2 * t + i % 2]);
#endif
  constexpr int mine = (NT + SPLITS - 1) / SPLITS;  // tiles of 16 x 8 sums that this block ends up with: every SPLITS-th
  float4 v[mine];
  auto tile_of = [&](int n) { return make_float4(acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]); };
#if SPLITS == 1
#pragma unroll
  for (int i = 0; i < mine; ++i) v[i] = tile_of(i);
#else
  static_assert(SPLITS == 2, "two blocks change sums");
  const u32 room = base + EXCHANGE + (warp * mine * 32 + lane) * 16;
  cluster_wait();
#pragma unroll
  for (int n = 0; n < NT; ++n)
    if (n % 2 != rank) to_other(room + n / 2 * 512, rank ^ 1, tile_of(n));
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int i = 0; i < mine; ++i) {
    const uint4 other = from_shared16(room + i * 512);
    v[i] = sum_of(rank ? tile_of(2 * i + 1) : tile_of(2 * i),
        make_float4(__uint_as_float(other.x), __uint_as_float(other.y), __uint_as_float(other.z), __uint_as_float(other.w)));
  }
#endif
  const int tile = (blockIdx.z * gridDim.x + blockIdx.x) * WARPS + warp;
  if (gridDim.y == 1 || added<mine>(v, parts + (u64)tile * PARTS * (mine * 32), locks + tile, blockIdx.y, lane)) {
#pragma unroll
    for (int i = 0; i < mine; ++i) store_tile(v[i], ends, row0, m0 + (i * SPLITS + (SPLITS > 1 ? rank : 0)) * 8, M, N, y, lane);
  }
}
