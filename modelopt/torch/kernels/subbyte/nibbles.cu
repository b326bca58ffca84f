// Four-bit codes of float16 and bfloat16 by comparison: x / s > b means x > T for one T of the type of x, since division is
// monotone. T is found once for a block, and two neighbours are compared at once. See constants.py for the formulas.
//
// Constants besides those of `halves.cu`: FIND (the block's amax is found here), CODES (else values), TWO (an E4M3 scale with a
// scale of the tensor, from its amax over TOP), SIX (rule 46); COUNT borders BORDER with the halves of the step above or below
// them STEP, CLOSED and REACH; CODED, the values by code; SIGNED (the codes are of magnitudes, with a sign).

#define EIGHTS (EACH / 8)
#define DEEP (COUNT == 15)

__device__ constexpr float border[COUNT] = BORDER, step[COUNT] = STEP, coded[COUNT + 1] = CODED;
__device__ constexpr bool closed[COUNT] = CLOSED, reach[COUNT] = REACH;

// Quotient and rounding of the scale of a block; `calm` says that neither the tensor's scale nor what it divides is extreme.
struct Outer {
    float scale, inverse, rest;
    bool calm;
};

__device__ __forceinline__ Outer outer_of(const float* global) {
    Outer o = {1.0f, 1.0f, 0.0f, false};
#if TWO
    o.scale = __fdiv_rn(*global, TOP);
    if (o.scale == 0.0f) o.scale = 1.0f;
    o.inverse = __frcp_rn(o.scale);
    o.rest = __fmul_rn(__fmaf_rn(-o.scale, o.inverse, 1.0f), o.inverse);
    o.calm = o.scale > 0x1p-60f && o.scale < 0x1p60f;
#endif
    return o;
}

__device__ __forceinline__ float scale_of(float amax, const Outer& o, u32& code) {
    const float ratio = over_most(amax);
    code = 0;
#if TWO
    float q;
    if (o.calm && ratio > 0x1p-60f && ratio < 0x1p60f) {
        q = __fmaf_rn(ratio, o.inverse, __fmul_rn(ratio, o.rest));
        q = __fmaf_rn(__fmaf_rn(-o.scale, q, ratio), o.inverse, q);
    } else {
        q = __fdiv_rn(ratio, o.scale);
    }
    if (q < 0x1p-9f) q = 0x1p-9f;
    code = to_e4m3(q, 0.0f) & 0xffu;
    return __fmul_rn(from_e4m3(code), o.scale);
#else
    return ratio == 0.0f ? 1.0f : ratio;
#endif
}

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
#if defined(BF16) && !DEEP
            if (i >= 4) t[i] = t[i == 6 ? 2 : i - 2] + (i == 6 ? 0x1000100u : 0x800080u);  // 2.5, 3.5, 5: exponents above
            else
#endif
            if (border[i] > 0.0f) t[i] = cut(__uint_as_float(at - closed[i]));
            else t[i] = cut(__uint_as_float(at - !closed[i])) + 0x10001u;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) t[i] = searched(s, border[i], reach[i]);
    }
}

// Codes of eight values given as the pairs (0, 4), (1, 5), (2, 6), (3, 7): nibble i is that of value i; its highest bit is the
// sign of the value with SIGN, else zero where the code has three bits.
template <bool SIGN>
__device__ __forceinline__ u32 eight(const u32* p, const u32 (&t)[COUNT], u32* top) {
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 x = SIGNED ? magnitude(p[j]) : p[j];
        u32 m0, m1, m2;
#if DEEP
        const u32 m3 = above(x, t[7]);
        m2 = above(x, pick(m3, t[11], t[3]));
        m1 = above(x, pick(m2, pick(m3, t[13], t[5]), pick(m3, t[9], t[1])));
        const u32 upper = pick(m2, pick(m3, t[14], t[6]), pick(m3, t[10], t[2]));
        m0 = above(x, pick(m1, upper, pick(m2, pick(m3, t[12], t[4]), pick(m3, t[8], t[0]))));
        top[j] = m3;
#else
        m2 = above(x, t[3]);
        m1 = above(x, pick(m2, t[5], t[1]));
        m0 = above(x, pick(m1, pick(m2, t[6], t[2]), pick(m2, t[4], t[0])));
#endif
        if (SIGN && !DEEP) {  // at the upper ends of both halves, where the signs are
            u32 bits = pick(0x20002000u, m1, m0);
            bits = pick(0x80008000u, p[j], pick(0x40004000u, m2, bits));
            word = pick(0xf000f000u, bits, word >> 4);
        } else {
            u32 bits = (m2 & 0x40004u) | (m1 & 0x20002u) | (m0 & 0x10001u);
#if DEEP
            if (SIGN) bits |= m3 & 0x80008u;
#endif
            word = j ? bits * (1u << 4 * j) + word : bits;
        }
    }
    return word;
}

__device__ __forceinline__ void pair_up(const u32* w, u32* p) {
    p[0] = bytes(w[0], w[2], 0x5410), p[1] = bytes(w[0], w[2], 0x7632);
    p[2] = bytes(w[1], w[3], 0x5410), p[3] = bytes(w[1], w[3], 0x7632);
}

