// Rounding of values to a format, equal bit for bit to kernels/triton_math.py, which says why the quotient is right.
//
// Constants: INT, FLOAT or E4M3 (the element), BITS, MBITS, MIN_EXP (biased exponent of the subnormals), E_MAX, E_MIN, EMAX;
// SCALE_F32, SCALE_E8M0 or SCALE_TWO (e4m3 with a float32 scale for the tensor), RULE (0: up, 1: nearest, 2: floor), TOP; CODES;
// FIND (scales are those of the values' own range).

#define MAGIC 12582912.0f  // 1.5 * 2^23
#ifdef E4M3
#define MASKED 0
#else
#define MASKED CODES  // codes cannot say NaN: it is 0, and so is all under an infinite scale
#endif
#define POWER(n) __uint_as_float((u32)((n) + 127) << 23)

__device__ __forceinline__ float larger(float a, float b) {  // NaN wins
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float smaller(float a, float b) {
    float c;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

// Two values from E4M3 codes in 16 bits.
__device__ __forceinline__ void from_e4m3(u32 codes, float& first, float& second) {
    asm("{ .reg .b32 t; .reg .b16 a, b; cvt.rn.f16x2.e4m3x2 t, %2; mov.b32 {a, b}, t; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(first), "=f"(second) : "h"((unsigned short)codes));
}

// What the values of a block need: the scale, the bits that are stored for it, and the constants of the quotient. Values are
// multiplied by `before` first, a power of two that is 1 unless the scale is very small or large, so that nothing of the quotient is
// lost below or above (or 0: x / infinity is x * 0); `divisor` is the scale times it, or with E8M0 `r` its reciprocal.
struct Scale {
    float value, before, low, high, r, rest, divisor;
    u32 stored;
};

__device__ __forceinline__ float outer_scale(const float* amax) {
#ifdef SCALE_TWO
    const float ratio = __fdiv_rn(*amax, TOP);
    return ratio == 0.0f ? 1.0f : ratio;
#else
    return 1.0f;
#endif
}

__device__ __forceinline__ Scale scale_of(float amax, float outer) {
    Scale s;
#if defined(SCALE_E8M0)
    const u32 bits = __float_as_uint(RULE == 2 ? amax : __fdiv_rn(amax, E_MAX));
    int code = bits >> 23 & 0xff;
    if (RULE == 0) code += (bits & 0x7fffff) != 0;
    if (RULE == 1) code += (bits & 0x7fffff) >= 0x400000;
    if (RULE == 2) code -= EMAX;
    code = min(max(code, 0), 254);
    if ((bits & 0x7f800000u) == 0x7f800000u) code = 255;
    s.stored = code;
    s.value = __uint_as_float(code == 255 ? 0x7fc00000u : code == 0 ? 0x00400000u : (u32)code << 23);
    s.r = __uint_as_float(code == 255 ? (MASKED ? 0u : 0x7fc00000u) : code == 254 ? 0x00400000u : (u32)(254 - code) << 23);
    s.low = code == 255 && MASKED ? 0.0f : E_MIN;
    s.high = code == 255 && MASKED ? 0.0f : E_MAX;
    s.before = 1.0f, s.rest = s.divisor = 0.0f;
#else
    const float ratio = __fdiv_rn(amax, E_MAX);
#ifdef SCALE_TWO
    s.stored = to_e4m3(smaller(larger(__fdiv_rn(ratio, outer), POWER(-9)), 448.0f), 0.0f) & 0xff;
    float none;
    from_e4m3(s.stored, s.value, none);
    s.value = __fmul_rn(s.value, outer);
#else
    s.value = ratio == 0.0f ? 1.0f : ratio;
    s.stored = __float_as_uint(s.value);
#endif
    bool gone = false;
    s.before = 1.0f, s.divisor = s.value;
    if (!(s.value > 0x1p-60f && s.value < 0x1p60f)) {
        const u32 bits = __float_as_uint(s.value), exponent = bits >> 23 & 0xff;
        gone = MASKED ? exponent == 255 : bits == 0x7f800000u;
        s.before = gone ? (MASKED ? 1.0f : 0.0f) : exponent < 67 ? POWER(64) : exponent > 187 ? POWER(-64) : 1.0f;
        s.divisor = gone ? 1.0f : __fmul_rn(s.value, s.before);
    }
    const float reach = gone && MASKED ? 0.0f : s.divisor;
    s.low = __fmul_rn(E_MIN, reach), s.high = __fmul_rn(E_MAX, reach);
    asm("rcp.rn.f32 %0, %1;" : "=f"(s.r) : "f"(s.divisor));
    s.rest = __fmaf_rn(-s.divisor, s.r, 1.0f);
#ifdef F32
    s.rest = __fmul_rn(s.rest, s.r);
#elif defined(E4M3)  // toward zero: then a r + a rest keeps the sign of a zero
    if (s.rest < 0.0f) s.r = __uint_as_float(__float_as_uint(s.r) - 1), s.rest = __fmaf_rn(-s.divisor, s.r, 1.0f);
    s.rest = __fmul_rn(s.rest, __fmul_rn(s.r, 1.0000001192092896f));  // 1 + 2^-23
#else
    s.rest = __fmul_rn(s.rest, __fmul_rn(s.r, 0.9999998807907104f));  // 1 - 2^-23
#endif
#endif
    return s;
}

// x * before / scale within the element's range; the magnitude for FLOAT. NaN stays NaN in values; where codes are made there is none.
__device__ __forceinline__ float quotient(float x, const Scale& s) {
#ifdef SCALE_E8M0
    float a = __fmul_rn(x, s.r);
#else
    float a = x;
#endif
#ifdef FLOAT
    a = MASKED ? fminf(fabsf(a), s.high) : smaller(fabsf(a), s.high);
#elif MASKED && defined(INT)
    a = fminf(fmaxf(a, s.low), s.high);
#elif defined(E4M3) && FIND && !defined(SCALE_TWO)  // nothing lies beyond but by rounding, and the conversion saturates
#else
    a = smaller(larger(a, s.low), s.high);
#endif
#ifdef SCALE_E8M0
    return a;
#else
    float q = __fmaf_rn(a, s.r, __fmul_rn(a, s.rest));
#ifdef F32
    q = __fmaf_rn(__fmaf_rn(-s.divisor, q, a), s.r, q);
#endif
#if defined(E4M3) && defined(F32)
    q = __uint_as_float((__float_as_uint(q) & 0x7fffffffu) | (__float_as_uint(a) & 0x80000000u));  // the sign of zero
#endif
    return q;
#endif
}

// The values to which N values are rounded.
template <int N> __device__ __forceinline__ void round_values(float* v, const Scale& s) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float a = quotient(v[i], s), b = quotient(v[i + 1], s);
#if defined(INT)
        v[i] = __fmul_rn(__fsub_rn(__fadd_rn(a, MAGIC), MAGIC), s.value);
        v[i + 1] = __fmul_rn(__fsub_rn(__fadd_rn(b, MAGIC), MAGIC), s.value);
#elif defined(E4M3)
        from_e4m3(to_e4m3(a, b), a, b);
        v[i] = __fmul_rn(a, s.value);
        v[i + 1] = __fmul_rn(b, s.value);
#else
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float q = j ? b : a, power = larger(__uint_as_float(__float_as_uint(q) & 0x7f800000u), POWER(MIN_EXP - 127));
            const float value = __fmul_rn(__fmaf_rn(power, -POWER(23 - MBITS), __fmaf_rn(power, POWER(23 - MBITS), q)), s.value);
            v[i + j] = __uint_as_float(__float_as_uint(value) | (__float_as_uint(v[i + j]) & 0x80000000u));
        }
#endif
    }
}

