// E2M1 codes and values of float16 and bfloat16, by comparison.
//
// Constants besides those of `halves.cu` and `borders.cu`: FIND (the block's amax is found here), CODES (else values), TWO (an E4M3 scale with a
// scale of the tensor, from its amax over TOP), SIX (rule 46); CODED, the values by code.

#define EIGHTS (EACH / 8)

__device__ constexpr float coded[COUNT + 1] = CODED;

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

__device__ __forceinline__ void look_up(const Table& v, u32 word, u32* out) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const u32 which = k ? word >> 16 : word;
        const u32 low = bytes(v.low[0], v.low[1], which), high = bytes(v.high[0], v.high[1], which);
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
    u32 other_code, t6[COUNT], t4[COUNT], word6[EIGHTS], word4[EIGHTS], sign[EIGHTS];
    const float other = scale_of(__fmul_rn(amax, 1.5f), o, other_code);
    thresholds(s, t6), thresholds(other, t4);
    const u32 exponent = __float_as_uint(amax) & INFINITE;
    const float k = __uint_as_float(0x86800000u - exponent);  // amax k lies in [2^15, 2^16)
    u32 square6 = 0, square4 = 0, product6 = 0, product4 = 0;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        u32 p[4], x[4];
        pair_up(w + 4 * e, p);
        word6[e] = eight(p, t6), word4[e] = eight(p, t4), sign[e] = CODES ? signs(p) : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float a = fabsf(low_of(w[4 * e + j])), b = fabsf(high_of(w[4 * e + j]));
            // 0x4b00 and 0xb500, the upper half of 2^23 as a float and what is added to the upper integer, add up to 2^16
            x[j] = __float_as_uint(__fmaf_rn(b, k, 8388608.0f + 0xb500)) * 65536 + __float_as_uint(__fmaf_rn(a, k, 8388608.0f));
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
    for (int e = 0; e < EIGHTS; e++) word[e] = (four ? word4[e] : word6[e]) | sign[e];
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
#if CODES
        const bool odd = false;  // a NaN is below all borders, and so is everything under a scale that is not finite
#else
        const bool odd = !(s > 0.0f && s < __uint_as_float(INFINITE)) || (!FIND && any_nan(w));
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
#if !SIX
            u32 p[4];
            pair_up(w + 4 * e, p);
            word[e] = eight(p, t) | signs(p);
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
            u32 y[4];
#if !SIX
            u32 p[4];
            pair_up(w + 4 * e, p);
            word[e] = eight(p, t);
#endif
            look_up(v, word[e], y);
#pragma unroll
            for (int j = 0; j < 4; j++) y[j] |= w[4 * e + j] & 0x80008000u;
            if (odd) {
#pragma unroll
                for (int j = 0; j < 4; j++) y[j] |= not_a_value(w[4 * e + j], s);
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
