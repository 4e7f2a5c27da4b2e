// gated_residual_norm_modulate and its derivative on device memory (millrace/api.h says what they compute).
//
// Mapping: one block per slot (millrace/slots.h), a few rows of one sample one after the other, eight columns
// a thread.
//   - A thread keeps gate, shift and scale of its columns in registers, so they are read once per slot; so do
//     the sums of the three gradients of vectors, backward. They go to memory once per slot, and a second
//     kernel adds the slots of a sample in their order: no atomics, the same bits every time.
//   - Rows are copied ahead into shared memory with cp.async, which costs no registers: while a row waits for
//     its sums over the block, the next ones are on their way. With 16-bit elements at a width of 1792,
//     forward holds two rows of 7 KiB ahead in each block, backward two of 14 KiB; an H200 needs about 36 KiB
//     in flight an SM (see row_copy.h). A thread reads only what it copied itself, so the copies need no
//     barrier.
//   - A warp per row instead of a block would need 7 words of six arrays a lane: backward would spill.
//
// The pointers are not __restrict__, for the reason given in row_copy.cu.

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "millrace/gated_residual.h"
#include "millrace/reduce.h"

namespace millrace {
namespace {

// Rows of kSources arrays on their way through shared memory: kStages - 1 ahead of the one that is read.
template <typename T, int kSources>
class RowsAhead {
  public:
    static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;  // as many bytes ahead with rows twice as long
    static constexpr int kWords = ThreadColumns<T>::kWords;

    static std::size_t shared_bytes(int threads) {
        return sizeof(Word16) * kStages * kSources * kWords * static_cast<std::size_t>(threads);
    }

    __device__ __forceinline__ RowsAhead(Word16* shared, const ThreadColumns<T>& mine,
                                         const void* const (&sources)[kSources], int first, int end)
        : shared_(shared), mine_(mine), next_(first), end_(end) {
        MILLRACE_UNROLL
        for (int i = 0; i < kSources; ++i) sources_[i] = static_cast<const T*>(sources[i]);
        MILLRACE_UNROLL
        for (int i = 0; i < kStages - 1; ++i) fetch();
    }

    // Waits for the next row. Once per row, before it is read.
    __device__ __forceinline__ void advance() {
        reading_ = reading_ + 1 < kStages ? reading_ + 1 : 0;
        fetch();
        __pipeline_wait_prior(kStages - 1);
    }

    __device__ __forceinline__ void read(int source, Columns& out) const {
        MILLRACE_UNROLL
        for (int word = 0; word < kWords; ++word) {
            Word16 held = {};
            if (mine_.holds(word)) held = *place(reading_, source, word);
            unpack<T>(held, out + word * kPerWord<T>);
        }
    }

  private:
    // Commits even where no row is left, so that the groups waited for stay in step.
    __device__ __forceinline__ void fetch() {
        if (next_ < end_) {
            MILLRACE_UNROLL
            for (int source = 0; source < kSources; ++source) {
                const T* row = sources_[source] + static_cast<int64_t>(next_) * mine_.width;
                MILLRACE_UNROLL
                for (int word = 0; word < kWords; ++word) {
                    if (!mine_.holds(word)) continue;
                    __pipeline_memcpy_async(place(writing_, source, word), row + mine_.column(word),
                                            sizeof(Word16));
                }
            }
        }
        __pipeline_commit();
        ++next_;
        writing_ = writing_ + 1 < kStages ? writing_ + 1 : 0;
    }

    __device__ __forceinline__ Word16* place(int stage, int source, int word) const {
        return shared_ + ((stage * kSources + source) * kWords + word) * mine_.threads + mine_.thread;
    }

    Word16* shared_;
    const ThreadColumns<T>& mine_;
    const T* sources_[kSources];
    int next_;
    int end_;
    int writing_ = 0;
    int reading_ = kStages - 1;
};

template <typename T>
__device__ __forceinline__ ThreadColumns<T> my_columns(const MillracePackedRows& packed) {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), static_cast<int>(packed.width)};
}

