// Products for any instruction set `V`, which names its vectors and what they can do.
//
// V::F and V::I are vectors of V::WIDTH floats and as many int32; 64 bytes are 16 / WIDTH of them. In each 128-bit
// lane V::select turns mask nibbles into two permutations, of a group's first and second kept column. V::add_rows adds
// what the lanes of a sum hold of each row, V::add_all all that a sum holds; vectors of 64 bytes do so for four inputs at once.
#pragma once
#include "layout.h"

namespace maskllm {

// Hold a vector in a register: gcc would load it again for each use.
#if defined(__aarch64__)
#define HOLD(vector) asm("" : "+w"(vector))
#else
#define HOLD(vector) asm("" : "+v"(vector))
#endif

// What a single stream reads next; several the processor fetches faster by itself. For few inputs into the second cache, which
// can wait for more lines at a time: 1.05 times as fast. 16 multiply for longer than that wait, and want them close: 1.04 times.
template <int INPUTS>
static inline void prefetch(const uint8_t* masks, const uint8_t* values, size_t bytes) {
    constexpr int CLOSE = INPUTS < 8 ? 2 : 3;
    if (masks) __builtin_prefetch(masks + PREFETCH / 8, 0, CLOSE);
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(values + PREFETCH + line, 0, CLOSE);
}

template <class V, int T, class Sum, class Out>
inline void add_rows(const Sum (&sums)[T], Out* out) {
    if constexpr (V::WIDTH == 16 && T % 4 == 0)
#pragma GCC unroll 4
        for (int t = 0; t < T; t += 4) V::add_rows_of_four(sums + t, out + 4 * t);
    else
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) V::add_rows(sums[t], out + 4 * t);
}

// A vector of a block as products use it: two kept columns' weights, and where their inputs are.
template <class V>
struct Decoded {
    typename V::F first, second;
    typename V::Where where;
};

template <class V>
void decode_f32(const uint8_t* masks, const uint8_t* values, size_t blocks, uint8_t* out) {
    static_assert(DECODED_BYTES == 8 * 16 / V::WIDTH * sizeof(Decoded<V>));
    auto* decoded = (Decoded<V>*)out;
    for (size_t b = 0; b < blocks; b++, masks += MASK_BYTES, values += BF16_BYTES)
        for (int p = 0; p < 16 / V::WIDTH; p++)
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const auto pairs = V::load(values + 64 * j + 4 * V::WIDTH * p);
                const auto where = V::by_bytes(V::select(V::load(masks + 4 * V::WIDTH * p), 4 * j));
                *decoded++ = {V::low_bf16(pairs), V::high_bf16(pairs), where};
            }
}

// Q quads, so many `apart`, with T inputs of fp32; where DECODED one, of what `decode_f32` wrote. Few inputs of one quad use
// two sums each, as a chain of additions would wait on itself.
template <class V, int T, int Q = 1, bool DECODED = false>
inline void sparse_f32_tile(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* panel, float* out,
                            size_t apart = 0) {
    constexpr int W = V::WIDTH, PARTS = 16 / W, SUMS = T >= 8 || Q > 1 ? 1 : 2;
    typename V::F sum[SUMS][Q][T];
#pragma GCC unroll 2
    for (auto& quads : sum)
#pragma GCC unroll 4
        for (auto& sums : quads)
#pragma GCC unroll 16
            for (auto& s : sums) s = V::zero();
    const size_t step = apart * blocks;
    const auto* decoded = (const Decoded<V>*)values;
    auto permute = [](auto inputs, auto where) {
        if constexpr (DECODED)
            return V::permute_by_bytes(inputs, where);
        else
            return V::permute(inputs, where);
    };
    for (size_t b = 0; b < blocks; b++, masks += DECODED ? 0 : MASK_BYTES, values += BF16_BYTES, panel += T * COLUMNS) {
        if (Q == 1 && !DECODED) prefetch<T>(masks, values, BF16_BYTES);
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const int j = Q > 1 ? i % 4 * 2 + i / 4 : i;  // low nibbles of all quads first, or too many wait
#pragma GCC unroll 4
                for (int q = 0; q < Q; q++) {
                    typename V::F first, second;
                    typename V::Where where;
                    if constexpr (DECODED) {
                        first = decoded->first, second = decoded->second;
                        where = {decoded->where.first, decoded->where.second};  // gcc copies a whole by way of the stack
                        decoded++;
                    } else {
                        const auto pairs = V::load(values + q * step * BF16_BYTES + 64 * j + 4 * W * p);
                        first = V::low_bf16(pairs), second = V::high_bf16(pairs);
                        where = V::select(V::load(masks + q * step * MASK_BYTES + 4 * W * p), 4 * j);
                    }
#pragma GCC unroll 16
                    for (int t = 0; t < T; t++) {
                        auto inputs = V::load_f32(panel + 16 * (j * T + t) + W * p);
                        HOLD(inputs);
                        auto &one = sum[0][q][t], &other = sum[SUMS - 1][q][t];
                        one = V::fma(first, permute(inputs, where.first), one);
                        other = V::fma(second, permute(inputs, where.second), other);
                    }
                }
            }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
#pragma GCC unroll 16
        for (int t = 0; SUMS > 1 && t < T; t++) sum[0][q][t] = V::add(sum[0][q][t], sum[SUMS - 1][q][t]);
        add_rows<V>(sum[0][q], out + q * apart * ROWS * T);
    }
}

