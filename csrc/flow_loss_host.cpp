// flow_loss on host memory: the arithmetic of flow_loss.cu by slot and thread. Sums over a slot are added in
// the device's order; sums over slots are not.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "millrace/flow_loss.h"
#include "millrace/host.h"
#include "millrace/reduce.h"

namespace millrace {
namespace {

template <typename T, typename Data>
int squares(const MillraceFlowLoss& call) {
    for_each_slot(call.packed, loss_rows_per_slot(call), [&](int index, const Slot& slot) {
        const LossSample sample = loss_sample(call, slot.sample);
        const int64_t first = slot.first * call.packed.width - sample.first;
        const int64_t end = slot.end * call.packed.width - sample.first;
        std::vector<float> sums(kLossThreads, 0.0f);
        for (std::size_t thread = 0; thread < sums.size(); ++thread) {
            const int64_t mine = first + static_cast<int64_t>(thread) * kPerWord<T>;
            for (int64_t at = mine; at < end; at += kLossThreads * kPerWord<T>) {
                sums[thread] += loss_word<T, Data>(call, sample, at);
            }
        }
        call.workspace[index] = block_sum(sums);
    });
    return MILLRACE_SUCCESS;
}

void means(const MillraceFlowLoss& call) {
    float total = 0.0f;
    for (int sample = 0; sample < call.packed.samples; ++sample) {
        const SlotRange range = slots_of_sample(call.packed.cu_seqlens, sample, loss_rows_per_slot(call));
        float sum = 0.0f;
        for (int slot = 0; slot < range.count; ++slot) sum += call.workspace[range.first + slot];
        total += sum;
        call.per_sample[sample] = mean_of_sample(call.packed, sample, sum);
    }
    *call.loss = mean_of_all(call.packed, total);
}

}  // namespace
}  // namespace millrace

extern "C" int64_t millrace_flow_loss_workspace(const MillraceFlowLoss* call) {
    return millrace::loss_workspace(*call);
}

extern "C" int millrace_flow_loss(const MillraceFlowLoss* call, void* /*stream*/) {
    using namespace millrace;
    int code = check_arguments(*call);
    if (code != MILLRACE_SUCCESS) return code;
    if (!are_offsets(call->packed)) return MILLRACE_INVALID_OFFSETS;
    for (int64_t b = 0; call->negative != nullptr && b < call->packed.samples; ++b) {
        if (call->negative[b] >= call->packed.samples) return MILLRACE_INDEX_OUT_OF_RANGE;
    }
    code = on_host([&] {
        return with_loss_types(*call, [&](auto zero, auto data) {
            return squares<decltype(zero), decltype(data)>(*call);
        });
    });
    if (code == MILLRACE_SUCCESS) means(*call);
    return code;
}
