// Arithmetic of flow_loss: the constants of a sample, one 16-byte word of predictions, and which arguments
// are refused.

#ifndef MILLRACE_FLOW_LOSS_H_
#define MILLRACE_FLOW_LOSS_H_

#include <cstdint>

#include "millrace/api.h"
#include "millrace/numbers.h"
#include "millrace/portable.h"
#include "millrace/slots.h"

namespace millrace {

constexpr int kLossThreads = 256;

// At least two words a thread.
inline int loss_rows_per_slot(const MillraceFlowLoss& call) {
    const int64_t words = call.packed.width * dtype_bytes(call.dtype) / 16;
    const int64_t most = call.packed.rows > 0 ? call.packed.rows : 1;
    const int64_t wanted = (2 * kLossThreads + words - 1) / words;
    return rows_per_slot(call.packed.rows, 2048, wanted < most ? wanted : most, most);
}

// `run` with zeros of the element types of prediction and of clean and noise.
template <typename Run>
int with_loss_types(const MillraceFlowLoss& call, Run run) {
    return with_element_type(call.dtype, [&](auto zero) {
        return call.data_dtype == call.dtype ? run(zero, zero) : run(zero, 0.0f);
    });
}

inline int64_t loss_workspace(const MillraceFlowLoss& call) {
    return slot_count(call.packed, loss_rows_per_slot(call));
}

// Both forms of the network's output, as v - target and target in terms of the tensors themselves. The noisy
// x_t cancels, so it is never formed, and without the contrastive term a predicted sample needs no noise:
//
//   velocity:  v - target = prediction - target,      target = noise - clean
//   sample:    v - target = (clean - prediction) / d, target = (t / d) * (noise - clean)
struct LossSample {
    int64_t first;           // element of the packed arrays
    int64_t negative_first;  // of the negative
    int64_t negative_size;   // elements of the negative; 0: no contrastive term
    float ratio;             // target = ratio * (noise - clean)
    float negative_ratio;
    float slope;             // of v in the prediction
};

MILLRACE_HOST_DEVICE float floored_time(const MillraceFlowLoss& call, int64_t sample) {
    return call.t[sample] > call.t_min ? call.t[sample] : call.t_min;
}

MILLRACE_HOST_DEVICE LossSample loss_sample(const MillraceFlowLoss& call, int sample) {
    const int32_t* offsets = call.packed.cu_seqlens;
    const int64_t width = call.packed.width;
    LossSample out;
    out.first = offsets[sample] * width;
    out.ratio = out.negative_ratio = out.slope = 1.0f;
    out.negative_first = out.negative_size = 0;
    if (call.contrastive_weight != 0.0f && call.packed.samples > 1) {
        int64_t other = sample > 0 ? sample - 1 : call.packed.samples - 1;
        if (call.negative != nullptr) other = call.negative[sample];
        if (other >= 0) {
            out.negative_first = offsets[other] * width;
            out.negative_size = offsets[other + 1] * width - out.negative_first;
            if (call.predicts_sample) out.negative_ratio = call.t[other] / floored_time(call, other);
        }
    }
    if (call.predicts_sample) {
        out.ratio = call.t[sample] / floored_time(call, sample);
        out.slope = -1.0f / floored_time(call, sample);
    }
    return out;
}

// The word of predictions at element `at` of the sample: writes its residual, returns its part of the sum of
// squares. Everything is loaded before anything is used.
template <typename T, typename Data>
MILLRACE_HOST_DEVICE float loss_word(const MillraceFlowLoss& call, const LossSample& sample, int64_t at) {
    constexpr int kElements = kPerWord<T>;
    const bool contrast = sample.negative_size > 0;
    const int64_t here = sample.first + at;
    using Loaded = Packed<T, Data>;
    const Packed<T, T> prediction_word = Packed<T, T>::load(call.prediction, here);
    const Loaded clean_words = Loaded::load(call.clean, here);
    Loaded noise_words = {}, clean_away_words = {}, noise_away_words = {};
    if (contrast || !call.predicts_sample) noise_words = Loaded::load(call.noise, here);
    if (contrast) {
        // Rows modulo the negative's length are elements modulo its size, a slow division that equal lengths
        // never need.
        const int64_t wrapped = at < sample.negative_size ? at : at % sample.negative_size;
        clean_away_words = Loaded::load(call.clean, sample.negative_first + wrapped);
        noise_away_words = Loaded::load(call.noise, sample.negative_first + wrapped);
    }
    float prediction[kElements], clean[kElements], noise[kElements], clean_away[kElements],
        noise_away[kElements];
    prediction_word.unpack(prediction);
    clean_words.unpack(clean);
    noise_words.unpack(noise);
    clean_away_words.unpack(clean_away);
    noise_away_words.unpack(noise_away);
    float sum = 0.0f;
    MILLRACE_UNROLL
    for (int i = 0; i < kElements; ++i) {
        const float target = sample.ratio * (noise[i] - clean[i]);
        const float error = sample.slope * (prediction[i] - (call.predicts_sample ? clean[i] : target));
        sum += error * error;
        prediction[i] = error;
        if (contrast) {  // not a product with zero, which would make a NaN of an overflow
            const float away = error + target - sample.negative_ratio * (noise_away[i] - clean_away[i]);
            sum -= call.contrastive_weight * away * away;
            prediction[i] -= call.contrastive_weight * away;
        }
    }
    *reinterpret_cast<Word16*>(static_cast<T*>(call.residual) + here) = pack<T>(prediction);
    return sum;
}

MILLRACE_HOST_DEVICE float mean_of_sample(const MillracePackedRows& packed, int sample, float sum) {
    const int length = packed.cu_seqlens[sample + 1] - packed.cu_seqlens[sample];
    return length > 0 ? sum / static_cast<float>(length * packed.width) : 0.0f;
}

MILLRACE_HOST_DEVICE float mean_of_all(const MillracePackedRows& packed, float sum) {
    return packed.rows > 0 ? sum / static_cast<float>(packed.rows * packed.width) : 0.0f;
}

inline int check_arguments(const MillraceFlowLoss& call) {
    if (!are_valid(call.packed) || !is_dtype(call.dtype)) return MILLRACE_INVALID_ARGUMENT;
    if (call.data_dtype != call.dtype && call.data_dtype != MILLRACE_FLOAT32) {
        return MILLRACE_INVALID_ARGUMENT;
    }
    if (call.packed.width > INT32_MAX || call.packed.width * dtype_bytes(call.dtype) % 16 != 0) {
        return MILLRACE_UNSUPPORTED_WIDTH;
    }
    if (call.t == nullptr || call.workspace == nullptr || call.loss == nullptr ||
        call.per_sample == nullptr) {
        return MILLRACE_INVALID_ARGUMENT;
    }
    if (call.packed.rows == 0) return MILLRACE_SUCCESS;
    const bool good = is_aligned(call.prediction) && is_aligned(call.clean) && is_aligned(call.noise) &&
                      is_aligned(call.residual);
    return good ? MILLRACE_SUCCESS : MILLRACE_INVALID_ARGUMENT;
}

}  // namespace millrace

#endif  // MILLRACE_FLOW_LOSS_H_
