// Sum of one value per thread over a block, in the same order on the device and in the host library: a
// butterfly over the lanes of each warp, then the warps one after the other.

#ifndef MILLRACE_REDUCE_H_
#define MILLRACE_REDUCE_H_

#include "millrace/portable.h"

#ifndef __CUDACC__
#include <cstddef>
#include <vector>
#endif

namespace millrace {

#ifdef __CUDACC__

__device__ __forceinline__ float warp_sum(float value) {
    MILLRACE_UNROLL
    for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

// `shared` has a place for every value of every warp. It may be used again after another barrier.
template <int kValues>
__device__ __forceinline__ void block_sum(float (&values)[kValues], float* shared) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const int warps = static_cast<int>(blockDim.x) / kLanes;
    MILLRACE_UNROLL
    for (int i = 0; i < kValues; ++i) {
        values[i] = warp_sum(values[i]);
        if (threadIdx.x % kLanes == 0) shared[i * warps + warp] = values[i];
    }
    __syncthreads();
    MILLRACE_UNROLL
    for (int i = 0; i < kValues; ++i) {
        values[i] = shared[i * warps];
        for (int other = 1; other < warps; ++other) values[i] += shared[i * warps + other];
    }
}

#else

// Of a whole number of warps; the butterfly's sum is the same in every lane.
inline float block_sum(std::vector<float> values) {
    float sum = 0.0f;
    for (std::size_t warp = 0; warp < values.size(); warp += kLanes) {
        float* lane = values.data() + warp;
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            for (int i = 0; i < offset; ++i) lane[i] += lane[i + offset];
        }
        sum = warp == 0 ? lane[0] : sum + lane[0];
    }
    return sum;
}

#endif

}  // namespace millrace

#endif  // MILLRACE_REDUCE_H_
