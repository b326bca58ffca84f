// Blocks of 2 to 256 neighbours transformed and rounded to a format in one pass, by warps or, where a scale is that of a longer row
// whose range must be found (ROW), by thread blocks that hold one row.
//
// Constants: those of tiles.cu and rounding.cu; SCALE; FIND (ranges are found here) and GROUP, the values under one scale: 16, 32, ...
// 1024, else 0; ROW; WARPS, RESIDENT. `chunks` is the number of 32 values under one scale; a block has WARPS warps, with ROW at most so many.

#define SCALES (GROUP == 16 ? 2 : 1)  // of a thread
#define WORDS (OWN * 4 / VALUES)

// The largest magnitude of `n` words as the bits of a float32; that of NaN is above all.
__device__ __forceinline__ u32 largest(const u32* words, int n) {
    u32 most = 0;
#ifdef F32
#pragma unroll
    for (int i = 0; i < n; i++) most = max(most, words[i] & 0x7fffffffu);
    return most;
#else
#pragma unroll
    for (int i = 0; i < n; i++) most = __vmaxu2(most, words[i] & 0x7fff7fffu);
    const u32 half = max(most & 0xffffu, most >> 16);
#ifdef BF16
    return half << 16;
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)half));
    return __float_as_uint(f);
#endif
#endif
}

// The largest of the lanes that share a scale, or of all threads of the block.
__device__ __forceinline__ u32 shared_largest(u32 most, u32* of_warps, u32 lane, u32 warp, u32 turn) {
#if ROW
    most = __reduce_max_sync(0xffffffffu, most);
    if (lane == 0) of_warps[turn * 32 + warp] = most;
    __syncthreads();
    return __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? of_warps[turn * 32 + lane] : 0);
#else
#pragma unroll
    for (int h = 1; h < GROUP / OWN; h *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, h));
    return most;
#endif
}

// Set what is NaN to 0, for codes have none: rare, found by a sum of products with 0.
__device__ __forceinline__ void without_nan(u32* words) {
#if CODES && !defined(E4M3)
#ifdef F32
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WORDS; i++) sum = __fmaf_rn(__uint_as_float(words[i]), 0.0f, sum);
    if (sum == 0.0f) return;
#pragma unroll
    for (int i = 0; i < WORDS; i++)
        if ((words[i] & 0x7fffffffu) > 0x7f800000u) words[i] = 0;
#else
#ifdef BF16
    const u32 infinite = 0x7f80;
#define FMA "fma.rn.bf16x2 %0, %1, %2, %0;"
#else
    const u32 infinite = 0x7c00;
#define FMA "fma.rn.f16x2 %0, %1, %2, %0;"
#endif
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < WORDS; i++) asm(FMA : "+r"(sum) : "r"(words[i]), "r"(0));
    if ((sum & 0x7fff7fffu) == 0) return;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        if ((words[i] & 0x7fff) > infinite) words[i] &= 0xffff0000u;
        if ((words[i] >> 16 & 0x7fff) > infinite) words[i] &= 0xffffu;
    }
#endif
#endif
}

// Multiply the values under a scale by its `before`, where that is not 1: rare.
__device__ __forceinline__ void bring_near(u32* words, const Scale* scales) {
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
        const float before = scales[i].before;
        if (before == 1.0f) continue;
#pragma unroll
        for (int j = i * (WORDS / SCALES); j < (i + 1) * (WORDS / SCALES); j += 4) {
            float v[VALUES];
            unpack(words + j, v);
#pragma unroll
            for (int k = 0; k < VALUES; k++) v[k] = __fmul_rn(v[k], before);
#pragma unroll
            for (int k = 0; k < 4; k++) words[j + k] = word_of(v[k * VALUES / 4], v[(k + 1) * VALUES / 4 - 1]);
        }
    }
}

// The scales of a thread's values, their storage included.
__device__ __forceinline__ void find_scales(
    Scale* scales, const u32* words, const float* amax, void* stored, float outer, u32* of_warps, u64 chunk, u32 chunks, bool exists,
    u32 lane, u32 warp, u32 turn) {
#if GROUP == 16
    const u64 cell = chunk * 2;
#else
    const u64 cell = GROUP == 32 ? chunk : (u32)chunk / chunks;
#endif
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
        float most;
        if (FIND) {
            const u32 bits = largest(words + i * (WORDS / SCALES), WORDS / SCALES);
            most = __uint_as_float(GROUP <= OWN && GROUP > 0 ? bits : shared_largest(bits, of_warps, lane, warp, turn));
        } else
            most = exists ? __ldg(amax + cell + i) : 1.0f;
        scales[i] = scale_of(most, outer);
    }
    if (!CODES || !exists || (GROUP != 16 && GROUP != 32 && (u32)chunk % chunks)) return;
