// The Walsh-Hadamard transform of blocks of M 2^BITS neighbours, by thread blocks that hold a tile of whole blocks in shared memory.
//
// The lowest OWN_BITS bits of the index are transformed by threads that have so many neighbours, then MIDDLE_1 and MIDDLE_2 bits, then
// LAST bits or the matrix H_M: 2^OWN_BITS values of a thread at a time, between them a pass through shared memory, and the next tile is copied there
// meanwhile. Each sum is one float32 addition. Rows of H_M are summed up from the 8 sums that 4 neighbours can have.
// Constants: those of values.cu; OWN_BITS, 5 or 6; M, BITS, MIDDLE_1, MIDDLE_2, LAST, COUNT (blocks of a tile), SCALE, SIGNS (0: none, 1: before, -1:
// after the transform), THREADS, RESIDENT (thread blocks of a multiprocessor), ROWS (of H_M: bit j set where entry j is -1).

#define SIZE (M << BITS)
#define TILE (SIZE * COUNT)
#define OWN (1 << OWN_BITS)
#define PIECES (OWN / VALUES)

#if M > 1
__device__ constexpr u32 matrix[M] = {ROWS};
#endif

// Of the float32 sums each 32 neighbours are pieces in an order of their own, the exclusive or of their number and what `turn` makes of
// the bits above, so that neither 8 neighbours nor 8 pieces OWN apart share a bank. `Place` finds elements that differ in bits from LOW on, with few instructions each.
__device__ constexpr u32 turn(u32 e) { return (OWN_BITS == 5 ? e >> 5 : e >> 5 ^ e >> 8) & 7; }

template <int LOW> struct Place {
    float* row;
    u32 column;
    // The places of e + (i << LOW), where bits that i has are 0 in e.
    __device__ __forceinline__ Place(float* sums, u32 e) : row(sums + (e & ~31u)), column((e & 31) ^ (turn(e) << 2)) {}
    __device__ __forceinline__ float* operator()(int i) const {
        const int more = i << LOW;
        return row + (more & ~31) + (column ^ (more & 31) ^ (turn(more) << 2));
    }
};

// Load or store N neighbours.
template <int N> __device__ __forceinline__ void load(float* v, const float* from) {
    if constexpr (N == 4) {
        const float4 piece = *(const float4*)from;
        v[0] = piece.x, v[1] = piece.y, v[2] = piece.z, v[3] = piece.w;
    } else if constexpr (N == 2) {
        const float2 piece = *(const float2*)from;
        v[0] = piece.x, v[1] = piece.y;
    } else
        v[0] = *from;
}

template <int N> __device__ __forceinline__ void keep(float* to, const float* v) {
    if constexpr (N == 4)
        *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
    else if constexpr (N == 2)
        *(float2*)to = make_float2(v[0], v[1]);
    else
        *to = v[0];
}

// Store N neighbours to the tensor, normalized; `signs` are theirs.
template <int N> __device__ __forceinline__ void emit(element* to, const float* signs, const float* v) {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[i] = __fmul_rn(v[i], SCALE);
        if (SIGNS < 0) out[i] = __fmul_rn(out[i], __ldg(signs + i));
    }
#ifdef F32
    if constexpr (N == 4)
        __stcs((float4*)to, make_float4(out[0], out[1], out[2], out[3]));
    else if constexpr (N == 2)
        __stcs((float2*)to, make_float2(out[0], out[1]));
    else
        __stcs(to, out[0]);
#else
    if constexpr (N == 4)
        __stcs((uint2*)to, make_uint2(word_of(out[0], out[1]), word_of(out[2], out[3])));
    else if constexpr (N == 2)
        __stcs((u32*)to, word_of(out[0], out[1]));
    else
        __stcs(to, (element)word_of(out[0], 0.0f));
#endif
}

// Butterflies over the 2^B elements v[i << SHIFT], for each of the 2^SHIFT remainders.
template <int B, int SHIFT> __device__ __forceinline__ void butterflies(float* v) {
#pragma unroll
    for (int h = 1 << SHIFT; h < 1 << (B + SHIFT); h *= 2)
#pragma unroll
        for (int i = 0; i < 1 << (B + SHIFT); i++)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = __fadd_rn(a, b);
                v[i + h] = __fsub_rn(a, b);
            }
}

// Transform the lowest bits, at most OWN_BITS, of the tile in `raw`, and leave float32 sums.
__device__ __forceinline__ void first_bits(const uint4* raw, float* sums, const float* signs) {
#pragma unroll 1
    for (u32 c = threadIdx.x; c < TILE / OWN; c += THREADS) {
        float v[OWN];
#pragma unroll
        for (int p = 0; p < PIECES; p++) unpack(raw[slot(c * PIECES + p)], v + p * VALUES);
        if (SIGNS > 0) {
#pragma unroll
            for (int i = 0; i < OWN; i++) v[i] = __fmul_rn(v[i], __ldg(signs + (c * OWN + i) % SIZE));
        }
        constexpr int bits = BITS < OWN_BITS ? BITS : OWN_BITS;
        const Place<2> place(sums, c * OWN);
#pragma unroll
        for (int i = 0; i < OWN; i += 1 << bits) butterflies<bits, 0>(v + i);
#pragma unroll
        for (int p = 0; p < OWN / 4; p++) keep<4>(place(p), v + 4 * p);
    }
}

