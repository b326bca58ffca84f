// Counts of |x| and the largest |x|: counters of a block lie in shared memory, COLUMNS of each, lane l using column l % COLUMNS.
//
// A bin is the leading bits of |x| (as float32) where SHIFT >= 0, else trunc(|x| * factor), at most BINS - 1. Magnitudes compare as
// their bits do, and NaN is above all. Lanes that add one to the same counter are merged by the hardware (ATOMS.POPC.INC), so hot
// bins cost nothing; columns keep different bins out of one bank. NaN is looked for in 16 bytes at once, and recounted where found.
// Constants: F32, F16 or BF16; BINS, COLUMNS, THREADS, RESIDENT (blocks of a multiprocessor), SHIFT.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef F32
#define EACH 4
#define INFINITE 0x7f800000u
#else
#define EACH 8
#ifdef BF16
#define INFINITE 0x7f80u
#else
#define INFINITE 0x7c00u
#endif
#endif
#define VECTORS 4  // loads in flight of one thread

// The bits of |x| as float32, of an element in the low bits (`high`: of 16 bits in the high ones) of a word.
__device__ __forceinline__ u32 magnitude(u32 word, bool high) {
#ifdef F32
    return word & 0x7fffffffu;
#elif defined(BF16)
    return high ? word & 0x7fff0000u : (word << 16) & 0x7fffffffu;
#else
    const unsigned short half = (high ? word >> 16 : word) & 0x7fffu;
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return __float_as_uint(f);
#endif
}

// The bin of a magnitude; with equal bins that of NaN is the last one.
__device__ __forceinline__ u32 bin_of(u32 bits, float factor) {
#if SHIFT >= 0
    return bits >> SHIFT;
#else
    const float place = fminf(__fmul_rn(__uint_as_float(bits), factor), BINS - 1.0f);
    return __float_as_uint(__fadd_rz(place, 8388608.0f)) - 0x4b000000u;  // 2^23 + trunc(place) has the bits of its integer
#endif
}

__device__ __forceinline__ void count(u32* column, u32 word, float factor) {
    atomicAdd(column + bin_of(magnitude(word, false), factor) * COLUMNS, 1u);
#ifndef F32
    atomicAdd(column + bin_of(magnitude(word, true), factor) * COLUMNS, 1u);
#endif
}

// Put a NaN where it belongs, after it was counted: into the last logarithmic bin, into none of equal ones.
__device__ __noinline__ void recount(u32* column, u32 bits, float factor) {
    if (bits <= 0x7f800000u) return;
    atomicSub(column + bin_of(bits, factor) * COLUMNS, 1u);
    if (SHIFT >= 0) atomicAdd(column + (BINS - 1) * COLUMNS, 1u);
}

// The largest magnitude of a word and of a 16-byte vector: two of 16 bits side by side.
#ifdef F32
__device__ __forceinline__ u32 larger(u32 most, u32 word) { return max(most, word & 0x7fffffffu); }
__device__ __forceinline__ bool has_nan(u32 most) { return most > INFINITE; }
#else
__device__ __forceinline__ u32 larger(u32 most, u32 word) { return __vmaxu2(most, word & 0x7fff7fffu); }
__device__ __forceinline__ bool has_nan(u32 most) { return (most & 0xffffu) > INFINITE || most > (INFINITE << 16 | 0xffffu); }
#endif

__device__ __forceinline__ void take(u32* column, u32& most, const uint4& v, float factor) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    u32 peak = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        count(column, words[i], factor);
        peak = larger(peak, words[i]);
    }
    most = larger(most, peak);
    if (has_nan(peak)) {
#pragma unroll
        for (int i = 0; i < EACH; i++) recount(column, magnitude(words[i * 4 / EACH], i % (EACH / 4)), factor);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) histogram(
    const uint4* __restrict__ x, u64* __restrict__ counts, u32* __restrict__ peak, const float* __restrict__ limit, int low, int high) {
    extern __shared__ u32 counters[];
    for (int i = threadIdx.x; i < BINS * COLUMNS; i += THREADS) counters[i] = 0;
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const u64 size = ((u64)high << 31) + low, vectors = size / EACH;
    const float factor = SHIFT >= 0 ? 0.0f : __fdiv_rn((float)BINS, *limit);
    u32* column = counters + threadIdx.x % COLUMNS;
    u32 most = 0;
    const u64 stride = (u64)gridDim.x * THREADS * VECTORS;
    for (u64 first = (u64)blockIdx.x * THREADS * VECTORS + threadIdx.x; first < vectors; first += stride) {
        uint4 v[VECTORS];
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            if (first + k * THREADS < vectors) v[k] = __ldcs(x + first + k * THREADS);
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            if (first + k * THREADS < vectors) take(column, most, v[k], factor);
    }
#ifndef F32
    most = max(most & 0xffffu, most >> 16);
#endif
    most = magnitude(most, false);
    if (blockIdx.x == 0 && threadIdx.x < size % EACH) {  // the last elements, which fill no vector
#ifdef F32
        const u32 bits = magnitude(((const u32*)x)[vectors * EACH + threadIdx.x], false);
#else
        const u32 bits = magnitude(((const unsigned short*)x)[vectors * EACH + threadIdx.x], false);
#endif
        most = max(most, bits);
        atomicAdd(column + bin_of(bits, factor) * COLUMNS, 1u);
        recount(column, bits, factor);
    }
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0 && most > 0) atomicMax(peak, most);
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        u32 sum = 0;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) sum += counters[i * COLUMNS + (c + threadIdx.x) % COLUMNS];
        if (sum > 0) atomicAdd(counts + i, (u64)sum);
    }
}
