// The slice of ONNX Runtime's C ABI that this library uses, so that no ONNX Runtime header is needed to build
// it.
//
// OrtApi is a struct of function pointers to which releases only append: a slot number never changes its
// meaning (static_asserts at the end of onnxruntime/core/session/onnxruntime_c_api.cc hold upstream to that).
// GetApi(18) returns the table in every release from 1.18 on, with all of that release's functions. The slot
// numbers and the layout of OrtCustomOp were read from
// include/onnxruntime/core/session/onnxruntime_c_api.h and are exercised by tests/ops in the oldest and
// newest release supported.
#ifndef LLMPACK_ORT_ABI_H_
#define LLMPACK_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

typedef void (*OrtAnyFunction)();
struct OrtApi {
    OrtAnyFunction slots[279];  // as many as release 1.18 has; later ones have more
};
struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

// OrtCustomOp of version 18. Newer releases accept older versions; 1.22 looks for GetApi(version), so a
// larger number would fail there.
constexpr uint32_t kOrtApiVersion = 18;

struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    int (*GetInputType)(const OrtCustomOp*, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    size_t (*GetMayInplace)(int** input_indices, int** output_indices);
    void (*ReleaseMayInplace)(int* input_indices, int* output_indices);
    size_t (*GetAliasMap)(int** input_indices, int** output_indices);
    void (*ReleaseAliasMap)(int* input_indices, int* output_indices);
};

}  // extern "C"

static_assert(sizeof(void*) == 8, "the offsets below are those of 64-bit machines");
static_assert(offsetof(OrtCustomOp, CreateKernel) == 8 && offsetof(OrtCustomOp, KernelCompute) == 64 &&
                  offsetof(OrtCustomOp, GetInputCharacteristic) == 80 &&
                  offsetof(OrtCustomOp, GetInputMemoryType) == 96 &&
                  offsetof(OrtCustomOp, CreateKernelV2) == 136 &&
                  offsetof(OrtCustomOp, InferOutputShapeFn) == 152 &&
                  offsetof(OrtCustomOp, GetMayInplace) == 176 &&
                  offsetof(OrtCustomOp, ReleaseAliasMap) == 200 && sizeof(OrtCustomOp) == 208,
              "OrtCustomOp differs from onnxruntime_c_api.h, version 18");

namespace llmpack::ort {

// enum ONNXTensorElementDataType; kAny (UNDEFINED) as an input type of an OrtCustomOp accepts every type.
enum ElementType : int { kAny = 0, kFloat = 1, kUInt8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };

// enum OrtErrorCode
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// Every function of OrtApi that is used:  X(name, slot, result, parameters)
#define LLMPACK_ORT_FUNCTIONS(X)                                                                             \
    X(CreateStatus, 0, OrtStatus*, (int code, const char* message))                                          \
    X(CreateCustomOpDomain, 26, OrtStatus*, (const char* domain, OrtCustomOpDomain** out))                   \
    X(CustomOpDomain_Add, 27, OrtStatus*, (OrtCustomOpDomain*, const OrtCustomOp*))                          \
    X(AddCustomOpDomain, 28, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))                           \
    X(GetTensorMutableData, 51, OrtStatus*, (OrtValue*, void** out))                                         \
    X(GetTensorElementType, 60, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int* out))                    \
    X(GetDimensionsCount, 61, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t* out))                   \
    X(GetDimensions, 62, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count))        \
    X(GetTensorTypeAndShape, 65, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo** out))             \
    X(KernelInfoGetAttribute_float, 85, OrtStatus*, (const OrtKernelInfo*, const char* name, float* out))    \
    X(KernelInfoGetAttribute_int64, 86, OrtStatus*, (const OrtKernelInfo*, const char* name, int64_t* out))  \
    X(KernelContext_GetInput, 90, OrtStatus*, (const OrtKernelContext*, size_t index, const OrtValue** out)) \
    X(KernelContext_GetOutput, 91, OrtStatus*,                                                               \
      (OrtKernelContext*, size_t index, const int64_t* dims, size_t count, OrtValue** out))                  \
    X(ReleaseStatus, 93, void, (OrtStatus*))                                                                 \
    X(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo*))                                 \
    X(KernelContext_GetGPUComputeStream, 193, OrtStatus*, (const OrtKernelContext*, void** out))             \
    X(KernelInfo_GetInputCount, 230, OrtStatus*, (const OrtKernelInfo*, size_t* out))                        \
    X(KernelInfo_GetInputName, 232, OrtStatus*,                                                              \
      (const OrtKernelInfo*, size_t index, char* out, size_t* size))                                         \
    X(KernelInfo_GetNodeName, 244, OrtStatus*, (const OrtKernelInfo*, char* out, size_t* size))              \
    X(KernelInfoGetConstantInput_tensor, 249, OrtStatus*,                                                    \
      (const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue** out))                          \
    X(KernelContext_ParallelFor, 274, OrtStatus*,                                                            \
      (const OrtKernelContext*, void (*function)(void* user_data, size_t index), size_t total,               \
       size_t num_batch, void* user_data))

// One inline function each:  ort::GetDimensions(api, info, dims, count)
#define LLMPACK_ORT_FUNCTION(name, slot, result, parameters)                     \
    template <class... Args>                                                     \
    inline result name(const OrtApi& api, Args... args) {                        \
        static_assert((slot) < sizeof(OrtApi) / sizeof(OrtAnyFunction), #name);  \
        return reinterpret_cast<result(*) parameters>(api.slots[slot])(args...); \
    }
LLMPACK_ORT_FUNCTIONS(LLMPACK_ORT_FUNCTION)
#undef LLMPACK_ORT_FUNCTION
#undef LLMPACK_ORT_FUNCTIONS

// From release 1.24 on: the shape where the tensor has it, without an object made and released for it.
constexpr int kTypeAndShapeReferenceRelease = 24;
inline OrtStatus* GetTensorElementTypeAndShapeDataReference(const OrtApi& api, const OrtValue* value,
                                                            int* type, const int64_t** dims, size_t* count) {
    using Function = OrtStatus* (*)(const OrtValue*, int*, const int64_t**, size_t*);
    return reinterpret_cast<Function>((&api.slots[0])[414])(value, type, dims, count);
}

}  // namespace llmpack::ort

#endif  // LLMPACK_ORT_ABI_H_
