// Arithmetic of gated_residual_norm_modulate and its derivative: what one thread does with its columns of a
// row between the sums over the row, and which arguments are refused.

#ifndef MILLRACE_GATED_RESIDUAL_H_
#define MILLRACE_GATED_RESIDUAL_H_

#include <cstdint>

#include "millrace/api.h"
#include "millrace/numbers.h"
#include "millrace/portable.h"
#include "millrace/slots.h"

namespace millrace {

// A block takes a row, a thread eight of its columns: with 16-bit elements one word of each array, 224
// threads at a width of 1792 and 448 at 3584, none of them idle.
constexpr int kColumns = 8;
constexpr int kMostThreads = 512;
constexpr int kWidest = kColumns * kMostThreads;

inline int threads_of_row(int64_t width) {
    const int64_t threads = (width + kColumns - 1) / kColumns;
    return static_cast<int>((threads + kLanes - 1) / kLanes * kLanes);
}

// A block reads its sample's vectors once, so longer slots read and, backward, sum fewer of them; 1024 slots
// are two full waves of forward blocks on an H200 at a width of 1792.
inline int residual_rows_per_slot(int64_t rows) { return rows_per_slot(rows, 1024, 1, 64); }

inline int64_t residual_workspace(const MillracePackedRows& packed) {
    return 3 * slot_count(packed, residual_rows_per_slot(packed.rows)) * packed.width;
}

using Columns = float[kColumns];

// The columns of a thread: neighbouring threads have neighbouring words.
template <typename T>
struct ThreadColumns {
    static constexpr int kWords = kColumns / kPerWord<T>;
    int thread;
    int threads;
    int width;

    MILLRACE_HOST_DEVICE int column(int word) const { return (word * threads + thread) * kPerWord<T>; }
    MILLRACE_HOST_DEVICE bool holds(int word) const { return column(word) < width; }

    // Zero where the row has ended, so that sums need no mask.
    template <typename Stored>
    MILLRACE_HOST_DEVICE void load_as(const void* array, int64_t at, Columns& out) const {
        MILLRACE_UNROLL
        for (int word = 0; word < kWords; ++word) {
            Packed<T, Stored> packed = {};
            if (holds(word)) packed = Packed<T, Stored>::load(array, at + column(word));
            packed.unpack(out + word * kPerWord<T>);
        }
    }
    MILLRACE_HOST_DEVICE void load_vector(int dtype, const MillraceSampleVectors& vectors, int sample,
                                          Columns& out) const {
        if (dtype == MILLRACE_FLOAT32) {
            load_as<float>(vectors.data, sample * vectors.stride, out);
        } else {
            load_as<T>(vectors.data, sample * vectors.stride, out);
        }
    }
    MILLRACE_HOST_DEVICE void store(void* array, int64_t row, const Columns& values) const {
        MILLRACE_UNROLL
        for (int word = 0; word < kWords; ++word) {
            if (!holds(word)) continue;
            T* to = static_cast<T*>(array) + row * width + column(word);
            *reinterpret_cast<Word16*>(to) = pack<T>(values + word * kPerWord<T>);
        }
    }
    MILLRACE_HOST_DEVICE void store_sums(float* vectors, int64_t vector, const Columns& sums) const {
        MILLRACE_UNROLL
        for (int word = 0; word < kWords; ++word) {
            if (!holds(word)) continue;
            float* to = vectors + vector * width + column(word);
            MILLRACE_UNROLL
            for (int i = 0; i < kPerWord<T>; i += 4) {
                *reinterpret_cast<Word16*>(to + i) = pack<float>(sums + word * kPerWord<T> + i);
            }
        }
    }
};

MILLRACE_HOST_DEVICE float sum_of(const Columns& values) {
    float sum = 0.0f;
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) sum += values[i];
    return sum;
}

// x + gate * branch as it is stored, so that the norm sees what backward will see; in place of x.
template <typename T>
MILLRACE_HOST_DEVICE void add_branch(Columns& x, const Columns& branch, const Columns& gate) {
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) x[i] = rounded<T>(x[i] + gate[i] * branch[i]);
}

// The variance is summed around the mean, in a second turn over registers: E[x^2] - E[x]^2 would cancel.
template <typename T>
MILLRACE_HOST_DEVICE float centred_squares(const ThreadColumns<T>& mine, const Columns& values, float mean) {
    float sum = 0.0f;
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
        const float centred = values[i] - mean;
        if (mine.holds(i / kPerWord<T>)) sum += centred * centred;
    }
    return sum;
}

