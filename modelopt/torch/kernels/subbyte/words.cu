// What is written in assembly: words of two float16 or bfloat16 (BF16), conversions, and copies ahead to shared memory.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef BF16
#define TYPE "bf16x2"
#else
#define TYPE "f16x2"
#endif

__device__ __forceinline__ u32 bytes(u32 a, u32 b, u32 which) {  // a number plus 8: ones or zeros as the sign of that byte
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
    return d;
}

__device__ __forceinline__ u32 above(u32 a, u32 b) {  // ones in each half of a that is larger than that of b
    u32 d;
    asm("set.gt.u32." TYPE " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 not_a_number(u32 a) {
    u32 d;
    asm("set.nan.u32." TYPE " %0, %1, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ u32 magnitude(u32 a) {
    u32 d;
    asm("abs." TYPE " %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ u32 larger(u32 a, u32 b) {  // NaN wins
    u32 d;
    asm("max.NaN." TYPE " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 within(u32 a, u32 low, u32 high) {
    u32 d;
    asm("{ .reg .b32 t; max." TYPE " t, %1, %2; min." TYPE " %0, t, %3; }" : "=r"(d) : "r"(a), "r"(low), "r"(high));
    return d;
}

// The largest magnitude of n words of two, in both halves.
__device__ __forceinline__ u32 largest_magnitude(const u32* words, int n) {
    u32 most = magnitude(words[0]);
#pragma unroll
    for (int i = 1; i < n; i++) most = larger(most, magnitude(words[i]));
    return larger(most, bytes(most, most, 0x1032));
}

__device__ __forceinline__ u32 halves(float low, float high) {
    u32 d;
    asm("cvt.rn." TYPE ".f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u32 cut(float x) {  // toward zero, in both halves
    u32 d;
    asm("cvt.rz." TYPE ".f32 %0, %1, %1;" : "=r"(d) : "f"(x));
    return d;
}

__device__ __forceinline__ float fma_within(float a, float b, float c) {  // limited to [0, 1]
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

__device__ __forceinline__ float widen(u32 half) {
#ifdef BF16
    return __uint_as_float(half << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)half));
    return f;
#endif
}

__device__ __forceinline__ u32 to_e4m3(float a, float b) {  // one byte each
    unsigned short d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(b), "f"(a));
    return d;
}

__device__ __forceinline__ u32 to_e5m2(float a, float b) {
    unsigned short d;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(b), "f"(a));
    return d;
}

__device__ __forceinline__ float from_e4m3(u32 code) {
    u32 both;
    float value;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"((unsigned short)code));
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)both));
    return value;
}

__device__ __forceinline__ void copy_ahead(uint4* to, const uint4* from) {
    u32 at;
    asm("{ .reg .u64 v; cvta.to.shared.u64 v, %1; cvt.u32.u64 %0, v; }" : "=r"(at) : "l"(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void all_but_latest() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ __forceinline__ void after_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
