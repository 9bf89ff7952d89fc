// Arm NEON (AArch64): bf16 values with fp32 inputs, int8 by multiplying and widening.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "products.h"

namespace maskllm {
namespace {

struct Neon {
    using F = float32x4_t;
    using I = int32x4_t;
    struct Where {
        uint8x16_t first, second;
    };
    static constexpr int WIDTH = 4, TILE = 4;
    static constexpr bool UNSIGNED = false;

    static F zero() { return vdupq_n_f32(0); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F load_f32(const float* at) { return vld1q_f32(at); }
    static I load(const void* at) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)at)); }
    static F low_bf16(I pairs) { return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16)); }
    static F high_bf16(I pairs) { return vreinterpretq_f32_s32(vandq_s32(pairs, vdupq_n_s32(0xffff0000))); }
    static F permute(F x, uint8x16_t where) {
        return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), where));
    }
    // The group's nibble, three bits of it, in every byte of its dword.
    static uint8x16_t groups(I mask, int shift) {
        const uint32x4_t bits = vshlq_u32(vreinterpretq_u32_s32(mask), vdupq_n_s32(-shift));
        return vreinterpretq_u8_u32(vmulq_n_u32(vandq_u32(bits, vdupq_n_u32(7)), 0x01010101));
    }
    static uint8x16_t look_up(const uint8_t (&table)[8], uint8x16_t groups) {
        return vqtbl1q_u8(vcombine_u8(vld1_u8(table), vdup_n_u8(0)), groups);
    }
    static Where select(I mask, int shift) {
        const uint8x16_t of = groups(mask, shift), bytes = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
        return {vaddq_u8(vshlq_n_u8(look_up(FIRST, of), 2), bytes), vaddq_u8(vshlq_n_u8(look_up(SECOND, of), 2), bytes)};
    }
    static void add_rows(F sum, float* out) { vst1q_f32(out, vaddq_f32(vld1q_f32(out), sum)); }
    static float add_all(F sum) { return vaddvq_f32(sum); }

    static I zero_int() { return vdupq_n_s32(0); }
    static I add(I a, I b) { return vaddq_s32(a, b); }
    static I dot(I sum, I x, I weights) {
        const int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(weights);
        const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
        return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
    static I permute_bytes(I x, uint8x16_t where) { return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x), where)); }
    static uint8x16_t select_bytes(I mask, int shift, int half) {
        const uint8x16_t low = groups(mask, shift), high = groups(mask, shift + 4);
        const uint8x16_t first = vbslq_u8(vreinterpretq_u8_u32(vdupq_n_u32(0xffff)), low, high);
        const uint8x16_t odd = vreinterpretq_u8_u32(vdupq_n_u32(0xff00ff00));
        const uint8x16_t at = vbslq_u8(odd, look_up(SECOND, first), look_up(FIRST, first));
        return vaddq_u8(at, vreinterpretq_u8_u32(vdupq_n_u32(half ? 0x0c0c0808 : 0x04040000)));
    }
    static uint8x16_t same_dword(int at) { return vreinterpretq_u8_u32(vdupq_n_u32(0x03020100 + 0x04040404 * at)); }
    static void add_rows(I sum, int32_t* out) { vst1q_s32(out, vaddq_s32(vld1q_s32(out), sum)); }
};

}  // namespace

const Kernels* neon() {
    static const Kernels kernels = {
        .name = "neon",
        .tile = Neon::TILE,
        .sparse_f32 = sparse_f32<Neon>,
        .int8 = int8<Neon>,
        .int8_is_unsigned = Neon::UNSIGNED,
        .dense_f32 = dense_f32<Neon>,
        .fill_bf16 = portable()->fill_bf16,
        .fill_int8 = portable()->fill_int8,
    };
    return &kernels;
}

}  // namespace maskllm
#else
#include "layout.h"
namespace maskllm {
const Kernels* neon() { return nullptr; }
}  // namespace maskllm
#endif
