// How packed rows are cut into slots, the pieces of work that a block takes: up to `rows_per_slot` rows of
// one sample, so that a block reads the vectors of its sample once and adds up their gradients in registers.
//
// Sample b owns the slots from cu_seqlens[b] / rows_per_slot + b on, up to those of sample b + 1. That is
// never too few for its rows and at most one too many, so the launch is known on the host (rows /
// rows_per_slot + samples slots) though the lengths are known on the device alone, whatever their spread.

#ifndef MILLRACE_SLOTS_H_
#define MILLRACE_SLOTS_H_

#include <cstdint>

#include "millrace/api.h"
#include "millrace/portable.h"

namespace millrace {

struct Slot {
    int sample;
    int first;  // row
    int end;    // first + 1 ... first + rows_per_slot; first or less where the slot is empty
};

struct SlotRange {
    int first;
    int count;  // those with rows in them
};

inline int64_t slot_count(const MillracePackedRows& packed, int rows_per_slot) {
    return packed.rows / rows_per_slot + packed.samples;
}

// Rows that make about `slots` slots of all rows, between `least` and `most`. A function of the sizes alone,
// so sums are added in the same order on every GPU.
inline int rows_per_slot(int64_t rows, int64_t slots, int64_t least, int64_t most) {
    const int64_t even = (rows + slots - 1) / slots;
    return static_cast<int>(even < least ? least : even > most ? most : even);
}

MILLRACE_HOST_DEVICE int first_slot(const int32_t* cu_seqlens, int sample, int rows_per_slot) {
    return cu_seqlens[sample] / rows_per_slot + sample;
}

MILLRACE_HOST_DEVICE Slot find_slot(const int32_t* cu_seqlens, int samples, int rows_per_slot, int slot) {
    int sample = 0;
    for (int above = samples; above - sample > 1;) {
        const int middle = sample + (above - sample) / 2;
        if (first_slot(cu_seqlens, middle, rows_per_slot) <= slot) {
            sample = middle;
        } else {
            above = middle;
        }
    }
    const int start = cu_seqlens[sample];
    const int end = cu_seqlens[sample + 1];
    const int first = start + (slot - start / rows_per_slot - sample) * rows_per_slot;
    return {sample, first, end - first < rows_per_slot ? end : first + rows_per_slot};
}

MILLRACE_HOST_DEVICE SlotRange slots_of_sample(const int32_t* cu_seqlens, int sample, int rows_per_slot) {
    const int length = cu_seqlens[sample + 1] - cu_seqlens[sample];
    return {first_slot(cu_seqlens, sample, rows_per_slot), (length + rows_per_slot - 1) / rows_per_slot};
}

// Slots and rows are counted in 32 bits on the device.
inline bool are_valid(const MillracePackedRows& packed) {
    return packed.rows >= 0 && packed.samples >= 1 && packed.width >= 1 && packed.cu_seqlens != nullptr &&
           packed.rows <= INT32_MAX / 2 && packed.samples <= INT32_MAX / 2 &&
           reinterpret_cast<uintptr_t>(packed.cu_seqlens) % sizeof(int32_t) == 0;
}

// The host library reads the offsets and can say whether they are ones.
inline bool are_offsets(const MillracePackedRows& packed) {
    if (packed.cu_seqlens[0] != 0 || packed.cu_seqlens[packed.samples] != packed.rows) return false;
    for (int64_t b = 0; b < packed.samples; ++b) {
        if (packed.cu_seqlens[b + 1] < packed.cu_seqlens[b]) return false;
    }
    return true;
}

}  // namespace millrace

#endif  // MILLRACE_SLOTS_H_
