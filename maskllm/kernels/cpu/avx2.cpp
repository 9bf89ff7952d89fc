// AVX2 and FMA: bf16 values with fp32 inputs, int8 by pairs of bytes.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "products.h"

namespace maskllm {
namespace {

struct Avx2 {
    using F = __m256;
    using I = __m256i;
    struct Where {
        I first, second;
    };
    static constexpr int WIDTH = 8, TILE = 8;
    static constexpr bool UNSIGNED = false;

    static F zero() { return _mm256_setzero_ps(); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F load_f32(const float* at) { return _mm256_loadu_ps(at); }
    static I load(const void* at) { return _mm256_loadu_si256((const I*)at); }
    static F low_bf16(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
    static F high_bf16(I pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))); }
    static F permute(F x, I where) { return _mm256_permutevar_ps(x, where); }  // reads bits 1:0
    // For many inputs: vpshufb runs beside FMAs, with which vpermilps competes (1.3x), and its operand is dearer to make.
    static Where by_bytes(Where where) {
        const F dwords = _mm256_castsi256_ps(
            _mm256_broadcastsi128_si256(_mm_setr_epi32(0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c)));
        return {_mm256_castps_si256(permute(dwords, where.first)), _mm256_castps_si256(permute(dwords, where.second))};
    }
    static F permute_by_bytes(F x, I where) { return _mm256_castsi256_ps(permute_bytes(_mm256_castps_si256(x), where)); }
    template <class Entry>
    static I each_lane(Entry entry) {  // by what `entry` says of its bytes 0 to 15
        return _mm256_broadcastsi128_si256(_mm_setr_epi8(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5),
                                                         entry(6), entry(7), entry(8), entry(9), entry(10), entry(11),
                                                         entry(12), entry(13), entry(14), entry(15)));
    }
    // Of the low or the high nibble of each byte, what `entry` says of its pattern.
    template <class Entry>
    static I look_up(I mask, bool high, Entry entry) {
        const I nibbles = _mm256_and_si256(high ? _mm256_srli_epi32(mask, 4) : mask, _mm256_set1_epi8(7));
        return _mm256_shuffle_epi8(each_lane([&](int i) { return entry(i & 7); }), nibbles);
    }
    static Where select(I mask, int shift) {  // a permutation reads bits 1:0 of a dword
        const I both = look_up(mask, shift & 4, [](int pattern) { return FIRST[pattern] | SECOND[pattern] << 2; });
        return {_mm256_srli_epi32(both, shift & ~4), _mm256_srli_epi32(both, (shift & ~4) + 2)};
    }
    static void add_rows(F sum, float* out) {
        __m128 rows = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), rows));
    }
    static float add_all(F sum) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    static I zero_int() { return _mm256_setzero_si256(); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    // |w| * (x with the sign of w): a pair is at most 2 * 127 * 127, which an int16 holds.
    static I dot(I sum, I x, I weights) {
        const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static I permute_bytes(I x, I where) { return _mm256_shuffle_epi8(x, where); }
    // Two groups' bytes for each row, of vector `shift` / 8: all four are made together and wait for their turn.
    static I select_bytes(I mask, int shift, int half) {
        const I by_vector = _mm256_shuffle_epi8(mask, each_lane([](int i) { return i % 4 * 4 + i / 4; }));
        auto pairs = [&](bool high) {
            const I first = look_up(by_vector, high, [&](int pattern) { return 4 * high + FIRST[pattern]; });
            const I second = look_up(by_vector, high, [&](int pattern) { return 4 * high + SECOND[pattern]; });
            return shift < 16 ? _mm256_unpacklo_epi8(first, second) : _mm256_unpackhi_epi8(first, second);
        };
        const I low = pairs(false), high = pairs(true);
        return half ? _mm256_add_epi8(_mm256_unpackhi_epi16(low, high), _mm256_set1_epi8(8)) : _mm256_unpacklo_epi16(low, high);
    }
    static I same_dword(int at) { return _mm256_set1_epi32(0x03020100 + 0x04040404 * at); }
    static void add_rows(I sum, int32_t* out) {
        __m128i rows = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        _mm_storeu_si128((__m128i*)out, _mm_add_epi32(_mm_loadu_si128((__m128i*)out), rows));
    }
};

// Bytes of two groups' kept bf16 values, by the two groups' mask nibbles.
struct Kept {
    alignas(16) uint8_t bytes[256][16] = {};
    constexpr Kept() {
        for (int b = 0; b < 256; b++) {
            const int at[4] = {FIRST[b & 7], SECOND[b & 7], 4 + FIRST[b >> 4 & 7], 4 + SECOND[b >> 4 & 7]};
            for (int i = 0; i < 16; i++) bytes[b][i] = uint8_t(2 * at[i / 2 % 4] + i % 2);
        }
    }
};
constexpr Kept KEPT;

// Kept values of a row's two groups from column 8 g: 4 bf16 in each half.
inline __m128i kept(const uint16_t* row, const uint8_t* mask, int g) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(row + 8 * g)), _mm_load_si128((const __m128i*)KEPT.bytes[mask[g]]));
}

