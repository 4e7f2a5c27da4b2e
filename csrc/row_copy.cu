// gather_rows and scatter_rows on device memory (millrace/api.h says what they compute).
//
// Mapping: one warp per row, eight warps per block, no shared memory, no synchronisation.
//   - The warp reads its index entry once, as a broadcast, and everything that follows from it (the two row
//     addresses, the word size) is uniform across the warp: no divergence.
//   - A row is contiguous on both sides of the copy, so 32 lanes x 16 bytes fill whole lines on both. A row
//     of 1792 bf16 (3584 bytes) is 7 words a lane, one of 3584 bf16 is 14: no idle lane at either width.
//   - A block per row would give its 256 threads less than one word each at 3584 bytes; a thread per word
//     over the flattened output would need a 64-bit division per word to find its row.
// A route keeps thousands of rows per GPU, which fills the machine; a call of a few dozen rows does not, and
// is bound by launch latency whatever the mapping.
//
// Every destination row is written by one warp and nothing is accumulated, so the result is deterministic.

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#ifdef MILLRACE_CHECK_INDICES
#undef NDEBUG  // asked for by name, so it holds in a release build too
#include <cassert>
#endif

#include "millrace/row_copy.h"

static_assert(MILLRACE_SUCCESS == static_cast<int>(cudaSuccess));
static_assert(MILLRACE_INVALID_ARGUMENT == static_cast<int>(cudaErrorInvalidValue));
static_assert(MILLRACE_OUT_OF_MEMORY == static_cast<int>(cudaErrorMemoryAllocation));

namespace millrace {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kLanes;

// The pointers are not __restrict__, on purpose. Told that no store can change what a later load reads, ptxas
// moves each load down to its store, one 16-byte load in flight per lane instead of kBatch.
template <typename Index>
__global__ void __launch_bounds__(kThreads)
    copy_rows(bool scatter, const char* source, char* destination, const Index* index, int64_t index_count,
              [[maybe_unused]] int64_t table_rows, int64_t row_bytes) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    // One pass of this loop unless there are more rows than the largest grid holds.
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp; k < index_count; k += stride) {
        const int64_t row = index[k];
#ifdef MILLRACE_CHECK_INDICES
        assert(row >= 0 && row < table_rows);
#endif
        copy_entry(scatter, lane, k, row, source, destination, row_bytes);
    }
}

template <typename Index>
int launch(const RowCopy& copy, cudaStream_t stream) {
    const int64_t blocks = (copy.index_count - 1) / kWarpsPerBlock + 1;
    const unsigned grid = static_cast<unsigned>(blocks < INT_MAX ? blocks : INT_MAX);
    copy_rows<<<grid, kThreads, 0, stream>>>(
        copy.scatter, static_cast<const char*>(copy.source), static_cast<char*>(copy.destination),
        static_cast<const Index*>(copy.index), copy.index_count, copy.table_rows, copy.row_bytes);
    return static_cast<int>(cudaGetLastError());
}

int run(const RowCopy& copy, void* stream) {
    const int code = check_arguments(copy);
    if (code != MILLRACE_SUCCESS || copy.empty()) return code;  // a grid of no blocks is a launch error
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    return copy.index_bytes == 4 ? launch<int32_t>(copy, queue) : launch<int64_t>(copy, queue);
}

}  // namespace
}  // namespace millrace

extern "C" int millrace_gather_rows(const void* x, int64_t x_rows, const void* index, int index_bytes,
                                    int64_t index_count, void* out, int64_t row_bytes, void* stream) {
    return millrace::run({false, x, out, x_rows, index, index_bytes, index_count, row_bytes}, stream);
}

extern "C" int millrace_scatter_rows(void* base, int64_t base_rows, const void* update, const void* index,
                                     int index_bytes, int64_t index_count, int64_t row_bytes, void* stream) {
    return millrace::run({true, update, base, base_rows, index, index_bytes, index_count, row_bytes}, stream);
}
