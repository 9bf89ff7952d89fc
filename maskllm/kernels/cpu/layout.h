// How a resident 2:4 mask lies in memory, and what an instruction set must offer to multiply by it.
//
// A *quad* is 4 rows of the weight, a *block* a quad's 128 columns, a *chunk* 4 blocks, or 8 of int8. Chunks of columns
// follow each other, in a chunk its quads, in a quad its blocks: a product reads streams, and meanwhile the inputs of a
// chunk stay in the first cache (2x at 4 inputs). A slot has two such streams, of mask bits and of kept values. In a block:
//
//   mask    16 dwords; dword 4 l + r has bit c set where row r keeps column 32 l + c
//   bf16    8 vectors of 64 bytes; dword 4 l + r of vector j holds the two kept values of row r, group 8 l + j
//   int8    4 vectors of 64 bytes; dword 4 l + r of vector j holds the four kept values of row r, groups
//           8 l + 2 j and 8 l + 2 j + 1
//
// A group is 4 columns. So lane l (128 bits) of every vector belongs to columns 32 l to 32 l + 31, its four
// dwords to the four rows, and each lane needs one group's inputs, which the mask's nibble permutes within
// the lane. Inputs are laid out to match ("lane order"): for each block, the 16-byte pieces that lanes 0 to 3
// need for vector 0 (and 1 ... where a piece holds several groups), then those for the next. A *panel* holds up to
// 16 inputs with their 64-byte vectors in turn, so that a product reads it, too, as one stream.
//
// An int8 slot starts with the scale of each row (fp32), of the dense row's largest weight: no mask changes it.
// Columns are padded to whole blocks and rows to whole quads, with values of zero.
//
// Where all weights are kept as int8 there is no mask, and a block has 8 vectors: dword 4 l + r of vector j holds row r's
// columns 32 l + 4 j to 32 l + 4 j + 3.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace maskllm {

enum Type : int { F32 = 0, BF16 = 1, INT8 = 2, INT8_DENSE = 3 };  // cpu.py's TYPES, and INT8_DENSE

constexpr size_t ROWS = 4, COLUMNS = 128, CHUNK = 4, MASK_BYTES = 64;
constexpr size_t BF16_BYTES = 512, INT8_BYTES = 256, INT8_DENSE_BYTES = 512;  // the values of a block
constexpr size_t DECODED_BYTES = 2048;  // the values of a block as fp32, and where the inputs of each are
constexpr int STREAMS = 4;  // that a core reads at once: 1.3x of what it reads in one (Zen 3)
constexpr size_t PREFETCH = 2304;  // bytes ahead: worth 1.3x out of cache

// The nibble of a group -> its two kept columns. The low three bits tell the six patterns apart.
constexpr uint8_t FIRST[8] = {0, 0, 1, 0, 2, 0, 1, 0}, SECOND[8] = {0, 3, 3, 1, 3, 2, 2, 0};

static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

static inline float to_float(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Products of one quad with a panel of 1, 2, 4, 8 or 16 inputs (at most `tile`), added to
// out[4 * input + row]. Where one for bf16 inputs is null they are multiplied as fp32.
struct Kernels {
    const char* name;
    int tile;
    void (*sparse_f32)(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* panel, int inputs, float* out);
    // The same for one input and STREAMS quads, so many `apart`, as sums are; null where memory is read no faster so.
    void (*sparse_f32_apart)(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* input, float* out, size_t apart);
    // For many inputs: blocks to DECODED_BYTES each, and `sparse_f32` of these as `values`; null where there is none.
    void (*decode_f32)(const uint8_t* masks, const uint8_t* values, size_t blocks, uint8_t* decoded);
    void (*sparse_f32_decoded)(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* panel, int inputs, float* out);
    void (*sparse_bf16)(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint16_t* panel, int inputs, float* out);
    // Sums of products of integers, of all columns where `masks` is null. Inputs are signed, or unsigned with zero at 128.
    void (*int8)(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint8_t* panel, int inputs, int32_t* out);
    bool int8_is_unsigned;
    // Four rows of the dense weight, a multiple of 32 columns, and a panel of 1, 2 or 4 inputs, of each 32 columns the
    // even ones first.
    void (*dense_f32)(const uint16_t* weight, size_t weight_stride, size_t columns, const float* panel, int inputs, float* out);
    // The same for any columns, and inputs in natural order; masks[input] has the mask bits of an input in the first
    // chunk, where it has a mask: the form that reads the weight once for many masks.
    void (*dense_bf16)(const uint16_t* weight, size_t weight_stride, size_t columns, const uint8_t* const* masks,
                       size_t mask_stride, const uint16_t* panel, int inputs, float* out);
    // Four rows of 128 dense columns and their mask bits -> the values of a block. As int8 an infinity saturates, and NaN is 0.
    void (*fill_bf16)(const uint16_t* weight, size_t weight_stride, const uint8_t* mask, uint8_t* values);
    void (*fill_int8)(const uint16_t* weight, size_t weight_stride, const float* inverse_scales, const uint8_t* mask, uint8_t* values);
    bool fills_past_caches;  // whole lines, once each, which a slot's megabytes would only empty
};

const Kernels* portable();
const Kernels* avx2();    // null where not built for this architecture
const Kernels* avx512();  // without bf16 products
const Kernels* avx512_bf16();
const Kernels* neon();

}  // namespace maskllm
