// AVX-512 as in Ice Lake and Zen 4 (BW, DQ, VL, VBMI2, VNNI), and bf16 products where the processor has them.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx512bf16")
#include <immintrin.h>

#include "products.h"

namespace maskllm {
namespace {

struct Avx512 {
    using F = __m512;
    using I = __m512i;
    struct Where {
        I first, second;
    };
    static constexpr int WIDTH = 16, TILE = 16;
    static constexpr bool UNSIGNED = true;  // vpdpbusd multiplies unsigned by signed bytes

    static F zero() { return _mm512_setzero_ps(); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F load_f32(const float* at) { return _mm512_loadu_ps(at); }
    static I load(const void* at) { return _mm512_loadu_si512(at); }
    static F low_bf16(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
    static F high_bf16(I pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))); }
    static F permute(F x, I where) { return _mm512_permutevar_ps(x, where); }  // reads bits 1:0
    static Where select(I mask, int shift) {
        const I table = _mm512_broadcast_i64x4(_mm256_setr_epi32(FIRST[0] | SECOND[0] << 2, FIRST[1] | SECOND[1] << 2,
                                                                FIRST[2] | SECOND[2] << 2, FIRST[3] | SECOND[3] << 2,
                                                                FIRST[4] | SECOND[4] << 2, FIRST[5] | SECOND[5] << 2,
                                                                FIRST[6] | SECOND[6] << 2, 0));
        I both = _mm512_permutexvar_epi32(_mm512_srli_epi32(mask, shift), table);
        return {both, _mm512_srli_epi32(both, 2)};
    }
    static void add_rows(F sum, float* out) {
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
        __m128 rows = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), rows));
    }
    static float add_all(F sum) { return _mm512_reduce_add_ps(sum); }

    static I zero_int() { return _mm512_setzero_si512(); }
    static I ones() { return _mm512_set1_epi8(1); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static I dot(I sum, I x, I weights) { return _mm512_dpbusd_epi32(sum, x, weights); }
    static I permute_bytes(I x, I where) { return _mm512_shuffle_epi8(x, where); }
    static I select_bytes(I mask, int shift, int half) {
        auto entry = [](int i, int at) { return int(FIRST[i] + at) | int(SECOND[i] + at) << 8; };
        auto table = [&](int at) {
            return _mm512_broadcast_i64x4(_mm256_setr_epi32(entry(0, at), entry(1, at), entry(2, at), entry(3, at),
                                                           entry(4, at), entry(5, at), entry(6, at), 0));
        };
        I low = _mm512_permutexvar_epi32(_mm512_srli_epi32(mask, shift), table(8 * half));
        I high = _mm512_permutexvar_epi32(_mm512_srli_epi32(mask, shift + 4), _mm512_slli_epi32(table(8 * half + 4), 16));
        return _mm512_or_si512(low, high);
    }
    static I same_dword(int at) { return _mm512_set1_epi32(0x03020100 + 0x04040404 * at); }
    static I minus_128(I sum, I weights) { return _mm512_sub_epi32(sum, _mm512_slli_epi32(weights, 7)); }
    static void add_rows(I sum, int32_t* out) {
        __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti32x8_epi32(sum, 1));
        __m128i rows = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        _mm_storeu_si128((__m128i*)out, _mm_add_epi32(_mm_loadu_si128((__m128i*)out), rows));
    }

    // Lane i of the result adds the lanes of the i-th sum.
    template <class Sum>
    static Sum add_lanes(const Sum* sums) {
        auto fold = [](Sum a, Sum b) {
            return add(Sum(_mm512_shuffle_f32x4(F(a), F(b), 0x88)), Sum(_mm512_shuffle_f32x4(F(a), F(b), 0xdd)));
        };
        return fold(fold(sums[0], sums[1]), fold(sums[2], sums[3]));
    }
    template <class Sum>
    static void add_rows_of_four(const Sum* sums, void* out) {
        _mm512_storeu_si512(out, I(add(Sum(_mm512_loadu_si512(out)), add_lanes(sums))));
    }
};

