// NF4 of float16 and bfloat16: [-1, 1] is cut into 32 pieces with at most one border each; lane i of a warp keeps the border of
// piece i and what stands at place i, and a quotient asks two lanes: for the border of its piece, then for the code or value of its
// place, which is the next one beyond the border.
//
// Constants besides those of `halves.cu`: FIND (the block's amax is found here), CODES (else values); BORDER by piece (very large
// where there is none), CODE and CODED (values) by place.

#define EIGHTS (EACH / 8)

__device__ constexpr float border[32] = BORDER, coded[32] = CODED;
__device__ constexpr unsigned char code_of[32] = CODE;

__device__ __noinline__ float divided(float x, float s) {
    const float q = __fdiv_rn(x, s);
    return q == q ? fminf(fmaxf(q, -2.0f), 2.0f) : 0.0f;
}

// x / s for eight values; `calm`: s is ordinary and no quotient is beyond 2^99. NaN becomes 0.
__device__ __forceinline__ void quotients(const u32* w, float s, float r, float rest, bool calm, float* q) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float a = i & 1 ? high_of(w[i / 2]) : low_of(w[i / 2]);
        q[i] = __fmaf_rn(a, r, __fmul_rn(a, rest));
    }
    if (!calm) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            q[i] = divided(i & 1 ? high_of(w[i / 2]) : low_of(w[i / 2]), s);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) normal(
    const uint4* __restrict__ x, uint4* __restrict__ out, void* __restrict__ scales, float*,
    const float* __restrict__ amax_in, const float*, u32 pieces) {
    extern __shared__ uint4 staged[];
    const u32 lane = threadIdx.x % 32, stride = gridDim.x * THREADS;
    uint4* const mine = staged + (threadIdx.x - lane) * VECTORS;
    const float my_border = border[lane], my_value = coded[lane];
    const u32 my_code = code_of[lane];
    after_kernel_ahead();
    for (u32 base = blockIdx.x * THREADS; base < pieces; base += stride) {
        const u32 piece = base + threadIdx.x;
        u32 w[WORDS];
#if !FIND
        const float amax = piece < pieces ? amax_in[piece / SHARE] : 1.0f;
#endif
        load(w, x, piece, pieces);
        const float most = largest_of(w);
#if FIND
        const float amax = most;
#endif
        const float s = amax == 0.0f ? 1.0f : amax, r = __frcp_rn(s);
        const float rest = __fmul_rn(__fmaf_rn(-s, r, 1.0f), __fmul_rn(r, 0.9999998807907104f));  // 1 - 2^-23
        const bool calm = s > 0x1p-60f && s < 0x1p60f && most < fminf(__fmul_rn(s, 0x1p99f), __uint_as_float(INFINITE));
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            float q[8];
            quotients(w + 4 * e, s, r, rest, calm, q);
            u32 word = 0;
            float y[8];
#pragma unroll
            for (int i = 7; i >= 0; i--) {
                const u32 part = __float_as_uint(__fmaf_rn(fma_within(q[i], 0.5f, 0.5f), 31.0f, 12582912.0f));  // by its low bits
                const u32 at = part + (q[i] > __shfl_sync(0xffffffffu, my_border, part));
#if CODES
                word = word * 16 + __shfl_sync(0xffffffffu, my_code, at);
#else
                y[i] = __fmul_rn(__shfl_sync(0xffffffffu, my_value, at), s);
#endif
            }
#if CODES
            w[e] = word;
#else
            uint4 v = make_uint4(halves(y[0], y[1]), halves(y[2], y[3]), halves(y[4], y[5]), halves(y[6], y[7]));
            if (!calm) {
                v.x |= not_a_number(w[4 * e]), v.y |= not_a_number(w[4 * e + 1]);
                v.z |= not_a_number(w[4 * e + 2]), v.w |= not_a_number(w[4 * e + 3]);
            }
            mine[place(lane * VECTORS + e)] = v;
#endif
        }
#if CODES
        if (piece < pieces) {
#if EIGHTS == 2
            ((uint2*)out)[piece] = make_uint2(w[0], w[1]);
#else
            out[piece] = make_uint4(w[0], w[1], w[2], w[3]);
#endif
            if (piece % SHARE == 0) ((float*)scales)[piece / SHARE] = s;
        }
#else
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
