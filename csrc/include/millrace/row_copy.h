// Arithmetic of gather_rows and scatter_rows: how a row is split into words, which lane copies which word,
// and which arguments are refused. Plain C++ without a CUDA header: nvcc compiles it into the kernels, g++
// into the host library, so the code that is tested on a CPU is the code that runs on the GPU.

#ifndef MILLRACE_ROW_COPY_H_
#define MILLRACE_ROW_COPY_H_

#include <cstdint>

#include "millrace/api.h"
#include "millrace/portable.h"

namespace millrace {

// One warp copies one row. A lane loads this many words before it stores the first: bytes in flight are what
// hides memory latency. Four 16-byte words a lane are 2 KiB a warp, and with the 40 warps that fit an SM at
// 48 registers, 80 KiB. By Little's law an H200 needs about 36 KiB (4.8 TB/s over 132 SMs, latency under load
// taken as 1 us).
constexpr int kBatch = 4;

// A row as `head` single bytes, aligned words of `word_bytes`, and `tail` single bytes.
struct RowSplit {
    int word_bytes;  // 16, 8, 4, 2 or 1
    int head;        // in [0, word_bytes)
    int tail;        // in [0, word_bytes)
};

// Source and destination can both be aligned to a word only if they agree modulo its size, so the widest
// usable word is the largest power of two, 16 at most, that divides the difference of the addresses. Rows
// that are multiples of 16 bytes in 16-byte aligned tensors (every width a transformer uses) are whole
// 16-byte words without head or tail; any other row takes the widest word its own two addresses allow.
MILLRACE_HOST_DEVICE RowSplit split_row(uintptr_t source, uintptr_t destination, int64_t row_bytes) {
    const uintptr_t disagreement = (source ^ destination) | 16;
    const int word_bytes = static_cast<int>(disagreement & (~disagreement + 1));
    const int within_word = word_bytes - 1;  // mask
    const int to_boundary = static_cast<int>(~destination + 1) & within_word;
    const int head = to_boundary < row_bytes ? to_boundary : static_cast<int>(row_bytes);
    return {word_bytes, head, static_cast<int>(row_bytes - head) & within_word};
}

// Lane l copies words l, l + 32, l + 64, ...: at every step the warp touches 32 neighbouring words, for
// 16-byte words 512 contiguous bytes.
template <typename Unit>
MILLRACE_HOST_DEVICE void copy_words(int lane, const char* source, char* destination, int64_t bytes) {
    const Unit* from = reinterpret_cast<const Unit*>(source);
    Unit* to = reinterpret_cast<Unit*>(destination);
    const int64_t words = bytes / static_cast<int64_t>(sizeof(Unit));
    for (int64_t first = lane; first < words; first += kLanes * kBatch) {
        Unit held[kBatch] = {};
        MILLRACE_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            if (first + i * kLanes < words) held[i] = from[first + i * kLanes];
        }
        MILLRACE_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            if (first + i * kLanes < words) to[first + i * kLanes] = held[i];
        }
    }
}

// The part of one row's copy that belongs to `lane`; the 32 lanes together copy every byte exactly once. The
// split depends on the row alone, so all lanes of a warp take the same branch.
MILLRACE_HOST_DEVICE void copy_row(int lane, const char* source, char* destination, int64_t row_bytes) {
    const RowSplit split =
        split_row(reinterpret_cast<uintptr_t>(source), reinterpret_cast<uintptr_t>(destination), row_bytes);
    const char* from = source + split.head;
    char* to = destination + split.head;
    const int64_t body = row_bytes - split.head - split.tail;
    if (split.word_bytes == 16) {
        copy_words<Word16>(lane, from, to, body);
    } else if (split.word_bytes == 8) {
        copy_words<Word8>(lane, from, to, body);
    } else if (split.word_bytes == 4) {
        copy_words<Word4>(lane, from, to, body);
    } else if (split.word_bytes == 2) {
        copy_words<Word2>(lane, from, to, body);
    } else {
        copy_words<Word1>(lane, from, to, body);
    }
    // Head and tail are shorter than a word, hence than the warp: one lane a byte.
    if (lane < split.head) destination[lane] = source[lane];
    if (lane < split.tail) to[body + lane] = from[body + lane];
}

// One call of the C interface. A gather takes the rows that the index names, a scatter writes to them.
// `table` is the array whose rows are named: the source of a gather, the destination of a scatter.
struct RowCopy {
    bool scatter;
    const void* source;
    void* destination;
    int64_t table_rows;
    const void* index;
    int index_bytes;
    int64_t index_count;
    int64_t row_bytes;

    bool empty() const { return index_count == 0 || row_bytes == 0; }
};

// Entry k of the index, naming `row`. Offsets are 64-bit: 2^20 tokens of 7168 bytes already pass 2^32.
MILLRACE_HOST_DEVICE void copy_entry(bool scatter, int lane, int64_t k, int64_t row, const char* source,
                                     char* destination, int64_t row_bytes) {
    const int64_t source_row = scatter ? k : row;
    const int64_t destination_row = scatter ? row : k;
    copy_row(lane, source + source_row * row_bytes, destination + destination_row * row_bytes, row_bytes);
}

inline bool overlap(uintptr_t a, uintptr_t a_bytes, uintptr_t b, uintptr_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

// What can be refused without reading the index. Both libraries call it first.
inline int check_arguments(const RowCopy& copy) {
    if (copy.index_bytes != 4 && copy.index_bytes != 8) return MILLRACE_INVALID_ARGUMENT;
    if (copy.table_rows < 0 || copy.index_count < 0 || copy.row_bytes < 0) return MILLRACE_INVALID_ARGUMENT;
    const int64_t most_rows = copy.table_rows > copy.index_count ? copy.table_rows : copy.index_count;
    const int64_t widest = copy.row_bytes > copy.index_bytes ? copy.row_bytes : copy.index_bytes;
    if (most_rows > INT64_MAX / widest) return MILLRACE_INVALID_ARGUMENT;
    if (copy.index_count == 0) return MILLRACE_SUCCESS;
    if (copy.table_rows == 0) return MILLRACE_INDEX_OUT_OF_RANGE;
    if (copy.scatter && copy.index_count > copy.table_rows) return MILLRACE_INDEX_REPEATED;

    const uintptr_t source = reinterpret_cast<uintptr_t>(copy.source);
    const uintptr_t destination = reinterpret_cast<uintptr_t>(copy.destination);
    const uintptr_t index = reinterpret_cast<uintptr_t>(copy.index);
    if (index == 0 || index % static_cast<uintptr_t>(copy.index_bytes) != 0) return MILLRACE_INVALID_ARGUMENT;
    if (copy.row_bytes == 0) return MILLRACE_SUCCESS;
    if (source == 0 || destination == 0) return MILLRACE_INVALID_ARGUMENT;
    const uintptr_t table_bytes = static_cast<uintptr_t>(copy.table_rows * copy.row_bytes);
    const uintptr_t moved_bytes = static_cast<uintptr_t>(copy.index_count * copy.row_bytes);
    const uintptr_t index_bytes = static_cast<uintptr_t>(copy.index_count * copy.index_bytes);
    const uintptr_t source_bytes = copy.scatter ? moved_bytes : table_bytes;
    const uintptr_t destination_bytes = copy.scatter ? table_bytes : moved_bytes;
    if (overlap(source, source_bytes, destination, destination_bytes) ||
        overlap(index, index_bytes, destination, destination_bytes)) {
        return MILLRACE_INVALID_ARGUMENT;
    }
    return MILLRACE_SUCCESS;
}

}  // namespace millrace

#endif  // MILLRACE_ROW_COPY_H_
