// Arm kernels against the portable ones, on random blocks: prints "neon agrees", or says which one does not.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "layout.h"

using namespace maskllm;

int main() {
    const Kernels &ours = *neon(), &reference = *portable();
    const size_t blocks = 3;
    const uint8_t nibbles[6] = {3, 5, 9, 6, 10, 12};
    srand(1);
    for (int inputs : {1, 2, 4}) {
        std::vector<uint8_t> masks(blocks * MASK_BYTES), bytes(blocks * COLUMNS * inputs);
        std::vector<uint8_t> bf16(blocks * BF16_BYTES), int8(blocks * INT8_BYTES);
        std::vector<float> panel(blocks * COLUMNS * inputs);
        for (auto& mask : masks) mask = uint8_t(nibbles[rand() % 6] | nibbles[rand() % 6] << 4);
        for (size_t i = 0; i < bf16.size(); i += 2) {
            const uint16_t value = to_bf16(rand() % 2001 / 1000.f - 1);
            std::memcpy(&bf16[i], &value, 2);
        }
        for (auto& value : int8) value = uint8_t(rand() % 255 - 127);
        for (auto& value : bytes) value = uint8_t(rand() % 255 - 127);
        for (auto& value : panel) value = rand() % 2001 / 1000.f - 1;
        float a[16] = {}, b[16] = {};
        float g[16] = {}, h[16] = {};
        int32_t c[16] = {}, d[16] = {}, e[16] = {}, f[16] = {};
        ours.sparse_f32(masks.data(), bf16.data(), blocks, panel.data(), inputs, a);
        reference.sparse_f32(masks.data(), bf16.data(), blocks, panel.data(), inputs, b);
        ours.int8(masks.data(), int8.data(), blocks, bytes.data(), inputs, c);
        reference.int8(masks.data(), int8.data(), blocks, bytes.data(), inputs, d);
        ours.int8(nullptr, bf16.data(), blocks, bytes.data(), inputs, e);  // any bytes are as many dense weights
        reference.int8(nullptr, bf16.data(), blocks, bytes.data(), inputs, f);
        for (size_t columns : {96, 1056}) {  // short rows, and long ones
            std::vector<uint16_t> weight(4 * columns);
            std::vector<float> wide(columns * inputs);
            for (auto& value : weight) value = to_bf16(rand() % 2001 / 1000.f - 1);
            for (auto& value : wide) value = rand() % 2001 / 1000.f - 1;
            ours.dense_f32(weight.data(), columns, columns, wide.data(), inputs, g);
            reference.dense_f32(weight.data(), columns, columns, wide.data(), inputs, h);
        }
        for (int i = 0; i < 4 * inputs; i++) {
            if (std::fabs(g[i] - h[i]) > 1e-4f || h[i] == 0) return printf("dense fp32: %g, not %g\n", g[i], h[i]), 1;
            if (std::fabs(a[i] - b[i]) > 1e-4f || b[i] == 0) return printf("fp32: %g, not %g\n", a[i], b[i]), 1;
            if (c[i] != d[i] || d[i] == 0) return printf("int8: %d, not %d\n", c[i], d[i]), 1;
            if (e[i] != f[i] || f[i] == 0) return printf("dense int8: %d, not %d\n", e[i], f[i]), 1;
        }
    }
    puts("neon agrees");
}
