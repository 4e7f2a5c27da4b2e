// Element types: 16-byte words of float, bfloat16 or float16 to and from FP32, the type that everything is
// computed in. On the device the conversions are single instructions; the host library spells them out.

#ifndef MILLRACE_NUMBERS_H_
#define MILLRACE_NUMBERS_H_

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "millrace/api.h"
#include "millrace/portable.h"

namespace millrace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <typename T>
constexpr int kDtype = MILLRACE_FLOAT32;
template <>
constexpr int kDtype<BFloat16> = MILLRACE_BFLOAT16;
template <>
constexpr int kDtype<Float16> = MILLRACE_FLOAT16;

// Elements of one 16-byte word.
template <typename T>
constexpr int kPerWord = 16 / static_cast<int>(sizeof(T));

inline int64_t dtype_bytes(int dtype) { return dtype == MILLRACE_FLOAT32 ? 4 : 2; }
inline bool is_dtype(int dtype) { return dtype >= MILLRACE_FLOAT32 && dtype <= MILLRACE_FLOAT16; }

MILLRACE_HOST_DEVICE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MILLRACE_HOST_DEVICE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

MILLRACE_HOST_DEVICE float widen(BFloat16 value) {
    return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

MILLRACE_HOST_DEVICE float widen(Float16 value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponents differ in bias by 112: a product with 2^112 is exact, subnormals included.
    return float_from_bits(sign | bits_of_float(float_from_bits(magnitude << 13) * 0x1p112f));
#endif
}

// Nearest value of T, ties to even.
template <typename T>
MILLRACE_HOST_DEVICE T narrow(float value);

template <>
MILLRACE_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN, which rounding could carry into infinity
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
MILLRACE_HOST_DEVICE Float16 narrow<Float16>(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    } else if (magnitude >= 0x477ff000u) {  // 65520, half way from the largest finite value to the next
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal value
        const uint32_t rebiased = magnitude - (112u << 23);
        half = (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13;
    } else {
        // Next to 0.5 a float's last bit is 2^-24, the last bit of a subnormal half: the sum does the
        // rounding.
        half = bits_of_float(float_from_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
}

// What is stored is T; what is computed with afterwards must be the same number.
template <typename T>
MILLRACE_HOST_DEVICE float rounded(float value) {
    if constexpr (sizeof(T) == 4) {
        return value;
    } else {
        return widen(narrow<T>(value));
    }
}

template <typename T>
MILLRACE_HOST_DEVICE void unpack(const Word16& word, float* out) {
    MILLRACE_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            out[i] = float_from_bits(word.part[i]);
        } else {
            out[2 * i] = widen(T{static_cast<uint16_t>(word.part[i] & 0xffffu)});
            out[2 * i + 1] = widen(T{static_cast<uint16_t>(word.part[i] >> 16)});
        }
    }
}

template <typename T>
MILLRACE_HOST_DEVICE Word16 pack(const float* values) {
    Word16 word;
    MILLRACE_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            word.part[i] = bits_of_float(values[i]);
        } else {
            const uint32_t low = narrow<T>(values[2 * i]).bits;
            word.part[i] = low | static_cast<uint32_t>(narrow<T>(values[2 * i + 1]).bits) << 16;
        }
    }
    return word;
}

// kPerWord<T> neighbouring elements, stored as `Stored`: T or float. Loading and unpacking are two steps, so
// that a thread can have several loads under way.
template <typename T, typename Stored>
struct Packed {
    static constexpr int kWords = kPerWord<T> / kPerWord<Stored>;
    Word16 words[kWords];

    MILLRACE_HOST_DEVICE static Packed load(const void* array, int64_t at) {
        const Word16* from = reinterpret_cast<const Word16*>(static_cast<const Stored*>(array) + at);
        Packed out;
        MILLRACE_UNROLL
        for (int i = 0; i < kWords; ++i) out.words[i] = from[i];
        return out;
    }
    MILLRACE_HOST_DEVICE void unpack(float* out) const {
        MILLRACE_UNROLL
        for (int i = 0; i < kWords; ++i) millrace::unpack<Stored>(words[i], out + i * kPerWord<Stored>);
    }
};

// `call` with a zero of the element type that `dtype` names: the arguments have been checked.
template <typename Call>
int with_element_type(int dtype, Call call) {
    if (dtype == MILLRACE_BFLOAT16) return call(BFloat16{});
    if (dtype == MILLRACE_FLOAT16) return call(Float16{});
    return call(0.0f);
}

inline bool is_aligned(const void* array) {
    return array != nullptr && reinterpret_cast<uintptr_t>(array) % sizeof(Word16) == 0;
}

}  // namespace millrace

#endif  // MILLRACE_NUMBERS_H_
