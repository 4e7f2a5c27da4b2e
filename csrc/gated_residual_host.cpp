// gated_residual_norm_modulate and its derivative on host memory: the arithmetic of gated_residual.cu by slot
// and thread by thread. Sums over a row are added in the device's order; sums over slots are not.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "millrace/gated_residual.h"
#include "millrace/host.h"
#include "millrace/reduce.h"

namespace millrace {
namespace {

template <typename T>
std::vector<ThreadColumns<T>> threads_of(const MillracePackedRows& packed) {
    const int threads = threads_of_row(packed.width);
    std::vector<ThreadColumns<T>> out;
    for (int thread = 0; thread < threads; ++thread) {
        out.push_back({thread, threads, static_cast<int>(packed.width)});
    }
    return out;
}

template <typename T>
int forward(const MillraceGatedResidual& call) {
    struct Held {
        Columns values, branch, gate, shift, gain;
    };
    const std::vector<ThreadColumns<T>> threads = threads_of<T>(call.packed);
    std::vector<Held> held(threads.size());
    std::vector<float> parts(threads.size());
    const float width = static_cast<float>(call.packed.width);
    for_each_slot(call.packed, residual_rows_per_slot(call.packed.rows), [&](int, const Slot& slot) {
        for (std::size_t i = 0; i < threads.size(); ++i) {
            threads[i].load_vector(call.vector_dtype, call.gate, slot.sample, held[i].gate);
            threads[i].load_vector(call.vector_dtype, call.shift, slot.sample, held[i].shift);
            threads[i].load_vector(call.vector_dtype, call.scale, slot.sample, held[i].gain);
            add_one(held[i].gain);
        }
        for (int64_t row = slot.first; row < slot.end; ++row) {
            for (std::size_t i = 0; i < threads.size(); ++i) {
                threads[i].template load_as<T>(call.x, row * call.packed.width, held[i].values);
                threads[i].template load_as<T>(call.branch, row * call.packed.width, held[i].branch);
                add_branch<T>(held[i].values, held[i].branch, held[i].gate);
                threads[i].store(call.sum, row, held[i].values);
                parts[i] = sum_of(held[i].values);
            }
            const float mean = block_sum(parts) / width;
            for (std::size_t i = 0; i < threads.size(); ++i) {
                parts[i] = centred_squares(threads[i], held[i].values, mean);
            }
            const float rstd = 1.0f / std::sqrt(block_sum(parts) / width + call.eps);
            for (std::size_t i = 0; i < threads.size(); ++i) {
                modulate(held[i].values, mean, rstd, held[i].gain, held[i].shift);
                threads[i].store(call.y, row, held[i].values);
            }
            call.mean[row] = mean;
            call.rstd[row] = rstd;
        }
    });
    return MILLRACE_SUCCESS;
}

template <typename T>
int backward(const MillraceGatedResidualBackward& call) {
    struct Held {
        BackwardRow row;
        Columns gate, gain;
        VectorSums sums;
    };
    const int rows_per_slot = residual_rows_per_slot(call.packed.rows);
    const int64_t slots = slot_count(call.packed, rows_per_slot);
    const std::vector<ThreadColumns<T>> threads = threads_of<T>(call.packed);
    std::vector<Held> held(threads.size());
    std::vector<float> g(threads.size()), gn(threads.size());
    const float width = static_cast<float>(call.packed.width);
    for_each_slot(call.packed, rows_per_slot, [&](int index, const Slot& slot) {
        for (std::size_t i = 0; i < threads.size(); ++i) {
            threads[i].load_vector(call.vector_dtype, call.gate, slot.sample, held[i].gate);
            threads[i].load_vector(call.vector_dtype, call.scale, slot.sample, held[i].gain);
            add_one(held[i].gain);
            held[i].sums = {};
        }
        for (int64_t row = slot.first; row < slot.end; ++row) {
            const float rstd = call.rstd[row];
            for (std::size_t i = 0; i < threads.size(); ++i) {
                BackwardRow& mine = held[i].row;
                threads[i].template load_as<T>(call.grad_sum, row * call.packed.width, mine.grad_sum);
                threads[i].template load_as<T>(call.grad_y, row * call.packed.width, mine.grad_y);
                threads[i].template load_as<T>(call.sum, row * call.packed.width, mine.normed);
                threads[i].template load_as<T>(call.branch, row * call.packed.width, mine.branch);
                float parts[2];
                begin_row(mine, call.mean[row], rstd, held[i].gain, held[i].sums, parts);
                g[i] = parts[0];
                gn[i] = parts[1];
            }
            const float mean_g = block_sum(g) / width;
            const float mean_gn = block_sum(gn) / width;
            for (std::size_t i = 0; i < threads.size(); ++i) {
                finish_row(held[i].row, rstd, mean_g, mean_gn, held[i].gain, held[i].gate, held[i].sums);
                threads[i].store(call.grad_x, row, held[i].row.grad_sum);
                threads[i].store(call.grad_branch, row, held[i].row.branch);
            }
        }
        for (std::size_t i = 0; i < threads.size(); ++i) {
            threads[i].store_sums(call.workspace, index, held[i].sums.gate);
            threads[i].store_sums(call.workspace, slots + index, held[i].sums.shift);
            threads[i].store_sums(call.workspace, 2 * slots + index, held[i].sums.scale);
        }
    });
    return MILLRACE_SUCCESS;
}

void add_slots(const MillraceGatedResidualBackward& call) {
    const int rows_per_slot = residual_rows_per_slot(call.packed.rows);
    const int64_t slots = slot_count(call.packed, rows_per_slot);
    float* out = call.grad_vectors;
    for (int64_t vector = 0; vector < 3; ++vector) {
        for (int sample = 0; sample < call.packed.samples; ++sample) {
            const SlotRange range = slots_of_sample(call.packed.cu_seqlens, sample, rows_per_slot);
            for (int64_t column = 0; column < call.packed.width; ++column) {
                const int64_t first = (vector * slots + range.first) * call.packed.width + column;
                float sum = 0.0f;
                for (int slot = 0; slot < range.count; ++slot) {
                    sum += call.workspace[first + slot * call.packed.width];
                }
                *out++ = sum;
            }
        }
    }
}

}  // namespace
}  // namespace millrace

extern "C" int millrace_gated_residual_norm_modulate(const MillraceGatedResidual* call, void* /*stream*/) {
    using namespace millrace;
    const int code = check_arguments(*call);
    if (code != MILLRACE_SUCCESS) return code;
    if (!are_offsets(call->packed)) return MILLRACE_INVALID_OFFSETS;
    return on_host([&] {
        return with_element_type(call->dtype, [&](auto zero) { return forward<decltype(zero)>(*call); });
    });
}

extern "C" int64_t millrace_gated_residual_workspace(const MillracePackedRows* packed) {
    return millrace::residual_workspace(*packed);
}

extern "C" int millrace_gated_residual_norm_modulate_backward(const MillraceGatedResidualBackward* call,
                                                              void* /*stream*/) {
    using namespace millrace;
    int code = check_arguments(*call);
    if (code != MILLRACE_SUCCESS) return code;
    if (!are_offsets(call->packed)) return MILLRACE_INVALID_OFFSETS;
    code = on_host([&] {
        return with_element_type(call->dtype, [&](auto zero) { return backward<decltype(zero)>(*call); });
    });
    if (code == MILLRACE_SUCCESS) add_slots(*call);
    return code;
}
