// Plain C++, for processors without kernels of their own, and to check those.
#include <cmath>

#include "layout.h"

namespace maskllm {
namespace {

uint32_t dword(const uint8_t* at) {
    uint32_t bits;
    std::memcpy(&bits, at, 4);
    return bits;
}

void sparse_f32(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* panel, int inputs, float* out) {
    for (int t = 0; t < inputs; t++) {
        float sum[4] = {};
        for (size_t b = 0; b < blocks; b++) {
            const uint8_t *mask = masks + b * MASK_BYTES, *pairs = values + b * BF16_BYTES;
            for (int j = 0; j < 8; j++)
                for (int e = 0; e < 16; e++) {
                    const uint32_t pair = dword(pairs + 64 * j + 4 * e);
                    const int group = dword(mask + 4 * e) >> 4 * j & 7;
                    const float* four = panel + b * COLUMNS * inputs + 16 * (j * inputs + t) + e / 4 * 4;
                    sum[e % 4] += to_float(uint16_t(pair)) * four[FIRST[group]];
                    sum[e % 4] += to_float(uint16_t(pair >> 16)) * four[SECOND[group]];
                }
        }
        for (int r = 0; r < 4; r++) out[4 * t + r] += sum[r];
    }
}

void dense_f32(const uint16_t* weight, size_t weight_stride, size_t columns, const float* panel, int inputs, float* out) {
    for (int t = 0; t < inputs; t++)
        for (int r = 0; r < 4; r++) {
            float sum = 0;
            for (size_t c = 0; c < columns; c++)  // of each 32 the even ones come first
                sum += to_float(weight[r * weight_stride + c]) * panel[16 * ((c / 32 * 2 + c % 2) * inputs + t) + c % 32 / 2];
            out[4 * t + r] += sum;
        }
}

void int8(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint8_t* panel, int inputs, int32_t* out) {
    for (int t = 0; t < inputs; t++) {
        int32_t sum[4] = {};
        for (size_t b = 0; b < blocks; b++) {
            const int8_t *lanes = (const int8_t*)panel + b * COLUMNS * inputs, *dense = (const int8_t*)values + b * INT8_DENSE_BYTES;
            for (int i = 0; !masks && i < 8 * 64; i++)  // dword 4 l + r of vector j
                sum[i / 4 % 4] += dense[i] * lanes[64 * (i / 64 / 4 * inputs + t) + i / 16 % 4 * 16 + i / 64 % 4 * 4 + i % 4];
            const uint8_t* mask = masks + b * MASK_BYTES;
            const int8_t* kept = (const int8_t*)values + b * INT8_BYTES;
            for (int j = 0; masks && j < 4; j++)
                for (int e = 0; e < 16; e++) {
                    const int8_t* four = kept + 64 * j + 4 * e;
                    const int8_t* eight = lanes + 64 * (j / 2 * inputs + t) + e / 4 * 16 + 8 * (j % 2);
                    const int low = dword(mask + 4 * e) >> 8 * j & 7, high = dword(mask + 4 * e) >> (8 * j + 4) & 7;
                    sum[e % 4] += four[0] * eight[FIRST[low]] + four[1] * eight[SECOND[low]] +
                                  four[2] * eight[4 + FIRST[high]] + four[3] * eight[4 + SECOND[high]];
                }
        }
        for (int r = 0; r < 4; r++) out[4 * t + r] += sum[r];
    }
}

void fill_bf16(const uint16_t* weight, size_t weight_stride, const uint8_t* mask, uint8_t* values) {
    for (int j = 0; j < 8; j++)
        for (int e = 0; e < 16; e++) {
            const int group = dword(mask + 4 * e) >> 4 * j & 7;
            const uint16_t* four = weight + e % 4 * weight_stride + e / 4 * 32 + 4 * j;
            const uint16_t pair[2] = {four[FIRST[group]], four[SECOND[group]]};
            std::memcpy(values + 64 * j + 4 * e, pair, 4);
        }
}

void fill_int8(const uint16_t* weight, size_t weight_stride, const float* inverse_scales, const uint8_t* mask, uint8_t* values) {
    for (int j = 0; j < 4; j++)
        for (int e = 0; e < 16; e++)
            for (int half = 0; half < 2; half++) {
                const int group = dword(mask + 4 * e) >> (8 * j + 4 * half) & 7;
                const uint16_t* four = weight + e % 4 * weight_stride + e / 4 * 32 + 8 * j + 4 * half;
                const float scale = inverse_scales[e % 4];
                int8_t* pair = (int8_t*)values + 64 * j + 4 * e + 2 * half;
                for (int i = 0; i < 2; i++) {
                    const float steps = to_float(four[i ? SECOND[group] : FIRST[group]]) * scale;
                    pair[i] = std::isnan(steps) ? 0 : int8_t(std::lrintf(std::fmax(std::fmin(steps, 127.f), -127.f)));
                }
            }
}

}  // namespace

const Kernels* portable() {
    static const Kernels kernels = {
        .name = "portable",
        .tile = 8,
        .sparse_f32 = sparse_f32,
        .int8 = int8,
        .int8_is_unsigned = false,
        .dense_f32 = dense_f32,
        .fill_bf16 = fill_bf16,
        .fill_int8 = fill_int8,
    };
    return &kernels;
}

}  // namespace maskllm