template <class V, bool DECODED = false>
void sparse_f32(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* panel, int inputs, float* out) {
    switch (inputs) {
        case 1: return sparse_f32_tile<V, 1, 1, DECODED>(masks, values, blocks, panel, out);
        case 2: return sparse_f32_tile<V, 2, 1, DECODED>(masks, values, blocks, panel, out);
        case 4: return sparse_f32_tile<V, 4, 1, DECODED>(masks, values, blocks, panel, out);
        case 8: return sparse_f32_tile<V, V::TILE < 8 ? V::TILE : 8, 1, DECODED>(masks, values, blocks, panel, out);
        default: return sparse_f32_tile<V, V::TILE, 1, DECODED>(masks, values, blocks, panel, out);
    }
}

template <class V>
void sparse_f32_apart(const uint8_t* masks, const uint8_t* values, size_t blocks, const float* input, float* out, size_t apart) {
    sparse_f32_tile<V, 1, STREAMS>(masks, values, blocks, input, out, apart);
}

// R dense rows with T inputs of fp32. A dword of a row has an even column's value and the odd one's that follows it.
template <class V, int R, int T, bool SHORT>
inline void dense_f32_tile(const uint16_t* weight, size_t weight_stride, size_t columns, const float* panel, float* out) {
    constexpr int W = V::WIDTH, PARTS = 16 / W, SUMS = R * T == 1 ? 4 : R * T < 8 ? 2 : 1;
    typename V::F sum[SUMS][R][T];
#pragma GCC unroll 4
    for (auto& sums : sum)
#pragma GCC unroll 4
        for (auto& row : sums)
#pragma GCC unroll 4
            for (auto& s : row) s = V::zero();
    for (size_t c = 0; c < columns; c += 32, panel += 32 * T) {
#pragma GCC unroll 4
        for (int r = 0; SHORT && r < R; r++) __builtin_prefetch(weight + r * weight_stride + c + PREFETCH / (R == 1 ? 2 : 4));
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                typename V::F w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const auto pairs = V::load(weight + r * weight_stride + c + 2 * W * p);
                    w[r] = odd ? V::high_bf16(pairs) : V::low_bf16(pairs);
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    auto inputs = V::load_f32(panel + 16 * (odd * T + t) + W * p);
                    HOLD(inputs);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) {
                        auto& s = sum[(2 * p + odd) % SUMS][r][t];
                        s = V::fma(w[r], inputs, s);
                    }
                }
            }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
            for (int i = 1; i < SUMS; i++) sum[0][r][t] = V::add(sum[0][r][t], sum[i][r][t]);
            out[4 * t + r] += V::add_all(sum[0][r][t]);
        }
}