// In place of the values; `gain` is 1 + scale.
MILLRACE_HOST_DEVICE void modulate(Columns& values, float mean, float rstd, const Columns& gain,
                                   const Columns& shift) {
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) values[i] = (values[i] - mean) * rstd * gain[i] + shift[i];
}

// What backward holds of a row.
struct BackwardRow {
    Columns grad_sum;
    Columns grad_y;
    Columns normed;  // read as sum
    Columns branch;
};

struct VectorSums {
    Columns gate;
    Columns shift;
    Columns scale;
};

// Before the sums over the row: their parts sum(g) and sum(g * n), and the row's share of two gradients.
MILLRACE_HOST_DEVICE void begin_row(BackwardRow& row, float mean, float rstd, const Columns& gain,
                                    VectorSums& sums, float (&parts)[2]) {
    parts[0] = parts[1] = 0.0f;
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
        row.normed[i] = (row.normed[i] - mean) * rstd;
        const float product = row.grad_y[i] * row.normed[i];
        parts[0] += row.grad_y[i] * gain[i];
        parts[1] += product * gain[i];
        sums.shift[i] += row.grad_y[i];
        sums.scale[i] += product;
    }
}

// After them: grad_x in place of grad_sum, grad_branch in place of branch.
MILLRACE_HOST_DEVICE void finish_row(BackwardRow& row, float rstd, float mean_g, float mean_gn,
                                     const Columns& gain, const Columns& gate, VectorSums& sums) {
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
        const float through = row.grad_y[i] * gain[i] - mean_g - row.normed[i] * mean_gn;
        const float total = row.grad_sum[i] + rstd * through;
        sums.gate[i] += total * row.branch[i];
        row.grad_sum[i] = total;
        row.branch[i] = gate[i] * total;
    }
}

MILLRACE_HOST_DEVICE void add_one(Columns& scale) {
    MILLRACE_UNROLL
    for (int i = 0; i < kColumns; ++i) scale[i] += 1.0f;
}

inline bool are_aligned(const MillraceSampleVectors& vectors, int dtype) {
    return is_aligned(vectors.data) && vectors.stride >= 0 && vectors.stride * dtype_bytes(dtype) % 16 == 0;
}

// The part that forward and backward share.
template <typename Call>
int check_rows(const Call& call) {
    if (!are_valid(call.packed) || !is_dtype(call.dtype)) return MILLRACE_INVALID_ARGUMENT;
    if (call.vector_dtype != call.dtype && call.vector_dtype != MILLRACE_FLOAT32) {
        return MILLRACE_INVALID_ARGUMENT;
    }
    if (call.packed.width > kWidest) return MILLRACE_UNSUPPORTED_WIDTH;
    if (call.packed.width * dtype_bytes(call.dtype) % 16 != 0) return MILLRACE_UNSUPPORTED_WIDTH;
    return MILLRACE_SUCCESS;
}

inline int check_arguments(const MillraceGatedResidual& call) {
    const int code = check_rows(call);
    if (code != MILLRACE_SUCCESS || call.packed.rows == 0) return code;
    const bool good = is_aligned(call.x) && is_aligned(call.branch) && is_aligned(call.sum) &&
                      is_aligned(call.y) && call.mean != nullptr && call.rstd != nullptr &&
                      are_aligned(call.gate, call.vector_dtype) &&
                      are_aligned(call.shift, call.vector_dtype) &&
                      are_aligned(call.scale, call.vector_dtype);
    return good ? MILLRACE_SUCCESS : MILLRACE_INVALID_ARGUMENT;
}

inline int check_arguments(const MillraceGatedResidualBackward& call) {
    const int code = check_rows(call);
    if (code != MILLRACE_SUCCESS) return code;
    if (!is_aligned(call.grad_vectors)) return MILLRACE_INVALID_ARGUMENT;
    if (call.packed.rows == 0) return MILLRACE_SUCCESS;
    const bool good = is_aligned(call.grad_sum) && is_aligned(call.grad_y) && is_aligned(call.sum) &&
                      is_aligned(call.branch) && is_aligned(call.grad_x) && is_aligned(call.grad_branch) &&
                      call.mean != nullptr && call.rstd != nullptr && is_aligned(call.workspace) &&
                      are_aligned(call.gate, call.vector_dtype) && are_aligned(call.scale, call.vector_dtype);
    return good ? MILLRACE_SUCCESS : MILLRACE_INVALID_ARGUMENT;
}

}  // namespace millrace

#endif  // MILLRACE_GATED_RESIDUAL_H_