void fill_bf16(const uint16_t* weight, size_t weight_stride, const uint8_t* mask, uint8_t* values) {
    for (int l = 0; l < 4; l++)
        for (int g = 0; g < 4; g++) {  // groups 2 g and 2 g + 1 of the lane, for vectors 2 g and 2 g + 1
            __m128i row[4];
            for (int r = 0; r < 4; r++)
                row[r] = kept(weight + r * weight_stride + 32 * l, mask + 16 * l + 4 * r, g);
            const __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpacklo_epi32(row[2], row[3]);
            uint8_t* out = values + 128 * g + 16 * l;
            _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi64(a, b));
            _mm_storeu_si128((__m128i*)(out + 64), _mm_unpackhi_epi64(a, b));
        }
}

void fill_int8(const uint16_t* weight, size_t weight_stride, const float* inverse_scales, const uint8_t* mask, uint8_t* values) {
    for (int l = 0; l < 4; l++)
        for (int g = 0; g < 4; g++) {
            __m128i row[4];
            for (int r = 0; r < 4; r++) {
                const __m128i four = kept(weight + r * weight_stride + 32 * l, mask + 16 * l + 4 * r, g);
                const __m128 floats = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(four), 16));
                const __m128 steps = _mm_mul_ps(floats, _mm_set1_ps(inverse_scales[r])), most = _mm_set1_ps(127);
                const __m128 number = _mm_and_ps(steps, _mm_cmpord_ps(steps, steps));
                row[r] = _mm_cvtps_epi32(_mm_max_ps(_mm_min_ps(number, most), -most));
            }
            const __m128i bytes = _mm_packs_epi16(_mm_packs_epi32(row[0], row[1]), _mm_packs_epi32(row[2], row[3]));
            _mm_storeu_si128((__m128i*)(values + 64 * g + 16 * l), bytes);
        }
}

}  // namespace

const Kernels* avx2() {
    static const Kernels kernels = {
        .name = "avx2",
        .tile = Avx2::TILE,
        .sparse_f32 = sparse_f32<Avx2>,
        .sparse_f32_apart = sparse_f32_apart<Avx2>,
        .decode_f32 = decode_f32<Avx2>,
        .sparse_f32_decoded = sparse_f32<Avx2, true>,
        .int8 = int8<Avx2>,
        .int8_is_unsigned = Avx2::UNSIGNED,
        .dense_f32 = dense_f32<Avx2>,
        .fill_bf16 = fill_bf16,
        .fill_int8 = fill_int8,
    };
    return &kernels;
}

}  // namespace maskllm
#else
#include "layout.h"
namespace maskllm {
const Kernels* avx2() { return nullptr; }
}  // namespace maskllm
#endif
