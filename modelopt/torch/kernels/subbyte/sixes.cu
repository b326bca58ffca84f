// Six-bit codes with one power-of-two scale: E3M2 and E2M3 are E5M2 and E4M3 with fewer exponents, so the hardware's conversion of
// x / s * SHIFT (a power of two that brings the least exponents together) rounds, and its low bits and sign are the code.
//
// A thread has a block of 32 values, or shares a longer one. Constants besides those of `halves.cu`: FIND (the amax is found
// here), E2M3, RULE (0 up, 1 nearest, 2 floor), EMAX, SHIFT, ENDS (quotients may lie beyond the largest value).

// The exponent of the scale, biased by 127; 255 for a range that is not finite.
__device__ __forceinline__ u32 power_of(float amax) {
    const u32 bits = __float_as_uint(RULE == 2 ? amax : over_most(amax));
    int code = (bits >> 23) & 0xff;
    if (RULE == 0) code += (bits & 0x7fffffu) != 0;
    else if (RULE == 1) code += (bits >> 22) & 1;
    else code -= EMAX;
    code = min(max(code, 0), 254);
    return (bits & INFINITE) == INFINITE ? 255 : code;
}

__device__ __forceinline__ u32 two_codes(float a, float b) { return E2M3 ? to_e4m3(a, b) : to_e5m2(a, b); }

__device__ __forceinline__ float scaled(float x, float factor) {
    const float q = __fmul_rn(x, factor);
    return ENDS ? fminf(fmaxf(q, -MOST * SHIFT), MOST * SHIFT) : q;
}

// The codes of four values as 24 bits.
__device__ __forceinline__ u32 four_codes(u32 v, u32 w, float factor) {
    const u32 low = two_codes(scaled(low_of(v), factor), scaled(high_of(v), factor));
    const u32 high = two_codes(scaled(low_of(w), factor), scaled(high_of(w), factor));
    const u32 four = low | (high << 16);
    const u32 six = (four & 0x1f1f1f1fu) | ((four >> 2) & 0x20202020u);
    const u32 pairs = (six & 0x003f003fu) | ((six >> 2) & 0x0fc00fc0u);
    return (pairs & 0xfffu) | ((pairs >> 4) & 0xfff000u);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) sixes(
    const uint4* __restrict__ x, uint4* __restrict__ out, unsigned char* __restrict__ scales, const float* __restrict__ amax_in, u32 pieces) {
    extern __shared__ uint4 staged[];
    after_kernel_ahead();
    const u32 lane = threadIdx.x % 32, stride = gridDim.x * THREADS, size = AHEAD ? THREADS * VECTORS : 0;
    const u32 mover = threadIdx.x - lane + lane / VECTORS;
    u32 turn = (threadIdx.x - lane) * VECTORS;
    const uint4* from = x + ((u64)blockIdx.x * THREADS + threadIdx.x - lane) * VECTORS + lane;
    if (AHEAD) fetch(staged + turn, from, blockIdx.x * THREADS + mover, pieces);
    for (u32 base = blockIdx.x * THREADS; base < pieces; base += stride) {
        const u32 piece = base + threadIdx.x;
        uint4* const mine = staged + turn;
        turn ^= size;
        from += stride * VECTORS;
        u32 w[WORDS];
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
        const u32 code = power_of(amax);
        if (FIND ? code == 255 : code == 255 || any_nan(w)) {  // NaN has the code of zero
#pragma unroll
            for (int i = 0; i < WORDS; i++) w[i] = code == 255 ? 0 : w[i] & ~not_a_number(w[i]);
        }
        const float inverse = code >= 254 ? 0x1p-127f : __uint_as_float((254 - code) << 23);
        const float factor = __fmul_rn(inverse, SHIFT);
        uint2* const to = (uint2*)mine + lane * 3;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 t[4];
#pragma unroll
            for (int i = 0; i < 4; i++) t[i] = four_codes(w[8 * h + 2 * i], w[8 * h + 2 * i + 1], factor);
            const u32 a = bytes(t[0], t[1], 0x4210), b = bytes(t[1], t[2], 0x5421), c = bytes(t[2], t[3], 0x6542);
            if (h == 0) to[0] = make_uint2(a, b), ((u32*)to)[2] = c;
            else ((u32*)to)[3] = a, to[2] = make_uint2(b, c);
        }
        __syncwarp();
        const u64 first = (u64)(piece - lane) * 24, end = (u64)pieces * 24;  // in bytes; `pieces` may end within 16
#pragma unroll
        for (u32 i = lane; i < 48; i += 32) {
            if (first + i * 16 + 16 <= end) out[first / 16 + i] = mine[i];
            else if (first + i * 16 < end) *(uint2*)(out + first / 16 + i) = *(const uint2*)(mine + i);
        }
        if (piece < pieces && piece % SHARE == 0) scales[piece / SHARE] = code;
        __syncwarp();
    }
}
