// Counts of |x| and the largest |x|: counters of a block lie in shared memory, COPIES of each, one for every COPIES-th lane.
//
// A bin is the leading bits of |x| (as float32) where SHIFT >= 0, else trunc(|x| * factor), at most BINS - 1. Magnitudes compare as
// their bits do, and NaN is above all. Constants: F32, F16 or BF16; BINS, COPIES, THREADS, SHIFT.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef F32
#define EACH 4
#else
#define EACH 8
#endif

// The bits of |x| as float32, of element i of a 16-byte vector.
__device__ __forceinline__ u32 magnitude(const uint4& v, int i) {
#ifdef F32
    const u32 word = i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    return word & 0x7fffffffu;
#else
    const u32 word = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
#ifdef BF16
    return (i & 1) ? word & 0x7fff0000u : (word << 16) & 0x7fffffffu;
#else
    const unsigned short half = ((i & 1) ? word >> 16 : word) & 0x7fffu;
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return __float_as_uint(f);
#endif
#endif
}

__device__ __forceinline__ void count(u32* counters, u32 bits, float factor) {
    const u32 lane = threadIdx.x & (COPIES - 1);
#if SHIFT >= 0
    atomicAdd(counters + (bits >> SHIFT) * COPIES + lane, 1u);
#else
    const float place = __fmul_rn(__uint_as_float(bits), factor);
    if (place == place) atomicAdd(counters + min(__float2uint_rz(place), BINS - 1u) * COPIES + lane, 1u);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) histogram(
    const uint4* __restrict__ x, u64* __restrict__ counts, u32* __restrict__ peak, const float* __restrict__ factor_ptr, int low, int high) {
    extern __shared__ u32 counters[];
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    for (int i = threadIdx.x; i < BINS * COPIES; i += THREADS) counters[i] = 0;
    __syncthreads();
    const u64 size = ((u64)high << 31) + low, vectors = size / EACH;
    const float factor = factor_ptr == nullptr ? 0.0f : *factor_ptr;
    u32 most = 0;
    const u64 stride = (u64)gridDim.x * THREADS * 4;
    for (u64 first = (u64)blockIdx.x * THREADS * 4 + threadIdx.x; first < vectors; first += stride) {
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + k * THREADS < vectors) v[k] = __ldcs(x + first + k * THREADS);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + k * THREADS < vectors) {
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const u32 bits = magnitude(v[k], i);
                    most = max(most, bits);
                    count(counters, bits, factor);
                }
            }
    }
    if (blockIdx.x == 0 && threadIdx.x < size % EACH) {  // the last elements, which fill no vector
        uint4 v = make_uint4(0, 0, 0, 0);
#ifdef F32
        v.x = ((const u32*)x)[vectors * EACH + threadIdx.x];
#else
        v.x = ((const unsigned short*)x)[vectors * EACH + threadIdx.x];
#endif
        const u32 bits = magnitude(v, 0);
        most = max(most, bits);
        count(counters, bits, factor);
    }
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0 && most > 0) atomicMax(peak, most);
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        u32 sum = 0;
        for (int c = 0; c < COPIES; c++) sum += counters[i * COPIES + c];
        if (sum > 0) atomicAdd(counts + i, (u64)sum);
    }
}