// The values of all codes, low bytes and high bytes, four to a word.
struct Table {
    u32 low[(COUNT + 1) / 4], high[(COUNT + 1) / 4];
};

__device__ __forceinline__ Table table_of(float s) {
    Table v;
#pragma unroll
    for (int i = 0; i <= COUNT; i += 4) {
        const u32 a = halves(__fmul_rn(coded[i], s), __fmul_rn(coded[i + 1], s));
        const u32 b = halves(__fmul_rn(coded[i + 2], s), __fmul_rn(coded[i + 3], s));
        v.low[i / 4] = bytes(a, b, 0x6420), v.high[i / 4] = bytes(a, b, 0x7531);
    }
    return v;
}

__device__ __forceinline__ void look_up(const Table& v, u32 word, const u32* top, u32* out) {
#if DEEP
    const u32 first = pick(0x00ff00ffu, top[0], top[1]), second = pick(0x00ff00ffu, top[2], top[3]);
#endif
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const u32 which = k ? word >> 16 : word;
        u32 low = bytes(v.low[0], v.low[1], which), high = bytes(v.high[0], v.high[1], which);
#if DEEP
        const u32 mask = bytes(first, second, k ? 0x7632 : 0x5410);
        low = pick(mask, bytes(v.low[2], v.low[3], which), low);
        high = pick(mask, bytes(v.high[2], v.high[3], which), high);
#endif
        out[2 * k] = bytes(low, high, 0x5140), out[2 * k + 1] = bytes(low, high, 0x7362);
    }
}

#if SIX
// Codes u (in halves) of integers X: sum u^2 and sum u X, both exact.
__device__ __forceinline__ void sums(u32 word, const u32* x, u32& squares, u32& products) {
    const u32 few = bytes(0x03020100u, 0x0c080604u, word), more = bytes(0x03020100u, 0x0c080604u, word >> 16);
    squares = __dp4a(few, few, squares), squares = __dp4a(more, more, squares);
    products = __dp2a_lo(x[0], few, products), products = __dp2a_hi(x[1], few, products);
    products = __dp2a_lo(x[2], more, products), products = __dp2a_hi(x[3], more, products);
}

struct Block {
    u32 w[8], t[COUNT];
};

// The sum of squared errors in the law's operations; for the few blocks where the short way cannot tell.
__device__ __noinline__ float error_of(Block b, float s) {
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) {
        const float x = fabsf(widen((i & 1 ? b.w[i / 2] >> 16 : b.w[i / 2]) & 0xffffu));
        float v = 0.0f;
        for (int k = 0; k < COUNT; k++)
            if (x > widen(b.t[k] & 0xffffu)) v = coded[k + 1];
        const float d = __fsub_rn(__fmul_rn(v, s), x);
        sum = __fadd_rn(sum, __fmul_rn(d, d));
    }
    return sum;
}

// Codes under the better of two scales; `s` and `code` become those of the choice.
__device__ __forceinline__ void better(const u32* w, float amax, const Outer& o, float& s, u32& code, u32* word) {
    u32 other_code, t6[COUNT], t4[COUNT], word6[EIGHTS], word4[EIGHTS], unused[4];
    const float other = scale_of(__fmul_rn(amax, 1.5f), o, other_code);
    thresholds(s, t6), thresholds(other, t4);
    const u32 exponent = __float_as_uint(amax) & INFINITE;
    const float k = __uint_as_float(0x86800000u - exponent);  // amax k lies in [2^15, 2^16)
    u32 square6 = 0, square4 = 0, product6 = 0, product4 = 0;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        u32 p[4], x[4];
        pair_up(w + 4 * e, p);
        word6[e] = eight<false>(p, t6, unused), word4[e] = eight<false>(p, t4, unused);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float a = fabsf(low_of(w[4 * e + j])), b = fabsf(high_of(w[4 * e + j]));
            x[j] = bytes(__float_as_uint(__fmaf_rn(a, k, 8388608.0f)), __float_as_uint(__fmaf_rn(b, k, 8388608.0f)), 0x5410);
        }
        sums(word6[e], x, square6, product6), sums(word4[e], x, square4, product4);
    }
    const float h6 = __fmul_rn(s, k) * 0.5f, h4 = __fmul_rn(other, k) * 0.5f;
    const float e6 = h6 * __fmaf_rn(h6, (float)square6, -2.0f * (float)product6);
    const float e4 = h4 * __fmaf_rn(h4, (float)square4, -2.0f * (float)product4);
    const float doubt = 0x1p-21f * __fmaf_rn(h6, (float)product6, h4 * (float)product4);
    const bool clear = fabsf(e4 - e6) > doubt && amax > 0x1p-40f && amax < 0x1p60f && o.calm && code < 0x79u;
    bool four = e4 < e6;
    if (!clear) {
        four = false;
        if (amax != 0.0f) {
            Block b;
            for (int i = 0; i < 8; i++) b.w[i] = w[i];
            for (int i = 0; i < COUNT; i++) b.t[i] = t4[i];
            const float wider = error_of(b, other);
            for (int i = 0; i < COUNT; i++) b.t[i] = t6[i];
            four = wider < error_of(b, s);
        }
    }
    s = four ? other : s, code = four ? other_code : code;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) word[e] = four ? word4[e] : word6[e];
}

