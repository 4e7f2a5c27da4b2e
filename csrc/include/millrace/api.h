/* The C interface of csrc. libmillrace_cuda.so implements it on device memory, libmillrace_host.so on host
 * memory: same names, same arguments, same return codes, so that a caller or a test chooses by the library it
 * loads. No torch, no C++ type and no CUDA type crosses it. */


#ifndef MILLRACE_API_H_
#define MILLRACE_API_H_

#include <stdint.h>

#define MILLRACE_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Codes above zero are cudaError_t values; those below zero are ours, where CUDA has none that fits. */
enum {
    MILLRACE_SUCCESS = 0,            /* cudaSuccess */
    MILLRACE_INVALID_ARGUMENT = 1,   /* cudaErrorInvalidValue */
    MILLRACE_OUT_OF_MEMORY = 2,      /* cudaErrorMemoryAllocation */
    MILLRACE_INDEX_OUT_OF_RANGE = -1,
    MILLRACE_INDEX_REPEATED = -2,
    MILLRACE_UNSUPPORTED_WIDTH = -3, /* rows that are no multiple of 16 bytes, or too wide */
    MILLRACE_INVALID_OFFSETS = -4,   /* cu_seqlens does not rise from 0 to rows; host library alone */
};

/* Element types. */
enum {
    MILLRACE_FLOAT32 = 0,
    MILLRACE_BFLOAT16 = 1,
    MILLRACE_FLOAT16 = 2,
};

/* Packed rows: sample b owns rows cu_seqlens[b] ... cu_seqlens[b + 1] - 1; it may own none. */
typedef struct {
    const int32_t* cu_seqlens; /* (samples + 1,), from 0 to rows, never falling; not checked on the device */
    int64_t samples;
    int64_t rows;
    int64_t width;
} MillracePackedRows;

/* A vector of `width` elements for each sample: a slice of a larger matrix. */
typedef struct {
    const void* data;
    int64_t stride; /* elements from one sample's to the next one's; a multiple of 16 bytes */
} MillraceSampleVectors;

/* out[k] = x[index[k]] for k in [0, index_count): TREAD's way out, and the backward of its way back.
 *
 *   x      (x_rows, row_bytes)       bytes, rows contiguous and back to back; any element type, any alignment
 *   index  (index_count,)            int32 or int64 as index_bytes (4 or 8) says, in [0, x_rows); may repeat
 *   out    (index_count, row_bytes)  must not overlap x or index
 *   stream cudaStream_t the copy is queued on, NULL for the default stream; the host library ignores it
 *
 * A row copy knows no element type: pass row_bytes = C * sizeof(element).
 *
 * Returns MILLRACE_SUCCESS or the reason nothing was written. MILLRACE_INVALID_ARGUMENT: a negative size, a
 * size past 63 bits, an index_bytes other than 4 or 8, a null pointer, a misaligned index, overlapping
 * arrays. MILLRACE_INDEX_OUT_OF_RANGE: always from the host library; from the CUDA library only if x has no
 * rows, for reading the index back would stall the stream. There a bad index is undefined behaviour, as in
 * any unchecked kernel; a build with -DMILLRACE_CHECK_INDICES=ON asserts in the kernel. The CUDA library
 * launches on the current device and does not wait: failures during the copy surface at the next
 * synchronisation. */
MILLRACE_API int millrace_gather_rows(const void* x, int64_t x_rows, const void* index, int index_bytes,
                                      int64_t index_count, void* out, int64_t row_bytes, void* stream);

/* base[index[k]] = update[k] for k in [0, index_count), in place: TREAD's way back, and, into zeros, the
 * backward of a gather whose index does not repeat.
 *
 *   base   (base_rows, row_bytes)    rows not named by index keep their bytes; must not overlap index
 *   update (index_count, row_bytes)  must not overlap base
 *   index  (index_count,)            as above, and no row twice: with every row written by one warp alone the
 *                                    result does not depend on the order of execution
 *
 * Returns as millrace_gather_rows does, and MILLRACE_INDEX_REPEATED for a row named twice: always from the
 * host library; from the CUDA library only if index_count exceeds base_rows. */
MILLRACE_API int millrace_scatter_rows(void* base, int64_t base_rows, const void* update, const void* index,
                                       int index_bytes, int64_t index_count, int64_t row_bytes, void* stream);

/* The end of one half of a transformer block and the norm that opens the next, for row r of sample b:
 *
 *   sum[r] = x[r] + gate[b] * branch[r]                                    formed in FP32, rounded once
 *   y[r]   = (1 + scale[b]) * (sum[r] - mean[r]) * rstd[r] + shift[b]
 *   mean[r], rstd[r] = mean of the rounded sum[r], 1 / sqrt(its variance + eps)
 *
 * Arrays (rows, width) are contiguous; every array but cu_seqlens, mean and rstd is 16-byte aligned. No
 * result may overlap anything else. */
