// What subbyte/words.cu has in assembly, and the device functions that its other sources use beside those of host_cuda.h.

#include "host_cuda.h"

#include <cfenv>
#include <cstdint>

#define __noinline__
typedef unsigned u32;
typedef unsigned long long u64;

inline float __frcp_rn(float a) { return 1.0f / a; }
inline float towards(int mode, float a, float b, float c) {
    fesetround(mode);
    volatile float x = a, y = b, z = c;
    volatile float r = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return r;
}
inline float __fmaf_rd(float a, float b, float c) { return towards(FE_DOWNWARD, a, b, c); }
inline float __fmaf_ru(float a, float b, float c) { return towards(FE_UPWARD, a, b, c); }
inline u32 __dp4a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}
inline u32 __dp2a_lo(u32 a, u32 b, u32 c) { return c + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255); }
inline u32 __dp2a_hi(u32 a, u32 b, u32 c) { return __dp2a_lo(a, b >> 16, c); }

inline u32 bytes(u32 a, u32 b, u32 which) {
    const u32 taken = __byte_perm(a, b, which & 0x7777), signs = (taken >> 7 & 0x01010101) * 255;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (which >> (4 * i + 3) & 1 ? signs : taken) & 255u << 8 * i;
    return out;
}

#ifdef BF16
inline float widen(u32 half) { return __uint_as_float(half << 16); }
inline u32 narrow(float f, bool cut) { return cut ? __float_as_uint(f) >> 16 : bfloat16(f); }
#else
inline float widen(u32 half) {
    const int e = half >> 10 & 31, m = half & 1023;
    const float size = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
    return half & 0x8000 ? -size : size;
}
inline u32 narrow(float f, bool cut) {
    const u32 sign = __float_as_uint(f) >> 16 & 0x8000;
    if (f != f) return 0x7fff;
    const double size = fabs((double)f);
    if (size == 0 || std::isinf(f)) return sign | (size ? 0x7c00 : 0);
    const int e = max(std::ilogb(size), -14);
    const u32 m = cut ? trunc(ldexp(size, 10 - e)) : nearbyint(ldexp(size, 10 - e));  // in steps of 2^(e - 10)
    const u32 code = ((e + 14) << 10) + m;
    return sign | min(code, cut ? 0x7bffu : 0x7c00u);
}
#endif

inline float fma_within(float a, float b, float c) { return min(max(fmaf(a, b, c), 0.0f), 1.0f); }

template <class F> u32 each(u32 a, u32 b, F f) { return (f(a & 0xffff, b & 0xffff) & 0xffff) | f(a >> 16, b >> 16) << 16; }
inline u32 above(u32 a, u32 b) { return each(a, b, [](u32 x, u32 y) { return widen(x) > widen(y) ? 0xffffu : 0u; }); }
inline u32 not_a_number(u32 a) { return each(a, a, [](u32 x, u32) { return std::isnan(widen(x)) ? 0xffffu : 0u; }); }
inline u32 magnitude(u32 a) { return a & 0x7fff7fff; }
inline u32 larger(u32 a, u32 b) {
    return each(a, b, [](u32 x, u32 y) { return widen(x) != widen(x) || widen(x) > widen(y) ? x : y; });
}
inline u32 largest_magnitude(const u32* words, int n) {
    u32 most = magnitude(words[0]);
    for (int i = 1; i < n; i++) most = larger(most, magnitude(words[i]));
    return larger(most, bytes(most, most, 0x1032));
}
inline u32 within(u32 a, u32 low, u32 high) {
    a = each(a, low, [](u32 x, u32 y) { return widen(x) > widen(y) ? x : y; });
    return each(a, high, [](u32 x, u32 y) { return widen(x) < widen(y) ? x : y; });
}
inline u32 halves(float low, float high) { return narrow(low, false) | narrow(high, false) << 16; }
inline u32 cut(float x) { return narrow(x, true) * 0x10001u; }
inline float from_e4m3(u32 code) { return e4m3_value(code & 255); }
inline u32 e5m2_code(float x) {  // E5M2 is float16 with fewer bits: the nearest, the even one of two, at most 57344
    const double size = min(fabs((double)x), 57344.0);
    if (x != x) return 0x7f;
    const int e = size == 0 ? -14 : max(std::ilogb(size), -14);
    const u32 code = ((e + 14) << 2) + (u32)nearbyint(ldexp(size, 2 - e));
    return __float_as_uint(x) >> 31 << 7 | code;
}
inline u32 to_e5m2(float a, float b) { return e5m2_code(a) | e5m2_code(b) << 8; }

inline void copy_ahead(uint4* to, const uint4* from) { *to = *from; }
inline void close_group() {}
inline void all_but_latest() {}
inline void after_kernel_ahead() {}