// One quad with T inputs of bf16: a dword is a group's kept pair, and one instruction multiplies and adds it.
template <int T>
inline void sparse_bf16_tile(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint16_t* panel,
                             float* out) {
    constexpr int SUMS = T >= 8 ? 1 : 2;
    auto entry = [](int i, int at) {
        int first = 2 * FIRST[i] + at, second = 2 * SECOND[i] + at;
        return first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
    };
    auto table = [&](int at) {
        return _mm512_broadcast_i64x4(_mm256_setr_epi32(entry(0, at), entry(1, at), entry(2, at), entry(3, at),
                                                       entry(4, at), entry(5, at), entry(6, at), 0));
    };
    auto multiply = [](__m512 sum, __m512i inputs, __m512i where, __m512i kept) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_shuffle_epi8(inputs, where), (__m512bh)kept);
    };
    const __m512i even = table(0), odd = table(8);  // two vectors share a lane's 16 bytes of inputs
    __m512 sum[SUMS][T];
#pragma GCC unroll 4
    for (auto& sums : sum)
#pragma GCC unroll 16
        for (auto& s : sums) s = _mm512_setzero_ps();
    for (size_t b = 0; b < blocks; b++, masks += MASK_BYTES, values += BF16_BYTES, panel += T * COLUMNS) {
        prefetch<T>(masks, values, BF16_BYTES);
        const __m512i mask = _mm512_loadu_si512(masks);
#pragma GCC unroll 4
        for (int jj = 0; jj < 4; jj++) {
            const __m512i v0 = _mm512_loadu_si512(values + 128 * jj);
            const __m512i v1 = _mm512_loadu_si512(values + 128 * jj + 64);
            const __m512i w0 = _mm512_permutexvar_epi32(_mm512_srli_epi32(mask, 8 * jj), even);
            const __m512i w1 = _mm512_permutexvar_epi32(_mm512_srli_epi32(mask, 8 * jj + 4), odd);
            constexpr int TURN = T < 4 ? T : 4;  // inputs between a sum's first product and its second
#pragma GCC unroll 16
            for (int t = 0; t < T; t += TURN) {
                __m512i inputs[TURN];
#pragma GCC unroll 4
                for (int i = 0; i < TURN; i++) {
                    inputs[i] = _mm512_loadu_si512(panel + 32 * (jj * T + t + i));
                    HOLD(inputs[i]);
                    sum[0][t + i] = multiply(sum[0][t + i], inputs[i], w0, v0);
                }
#pragma GCC unroll 4
                for (int i = 0; i < TURN; i++) sum[SUMS - 1][t + i] = multiply(sum[SUMS - 1][t + i], inputs[i], w1, v1);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; SUMS > 1 && t < T; t++) sum[0][t] = Avx512::add(sum[0][t], sum[SUMS - 1][t]);
    add_rows<Avx512>(sum[0], out);
}

void sparse_bf16(const uint8_t* masks, const uint8_t* values, size_t blocks, const uint16_t* panel, int inputs, float* out) {
    switch (inputs) {
        case 1: return sparse_bf16_tile<1>(masks, values, blocks, panel, out);
        case 2: return sparse_bf16_tile<2>(masks, values, blocks, panel, out);
        case 4: return sparse_bf16_tile<4>(masks, values, blocks, panel, out);
        case 8: return sparse_bf16_tile<8>(masks, values, blocks, panel, out);
        default: return sparse_bf16_tile<16>(masks, values, blocks, panel, out);
    }
}

// Four dense rows with T inputs, each under its own mask or none.
template <int T, bool MASKED>
inline void dense_bf16_tile(const uint16_t* weight, size_t weight_stride, size_t columns, const uint8_t* const* masks,
                            size_t mask_stride, const uint16_t* panel, float* out) {
    __m512 sum[4][T];
#pragma GCC unroll 4
    for (auto& sums : sum)
#pragma GCC unroll 16
        for (auto& s : sums) s = _mm512_setzero_ps();
    bool own[T];  // whether an input's mask is another than that of the one before
    for (int t = 0; t < T; t++) own[t] = MASKED && (t == 0 || masks[t] != masks[t - 1]);
    auto step = [&](const __m512i(&w)[4], size_t c) __attribute__((always_inline)) {
        __m512i kept[4] = {w[0], w[1], w[2], w[3]};
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            __m512bh inputs = (__m512bh)_mm512_loadu_si512(panel + T * c + 32 * t);
            if (MASKED && own[t]) {
                constexpr size_t chunk = CHUNK * COLUMNS;
                const uint8_t* mask = masks[t] + c / chunk * mask_stride + c % chunk / 2;
                if (c % COLUMNS == 0) __builtin_prefetch(mask + CHUNK * MASK_BYTES);  // the next quad's
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    uint32_t bits;
                    std::memcpy(&bits, mask + 4 * r, 4);
                    kept[r] = _mm512_maskz_mov_epi16(bits, w[r]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], inputs, (__m512bh)kept[r]);
        }
    };
    const uint16_t* rows[4] = {weight, weight + weight_stride, weight + 2 * weight_stride, weight + 3 * weight_stride};
    size_t c = 0;
    for (; c + 32 <= columns; c += 32) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            // The rows' pieces are short: what follows one is the next quad's.
            const size_t ahead = c + PREFETCH / 4;
            __builtin_prefetch(rows[r] + (ahead < columns ? ahead : 4 * weight_stride + ahead - columns), 0, 2);
            w[r] = _mm512_loadu_si512(rows[r] + c);
        }
        step(w, c);
    }
    if (c < columns) {
        __m512i w[4];
        for (int r = 0; r < 4; r++) w[r] = _mm512_maskz_loadu_epi16((1u << (columns - c)) - 1, rows[r] + c);
        step(w, c);
    }
    __m512 lanes[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {  // dword r of each lane: what the lane holds of row r
        auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
        const __m512d low = (__m512d)pairs(sum[0][t], sum[1][t]), high = (__m512d)pairs(sum[2][t], sum[3][t]);
        lanes[t] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(low, high), (__m512)_mm512_unpackhi_pd(low, high));
    }
    add_rows<Avx512>(lanes, out);
}

