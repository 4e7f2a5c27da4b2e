// The C interface as operators of PyTorch: namespace millrace_cuda on CUDA tensors in libmillrace_cuda.so,
// millrace_host on CPU tensors in libmillrace_host.so. Only PyTorch's stable ABI is used, of version 2.11, so
// one build runs under every later version too. kernels/support/cuda_library.py calls the operators; what they refuse
// here is what it did not put right.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "millrace/api.h"

#ifdef MILLRACE_HOST
#define MILLRACE_OPERATORS millrace_host
#define MILLRACE_DEVICE CPU
#else
#define MILLRACE_OPERATORS millrace_cuda
#define MILLRACE_DEVICE CUDA
// Weak, so that the library also loads, and says what it holds, under a PyTorch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void expect(bool condition, const std::string& message) {
    if (!condition) throw std::runtime_error("millrace: " + message);
}

void succeed(int code) {
    switch (code) {
        case MILLRACE_SUCCESS:
            return;
        case MILLRACE_INVALID_ARGUMENT:
            throw std::runtime_error("millrace: an argument is out of range, misaligned or overlapping");
        case MILLRACE_INDEX_OUT_OF_RANGE:
            throw std::runtime_error("millrace: an index is out of range");
        case MILLRACE_INDEX_REPEATED:
            throw std::runtime_error("millrace: a row is scattered to twice");
        case MILLRACE_UNSUPPORTED_WIDTH:
            throw std::runtime_error(
                "millrace: rows must be a multiple of 16 bytes, and at most 4096 elements for "
                "gated_residual_norm_modulate");
        case MILLRACE_INVALID_OFFSETS:
            throw std::runtime_error("millrace: cu_seqlens does not rise from 0 to the number of rows");
        default:
            throw std::runtime_error("millrace: CUDA error " + std::to_string(code));
    }
}

// The current stream of the tensors' device, which is made the current one meanwhile.
class Queue {
  public:
#ifdef MILLRACE_HOST
    explicit Queue(const Tensor&) {}
#else
    explicit Queue(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        expect(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
    }
#endif
    void* stream() const { return stream_; }

  private:
#ifndef MILLRACE_HOST
    torch::stable::accelerator::DeviceGuard guard_;
#endif
    void* stream_ = nullptr;
};

int dtype_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return MILLRACE_FLOAT32;
        case ScalarType::BFloat16:
            return MILLRACE_BFLOAT16;
        case ScalarType::Half:
            return MILLRACE_FLOAT16;
        default:
            throw std::runtime_error(std::string("millrace: ") + name +
                                     " must be float32, bfloat16 or float16");
    }
}

void expect_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
    expect(tensor.scalar_type() == dtype, std::string(name) + " has another dtype than expected");
}

// `sizes` and a contiguous layout, on the device of `like`.
void expect_array(const char* name, const Tensor& tensor, const Tensor& like,
                  std::initializer_list<int64_t> sizes) {
    bool good = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() &&
                tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index();
    int64_t i = 0;
    for (const int64_t size : sizes) good = good && tensor.size(i++) == size;
    expect(good, std::string(name) + " has another shape or device than expected, or is not contiguous");
}

MillracePackedRows packed_rows(const Tensor& rows, const Tensor& cu_seqlens) {
    expect(rows.dim() == 2, "rows must be (T, C)");
    expect(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 2, "cu_seqlens must be (B+1,)");
    expect_array("cu_seqlens", cu_seqlens, rows, {cu_seqlens.size(0)});
    expect_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
    return {static_cast<const int32_t*>(cu_seqlens.data_ptr()), cu_seqlens.size(0) - 1, rows.size(0),
            rows.size(1)};
}

const void* rows_like(const char* name, const Tensor& tensor, const Tensor& like) {
    expect_array(name, tensor, like, {like.size(0), like.size(1)});
    expect_dtype(name, tensor, like.scalar_type());
    return tensor.data_ptr();
}

MillraceSampleVectors vectors_of(const char* name, const Tensor& tensor, const Tensor& first,
                                 const MillracePackedRows& packed, const Tensor& rows) {
    expect(tensor.dim() == 2 && tensor.size(0) == packed.samples && tensor.size(1) == packed.width &&
               (tensor.stride(1) == 1 || packed.width == 1) && tensor.is_cuda() == rows.is_cuda() &&
               tensor.get_device_index() == rows.get_device_index(),
           std::string(name) + " must be (B, C) with neighbouring elements, on the device of the rows");
    expect_dtype(name, tensor, first.scalar_type());
    return {tensor.data_ptr(), packed.samples > 1 ? tensor.stride(0) : 0};
}

