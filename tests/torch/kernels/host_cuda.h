// What the CUDA sources of the Hadamard transform use, for one thread block of std::threads on the host: a warp is 32 of them.
// Copies to shared memory happen at once; what the device does in assembly is written out.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::max;
using std::min;
#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct Dim { unsigned x; };
static thread_local Dim threadIdx;
static Dim blockIdx, gridDim, blockDim;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }

static std::vector<std::unique_ptr<std::barrier<>>> warps;
static std::unique_ptr<std::barrier<>> block;
static unsigned lanes[32][32];
inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
inline void __syncthreads() { block->arrive_and_wait(); }
template <class T> T __shfl_xor_sync(unsigned, T v, int h) {
    unsigned* mine = lanes[threadIdx.x / 32];
    memcpy(mine + threadIdx.x % 32, &v, 4);
    __syncwarp();
    T other;
    memcpy(&other, mine + (threadIdx.x % 32 ^ h), 4);
    __syncwarp();
    return other;
}
template <class T> T __shfl_sync(unsigned, T v, unsigned from) {
    unsigned* mine = lanes[threadIdx.x / 32];
    memcpy(mine + threadIdx.x % 32, &v, 4);
    __syncwarp();
    T other;
    memcpy(&other, mine + from % 32, 4);
    __syncwarp();
    return other;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
    for (int h = 1; h < 32; h *= 2) v = max(v, __shfl_xor_sync(mask, v, h));
    return v;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= ((which >> 4 * i & 4 ? b : a) >> 8 * (which >> 4 * i & 3) & 255) << 8 * i;
    return out;
}

inline void fetch(uint4* to, const uint4* from, bool exists) { *to = exists ? *from : uint4{}; }
inline void fetch_group() {}
template <int pending> void fetched() {}
inline float larger(float a, float b) { return a != a || b != b ? NAN : max(a, b); }
inline float smaller(float a, float b) { return a != a || b != b ? NAN : min(a, b); }
inline unsigned bfloat16(float f) {
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float e4m3_value(unsigned code) {
    const unsigned low = code & 0x7f;
    const float size = low == 0x7f ? NAN : low < 8 ? low / 512.0f : ldexpf(8 + (low & 7), (int)(low >> 3) - 10);
    return code & 0x80 ? -size : size;
}
inline unsigned e4m3_code(float x) {  // the code whose value is the nearest, the even one of two
    unsigned best = 0;
    if (x != x) return 0x7f;
    const double size = min(fabs((double)x), 448.0);
    for (unsigned c = 1; c < 0x7f; c++) {
        const double old = fabs(e4m3_value(best) - size), now = fabs(e4m3_value(c) - size);
        if (now < old || (now == old && c % 2 == 0)) best = c;
    }
    return best | __float_as_uint(x) >> 31 << 7;
}
inline unsigned to_e4m3(float first, float second) { return e4m3_code(first) | e4m3_code(second) << 8; }
inline void from_e4m3(unsigned codes, float& first, float& second) { first = e4m3_value(codes & 255), second = e4m3_value(codes >> 8 & 255); }

alignas(16) static uint4 pool[1 << 16];  // shared memory

template <class F> void launch(int blocks, int threads, F kernel) {
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        warps.clear();
        for (int i = 0; i < threads / 32; i++) warps.emplace_back(new std::barrier<>(32));
        block.reset(new std::barrier<>(threads));
        std::vector<std::thread> all;
        for (int i = 0; i < threads; i++)
            all.emplace_back([=] {
                threadIdx.x = i;
                kernel();
                warps[i / 32]->arrive_and_drop();
                block->arrive_and_drop();
            });
        for (auto& thread : all) thread.join();
    }
}
