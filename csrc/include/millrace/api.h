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
};

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

#ifdef __cplusplus
}
#endif

#endif /* MILLRACE_API_H_ */