typedef struct {
    MillracePackedRows packed;
    int dtype;        /* of x, branch, sum and y */
    int vector_dtype; /* of gate, shift and scale: that of x, or FP32 */
    float eps;
    const void* x;
    const void* branch;
    MillraceSampleVectors gate, shift, scale;
    void* sum;   /* result (rows, width) */
    void* y;     /* result (rows, width) */
    float* mean; /* result (rows,) */
    float* rstd; /* result (rows,) */
} MillraceGatedResidual;

/* Its derivative. With n = (sum - mean) * rstd, g = (1 + scale_b) * grad_y, and means over the width:
 *
 *   d           = grad_sum + rstd * (g - mean(g) - n * mean(g * n))
 *   grad_x      = d,  grad_branch = gate_b * d
 *   grad_gate_b = sum over the rows of b of d * branch, grad_shift_b of grad_y, grad_scale_b of grad_y * n
 */
typedef struct {
    MillracePackedRows packed;
    int dtype;        /* of every array (rows, width) */
    int vector_dtype; /* of gate and scale */
    const void* grad_sum;
    const void* grad_y;
    const void* sum;
    const void* branch;
    MillraceSampleVectors gate, scale;
    const float* mean;
    const float* rstd;
    void* grad_x;         /* result (rows, width) */
    void* grad_branch;    /* result (rows, width) */
    float* grad_vectors;  /* result (3, samples, width): of gate, shift, scale; zero for an empty sample */
    float* workspace;     /* millrace_gated_residual_workspace(&packed) elements */
} MillraceGatedResidualBackward;

/* Both return MILLRACE_SUCCESS or the reason nothing was written: MILLRACE_INVALID_ARGUMENT for a negative
 * size, an unknown dtype, a null or misaligned pointer; MILLRACE_UNSUPPORTED_WIDTH unless a row is a multiple
 * of 16 bytes and at most 4096 elements; above zero what the launch returned. Launches go to the current
 * device and are not waited for. No atomics: the same bits every time. */
MILLRACE_API int millrace_gated_residual_norm_modulate(const MillraceGatedResidual* call, void* stream);
MILLRACE_API int64_t millrace_gated_residual_workspace(const MillracePackedRows* packed);
MILLRACE_API int millrace_gated_residual_norm_modulate_backward(const MillraceGatedResidualBackward* call,
                                                                void* stream);

/* The flow-matching loss of sample b and what its gradient needs, in one pass. With d = max(t, t_min) and
 * elements counted over the sample's rows and the width:
 *
 *   velocity:  v = prediction,              target = noise - clean
 *   sample:    v = (x_t - prediction) / d,  target = (x_t - clean) / d,   x_t = (1 - t) clean + t noise
 *
 *   per_sample[b] = mean((v - target)^2) - contrastive_weight * mean((v - target of negative[b])^2)
 *   residual      = (v - target) - contrastive_weight * (v - target of negative[b])
 *   loss          = the same mean over the elements of all samples
 *
 * The residual is all that backward needs: d per_sample[b] / d prediction is 2 / elements * residual, times
 * -1 / d for a predicted sample. It is of the size of the data, where the gradient itself would be too small
 * for float16.
 *
 * Row r of b meets row r modulo its length of the negative, under the negative's own t. Without rows in the
 * negative, with a negative below 0, or with one sample alone, the contrastive term is left out. */
typedef struct {
    MillracePackedRows packed;
    int dtype;      /* of prediction and residual */
    int data_dtype; /* of clean and noise: that of prediction, or FP32 */
    int predicts_sample;
    float contrastive_weight;
    float t_min;
    const void* prediction;  /* (rows, width) contiguous, 16-byte aligned, as are clean, noise and residual */
    const void* clean;
    const void* noise;
    const float* t;          /* (samples,) */
    const int64_t* negative; /* (samples,) below samples, or NULL: that of b is (b - 1) modulo samples */
    float* loss;             /* result () */
    float* per_sample;       /* result (samples,), 0 for an empty sample */
    void* residual;          /* result (rows, width) */
    float* workspace;        /* millrace_flow_loss_workspace(call) elements */
} MillraceFlowLoss;

/* Returns as above, for rows that are a multiple of 16 bytes, however wide; the host library also returns
 * MILLRACE_INDEX_OUT_OF_RANGE for a negative that is no sample. */
MILLRACE_API int64_t millrace_flow_loss_workspace(const MillraceFlowLoss* call);
MILLRACE_API int millrace_flow_loss(const MillraceFlowLoss* call, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* MILLRACE_API_H_ */
