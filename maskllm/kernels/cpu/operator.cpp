// Operators of torch's without Python, from which a small layer costs more than its product: `masked_linear`, and the engine's
// `layer`, to which the step has told its rows.
//
// It needs none of torch's headers to build. torch's C functions are looked up in the library that is loaded, and
// declared here as in torch/csrc/inductor/aoti_torch/c/shim.h and stable/c/shim.h, which keep them from version to version.
#include <dlfcn.h>
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "layout.h"

extern "C" long maskllm_multiply(const void* x, int x_type, long x_stride, long rows, const int32_t* row_slots,
                                 const void* weight, int weight_type, long weight_stride, const uint8_t* slots, long count,
                                 long slot_stride, int slot_type, long outs, long columns, const float* bias, void* y,
                                 int threads);
extern "C" bool maskllm_multiplies_all(const int32_t* row_slots, long rows, int weight_type);
extern "C" long maskllm_slot_bytes(long outs, long columns, int type);

using namespace maskllm;

namespace {

using Value = uint64_t;  // an argument or a result: a tensor's handle, or for one that may be missing 0 or an `Optional*`
using Optional = Value;
using Handle = void*;

const char* (*what)() = nullptr;  // torch's last error

template <class... Arguments>
struct Function {
    int (*call)(Arguments...) = nullptr;
    void operator()(Arguments... arguments) const {
        if (call(arguments...)) throw std::runtime_error(what());
    }
    bool find(void* library, const char* name) { return call = (int (*)(Arguments...))dlsym(library, name); }
};

Function<Handle, void**> get_data_ptr;
Function<Handle, int64_t*> get_dim;
Function<Handle, int64_t**> get_sizes, get_strides;
Function<Handle, int32_t*> get_dtype;
Function<int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*> empty_strided;
Function<Handle> delete_tensor;
Function<Optional*> delete_optional;
Function<const char*, const char*, Value*> call_dispatcher;
Function<const char*, const char*, const char*, uint32_t, Handle*> library_init_impl;
Function<Handle, const char*, void (*)(Value*, uint64_t, uint64_t)> library_impl;

bool find_all(void* torch) {
    return get_data_ptr.find(torch, "aoti_torch_get_data_ptr") && get_dim.find(torch, "aoti_torch_get_dim") &&
           get_sizes.find(torch, "aoti_torch_get_sizes") && get_strides.find(torch, "aoti_torch_get_strides") &&
           get_dtype.find(torch, "aoti_torch_get_dtype") && empty_strided.find(torch, "aoti_torch_empty_strided") &&
           delete_tensor.find(torch, "aoti_torch_delete_tensor_object") &&
           delete_optional.find(torch, "torch_delete_stable_ivalue") &&
           call_dispatcher.find(torch, "aoti_torch_call_dispatcher") &&
           library_init_impl.find(torch, "aoti_torch_library_init_impl") &&
           library_impl.find(torch, "aoti_torch_library_impl") &&
           (what = (const char* (*)())dlsym(torch, "torch_exception_get_what_without_backtrace"));
}

struct Matrix {
    void* data;
    int64_t dim, *sizes, *strides;
    int type;  // -1 where it is none of the kernels'
    int32_t dtype;
    explicit Matrix(Handle tensor) {
        get_data_ptr(tensor, &data), get_dim(tensor, &dim), get_sizes(tensor, &sizes), get_strides(tensor, &strides);
        get_dtype(tensor, &dtype);
        type = dtype == 6 ? F32 : dtype == 15 ? BF16 : dtype == 1 ? INT8 : -1;  // c10::ScalarType
    }
};

const int32_t* step_slots = nullptr;  // the slot of each row of the step about to run
long step_rows = 0, many = 0;         // and from how many weights on a second thread helps

// A bias as the kernels take it, until the next one; null where it is of another type.
const float* floats(const Matrix& bias) {
    static thread_local std::vector<float> converted;
    if (bias.type == F32 && bias.strides[0] == 1) return (const float*)bias.data;
    if (bias.type != BF16) return nullptr;
    converted.resize(bias.sizes[0]);
    for (int64_t n = 0; n < bias.sizes[0]; n++) converted[n] = to_float(((const uint16_t*)bias.data)[n * bias.strides[0]]);
    return converted.data();
}

// How slots hold a weight, under masks or the whole of it, or -1 where they do not.
int type_of(const Matrix& slots, const Matrix& weight) {
    if ((slots.type != BF16 && slots.type != INT8) || slots.dim != 2 || weight.dim != 2 || weight.strides[1] != 1) return -1;
    if (!slots.sizes[0]) return slots.type;
    auto bytes = [&](int type) { return maskllm_slot_bytes(weight.sizes[0], weight.sizes[1], type); };
    const int64_t size = slots.type == BF16 ? 2 : 1, given = slots.sizes[1] * size;
    if (slots.strides[1] != 1 || ((uintptr_t)slots.data | slots.strides[0] * size) % 64) return -1;
    if (slots.type == INT8 && given == bytes(INT8_DENSE)) return INT8_DENSE;
    return given == bytes(slots.type) ? slots.type : -1;
}

// The product, if it is one for the kernels alone; null where Python is to do it, or to say what is wrong.
Handle multiply(Value input, Value dense, Value kept, const int32_t* row_slots, int64_t rows, Value bias) {
    const Matrix x((Handle)input), weight((Handle)dense), slots((Handle)kept);
    const int slot_type = type_of(slots, weight);
    if (!row_slots || x.dim != 2 || x.sizes[0] != rows || x.strides[1] != 1 || (x.type != F32 && x.type != BF16) ||
        slot_type < 0 || x.sizes[1] != weight.sizes[1])
        return nullptr;
    const float* offsets = nullptr;
    if (bias) {
        const Matrix given((Handle) * (const Optional*)bias);
        if (given.dim == 1 && given.sizes[0] == weight.sizes[0]) offsets = floats(given);
        if (!offsets) return nullptr;
    }
    if (!maskllm_multiplies_all(row_slots, rows, weight.type)) return nullptr;
    const int64_t sizes[2] = {rows, weight.sizes[0]}, strides[2] = {weight.sizes[0], 1};
    Handle out = nullptr;
    empty_strided(2, sizes, strides, x.dtype, 0, 0, &out);
    const int threads = weight.sizes[0] * weight.sizes[1] * ((rows + 7) / 8) >= many ? omp_get_max_threads() : 1;
    const long left = maskllm_multiply(
        x.data, x.type, x.strides[0], rows, row_slots, weight.data, weight.type, weight.strides[0],
        (const uint8_t*)slots.data, slots.sizes[0], slots.strides[0] * (slots.type == BF16 ? 2 : 1), slot_type,
        weight.sizes[0], weight.sizes[1], offsets, Matrix(out).data, threads);
    if (!left) return out;
    delete_tensor(out);
    return nullptr;  // a slot that there is not
}

// Leave the result of a call whose arguments, so many tensors and then a bias or none, are no longer needed.
void answer(Value* stack, int tensors, Handle out) {
    for (int i = 0; i < tensors; i++) delete_tensor((Handle)stack[i]);
    if (stack[tensors]) delete_tensor((Handle) * (Optional*)stack[tensors]), delete_optional((Optional*)stack[tensors]);
    stack[0] = (Value)out;
}

void layer(Value* stack, uint64_t, uint64_t) {  // x, weight, slots, bias
    Handle out = multiply(stack[0], stack[1], stack[2], step_slots, step_rows, stack[3]);
    out ? answer(stack, 3, out) : call_dispatcher("maskllm::any_layer", "", stack);
}

void masked_linear(Value* stack, uint64_t, uint64_t) {  // x, weight, slots, row_slots, bias, present
    const Matrix row_slots((Handle)stack[3]);
    const bool plain = row_slots.dtype == 3 && row_slots.dim == 1 && row_slots.strides[0] == 1 && !stack[5];
    Handle out = !plain ? nullptr
                        : multiply(stack[0], stack[1], stack[2], (const int32_t*)row_slots.data, row_slots.sizes[0], stack[4]);
    out ? answer(stack, 4, out) : call_dispatcher("maskllm::any_masked_linear", "", stack);
}

}  // namespace

extern "C" {

// Let torch call C++ for one of these operators on CPU, which has maskllm::any_... do what it does not. False, and nothing
// done, where the library at `torch` has not all of what it calls.
bool maskllm_register(const char* name, const char* torch, long weights) {
    void* library = dlopen(torch, RTLD_LAZY | RTLD_NOLOAD);
    if (!library || !find_all(library)) return false;
    Handle ours = nullptr;
    library_init_impl("maskllm", "CPU", __FILE__, __LINE__, &ours);  // kept for good
    library_impl(ours, name, std::strcmp(name, "layer") ? masked_linear : layer);
    many = weights;
    return true;
}

// The rows of the step about to run; memory that stays until the next.
void maskllm_begin_step(const int32_t* row_slots, long rows) { step_slots = row_slots, step_rows = rows; }
}
