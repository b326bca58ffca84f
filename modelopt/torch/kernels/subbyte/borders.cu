// Codes by comparison: x / s > b means x > T for one T of the type of x, since division is monotone. T is found once for a block,
// and two neighbours are compared at once. See constants.py for the formulas.
//
// Constants: COUNT borders BORDER with the halves of the step above or below them STEP, CLOSED and REACH.

#ifdef BF16
#define HALF_INFINITE 0x7f80u
#else
#define HALF_INFINITE 0x7c00u
#endif

__device__ constexpr float border[COUNT] = BORDER, step[COUNT] = STEP;
__device__ constexpr bool closed[COUNT] = CLOSED, reach[COUNT] = REACH;

__device__ __forceinline__ u32 pick(u32 mask, u32 a, u32 b) { return (mask & a) | (~mask & b); }

// The largest half, as both halves of a word, whose quotient does not pass border i: by division, for any scale.
__device__ __noinline__ u32 searched(float s, float b, bool equal_passes) {
    u32 low = 0xffffu - (HALF_INFINITE | 0x8000u), high = 0x8000u + HALF_INFINITE;  // keys in the order of the numbers
    while (low < high) {
        const u32 key = (low + high + 1) >> 1;
        const float q = __fdiv_rn(widen(key & 0x8000u ? key ^ 0x8000u : 0xffffu - key), s);
        if (equal_passes ? q >= b : q > b) high = key - 1;
        else low = key;
    }
    const u32 half = low & 0x8000u ? low ^ 0x8000u : 0xffffu - low;
    return half * 0x10001u;
}

__device__ __forceinline__ void thresholds(float s, u32 (&t)[COUNT]) {
    if (__float_as_uint(s) - 0x0d800000u < 0x6e000000u) {  // 2^-100 to 2^120: no product below is inexact for its size
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const float far = __fmul_rn(s, step[i] < 0.0f ? -step[i] : step[i]), h = step[i] < 0.0f ? -far : far;
            const u32 at = __float_as_uint(closed[i] ? __fmaf_ru(s, border[i], h) : __fmaf_rd(s, border[i], h));
#ifdef BF16
            if (i >= 4) t[i] = t[i == 6 ? 2 : i - 2] + (i == 6 ? 0x1000100u : 0x800080u);  // 2.5, 3.5, 5: exponents above
            else
#endif
            t[i] = cut(__uint_as_float(at - closed[i]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) t[i] = searched(s, border[i], reach[i]);
    }
}

// Codes without signs of eight values given as the pairs (0, 4), (1, 5), (2, 6), (3, 7): nibble i is that of value i. Comparisons
// are ones in a half, 65535 in the lower and -65536 in the upper one; multiply-adds sum them up, since they have a pipe of their own.
__device__ __forceinline__ u32 eight(const u32* p, const u32 (&t)[COUNT]) {
    u32 sum = 0;
#pragma unroll
    for (int j = 3; j >= 0; j--) {
        const u32 x = magnitude(p[j]);
        const u32 m2 = above(x, t[3]);
        const u32 m1 = above(x, pick(m2, t[5], t[1]));
        const u32 m0 = above(x, pick(m1, pick(m2, t[6], t[2]), pick(m2, t[4], t[0])));
        sum = m2 * 4 + (m1 * 2 + (sum * 16 + m0));
    }
    return sum * 0xfffeffffu;
}

// The signs of these values as the highest bits of their nibbles.
__device__ __forceinline__ u32 signs(const u32* p) {
    return (bytes(p[0], p[2], 0xfbd9) & 0x08080808u) | (bytes(p[1], p[3], 0xfbd9) & 0x80808080u);
}

__device__ __forceinline__ void pair_up(const u32* w, u32* p) {
    p[0] = bytes(w[0], w[2], 0x5410), p[1] = bytes(w[0], w[2], 0x7632);
    p[2] = bytes(w[1], w[3], 0x5410), p[3] = bytes(w[1], w[3], 0x7632);
}
