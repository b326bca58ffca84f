// Blocks of 2 to 256 neighbours transformed by warps on their own.
//
// A warp copies its next tile of 1024 values to shared memory while it computes; results go back through it, so that whole sectors
// are stored. Constants: those of tiles.cu; SCALE, SIGNS (0: none, 1: before, -1: after the transform), WARPS, RESIDENT (thread
// blocks of a multiprocessor).

__device__ __forceinline__ void multiply(float* v, const float* signs, u32 lane) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        float sign;  // volatile: not kept in 32 registers for all tiles
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(sign) : "l"(signs + (lane * OWN + i) % SIZE));
        v[i] = __fmul_rn(v[i], sign);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) blocks(
    const uint4* __restrict__ x, const float* __restrict__ signs, uint4* __restrict__ y, int pieces_low, int pieces_high) {
    extern __shared__ uint4 shared[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 pieces = ((u64)pieces_high << 31) + pieces_low, stride = (u64)gridDim.x * WARPS * TILE;
    uint4* buffer = shared + warp * 2 * TILE;
    u64 tile = ((u64)blockIdx.x * WARPS + warp) * TILE;
    if (tile >= pieces) return;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    u32 left = (u32)min(pieces - tile, (u64)TILE);
    fetch_tile(buffer, x + tile + lane, lane, left);
    for (u32 turn = 0; tile < pieces; tile += stride, turn ^= 1) {
        const u64 next = tile + stride;
        uint4* here = buffer + turn * TILE;
        const u32 later = next < pieces ? (u32)min(pieces - next, (u64)TILE) : 0;
        fetch_tile(buffer + (turn ^ 1) * TILE, x + (later ? next : 0) + lane, lane, later);
        fetched<1>();
        __syncwarp();
        float v[OWN];
#pragma unroll
        for (int p = 0; p < PIECES; p++) unpack(here[own(lane, p)], v + p * VALUES);
        if (SIGNS > 0) multiply(v, signs, lane);
        transform(v, lane);
#pragma unroll
        for (int i = 0; i < OWN; i++) v[i] = __fmul_rn(v[i], SCALE);
        if (SIGNS < 0) multiply(v, signs, lane);
#pragma unroll
        for (int p = 0; p < PIECES; p++) here[own(lane, p)] = pack(v + p * VALUES);
        __syncwarp();
        uint4* out = y + tile + lane;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
            if (p * 32 + lane < left) __stcs(out + p * 32, here[dealt(lane, p)]);
        __syncwarp();
        left = later;
    }
}
