// Blocks of 2 to 256 neighbours transformed and rounded to a format in one pass, by warps or, where a scale is that of a longer row
// whose range must be found (ROW), by thread blocks that hold one row.
//
// Constants: those of tiles.cu and rounding.cu; SCALE; FIND (ranges are found here) and GROUP, the values under one scale: 16, 32, ...
// 1024, else 0; ROW; ROOM (with ACROSS: pieces of 16 bytes in which a warp's lanes exchange theirs); WARPS, RESIDENT. `chunks` is the number
// of 32 values under one scale; a block has WARPS warps, with ROW at most so many.

#define SCALES (GROUP == 16 ? 2 : 1)  // of a thread
#define WORDS (OWN * 4 / VALUES)
#ifdef FLOAT
#define FLOATS 1
#else
#define FLOATS 0
#endif
#define PER (CODES ? BITS / 4 : PIECES)  // pieces of a thread's results
#if ACROSS
#define BETWEEN (ROOM - TILE)  // of a warp's buffers lie between the two that are filled in turn: with either, room to exchange
#else
#define BETWEEN 0
#endif

#if CODES && !defined(F32) && BITS == 4
#define QUICK 1
#else
#define QUICK 0
#endif

#ifdef F16
#define LARGEST 0x1p8f
#else
#define LARGEST 0x1p60f
#endif

#if QUICK
// Four-bit codes of float16 and bfloat16, where scales are ordinary and values finite: two values are compared or limited at once.

// Whether the quick way is right for a scale: nothing is lost below, and the limits are finite.
__device__ __forceinline__ bool ordinary(const Scale& s) { return s.value > 0x1p-60f && s.value < LARGEST; }

// The codes of a thread's values.
__device__ __forceinline__ void quick_codes(const u32* words, const Scale* scales, u32* codes) {
#pragma unroll
    for (int g = 0; g < SCALES; g++) {
        const Scale& s = scales[g];
#ifdef FLOAT
        u32 t[COUNT];
        thresholds(s.value, t);
#pragma unroll
        for (int e = g * (4 / SCALES); e < (g + 1) * (4 / SCALES); e++) {
            u32 p[4];
            pair_up(words + 4 * e, p);
            codes[e] = eight(p, t) | signs(p);
        }
#else
        const u32 low = cut(__fmul_rn(E_MIN, s.value)), high = cut(__fmul_rn(E_MAX, s.value));
#pragma unroll
        for (int e = g * (4 / SCALES); e < (g + 1) * (4 / SCALES); e++) {
            u32 part[4], bits[8];
            float v[8];
#pragma unroll
            for (int i = 0; i < 4; i++) part[i] = within(words[4 * e + i], low, high);
            unpack(part, v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
#ifdef SCALE_E8M0
                bits[i] = __float_as_uint(__fmaf_rn(v[i], s.r, MAGIC + (BITS == 4 && E_MIN < 0 ? 8.0f : 0.0f)));
#else
                const float q = __fmaf_rn(v[i], s.r, __fmul_rn(v[i], s.rest));
                bits[i] = __float_as_uint(__fadd_rn(q, MAGIC + (BITS == 4 && E_MIN < 0 ? 8.0f : 0.0f)));
#endif
            }
            join(bits, codes + e * BITS / 4);
        }
#endif
    }
}
#endif

// The largest magnitude of `n` words as the bits of a float32; that of NaN is above all.
__device__ __forceinline__ u32 largest(const u32* words, int n) {
#ifdef F32
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < n; i++) most = max(most, words[i] & 0x7fffffffu);
    return most;
#else
    return __float_as_uint(widen(largest_magnitude(words, n) & 0xffffu));
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

