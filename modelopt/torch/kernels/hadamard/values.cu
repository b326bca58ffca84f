// Tensors of float32, float16 or bfloat16 (constants F32, F16, BF16) in pieces of 16 bytes, and copies of them into shared memory.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef F32
typedef float element;
#define VALUES 4  // in a piece
#else
typedef unsigned short element;
#define VALUES 8
#endif

// The float32 values of a piece, or of four words.
__device__ __forceinline__ void unpack(const u32* words, float* v) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if defined(F32)
        v[i] = __uint_as_float(words[i]);
#elif defined(BF16)
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#else
        asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
            : "=f"(v[2 * i]), "=f"(v[2 * i + 1]) : "r"(words[i]));
#endif
    }
}

__device__ __forceinline__ void unpack(const uint4& piece, float* v) {
    const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
    unpack(words, v);
}

// One word of the tensor's type from one (F32) or two values.
__device__ __forceinline__ u32 word_of(float first, float second) {
#if defined(F32)
    return __float_as_uint(first);
#else
    u32 word;
#ifdef BF16
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(first), "f"(second));
#else
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(first), "f"(second));
#endif
    return word;
#endif
}

__device__ __forceinline__ uint4 pack(const float* v) {
    const int n = VALUES / 4;
    return make_uint4(word_of(v[0], v[n - 1]), word_of(v[n], v[2 * n - 1]), word_of(v[2 * n], v[3 * n - 1]), word_of(v[3 * n], v[4 * n - 1]));
}

// Where piece i of a buffer in shared memory lies: neither 8 neighbours nor 8 pieces 4 or 8 apart share a bank.
__device__ __forceinline__ u32 slot(u32 i) { return i ^ ((i >> 3) & 7); }

// Start to copy a piece (with `exists` false: zeros) to shared memory; `fetched` waits until at most `pending` groups are under way.
__device__ __forceinline__ void fetch(uint4* to, const uint4* from, bool exists) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void fetch_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void fetched() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }
