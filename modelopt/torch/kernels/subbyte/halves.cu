// What the kernels for float16 and bfloat16 share: two neighbours in a word, and the largest magnitude of a thread's values.
// Constants: F16 or BF16; EACH values of a thread, SHARE threads of a block; MOST, the element's largest value; AHEAD (the next
// piece is copied to shared memory while this one is worked on, two buffers for each thread).

#define WORDS (EACH / 2)
#define VECTORS (EACH / 8)
#define INFINITE 0x7f800000u

__device__ __forceinline__ float low_of(u32 pair) { return widen(pair & 0xffffu); }

__device__ __forceinline__ float high_of(u32 pair) {
#ifdef BF16
    return __uint_as_float(pair & 0xffff0000u);
#else
    return widen(pair >> 16);
#endif
}

__device__ __forceinline__ float largest_of(const u32* w) {
    u32 most = largest_magnitude(w, WORDS);
#if SHARE > 1
#pragma unroll
    for (int i = 1; i < SHARE; i *= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, i));
#endif
    return widen(most & 0xffffu);
}

__device__ __forceinline__ bool any_nan(const u32* w) {
    u32 most = w[0];
#pragma unroll
    for (int i = 1; i < WORDS; i++) most = larger(most, w[i]);
    return not_a_number(most);
}

// amax / MOST, correctly rounded: MOST is a small integer over a power of two, so no quotient lies near a middle.
__device__ __forceinline__ float over_most(float amax) {
    if (MOST == 1.0f) return amax;
    const float inverse = 1.0f / MOST, rest = (float)(1.0 / MOST - (double)inverse);
    const bool calm = amax > 0x1p-60f && amax < 0x1p60f;
    return calm ? __fmaf_rn(amax, inverse, __fmul_rn(amax, rest)) : __fdiv_rn(amax, MOST);
}

__device__ __forceinline__ void load(u32* w, const uint4* x, u32 piece, u32 pieces) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint4 v = piece < pieces ? __ldg(x + (u64)piece * VECTORS + i) : make_uint4(0, 0, 0, 0);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
}

// Vectors lie in shared memory so that neither 32 neighbours nor the vectors of a thread meet in a bank.
__device__ __forceinline__ u32 place(u32 vector) { return vector ^ ((vector >> 3) & (VECTORS - 1)); }

// Start copying a warp's next vectors to shared memory: neighbouring threads take neighbouring ones; `piece` has this thread's first.
__device__ __forceinline__ void fetch(uint4* to, const uint4* from, u32 piece, u32 pieces) {
#pragma unroll
    for (u32 i = 0; i < VECTORS; i++)
        if (piece + i * (32 / VECTORS) < pieces)
            copy_ahead(to + place(threadIdx.x % 32) + 32 * i, from + 32 * i);
    close_group();
}

// Wait for all copies but the latest and read the words of this thread's piece.
__device__ __forceinline__ void take(u32* w, const uint4* from) {
    all_but_latest();
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < VECTORS; i++) {
        const uint4 v = from[place(threadIdx.x % 32 * VECTORS + i)];
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
    __syncwarp();
}