#if defined(SCALE_F32)
#pragma unroll
    for (int i = 0; i < SCALES; i++) ((u32*)stored)[cell + i] = scales[i].stored;
#elif GROUP == 16
    ((unsigned short*)stored)[chunk] = scales[0].stored | scales[SCALES - 1].stored << 8;
#else
    ((unsigned char*)stored)[cell] = scales[0].stored;
#endif
}

// Round a tile: the words of this thread become values, or codes, of which a thread has 16 or 32 bytes.
__device__ __forceinline__ void emit(uint4* here, uint4* out, const u32* words, const Scale* scales, u64 tile, u32 lane, u32 left) {
#if CODES
    u32 codes[BITS];
#pragma unroll
    for (int i = 0; i < OWN; i += 8) {
        float v[8];
#pragma unroll
        for (int p = 0; p < 8 / VALUES; p++) unpack(words + (i / VALUES + p) * 4, v + p * VALUES);
        round_codes(v, scales[i * SCALES / OWN], codes + i * BITS / 32);
    }
#if BITS == 4
    if (lane * PIECES < left) __stcs(out + tile / PIECES + lane, make_uint4(codes[0], codes[1], codes[2], codes[3]));
#else
    __syncwarp();  // codes go where other lanes had their values
#pragma unroll
    for (int p = 0; p < 2; p++) here[slot(lane * 2 + p)] = make_uint4(codes[4 * p], codes[4 * p + 1], codes[4 * p + 2], codes[4 * p + 3]);
    __syncwarp();
#pragma unroll
    for (int p = 0; p < 2; p++)
        if ((p * 32 + lane) * PIECES / 2 < left) __stcs(out + tile * 2 / PIECES + p * 32 + lane, here[dealt(lane, p)]);
#endif
#else
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        float v[VALUES];
        unpack(words + p * 4, v);
        round_values<VALUES>(v, scales[p * SCALES / PIECES]);
        here[own(lane, p)] = pack(v);
    }
    __syncwarp();
#pragma unroll
    for (int p = 0; p < PIECES; p++)
        if (p * 32 + lane < left) __stcs(out + tile + p * 32 + lane, here[dealt(lane, p)]);
#endif
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) rounded(
    const uint4* __restrict__ x, uint4* __restrict__ out, void* __restrict__ stored, float* __restrict__ stored_outer,
    const float* __restrict__ amax, const float* __restrict__ global_amax, int chunks, int pieces_low, int pieces_high) {
    extern __shared__ uint4 shared[];
    __shared__ u32 of_warps[64];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 pieces = ((u64)pieces_high << 31) + pieces_low;
    const u64 step = ROW ? (u64)chunks * PIECES : WARPS * TILE, stride = gridDim.x * step;
    uint4* buffer = shared + warp * 2 * TILE;
    u64 tile = blockIdx.x * step + warp * TILE;
    u64 ends = ROW ? (blockIdx.x + 1) * step : pieces;  // of the row or the tensor
    if (!ROW && tile >= pieces) return;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const float outer = outer_scale(global_amax);
    if (stored_outer != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *stored_outer = outer;
    u32 left = tile < ends ? (u32)min(ends - tile, (u64)TILE) : 0;
    fetch_tile(buffer, x + (left ? tile : 0) + lane, lane, left);
    for (u32 turn = 0; ROW ? ends <= pieces : tile < pieces; turn ^= 1) {
        const u64 next = tile + stride, next_end = ROW ? ends + stride : pieces;
        const u32 later = next < next_end && next_end <= pieces ? (u32)min(next_end - next, (u64)TILE) : 0;
        uint4* here = buffer + turn * TILE;
        fetch_tile(buffer + (turn ^ 1) * TILE, x + (later ? next : 0) + lane, lane, later);
        fetched<1>();
        __syncwarp();
        float v[OWN];
#pragma unroll
        for (int p = 0; p < PIECES; p++) unpack(here[own(lane, p)], v + p * VALUES);
        transform(v, lane);
        u32 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = word_of(__fmul_rn(v[i * OWN / WORDS], SCALE), __fmul_rn(v[(i + 1) * OWN / WORDS - 1], SCALE));
        Scale scales[SCALES];
        const u64 chunk = tile / PIECES + lane;
        find_scales(scales, words, amax, stored, outer, of_warps, chunk, chunks, lane * PIECES < left, lane, warp, turn);
        bring_near(words, scales);
        without_nan(words);
        emit(here, out, words, scales, tile, lane, left);
        tile = next, ends = next_end, left = later;
    }
}