// The scales of a thread's values: number `cell` of the tensor's, which the thread with `part` 0 stores.
__device__ __forceinline__ void find_scales(
    Scale* scales, const u32* words, const float* amax, void* stored, float outer, u32* of_warps, u32 cell, u32 part, bool exists,
    u32 lane, u32 warp, u32 turn) {
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
        float most;
        if (FIND) {
            const u32 bits = largest(words + i * (WORDS / SCALES), WORDS / SCALES);
            most = __uint_as_float(GROUP <= OWN && GROUP > 0 ? bits : shared_largest(bits, of_warps, lane, warp, turn));
        } else
            most = exists ? __ldg(amax + (u64)cell * SCALES + i) : 1.0f;
        scales[i] = scale_of(most, outer);
    }
    if (!CODES || !exists || part) return;
#if defined(SCALE_F32)
#pragma unroll
    for (int i = 0; i < SCALES; i++) ((u32*)stored)[(u64)cell * SCALES + i] = scales[i].stored;
#elif GROUP == 16
    ((unsigned short*)stored)[cell] = scales[0].stored | scales[SCALES - 1].stored << 8;
#else
    ((unsigned char*)stored)[cell] = scales[0].stored;
#endif
}

// Store a tile's results, 4 * PER words of each thread, in whole sectors; `more` is how many of its pieces are ahead of the lane.
// With ACROSS they change places in `room`, where PER pieces between blocks keep lanes out of each other's banks.
__device__ __forceinline__ void store(uint4* here, uint4* room, uint4* out, const u32* mine, u32 lane, int more) {
#if ACROSS
    constexpr int N = 4 * PER / LANES;  // words of a run
    u32* to = (u32*)(room + (lane >> ACROSS) * ((LANES + 1) * PER)) + (lane & (LANES - 1)) * N;
#pragma unroll
    for (int k = 0; k < LANES; k++)
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const u32* run = mine + k * N + i;
            if constexpr (N >= 4) *(uint4*)(to + 4 * PER * k + i) = make_uint4(run[0], run[1], run[2], run[3]);
            else if constexpr (N == 2) *(uint2*)(to + 4 * PER * k) = make_uint2(run[0], run[1]);
            else to[4 * PER * k] = run[0];
        }
    __syncwarp();
    const uint4* from = room + lane + lane / (LANES * PER) * PER;
#pragma unroll
    for (int p = 0; p < PER; p++)
        if (p * 32 * (PIECES / PER) < more) __stcs(out + p * 32, from[p * (32 + 32 / LANES)]);
#else
    if (PER == 1) {
        if (more > 0) __stcs(out, make_uint4(mine[0], mine[1], mine[2], mine[3]));
        return;
    }
    if (PER < PIECES) __syncwarp();  // results go where other lanes had their values
#pragma unroll
    for (int p = 0; p < PER; p++)
        here[PER == PIECES ? own(lane, p) : slot(lane * PER + p)] = make_uint4(mine[4 * p], mine[4 * p + 1], mine[4 * p + 2], mine[4 * p + 3]);
    __syncwarp();
#pragma unroll
    for (int p = 0; p < PER; p++)
        if (p * 32 * (PIECES / PER) < more) __stcs(out + p * 32, here[dealt(lane, p)]);
#endif
}

