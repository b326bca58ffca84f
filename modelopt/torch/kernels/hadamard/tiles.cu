// The Walsh-Hadamard transform of blocks of 2 to 1024 neighbours within a warp: a thread has 32 neighbours in registers.
//
// Bits 0 to 4 of the index are transformed within a thread, the next ones between lanes, in this order, each sum being one float32
// addition: own + other or other - own, an exact product and one rounding. With ACROSS, the number of those bits, they are brought into
// a thread through shared memory (`exchanged`). Constants: those of values.cu; SIZE.

#define OWN 32
#define PIECES (OWN / VALUES)
#define TILE (32 * PIECES)  // pieces of a warp
#ifndef ACROSS
#define ACROSS 0
#endif

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
#if ACROSS == 0
#pragma unroll
    for (int h = 1; h < SIZE / OWN; h *= 2) {
        const float sign = lane & h ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < OWN; i++) v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(0xffffffffu, v[i], h));
    }
#endif
}

// Where a lane's pieces p lie in shared memory: `own` those that it transforms, `dealt` those that neighbouring lanes copy together.
__device__ __forceinline__ u32 own(u32 lane, u32 p) { return slot(lane * PIECES) ^ p; }
__device__ __forceinline__ u32 dealt(u32 lane, u32 p) { return p * 32 + ((lane ^ lane >> 3) ^ (p & 1) * 4); }  // slot(p * 32 + lane)

// Start to copy a tile of which `left` pieces exist.
__device__ __forceinline__ void fetch_tile(uint4* to, const uint4* from, u32 lane, u32 left) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) fetch(to + dealt(lane, p), from + p * 32, p * 32 < (int)(left - lane));
    fetch_group();
}

#if ACROSS
// Lanes' neighbours change places where neither 8 lanes that store nor 8 that load share a bank: lane l's pieces of 16 bytes begin
// at 8 l + (8 / LANES) (l % LANES) + BEYOND (l / LANES).
#define LANES (1 << ACROSS)  // of a block: 4 or 8
#define RUN (OWN / LANES)
#define BEYOND (ACROSS + 5)

// Give each lane RUN neighbours of each of the LANES lanes of its block, v[k * RUN + i] being those of lane k, and transform them.
__device__ __forceinline__ void exchanged(float* v, float4* room, u32 lane) {
    const u32 k = lane & (LANES - 1), block = lane >> ACROSS;
    float4* to = room + lane * 8 + k * (8 / LANES) + block * BEYOND;
#pragma unroll
    for (int p = 0; p < 8; p++) to[p] = make_float4(v[4 * p], v[4 * p + 1], v[4 * p + 2], v[4 * p + 3]);
    __syncwarp();
    const float4* from = room + block * (8 * LANES + BEYOND) + k * (RUN / 4);
#pragma unroll
    for (int p = 0; p < 8; p++) {
        const int other = p / (RUN / 4);
        const float4 f = from[other * (8 + 8 / LANES) + p % (RUN / 4)];
        v[4 * p] = f.x, v[4 * p + 1] = f.y, v[4 * p + 2] = f.z, v[4 * p + 3] = f.w;
    }
    __syncwarp();
#pragma unroll
    for (int h = RUN; h < OWN; h *= 2)
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = __fadd_rn(a, b);
                v[i + h] = __fsub_rn(a, b);
            }
}
#endif