#ifdef INT
#define START (MAGIC + (BITS == 4 && E_MIN < 0 ? 8.0f : 0.0f))

// The codes of eight integers, given as the bits of their sums with START.
__device__ __forceinline__ void join(const u32* bits, u32* words) {
#if BITS == 4
    u32 word = bits[7];
#pragma unroll
    for (int i = 6; i >= 0; i--) word = word * 16 + bits[i];
    word -= 0x3f400000u;  // what eight times the bits of MAGIC have left
    words[0] = E_MIN < 0 ? word ^ 0x88888888u : word;
#else
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        words[i / 4] = __byte_perm(__byte_perm(bits[i], bits[i + 1], 0x0040), __byte_perm(bits[i + 2], bits[i + 3], 0x0040), 0x5410);
#endif
}
#endif

// The codes of eight values as one word (BITS 4) or two, the first in the lowest bits. There is no NaN but for E4M3.
__device__ __forceinline__ void round_codes(const float* v, const Scale& s, u32* words) {
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = quotient(v[i], s);
#if defined(INT)
    u32 bits[8];
#pragma unroll
    for (int i = 0; i < 8; i++) bits[i] = __float_as_uint(__fadd_rn(q[i], START));
    join(bits, words);
#elif defined(E4M3)
#pragma unroll
    for (int i = 0; i < 8; i += 4) words[i / 4] = to_e4m3(q[i], q[i + 1]) | to_e4m3(q[i + 2], q[i + 3]) << 16;
#else
    const float step = POWER(127 - MIN_EXP + MBITS);  // codes are concave in q: the least of three lines
    u32 word = 0;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        const float line = fminf(__fmaf_rn(q[i], step, MAGIC), __fmaf_rn(q[i], step / 2, MAGIC + (1 << MBITS)));
        const u32 code = __float_as_uint(fminf(line, __fmaf_rn(q[i], step / 4, MAGIC + 2 * (1 << MBITS))));
        word = i == 7 ? code : word * 16 + code;
    }
    word -= 0x3f400000u;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= (__float_as_uint(v[i]) >> (28 - 4 * i)) & (8u << 4 * i);
    words[0] = word;
#endif
}