// Round the words of this thread to codes, of which it has BITS words, or to values.
__device__ __forceinline__ void rounded_words(u32* words, const Scale* scales, u32* results) {
#if QUICK
    if ((FIND || FLOATS || largest(words, WORDS) < 0x7f800000u) && (FLOATS || (ordinary(scales[0]) && ordinary(scales[SCALES - 1])))) {
        quick_codes(words, scales, results);
        return;
    }
#endif
    bring_near(words, scales);
    without_nan(words);
#if CODES
#pragma unroll
    for (int i = 0; i < OWN; i += 8) {
        float v[8];
#pragma unroll
        for (int p = 0; p < 8 / VALUES; p++) unpack(words + (i / VALUES + p) * 4, v + p * VALUES);
        round_codes(v, scales[i * SCALES / OWN], results + i * BITS / 32);
    }
#else
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        float v[VALUES];
        unpack(words + p * 4, v);
        round_values<VALUES>(v, scales[p * SCALES / PIECES]);
        const uint4 piece = pack(v);
        results[4 * p] = piece.x, results[4 * p + 1] = piece.y, results[4 * p + 2] = piece.z, results[4 * p + 3] = piece.w;
    }
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) rounded(
    const uint4* __restrict__ x, uint4* __restrict__ out, void* __restrict__ stored, float* __restrict__ stored_outer,
    const float* __restrict__ amax, const float* __restrict__ global_amax, int chunks, int pieces_low, int pieces_high) {
    extern __shared__ uint4 shared[];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 pieces = ((u64)pieces_high << 31) + pieces_low;
    uint4* buffer = shared + warp * (2 * TILE + BETWEEN);
    u32* of_warps = (u32*)(shared + blockDim.x / 32 * (2 * TILE + BETWEEN));
#if ROW  // thread blocks take rows
    const u64 first = (u64)blockIdx.x * chunks * PIECES + warp * TILE, step = (u64)gridDim.x * chunks * PIECES;
    const u32 mine = (u32)min(max(chunks * PIECES - (int)(warp * TILE), 0), TILE);
    const u32 rows = (u32)(pieces / (chunks * PIECES));
    u32 cell = blockIdx.x;
    const u32 part = threadIdx.x;
    if (cell >= rows) return;
#else  // warps take tiles
    const u64 first = ((u64)blockIdx.x * WARPS + warp) * TILE, step = (u64)gridDim.x * (WARPS * TILE);
    if (first >= pieces) return;
    u64 rest = pieces - first;
    const bool single = GROUP == 16 || GROUP == 32;
    const u32 chunk = (u32)(first / PIECES) + lane, far = (u32)(step / PIECES);
    u32 cell = single ? chunk : chunk / chunks, part = single ? 0 : chunk % chunks;
    const u32 cells = single ? far : far / chunks, parts = single ? 0 : far % chunks;
#endif
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const float outer = outer_scale(global_amax);
    if (stored_outer != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *stored_outer = outer;
    const uint4* from = x + first + lane;
    out += first / PIECES * PER + lane;
#if ROW
    u32 left = mine;
#else
    u32 left = (u32)min(rest, (u64)TILE);
#endif
    fetch_tile(buffer, from, lane, left);
    for (u32 turn = 0;; turn ^= 1) {
#if ROW
        const u32 later = rows - cell > gridDim.x ? mine : 0;
        const bool last = rows - cell <= gridDim.x;
#else
        const bool last = rest <= step;
        rest -= step;
        const u32 later = last ? 0 : (u32)min(rest, (u64)TILE);
#endif
        uint4 *here = buffer + turn * (TILE + BETWEEN), *room = turn ? buffer + TILE : buffer;
        from += step;
        fetch_tile(buffer + (turn ^ 1) * (TILE + BETWEEN), from, lane, later);
        fetched<1>();
        __syncwarp();
        float v[OWN];
#pragma unroll
        for (int p = 0; p < PIECES; p++) unpack(here[own(lane, p)], v + p * VALUES);
        transform(v, lane);
#if ACROSS
        __syncwarp();
        exchanged(v, (float4*)room, lane);
#endif
        u32 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = word_of(__fmul_rn(v[i * OWN / WORDS], SCALE), __fmul_rn(v[(i + 1) * OWN / WORDS - 1], SCALE));
        Scale scales[SCALES];
        find_scales(scales, words, amax, stored, outer, of_warps, cell, part, lane * PIECES < left, lane, warp, turn);
        u32 results[4 * PER];
        rounded_words(words, scales, results);
        store(here, room, out, results, lane, (int)(left - lane * (PIECES / PER)));
        if (last) return;
        __syncwarp();
        out += step / PIECES * PER;
        left = later;
#if ROW
        cell += gridDim.x;
#else
        cell += cells;
        if (!single && (part += parts) >= (u32)chunks) part -= chunks, cell++;
#endif
    }
}