// Four short dense rows with one input, one after the other: their memory is a single stream (1.3x at 1024 columns).
inline void dense_bf16_rows(const uint16_t* weight, size_t weight_stride, size_t columns, const uint16_t* panel, float* out) {
    for (int r = 0; r < 4; r++) {
        const uint16_t *row = weight + r * weight_stride, *next = row + weight_stride;
        __m512 even = _mm512_setzero_ps(), odd = even;  // a chain of additions would wait on itself
        size_t c = 0;
        auto multiply = [&](__m512 sum, __mmask32 present, size_t c) {
            const __m512i w = _mm512_maskz_loadu_epi16(present, row + c), x = _mm512_loadu_si512(panel + c);
            return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
        };
        for (; c + 64 <= columns; c += 64) {
            const size_t ahead = c + PREFETCH / 2;
            const uint16_t* later = ahead < columns ? row + ahead : next + (ahead - columns);
            __builtin_prefetch(later, 0, 2), __builtin_prefetch(later + 32, 0, 2);
            even = multiply(even, ~0u, c), odd = multiply(odd, ~0u, c + 32);
        }
        for (; c < columns; c += 32) even = multiply(even, columns - c < 32 ? (1u << (columns - c)) - 1 : ~0u, c);
        out[r] += _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    }
}

template <bool MASKED>
void dense_bf16_panel(const uint16_t* weight, size_t weight_stride, size_t columns, const uint8_t* const* masks,
                      size_t mask_stride, const uint16_t* panel, int inputs, float* out) {
    switch (inputs) {
        case 1: return dense_bf16_tile<1, MASKED>(weight, weight_stride, columns, masks, mask_stride, panel, out);
        case 2: return dense_bf16_tile<2, MASKED>(weight, weight_stride, columns, masks, mask_stride, panel, out);
        default: return dense_bf16_tile<4, MASKED>(weight, weight_stride, columns, masks, mask_stride, panel, out);
    }
}

void dense_bf16(const uint16_t* weight, size_t weight_stride, size_t columns, const uint8_t* const* masks,
                size_t mask_stride, const uint16_t* panel, int inputs, float* out) {
    if (!masks && inputs == 1 && columns <= 4096) return dense_bf16_rows(weight, weight_stride, columns, panel, out);
    (masks ? dense_bf16_panel<true> : dense_bf16_panel<false>)(weight, weight_stride, columns, masks, mask_stride, panel,
                                                               inputs, out);
}

// The 16 values that a row keeps of 32 columns.
inline __m256i kept(const uint16_t* row, const uint8_t* mask) {
    uint32_t bits;
    std::memcpy(&bits, mask, 4);
    return _mm512_castsi512_si256(_mm512_maskz_compress_epi16(bits, _mm512_loadu_si512(row)));
}

