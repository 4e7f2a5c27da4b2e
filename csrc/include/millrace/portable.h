// What the headers of this folder need to be compiled by nvcc into kernels and by g++ into the host library.

#ifndef MILLRACE_PORTABLE_H_
#define MILLRACE_PORTABLE_H_

#include <cstdint>

#ifdef __CUDACC__
#define MILLRACE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MILLRACE_HOST_DEVICE inline
#endif
#ifdef __CUDA_ARCH__  // the device pass alone: nvcc's host pass is g++, which does not know the pragma
#define MILLRACE_UNROLL _Pragma("unroll")
#else
#define MILLRACE_UNROLL
#endif

namespace millrace {

constexpr int kLanes = 32;  // threads of a warp

// What one load or store moves. It may alias any element type.
template <typename Part, int kParts>
struct alignas(sizeof(Part) * kParts) [[gnu::may_alias]] Word {
    Part part[kParts];
};
using Word16 = Word<uint32_t, 4>;
using Word8 = Word<uint32_t, 2>;
using Word4 = Word<uint32_t, 1>;
using Word2 = Word<uint16_t, 1>;
using Word1 = Word<uint8_t, 1>;

}  // namespace millrace

#endif  // MILLRACE_PORTABLE_H_