const float* statistics_of(const char* name, const Tensor& tensor, const Tensor& rows) {
    expect_array(name, tensor, rows, {rows.size(0)});
    expect_dtype(name, tensor, ScalarType::Float);
    return static_cast<const float*>(tensor.data_ptr());
}

template <typename... Sizes>
Tensor new_floats(const Tensor& like, Sizes... sizes) {
    const int64_t shape[] = {sizes..., 1};  // one more than used: (): no array of size zero
    return torch::stable::new_empty(like, {shape, sizeof...(sizes)}, ScalarType::Float);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

using TwoRowsAndStatistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;

TwoRowsAndStatistics gated_residual_norm_modulate(const Tensor x, const Tensor branch, const Tensor gate,
                                                  const Tensor shift, const Tensor scale,
                                                  const Tensor cu_seqlens, double eps) {
    MillraceGatedResidual call = {};
    call.packed = packed_rows(x, cu_seqlens);
    call.dtype = dtype_of("x", x);
    call.vector_dtype = dtype_of("gate", gate);
    call.eps = static_cast<float>(eps);
    call.x = rows_like("x", x, x);
    call.branch = rows_like("branch", branch, x);
    call.gate = vectors_of("gate", gate, gate, call.packed, x);
    call.shift = vectors_of("shift", shift, gate, call.packed, x);
    call.scale = vectors_of("scale", scale, gate, call.packed, x);
    Tensor sum = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    Tensor mean = new_floats(x, x.size(0));
    Tensor rstd = new_floats(x, x.size(0));
    call.sum = sum.data_ptr();
    call.y = y.data_ptr();
    call.mean = floats(mean);
    call.rstd = floats(rstd);
    succeed(millrace_gated_residual_norm_modulate(&call, Queue(x).stream()));
    return {sum, y, mean, rstd};
}

using TwoRowsAndVectors = std::tuple<Tensor, Tensor, Tensor>;

TwoRowsAndVectors gated_residual_norm_modulate_backward(const Tensor grad_sum, const Tensor grad_y,
                                                        const Tensor sum, const Tensor branch,
                                                        const Tensor gate, const Tensor scale,
                                                        const Tensor cu_seqlens, const Tensor mean,
                                                        const Tensor rstd) {
    MillraceGatedResidualBackward call = {};
    call.packed = packed_rows(sum, cu_seqlens);
    call.dtype = dtype_of("sum", sum);
    call.vector_dtype = dtype_of("gate", gate);
    call.grad_sum = rows_like("grad_sum", grad_sum, sum);
    call.grad_y = rows_like("grad_y", grad_y, sum);
    call.sum = rows_like("sum", sum, sum);
    call.branch = rows_like("branch", branch, sum);
    call.gate = vectors_of("gate", gate, gate, call.packed, sum);
    call.scale = vectors_of("scale", scale, gate, call.packed, sum);
    call.mean = statistics_of("mean", mean, sum);
    call.rstd = statistics_of("rstd", rstd, sum);
    Tensor grad_x = torch::stable::new_empty(sum, {sum.size(0), sum.size(1)});
    Tensor grad_branch = torch::stable::new_empty(sum, {sum.size(0), sum.size(1)});
    Tensor grad_vectors = new_floats(sum, int64_t{3}, call.packed.samples, call.packed.width);
    Tensor workspace = new_floats(sum, millrace_gated_residual_workspace(&call.packed));
    call.grad_x = grad_x.data_ptr();
    call.grad_branch = grad_branch.data_ptr();
    call.grad_vectors = floats(grad_vectors);
    call.workspace = floats(workspace);
    succeed(millrace_gated_residual_norm_modulate_backward(&call, Queue(sum).stream()));
    return {grad_x, grad_branch, grad_vectors};
}

std::tuple<Tensor, Tensor, Tensor> flow_loss(const Tensor prediction, const Tensor clean, const Tensor noise,
                                             const Tensor t, const Tensor cu_seqlens,
                                             const std::optional<Tensor> negative, double contrastive_weight,
                                             bool predicts_sample, double t_min) {
    MillraceFlowLoss call = {};
    call.packed = packed_rows(prediction, cu_seqlens);
    call.dtype = dtype_of("prediction", prediction);
    call.data_dtype = dtype_of("clean", clean);
    call.predicts_sample = predicts_sample ? 1 : 0;
    call.contrastive_weight = static_cast<float>(contrastive_weight);
    call.t_min = static_cast<float>(t_min);
    call.prediction = rows_like("prediction", prediction, prediction);
    expect_array("clean", clean, prediction, {call.packed.rows, call.packed.width});
    call.clean = clean.data_ptr();
    call.noise = rows_like("noise", noise, clean);
    expect_array("t", t, prediction, {call.packed.samples});
    expect_dtype("t", t, ScalarType::Float);
    call.t = floats(t);
    if (negative.has_value()) {
        expect_array("negative", *negative, prediction, {call.packed.samples});
        expect_dtype("negative", *negative, ScalarType::Long);
        call.negative = static_cast<const int64_t*>(negative->data_ptr());
    }
    Tensor loss = new_floats(prediction);
    Tensor per_sample = new_floats(prediction, call.packed.samples);
    Tensor residual = torch::stable::new_empty(prediction, {call.packed.rows, call.packed.width});
    Tensor workspace = new_floats(prediction, millrace_flow_loss_workspace(&call));
    call.loss = floats(loss);
    call.per_sample = floats(per_sample);
    call.residual = residual.data_ptr();
    call.workspace = floats(workspace);
    succeed(millrace_flow_loss(&call, Queue(prediction).stream()));
    return {loss, per_sample, residual};
}

int index_bytes(const Tensor& index, const Tensor& like) {
    expect_array("index", index, like, {index.numel()});
    const bool wide = index.scalar_type() == ScalarType::Long;
    if (!wide) expect_dtype("index", index, ScalarType::Int);
    return wide ? 8 : 4;
}

Tensor gather_rows(const Tensor x, const Tensor index) {
    expect(x.dim() == 2, "x must be (T, C)");
    expect_array("x", x, x, {x.size(0), x.size(1)});
    const int bytes = index_bytes(index, x);
    Tensor out = torch::stable::new_empty(x, {index.numel(), x.size(1)});
    const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
    succeed(millrace_gather_rows(x.data_ptr(), x.size(0), index.data_ptr(), bytes, index.numel(),
                                 out.data_ptr(), row_bytes, Queue(x).stream()));
    return out;
}

void scatter_rows(const Tensor base, const Tensor update, const Tensor index) {
    expect(base.dim() == 2, "base must be (T, C)");
    expect_array("base", base, base, {base.size(0), base.size(1)});
    expect_array("update", update, base, {index.numel(), base.size(1)});
    expect_dtype("update", update, base.scalar_type());
    const int bytes = index_bytes(index, base);
    const int64_t row_bytes = base.size(1) * static_cast<int64_t>(base.element_size());
    succeed(millrace_scatter_rows(base.data_ptr(), base.size(0), update.data_ptr(), index.data_ptr(), bytes,
                                  index.numel(), row_bytes, Queue(base).stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY(MILLRACE_OPERATORS, library) {
    library.def(
        "gated_residual_norm_modulate(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
        "Tensor cu_seqlens, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "gated_residual_norm_modulate_backward(Tensor grad_sum, Tensor grad_y, Tensor sum, Tensor branch, "
        "Tensor gate, Tensor scale, Tensor cu_seqlens, Tensor mean, Tensor rstd) "
        "-> (Tensor, Tensor, Tensor)");
    library.def(
        "flow_loss(Tensor prediction, Tensor clean, Tensor noise, Tensor t, Tensor cu_seqlens, "
        "Tensor? negative, float contrastive_weight, bool predicts_sample, float t_min) "
        "-> (Tensor, Tensor, Tensor)");
    library.def("gather_rows(Tensor x, Tensor index) -> Tensor");
    library.def("scatter_rows(Tensor(a!) base, Tensor update, Tensor index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MILLRACE_OPERATORS, MILLRACE_DEVICE, library) {
    library.impl("gated_residual_norm_modulate", TORCH_BOX(&gated_residual_norm_modulate));
    library.impl("gated_residual_norm_modulate_backward", TORCH_BOX(&gated_residual_norm_modulate_backward));
    library.impl("flow_loss", TORCH_BOX(&flow_loss));
    library.impl("gather_rows", TORCH_BOX(&gather_rows));
    library.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}