__device__ __forceinline__ u32 signs(const u32* w) {  // of eight values, as the highest bits of nibbles
    u32 p[4];
    pair_up(w, p);
    u32 word = p[0] & 0x80008000u;
#pragma unroll
    for (int j = 1; j < 4; j++) word = pick(0x80008000u, p[j], word >> 4);
    return word & 0x88888888u;
}
#endif

// Ones where x / s times s is NaN: x is, or s is not finite, or x and s (by underflow) are zero.
__device__ __forceinline__ u32 not_a_value(u32 pair, float s) {
    if (s == 0.0f) return ~above(magnitude(pair), 0);
    return s < __uint_as_float(INFINITE) ? not_a_number(pair) : 0xffffffffu;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) nibbles(
    const uint4* __restrict__ x, uint4* __restrict__ out, void* __restrict__ scales, float* __restrict__ outer_out,
    const float* __restrict__ amax_in, const float* __restrict__ global, u32 pieces) {
    extern __shared__ uint4 staged[];  // values ahead and results, EACH of every thread
    after_kernel_ahead();
    const Outer o = outer_of(global);
#if CODES && TWO
    if (blockIdx.x == 0 && threadIdx.x == 0) *outer_out = o.scale;
#endif
    const u32 lane = threadIdx.x % 32;
    const u32 stride = gridDim.x * THREADS, size = AHEAD ? THREADS * VECTORS : 0, mover = threadIdx.x - lane + lane / VECTORS;
    u32 turn = (threadIdx.x - lane) * VECTORS;
    const uint4* from = x + ((u64)blockIdx.x * THREADS + threadIdx.x - lane) * VECTORS + lane;
    if (AHEAD) fetch(staged + turn, from, blockIdx.x * THREADS + mover, pieces);
    for (u32 base = blockIdx.x * THREADS; base < pieces; base += stride) {
        const u32 piece = base + threadIdx.x;
        uint4* const mine = staged + turn;
        turn ^= size;
        from += stride * VECTORS;
        u32 w[WORDS], code, word[EIGHTS];
        if (AHEAD) {
            fetch(staged + turn, from, base + stride + mover, pieces);
            take(w, mine);
        } else {
            load(w, x, piece, pieces);
        }
#if FIND
        const float amax = largest_of(w);
#else
        const float amax = piece < pieces ? amax_in[piece / SHARE] : 1.0f;
#endif
        float s = scale_of(amax, o, code);
#if CODES && !DEEP
        const bool odd = false;  // a NaN is below all borders, and so is everything under a scale that is not finite
#else
        const bool odd = !(s > 0.0f && s < __uint_as_float(INFINITE)) || ((DEEP || !FIND) && any_nan(w));
#endif
#if SIX
        better(w, amax, o, s, code, word);
#else
        u32 t[COUNT];
        thresholds(s, t);
#endif
#if CODES
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
#if SIX
            word[e] |= signs(w + 4 * e);
#else
            u32 p[4], top[4];
            pair_up(w + 4 * e, p);
            word[e] = eight<true>(p, t, top);
#if DEEP
            if (odd) {  // NaN has the code of zero
                const bool all = !(s < __uint_as_float(INFINITE));
                u32 bad = 0;
                for (int j = 3; j >= 0; j--) bad = (bad << 4) | ((all ? 0xffffffffu : not_a_number(p[j])) & 0x000f000fu);
                word[e] = pick(bad, 0x77777777u, word[e]);
            }
#endif
#endif
        }
        if (piece < pieces) {
#if EIGHTS == 2
            ((uint2*)out)[piece] = make_uint2(word[0], word[1]);
#else
            out[piece] = make_uint4(word[0], word[1], word[2], word[3]);
#endif
#if TWO
            if (piece % SHARE == 0) ((unsigned char*)scales)[piece / SHARE] = code;
#else
            if (piece % SHARE == 0) ((float*)scales)[piece / SHARE] = s;
#endif
        }
#else
        const Table v = table_of(s);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            u32 y[4], top[4];
#if !SIX
            u32 p[4];
            pair_up(w + 4 * e, p);
            word[e] = eight<false>(p, t, top);
#endif
            look_up(v, word[e], top, y);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (SIGNED) y[j] |= w[4 * e + j] & 0x80008000u;
                if (odd) y[j] |= not_a_value(w[4 * e + j], s);
            }
            mine[place(lane * VECTORS + e)] = make_uint4(y[0], y[1], y[2], y[3]);
        }
        __syncwarp();
        const u64 first = (u64)(piece - lane) * VECTORS;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            const u32 at = lane + 32 * e;
            if (first + at < (u64)pieces * VECTORS) __stcs(out + first + at, mine[place(at)]);
        }
        __syncwarp();
#endif
    }
}