// The 32 columns of lane l keep 16 values: group j's pair is dword j, and goes to vector j. Two lanes at a time.
void fill_bf16(const uint16_t* weight, size_t weight_stride, const uint8_t* mask, uint8_t* values) {
    __m512i part[2][4];  // of vectors j and j + 4 by lane: 2 h of the one, of the other, 2 h + 1 of the one, of the other
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            auto of = [&](int l) { return kept(weight + r * weight_stride + 32 * l, mask + 16 * l + 4 * r); };
            row[r] = _mm512_inserti64x4(_mm512_castsi256_si512(of(2 * h)), of(2 * h + 1), 1);
        }
        const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
        const __m512i c = _mm512_unpacklo_epi32(row[2], row[3]), d = _mm512_unpackhi_epi32(row[2], row[3]);
        part[h][0] = _mm512_unpacklo_epi64(a, c), part[h][1] = _mm512_unpackhi_epi64(a, c);
        part[h][2] = _mm512_unpacklo_epi64(b, d), part[h][3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        _mm512_stream_si512((__m512i*)(values + 64 * j), _mm512_shuffle_i64x2(part[0][j], part[1][j], 0x88));
        _mm512_stream_si512((__m512i*)(values + 64 * (j + 4)), _mm512_shuffle_i64x2(part[0][j], part[1][j], 0xdd));
    }
}

void fill_int8(const uint16_t* weight, size_t weight_stride, const float* inverse_scales, const uint8_t* mask, uint8_t* values) {
    __m512i lane[4];  // of each, what goes to vectors 0 to 3
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m512i wide = _mm512_cvtepu16_epi32(kept(weight + r * weight_stride + 32 * l, mask + 16 * l + 4 * r));
            const __m512 floats = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            const __mmask16 number = _mm512_cmp_ps_mask(floats, floats, _CMP_ORD_Q);
            const __m512 steps = _mm512_maskz_mul_ps(number, floats, _mm512_set1_ps(inverse_scales[r]));
            row[r] = _mm512_cvtps_epi32(_mm512_range_ps(steps, _mm512_set1_ps(127), 2));  // the smaller magnitude, with steps' sign
        }
        lane[l] = _mm512_packs_epi16(_mm512_packs_epi32(row[0], row[1]), _mm512_packs_epi32(row[2], row[3]));
    }
    for (int j = 0; j < 4; j += 2) {
        auto halves = [&](int l) {
            return j ? _mm512_shuffle_i64x2(lane[l], lane[l + 1], 0xee) : _mm512_shuffle_i64x2(lane[l], lane[l + 1], 0x44);
        };
        const __m512i low = halves(0), high = halves(2);
        _mm512_stream_si512((__m512i*)(values + 64 * j), _mm512_shuffle_i64x2(low, high, 0x88));
        _mm512_stream_si512((__m512i*)(values + 64 * (j + 1)), _mm512_shuffle_i64x2(low, high, 0xdd));
    }
}

}  // namespace

const Kernels* avx512() {
    static const Kernels kernels = {
        .name = "avx512",
        .tile = Avx512::TILE,
        .sparse_f32 = sparse_f32<Avx512>,
        .int8 = int8<Avx512>,
        .int8_is_unsigned = Avx512::UNSIGNED,
        .dense_f32 = dense_f32<Avx512>,
        .fill_bf16 = fill_bf16,
        .fill_int8 = fill_int8,
        .fills_past_caches = true,
    };
    return &kernels;
}

const Kernels* avx512_bf16() {
    static const Kernels kernels = {
        .name = "avx512-bf16",
        .tile = Avx512::TILE,
        .sparse_f32 = sparse_f32<Avx512>,
        .sparse_bf16 = sparse_bf16,
        .int8 = int8<Avx512>,
        .int8_is_unsigned = Avx512::UNSIGNED,
        .dense_f32 = dense_f32<Avx512>,
        .dense_bf16 = dense_bf16,
        .fill_bf16 = fill_bf16,
        .fill_int8 = fill_int8,
        .fills_past_caches = true,
    };
    return &kernels;
}

}  // namespace maskllm
#else
#include "layout.h"
namespace maskllm {
const Kernels* avx512() { return nullptr; }
const Kernels* avx512_bf16() { return nullptr; }
}  // namespace maskllm
#endif