template <class V, bool SHORT>
void dense_f32_panel(const uint16_t* weight, size_t weight_stride, size_t columns, const float* panel, int inputs, float* out) {
    auto tiles = [&](auto tile, int rows) {
        for (int r = 0; r < 4; r += rows) tile(weight + r * weight_stride, weight_stride, columns, panel, out + r);
    };
    switch (inputs) {
        case 1: return SHORT ? tiles(dense_f32_tile<V, 1, 1, SHORT>, 1) : tiles(dense_f32_tile<V, 4, 1, SHORT>, 4);
        case 2: return tiles(dense_f32_tile<V, 4, 2, SHORT>, 4);
        default: return tiles(dense_f32_tile<V, 2, 4, SHORT>, 2);
    }
}

// Long rows are streams of their own, of which the processor fetches several by itself.
template <class V>
void dense_f32(const uint16_t* weight, size_t weight_stride, size_t columns, const float* panel, int inputs, float* out) {
    (columns <= 1024 ? dense_f32_panel<V, true> : dense_f32_panel<V, false>)(weight, weight_stride, columns, panel, inputs, out);
}

// One quad with T inputs of int8. Where inputs are unsigned with zero at 128, 128 times the weights comes off.
template <class V, int T, bool MASKED>
inline void int8_tile(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint8_t* panel,
                             int32_t* out) {
    constexpr int W = V::WIDTH, PARTS = 16 / W, SUMS = T >= 8 ? 1 : 2, VECTORS = MASKED ? 2 : 4;
    constexpr size_t BYTES = MASKED ? INT8_BYTES : INT8_DENSE_BYTES;
    typename V::I sum[SUMS][T], weights = V::zero_int();
#pragma GCC unroll 2
    for (auto& sums : sum)
#pragma GCC unroll 16
        for (auto& s : sums) s = V::zero_int();
    for (size_t b = 0; b < blocks; b++, values += BYTES, panel += T * COLUMNS) {
        prefetch<T>(MASKED ? masks : nullptr, values, BYTES);
        typename V::I mask[PARTS];
        for (int p = 0; MASKED && p < PARTS; p++) mask[p] = V::load(masks + b * MASK_BYTES + 4 * W * p);
#pragma GCC unroll 2
        for (int jj = 0; jj < 2; jj++)  // these vectors share 16 bytes of inputs in each lane
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                typename V::I kept[VECTORS];
                decltype(V::same_dword(0)) where[VECTORS];
#pragma GCC unroll 4
                for (int k = 0; k < VECTORS; k++) {
                    kept[k] = V::load(values + 64 * (VECTORS * jj + k) + 4 * W * p);
                    if constexpr (MASKED)
                        where[k] = V::select_bytes(mask[p], 16 * jj + 8 * k, k);
                    else
                        where[k] = V::same_dword(k);
                    if constexpr (V::UNSIGNED) weights = V::dot(weights, V::ones(), kept[k]);
                }
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) {
                    auto inputs = V::load(panel + 64 * (jj * T + t) + 4 * W * p);
                    HOLD(inputs);
#pragma GCC unroll 4
                    for (int k = 0; k < VECTORS; k++) {
                        auto& s = sum[k % SUMS][t];
                        s = V::dot(s, V::permute_bytes(inputs, where[k]), kept[k]);
                    }
                }
            }
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
        if constexpr (SUMS > 1) sum[0][t] = V::add(sum[0][t], sum[SUMS - 1][t]);
        if constexpr (V::UNSIGNED) sum[0][t] = V::minus_128(sum[0][t], weights);
    }
    add_rows<V>(sum[0], out);
}

template <class V, bool MASKED>
void int8_panel(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint8_t* panel, int inputs, int32_t* out) {
    switch (inputs) {
        case 1: return int8_tile<V, 1, MASKED>(masks, values, blocks, panel, out);
        case 2: return int8_tile<V, 2, MASKED>(masks, values, blocks, panel, out);
        case 4: return int8_tile<V, 4, MASKED>(masks, values, blocks, panel, out);
        case 8: return int8_tile<V, V::TILE < 8 ? V::TILE : 8, MASKED>(masks, values, blocks, panel, out);
        default: return int8_tile<V, V::TILE, MASKED>(masks, values, blocks, panel, out);
    }
}

template <class V>
void int8(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint8_t* panel, int inputs, int32_t* out) {
    (masks ? int8_panel<V, true> : int8_panel<V, false>)(masks, values, blocks, panel, inputs, out);
}

}  // namespace maskllm
