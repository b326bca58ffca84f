// The Walsh-Hadamard transform of blocks of 2 to 1024 neighbours within a warp: a thread has 32 neighbours in registers.
//
// Bits 0 to 4 of the index are transformed within a thread, the next ones between lanes, in this order, each sum being one float32
// addition: own + other or other - own, an exact product and one rounding. Constants: those of values.cu; SIZE.

#define OWN 32
#define PIECES (OWN / VALUES)
#define TILE (32 * PIECES)  // pieces of a warp

__device__ __forceinline__ void transform(float* v, u32 lane) {
#pragma unroll
    for (int h = 1; h < SIZE && h < OWN; h *= 2)
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = __fadd_rn(a, b);
                v[i + h] = __fsub_rn(a, b);
            }
#pragma unroll
    for (int h = 1; h < SIZE / OWN; h *= 2) {
        const float sign = lane & h ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < OWN; i++) v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(0xffffffffu, v[i], h));
    }
}

// Where a lane's pieces p lie in shared memory: `own` those that it transforms, `dealt` those that neighbouring lanes copy together.
__device__ __forceinline__ u32 own(u32 lane, u32 p) { return slot(lane * PIECES) ^ p; }
__device__ __forceinline__ u32 dealt(u32 lane, u32 p) { return p * 32 + ((lane ^ lane >> 3) ^ (p & 1) * 4); }  // slot(p * 32 + lane)

// Start to copy a tile of which `left` pieces exist.
__device__ __forceinline__ void fetch_tile(uint4* to, const uint4* from, u32 lane, u32 left) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) fetch(to + dealt(lane, p), from + p * 32, p * 32 + lane < left);
    fetch_group();
}