// Transform B bits above the lowest LOW; a thread has as many neighbours as fill its values, at most four.
template <int LOW, int B, bool FINAL>
__device__ __forceinline__ void next_bits(float* sums, element* y, const float* signs, u64 left) {
    constexpr int S = B + 2 > OWN_BITS ? OWN_BITS - B : 2, N = 1 << S;
#pragma unroll 1
    for (u32 item = threadIdx.x; item < TILE >> (B + S); item += THREADS) {
        const u32 e = (item >> (LOW - S) << (LOW + B)) + ((item & ((1u << (LOW - S)) - 1)) << S);
        const Place<LOW> place(sums, e);
        float v[1 << (B + S)];
#pragma unroll
        for (int i = 0; i < 1 << B; i++) load<N>(v + (i << S), place(i));
        butterflies<B, S>(v);
        if (FINAL && COUNT > 1 && e >= left) return;
#pragma unroll
        for (int i = 0; i < 1 << B; i++) {
            if (FINAL)
                emit<N>(y + e + (i << LOW), signs + e % SIZE + (i << LOW), v + (i << S));
            else
                keep<N>(place(i), v + (i << S));
        }
    }
}

#if M > 1
#define SIDE (OWN_BITS == 5 && M == 28 || BITS == 0 ? 1 : 2)  // columns of a thread: two neighbours are stored as one, where registers allow it

// Multiply by H_M; a thread has SIDE neighbours of each of the M parts.
__device__ __forceinline__ void multiply(float* sums, element* y, const float* signs, u64 left) {
#pragma unroll 1
    for (u32 item = threadIdx.x * SIDE; item < COUNT << BITS; item += THREADS * SIDE) {
        const u32 e = (item >> BITS) * SIZE + (item & ((1u << BITS) - 1));
        const Place<BITS> place(sums, e);
        float sum[M][SIDE];
#pragma unroll
        for (int j = 0; j < M; j += 4) {
            float v[4][SIDE];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 at = e + (j + i << BITS);
                load<SIDE>(v[i], BITS >= (COUNT == 1 ? 5 : 3 * OWN_BITS - 7) ? place(j + i) : sums + (at & ~31) + ((at & 31) ^ turn(at) << 2));
            }
#pragma unroll
            for (int k = 0; k < SIDE; k++) {
                const float a[2] = {__fadd_rn(v[0][k], v[1][k]), __fsub_rn(v[0][k], v[1][k])};
                const float b[2] = {__fadd_rn(v[2][k], v[3][k]), __fsub_rn(v[2][k], v[3][k])};
                float four[2][2][2];  // which a, which b, and whether b is subtracted
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float b_i = b[i >> 1 & 1];
                    four[i >> 2][i >> 1 & 1][i & 1] = i & 1 ? __fsub_rn(a[i >> 2], b_i) : __fadd_rn(a[i >> 2], b_i);
                }
#pragma unroll
                for (int i = 0; i < M; i++) {
                    const u32 minus = matrix[i] >> j, turned = minus & 1 ? ~minus : minus;  // relative to the first sign
                    const float term = four[turned >> 1 & 1][(turned >> 2 ^ turned >> 3) & 1][turned >> 2 & 1];
                    const float before = j == 0 ? 0.0f : sum[i][k];
                    sum[i][k] = j == 0 ? (minus & 1 ? -term : term) : minus & 1 ? __fsub_rn(before, term) : __fadd_rn(before, term);
                }
            }
        }
        if (COUNT > 1 && e >= left) return;
#pragma unroll
        for (int i = 0; i < M; i++) emit<SIDE>(y + e + (i << BITS), signs + e % SIZE + (i << BITS), sum[i]);
    }
}
#endif

__device__ __forceinline__ void fetch_tile(uint4* raw, const uint4* x, u64 tile, u64 pieces) {
    constexpr u32 all = TILE / VALUES;
    const u64 start = tile * all;
    const uint4* from = x + start + threadIdx.x;
    const u32 first = slot(threadIdx.x);  // and THREADS further on as far away, where THREADS is a multiple of 64
#pragma unroll
    for (u32 k = 0; k < all; k += THREADS) {
        const u32 i = k + threadIdx.x;
        if (all % THREADS == 0 || i < all)
            fetch(raw + (THREADS % 64 ? slot(i) : k + first), from + k, COUNT == 1 || start + i < pieces);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) rows(
    const uint4* __restrict__ x, const float* __restrict__ signs, void* __restrict__ y, int pieces_low, int pieces_high) {
    extern __shared__ uint4 raw[];
    float* sums = (float*)(raw + TILE / VALUES);
    const u64 pieces = ((u64)pieces_high << 31) + pieces_low, total = pieces * VALUES;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    fetch_tile(raw, x, blockIdx.x, pieces);
    fetch_group();
    for (u64 tile = blockIdx.x; tile * TILE < total; tile += gridDim.x) {
        element* out = (element*)y + tile * TILE;
        const u64 left = total - tile * TILE;
        fetched<0>();
        __syncthreads();
        first_bits(raw, sums, signs);
        __syncthreads();
        if ((tile + gridDim.x) * TILE < total) fetch_tile(raw, x, tile + gridDim.x, pieces);
        fetch_group();
        if constexpr (MIDDLE_1 > 0) {
            next_bits<OWN_BITS, MIDDLE_1, false>(sums, out, signs, left);
            __syncthreads();
        }
        if constexpr (MIDDLE_2 > 0) {
            next_bits<OWN_BITS + MIDDLE_1, MIDDLE_2, false>(sums, out, signs, left);
            __syncthreads();
        }
#if M > 1
        multiply(sums, out, signs, left);
#else
        next_bits<OWN_BITS + MIDDLE_1 + MIDDLE_2, LAST, true>(sums, out, signs, left);
#endif
    }
}
