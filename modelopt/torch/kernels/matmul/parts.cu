// The end of `tens.cu`: parts of K from the blocks of a cluster and from others are added, always in one order, and stored.

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Into the shared memory of another block of the cluster.
__device__ __forceinline__ void to_other(u32 at, int rank, float4 v) {
  asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.v4.f32 [a], {%2, %3, %4, %5}; }"
      ::"r"(at), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Add the PARTS of K of a warp's sums: each block of a column writes its own, the last one to arrive adds them in order and has them.
// All are on the way before the first is added.
template <int TILES> __device__ __forceinline__ bool added(float4 (&v)[TILES], float4* parts, int* lock, int part, int lane) {
  constexpr int ahead = 16 / TILES;
  float4* at = parts + lane;
#pragma unroll
  for (int i = 0; i < TILES; ++i) __stcg(at + (part * TILES + i) * 32, v[i]);
  __syncwarp();
  int arrived = 0;
  if (lane == 0) asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(arrived) : "l"(lock) : "memory");
  if (__shfl_sync(~0u, arrived, 0) != PARTS - 1) return false;
  __syncwarp();
  if (lane == 0) *lock = 0;
#pragma unroll
  for (int i = 0; i < TILES; ++i) v[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int p = 0; p < PARTS; p += ahead) {
    float4 other[ahead][TILES];
#pragma unroll
    for (int q = 0; q < ahead; ++q)
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        if (p + q < PARTS) other[q][i] = __ldcg(at + ((p + q) * TILES + i) * 32);
#pragma unroll
    for (int q = 0; q < ahead; ++q)
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        if (p + q < PARTS) v[i] = sum_of(v[i], other[q][i]);
  }
  return true;
}

// Scale the sums of 16 rows of W and 8 of x, add the bias, and store two neighbours of a row of y at once.
__device__ __forceinline__ void store_tile(float4 v, const Ends& ends, int row0, int m0, int M, int N, u16* y, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float factor = ends.factor[0][h], offset = ends.offset[0][h];
    u32 two = pack2((h ? v.z : v.x) * factor + offset, (h ? v.w : v.y) * factor + offset);
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(two));
    const int m = m0 + g, at = row0 + 8 * h + 2 * t;
    u16* to = y + (u64)m * N + at;
    if (m >= M) continue;
    if (N % 2 == 0 && at < N) *(u32*)to = two;
    else {
      if (at < N) to[0] = two & 0xFFFF;
      if (at + 1 < N) to[1] = two >> 16;
    }
  }
}
