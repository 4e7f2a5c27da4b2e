// Runs the host library on heap arrays of exactly the size they must have, so that the address sanitizer sees
// a read or write beyond one, and checks that the slots of packed rows hold every row once, in their sample's
// range. test_row_operations.py compiles it with the sanitizers.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "millrace/slots.h"

namespace {

void expect(bool condition, const char* what) {
    if (condition) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

// 16-byte aligned, zero, and not a byte longer than asked.
struct Free {
    void operator()(char* memory) const { std::free(memory); }
};
using Array = std::unique_ptr<char, Free>;

Array array(int64_t elements, int64_t bytes) {
    return Array(static_cast<char*>(std::calloc(static_cast<std::size_t>(elements * bytes), 1)));
}

float* floats(const Array& memory) { return reinterpret_cast<float*>(memory.get()); }

std::vector<int32_t> offsets_of(const std::vector<int>& lengths) {
    std::vector<int32_t> offsets(lengths.size() + 1, 0);
    std::partial_sum(lengths.begin(), lengths.end(), offsets.begin() + 1);
    return offsets;
}

int check_slots(const std::vector<int>& lengths, int rows_per_slot) {
    const std::vector<int32_t> offsets = offsets_of(lengths);
    const int samples = static_cast<int>(lengths.size());
    const MillracePackedRows packed = {offsets.data(), samples, offsets.back(), 8};
    std::vector<int> seen(static_cast<std::size_t>(offsets.back()), 0);
    const int slots = static_cast<int>(millrace::slot_count(packed, rows_per_slot));
    for (int index = 0; index < slots; ++index) {
        const millrace::Slot slot = millrace::find_slot(offsets.data(), samples, rows_per_slot, index);
        if (slot.first >= slot.end) continue;
        expect(slot.first >= offsets[slot.sample], "first row of a slot");
        expect(slot.end <= offsets[slot.sample + 1], "last row of a slot");
        expect(slot.end - slot.first <= rows_per_slot, "rows of a slot");
        const auto range = millrace::slots_of_sample(offsets.data(), slot.sample, rows_per_slot);
        expect(index >= range.first && index < range.first + range.count, "slots of a sample");
        for (int row = slot.first; row < slot.end; ++row) ++seen[static_cast<std::size_t>(row)];
    }
    for (const int times : seen) expect(times == 1, "rows in exactly one slot");
    int counted = 0;
    for (int b = 0; b < samples; ++b) {
        counted += millrace::slots_of_sample(offsets.data(), b, rows_per_slot).count;
    }
    expect(counted <= slots, "number of slots");
    return slots;
}

void call(const std::vector<int>& lengths, int64_t width, int dtype) {
    const std::vector<int32_t> offsets = offsets_of(lengths);
    const int64_t samples = static_cast<int64_t>(lengths.size()), rows = offsets.back();
    const int64_t bytes = dtype == MILLRACE_FLOAT32 ? 4 : 2, size = rows * width;
    const MillracePackedRows packed = {offsets.data(), samples, rows, width};
    const Array a = array(size, bytes), b = array(size, bytes), c = array(size, bytes);
    const Array d = array(size, bytes), e = array(size, bytes), f = array(size, bytes);
    const Array vectors = array(samples * width, bytes), mean = array(rows, 4), rstd = array(rows, 4);
    const MillraceSampleVectors vector = {vectors.get(), width};
    MillraceGatedResidual forward = {packed, dtype,  dtype,  1e-6f,   a.get(), b.get(),
                                     vector, vector, vector, c.get(), d.get(), floats(mean),
                                     floats(rstd)};
    expect(millrace_gated_residual_norm_modulate(&forward, nullptr) == MILLRACE_SUCCESS, "forward");
    const Array grads = array(3 * samples * width, 4);
    const Array workspace = array(millrace_gated_residual_workspace(&packed), 4);
    MillraceGatedResidualBackward backward = {packed,       dtype,        dtype,   a.get(),
                                              d.get(),      c.get(),      b.get(), vector,
                                              vector,       floats(mean), floats(rstd), e.get(),
                                              f.get(),      floats(grads), floats(workspace)};
    const int code = millrace_gated_residual_norm_modulate_backward(&backward, nullptr);
    expect(code == MILLRACE_SUCCESS, "backward");

    const Array t = array(samples, 4), loss = array(1, 4), per_sample = array(samples, 4);
    MillraceFlowLoss flow = {packed,  dtype,   dtype,   1,         0.5f,    0.05f,        a.get(),
                             b.get(), c.get(), floats(t), nullptr, floats(loss), floats(per_sample), d.get(),
                             nullptr};
    const Array partial = array(millrace_flow_loss_workspace(&flow), 4);
    flow.workspace = floats(partial);
    expect(millrace_flow_loss(&flow, nullptr) == MILLRACE_SUCCESS, "flow loss");
}

}  // namespace

int main() {
    int slots = 0;
    for (int rows_per_slot : {1, 2, 3, 7, 64}) {
        for (const std::vector<int>& lengths :
             {std::vector<int>{1}, {0, 0, 5, 0}, {64, 64, 64}, {1, 2, 3, 4, 5}, {0, 200, 0, 1, 129}, {13}}) {
            slots += check_slots(lengths, rows_per_slot);
        }
    }
    int calls = 0;
    for (int dtype : {MILLRACE_FLOAT32, MILLRACE_BFLOAT16, MILLRACE_FLOAT16}) {
        for (int64_t width : {int64_t{8}, int64_t{264}, int64_t{4096}}) {
            for (const std::vector<int>& lengths : {std::vector<int>{1}, {0, 3, 0}, {2, 5}, {1100, 0, 30}}) {
                if (lengths[0] > 1000 && width > 8) {
                    call({1, 2, 3}, width, dtype);
                } else {
                    call(lengths, width, dtype);
                }
                ++calls;
            }
        }
    }
    std::printf("%d slots, %d calls\n", slots, calls);
    return 0;
}
