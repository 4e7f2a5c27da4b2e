// flow_loss on device memory (millrace/api.h says what it computes).
//
// Mapping: one block per slot (millrace/slots.h). A sample's rows are one run of elements whatever the width
// is, and the threads of a block take its 16-byte words in turn; no thread divides to find a row. A word's
// loads, three arrays or five with the contrastive term, are started together; an H200 needs about 36 KiB in
// flight an SM (see row_copy.h), which 768 threads with three words each have. Each block leaves one partial
// sum, and a second kernel adds them: no atomics, the same bits every time.
//
// The negatives' clean and noise are rows that another block reads as its own; the L2 cache serves one of the
// two where the samples lie close together.
//
// The pointers are not __restrict__, for the reason given in row_copy.cu.

#include <cuda_runtime.h>

#include <cstdint>
#ifdef MILLRACE_CHECK_INDICES
#undef NDEBUG  // asked for by name, so it holds in a release build too
#include <cassert>
#endif

#include "millrace/flow_loss.h"
#include "millrace/reduce.h"

namespace millrace {
namespace {

template <typename T, typename Data>
__global__ void __launch_bounds__(kLossThreads) squares(const MillraceFlowLoss call, int rows_per_slot) {
    __shared__ float parts[kLossThreads / kLanes];
    const Slot slot = find_slot(call.packed.cu_seqlens, static_cast<int>(call.packed.samples), rows_per_slot,
                                static_cast<int>(blockIdx.x));
    if (slot.first >= slot.end) return;
#ifdef MILLRACE_CHECK_INDICES
    assert(call.negative == nullptr || call.negative[slot.sample] < call.packed.samples);
#endif
    const LossSample sample = loss_sample(call, slot.sample);
    const int64_t first = slot.first * call.packed.width - sample.first;
    const int64_t end = slot.end * call.packed.width - sample.first;
    float sum[1] = {0.0f};
    for (int64_t at = first + threadIdx.x * kPerWord<T>; at < end; at += kLossThreads * kPerWord<T>) {
        sum[0] += loss_word<T, Data>(call, sample, at);
    }
    block_sum(sum, parts);
    if (threadIdx.x == 0) call.workspace[blockIdx.x] = sum[0];
}

// One block: its warps take samples in turn, the lanes of a warp the slots of a sample.
constexpr int kMeanThreads = 1024;
constexpr int kMeanWarps = kMeanThreads / kLanes;

__global__ void __launch_bounds__(kMeanThreads) means(const MillraceFlowLoss call, int rows_per_slot) {
    __shared__ float parts[kMeanWarps];
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    float total[1] = {0.0f};
    for (int64_t b = threadIdx.x / kLanes; b < call.packed.samples; b += kMeanWarps) {
        const int sample = static_cast<int>(b);
        const SlotRange range = slots_of_sample(call.packed.cu_seqlens, sample, rows_per_slot);
        float sum = 0.0f;
        for (int slot = lane; slot < range.count; slot += kLanes) sum += call.workspace[range.first + slot];
        sum = warp_sum(sum);
        if (lane != 0) continue;
        total[0] += sum;
        call.per_sample[sample] = mean_of_sample(call.packed, sample, sum);
    }
    block_sum(total, parts);
    if (threadIdx.x == 0) *call.loss = mean_of_all(call.packed, total[0]);
}

}  // namespace
}  // namespace millrace

extern "C" int64_t millrace_flow_loss_workspace(const MillraceFlowLoss* call) {
    return millrace::loss_workspace(*call);
}

extern "C" int millrace_flow_loss(const MillraceFlowLoss* call, void* stream) {
    using namespace millrace;
    const int code = check_arguments(*call);
    if (code != MILLRACE_SUCCESS) return code;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const int rows_per_slot = loss_rows_per_slot(*call);
    if (call->packed.rows > 0) {
        const unsigned grid = static_cast<unsigned>(slot_count(call->packed, rows_per_slot));
        const int launched = with_loss_types(*call, [&](auto zero, auto data) {
            squares<decltype(zero), decltype(data)><<<grid, kLossThreads, 0, queue>>>(*call, rows_per_slot);
            return static_cast<int>(cudaGetLastError());
        });
        if (launched != MILLRACE_SUCCESS) return launched;
    }
    means<<<1, kMeanThreads, 0, queue>>>(*call, rows_per_slot);
    return static_cast<int>(cudaGetLastError());
}