constexpr int kMostWarps = kMostThreads / kLanes;

template <typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward(const MillraceGatedResidual call, int rows_per_slot) {
    extern __shared__ Word16 ahead_words[];
    __shared__ float sum_parts[kMostWarps];
    __shared__ float square_parts[kMostWarps];
    const Slot slot = find_slot(call.packed.cu_seqlens, static_cast<int>(call.packed.samples), rows_per_slot,
                                static_cast<int>(blockIdx.x));
    if (slot.first >= slot.end) return;
    const ThreadColumns<T> mine = my_columns<T>(call.packed);
    RowsAhead<T, 2> ahead(ahead_words, mine, {call.x, call.branch}, slot.first, slot.end);
    Columns gate, shift, gain;
    mine.load_vector(call.vector_dtype, call.gate, slot.sample, gate);
    mine.load_vector(call.vector_dtype, call.shift, slot.sample, shift);
    mine.load_vector(call.vector_dtype, call.scale, slot.sample, gain);
    add_one(gain);
    const float width = static_cast<float>(call.packed.width);
    for (int64_t row = slot.first; row < slot.end; ++row) {
        Columns values, branch;
        ahead.advance();
        ahead.read(0, values);
        ahead.read(1, branch);
        add_branch<T>(values, branch, gate);
        mine.store(call.sum, row, values);
        // Two arrays in turn, so that a warp never writes what a slower one still reads: between two writes
        // of the same array lies the barrier of the other.
        float part[1] = {sum_of(values)};
        block_sum(part, sum_parts);
        const float mean = part[0] / width;
        part[0] = centred_squares(mine, values, mean);
        block_sum(part, square_parts);
        const float rstd = 1.0f / sqrtf(part[0] / width + call.eps);
        modulate(values, mean, rstd, gain, shift);
        mine.store(call.y, row, values);
        if (threadIdx.x == 0) {
            call.mean[row] = mean;
            call.rstd[row] = rstd;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward(const MillraceGatedResidualBackward call, int rows_per_slot) {
    extern __shared__ Word16 ahead_words[];
    __shared__ float row_parts[2][2 * kMostWarps];
    const Slot slot = find_slot(call.packed.cu_seqlens, static_cast<int>(call.packed.samples), rows_per_slot,
                                static_cast<int>(blockIdx.x));
    if (slot.first >= slot.end) return;
    const ThreadColumns<T> mine = my_columns<T>(call.packed);
    RowsAhead<T, 4> ahead(ahead_words, mine, {call.grad_y, call.sum, call.grad_sum, call.branch}, slot.first,
                          slot.end);
    Columns gate, gain;
    mine.load_vector(call.vector_dtype, call.gate, slot.sample, gate);
    mine.load_vector(call.vector_dtype, call.scale, slot.sample, gain);
    add_one(gain);
    VectorSums sums = {};
    const float width = static_cast<float>(call.packed.width);
    float mean = call.mean[slot.first];
    float rstd = call.rstd[slot.first];
    for (int64_t row = slot.first; row < slot.end; ++row) {
        // The statistics come a row ahead, too.
        const int64_t next = row + 1 < slot.end ? row + 1 : row;
        const float next_mean = call.mean[next];
        const float next_rstd = call.rstd[next];
        BackwardRow held;
        ahead.advance();
        ahead.read(0, held.grad_y);
        ahead.read(1, held.normed);
        float parts[2];
        begin_row(held, mean, rstd, gain, sums, parts);
        block_sum(parts, row_parts[(row - slot.first) % 2]);  // in turn, as in forward
        ahead.read(2, held.grad_sum);  // not needed before: fewer registers
        ahead.read(3, held.branch);
        finish_row(held, rstd, parts[0] / width, parts[1] / width, gain, gate, sums);
        mine.store(call.grad_x, row, held.grad_sum);
        mine.store(call.grad_branch, row, held.branch);
        mean = next_mean;
        rstd = next_rstd;
    }
    const int64_t slots = gridDim.x;
    mine.store_sums(call.workspace, blockIdx.x, sums.gate);
    mine.store_sums(call.workspace, slots + blockIdx.x, sums.shift);
    mine.store_sums(call.workspace, 2 * slots + blockIdx.x, sums.scale);
}

// Adds the slots of one sample: a warp has 32 neighbouring columns, the warps of a block take slots in turn.
constexpr int kAddWarps = 16;

__global__ void __launch_bounds__(kAddWarps * kLanes)
    add_slots(const MillracePackedRows packed, int rows_per_slot, int64_t slots, const float* workspace,
              float* grad_vectors) {
    __shared__ float parts[kAddWarps][kLanes];
    const int sample = static_cast<int>(blockIdx.x);
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x;
    const SlotRange range = slots_of_sample(packed.cu_seqlens, sample, rows_per_slot);
    float sum = 0.0f;
    if (column < packed.width) {
        const float* first = workspace + (blockIdx.z * slots + range.first) * packed.width + column;
#pragma unroll 4
        for (int slot = static_cast<int>(threadIdx.y); slot < range.count; slot += kAddWarps) {
            sum += first[slot * packed.width];
        }
    }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= packed.width) return;
    for (int warp = 1; warp < kAddWarps; ++warp) sum += parts[warp][threadIdx.x];
    grad_vectors[(blockIdx.z * packed.samples + sample) * packed.width + column] = sum;
}

// Ahead is the RowsAhead of the kernel. A launch gets 48 KiB unasked; the most it may need, 128 KiB (FP32,
// 4096 columns), is asked for whatever the width is, so that threads which launch the same kernel do not
// disagree.
template <typename Ahead, typename Call>
int launch_rows(void (*kernel)(Call, int), const Call& call, cudaStream_t stream) {
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(Ahead::shared_bytes(kMostThreads)));
    if (code != cudaSuccess) return static_cast<int>(code);
    const int rows_per_slot = residual_rows_per_slot(call.packed.rows);
    const unsigned grid = static_cast<unsigned>(slot_count(call.packed, rows_per_slot));
    const int threads = threads_of_row(call.packed.width);
    kernel<<<grid, threads, Ahead::shared_bytes(threads), stream>>>(call, rows_per_slot);
    return static_cast<int>(cudaGetLastError());
}

int launch_add_slots(const MillraceGatedResidualBackward& call, cudaStream_t stream) {
    const int rows_per_slot = residual_rows_per_slot(call.packed.rows);
    const dim3 grid(static_cast<unsigned>(call.packed.samples),
                    static_cast<unsigned>((call.packed.width + kLanes - 1) / kLanes), 3);
    add_slots<<<grid, dim3(kLanes, kAddWarps), 0, stream>>>(
        call.packed, rows_per_slot, slot_count(call.packed, rows_per_slot), call.workspace,
        call.grad_vectors);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace millrace

extern "C" int millrace_gated_residual_norm_modulate(const MillraceGatedResidual* call, void* stream) {
    using namespace millrace;
    const int code = check_arguments(*call);
    if (code != MILLRACE_SUCCESS || call->packed.rows == 0) return code;
    return with_element_type(call->dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch_rows<RowsAhead<T, 2>>(forward<T>, *call, static_cast<cudaStream_t>(stream));
    });
}

extern "C" int64_t millrace_gated_residual_workspace(const MillracePackedRows* packed) {
    return millrace::residual_workspace(*packed);
}

extern "C" int millrace_gated_residual_norm_modulate_backward(const MillraceGatedResidualBackward* call,
                                                              void* stream) {
    using namespace millrace;
    int code = check_arguments(*call);
    if (code != MILLRACE_SUCCESS) return code;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (call->packed.rows > 0) {
        code = with_element_type(call->dtype, [&](auto zero) {
            using T = decltype(zero);
            return launch_rows<RowsAhead<T, 4>>(backward<T>, *call, queue);
        });
        if (code != MILLRACE_SUCCESS) return code;
    }
    return launch_add_slots(*call, queue);
}
