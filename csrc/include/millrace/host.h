// What the operations of the host library over packed rows share.

#ifndef MILLRACE_HOST_H_
#define MILLRACE_HOST_H_

#include <cstdint>
#include <new>

#include "millrace/api.h"
#include "millrace/slots.h"

namespace millrace {

// No exception leaves the C interface.
template <typename Run>
int on_host(Run run) {
    try {
        return run();
    } catch (const std::bad_alloc&) {
        return MILLRACE_OUT_OF_MEMORY;
    }
}

// visit(index, slot) for the slots that have rows, as the blocks of a launch.
template <typename Visit>
void for_each_slot(const MillracePackedRows& packed, int rows_per_slot, Visit visit) {
    const int slots = static_cast<int>(slot_count(packed, rows_per_slot));
    for (int index = 0; index < slots; ++index) {
        const Slot slot =
            find_slot(packed.cu_seqlens, static_cast<int>(packed.samples), rows_per_slot, index);
        if (slot.first < slot.end) visit(index, slot);
    }
}

}  // namespace millrace

#endif  // MILLRACE_HOST_H_
