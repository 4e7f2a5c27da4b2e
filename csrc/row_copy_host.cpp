// gather_rows and scatter_rows on host memory: the twin of row_copy.cu that runs the same arithmetic lane by
// lane and checks every index first. It exists to test that arithmetic and to check a caller's arguments
// where no GPU is at hand; it is not a fast CPU path.

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "millrace/row_copy.h"

namespace millrace {
namespace {

template <typename Index>
int check_index(const RowCopy& copy) {
    const Index* index = static_cast<const Index*>(copy.index);
    std::vector<bool> written(copy.scatter ? static_cast<std::size_t>(copy.table_rows) : 0);
    for (int64_t k = 0; k < copy.index_count; ++k) {
        const int64_t row = index[k];
        if (row < 0 || row >= copy.table_rows) return MILLRACE_INDEX_OUT_OF_RANGE;
        if (!copy.scatter) continue;
        if (written[static_cast<std::size_t>(row)]) return MILLRACE_INDEX_REPEATED;
        written[static_cast<std::size_t>(row)] = true;
    }
    return MILLRACE_SUCCESS;
}

template <typename Index>
int copy_rows(const RowCopy& copy) {
    const int code = check_index<Index>(copy);
    if (code != MILLRACE_SUCCESS || copy.empty()) return code;
    const Index* index = static_cast<const Index*>(copy.index);
    for (int64_t k = 0; k < copy.index_count; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) {
            copy_entry(copy.scatter, lane, k, index[k], static_cast<const char*>(copy.source),
                       static_cast<char*>(copy.destination), copy.row_bytes);
        }
    }
    return MILLRACE_SUCCESS;
}

int run(const RowCopy& copy) {
    const int code = check_arguments(copy);
    if (code != MILLRACE_SUCCESS) return code;
    try {
        return copy.index_bytes == 4 ? copy_rows<int32_t>(copy) : copy_rows<int64_t>(copy);
    } catch (const std::bad_alloc&) {
        return MILLRACE_OUT_OF_MEMORY;
    }
}

}  // namespace
}  // namespace millrace

extern "C" int millrace_gather_rows(const void* x, int64_t x_rows, const void* index, int index_bytes,
                                    int64_t index_count, void* out, int64_t row_bytes, void* /*stream*/) {
    return millrace::run({false, x, out, x_rows, index, index_bytes, index_count, row_bytes});
}

extern "C" int millrace_scatter_rows(void* base, int64_t base_rows, const void* update, const void* index,
                                     int index_bytes, int64_t index_count, int64_t row_bytes,
                                     void* /*stream*/) {
    return millrace::run({true, update, base, base_rows, index, index_bytes, index_count, row_bytes});
}
