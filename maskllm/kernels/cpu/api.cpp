// What Python calls: write a slot, multiply a batch. Picks the instruction set, lays inputs out, shares the
// quads among threads. One OpenMP runtime with torch: whoever loads this library has loaded torch before.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "layout.h"

// A function that the compiler builds for each of these and the loader chooses from; gcc knows the names since 12.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace maskllm {
namespace {

// Base-6 byte -> the mask bits of its three groups, first group lowest.
struct Packed {
    uint16_t bits[256] = {};
    constexpr Packed() {
        constexpr uint8_t code[6] = {3, 5, 9, 6, 10, 12};
        for (int b = 0; b < 216; b++) bits[b] = uint16_t(code[b % 6] | code[b / 6 % 6] << 4 | code[b / 36] << 8);
    }
};
constexpr Packed PACKED;

// A row of packed codes -> its mask bits, 96 columns at a time.
void unpack(const uint8_t* codes, size_t bytes, uint32_t* bits) {
    const uint16_t* table = PACKED.bits;
    auto write = [&](uint64_t low, uint64_t high) {  // 60 and 36 bits
        bits[0] = uint32_t(low), bits[1] = uint32_t(low >> 32 | high << 28), bits[2] = uint32_t(high >> 4);
        bits += 3;
    };
    for (; bytes >= 8; codes += 8, bytes -= 8)
        write(uint64_t(table[codes[0]]) | uint64_t(table[codes[1]]) << 12 | uint64_t(table[codes[2]]) << 24 |
                  uint64_t(table[codes[3]]) << 36 | uint64_t(table[codes[4]]) << 48,
              uint64_t(table[codes[5]]) | uint64_t(table[codes[6]]) << 12 | uint64_t(table[codes[7]]) << 24);
    uint64_t low = 0, high = 0;
    for (size_t i = 0; i < bytes; i++) (i < 5 ? low : high) |= uint64_t(table[codes[i]]) << 12 * (i % 5);
    if (bytes) write(low, high);
}

// A copy past the caches, which a slot's megabytes would only empty.
void stream(uint8_t* out, const uint8_t* from, size_t bytes) {
#if defined(__x86_64__)
    for (size_t i = 0; i < bytes; i += 16) _mm_stream_si128((__m128i*)(out + i), _mm_load_si128((const __m128i*)(from + i)));
#else
    std::memcpy(out, from, bytes);
#endif
}

// What this processor can run, the fastest first.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool ice_lake = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
                          __builtin_cpu_supports("avx512vnni");
    if (ice_lake && __builtin_cpu_supports("avx512bf16")) all.push_back(avx512_bf16());
    if (ice_lake) all.push_back(avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(avx2());
#endif
    if (neon()) all.push_back(neon());
    all.push_back(portable());
    return all;
}

const Kernels* kernels = available().front();
int form = -1;  // of masks in one batch: 0 each slot for its rows, 1 the dense weight once for all, -1 the faster

struct Shape {
    size_t outs, columns, quads, blocks;
    Shape(long outs, long columns)
        : outs(outs), columns(columns), quads(ceil_div(outs, ROWS)), blocks(ceil_div(columns, COLUMNS)) {}
};

// A slot: scales where it is int8, mask bits, values.
bool is_int8(int type) { return type != BF16; }
size_t chunk(int type) { return is_int8(type) ? 2 * CHUNK : CHUNK; }
size_t value_bytes(int type) { return type == BF16 ? BF16_BYTES : type == INT8 ? INT8_BYTES : INT8_DENSE_BYTES; }
size_t masks_at(const Shape& s, int type) { return is_int8(type) ? ceil_div(s.quads * ROWS * 4, 64) * 64 : 0; }
size_t values_at(const Shape& s, int type) {
    return masks_at(s, type) + (type == INT8_DENSE ? 0 : s.quads * s.blocks * MASK_BYTES);
}
size_t slot_bytes(const Shape& s, int type) { return values_at(s, type) + s.quads * s.blocks * value_bytes(type); }

// Which block of a slot it is.
size_t place(const Shape& s, int type, size_t quad, size_t block) {
    const size_t blocks = chunk(type), begin = block / blocks * blocks;
    return begin * s.quads + quad * std::min(blocks, s.blocks - begin) + block - begin;
}

// Memory that is kept from call to call, on a cache line.
uint8_t* scratch(size_t bytes) {
    static thread_local std::vector<uint8_t> memory;
    if (memory.size() < bytes + 64) {
        memory.clear();  // or it would be copied
        memory.resize(bytes + 64);
    }
    return (uint8_t*)(((uintptr_t)memory.data() + 63) / 64 * 64);
}

// ---- Inputs

// A block of an input into its panel, as 64-byte vectors `step` bytes apart. In lane order the 16-byte piece of lane
// l and vector v is the (l * V + v)th of the block.
template <int V>
void lane_order(const void* block, uint8_t* out, size_t step) {
    for (size_t v = 0; v < V; v++)
        for (size_t l = 0; l < 4; l++) std::memcpy(out + step * v + 16 * l, (const uint8_t*)block + 16 * (V * l + v), 16);
}

void even_first(const float* block, uint8_t* out, size_t step) {
    for (size_t v = 0; v < 8; v++) {
        float half[16];
        for (size_t i = 0; i < 16; i++) half[i] = block[v / 2 * 32 + 2 * i + v % 2];
        std::memcpy(out + step * v, half, 64);
    }
}

void natural_order(const uint16_t* block, uint8_t* out, size_t step) {
    for (size_t v = 0; v < 4; v++) std::memcpy(out + step * v, block + 32 * v, 64);
}

// Block `b` of an input as fp32, zeros past its end.
void read_block(const void* x, int type, const Shape& s, size_t b, float* block) {
    const size_t at = b * COLUMNS, count = std::min(COLUMNS, s.columns - at);
    if (type == F32)
        std::memcpy(block, (const float*)x + at, 4 * count);
    else
        for (size_t c = 0; c < count; c++) block[c] = to_float(((const uint16_t*)x)[at + c]);
    std::fill(block + count, block + COLUMNS, 0.f);
}

enum Form { LANES_F32, LANES_BF16, LANES_INT8, EVEN_FIRST_F32, NATURAL_BF16 };

size_t element_bytes(Form form) { return form == LANES_INT8 ? 1 : form == LANES_BF16 || form == NATURAL_BF16 ? 2 : 4; }

constexpr long READ = 1 << 15, LINES = 64;  // numbers that a thread reads in one go, and of one stream in turn

CLONES uint64_t sum_of(const uint64_t* numbers, long apart, long count) {
    uint64_t sum = 0;
    for (long begin = 0; begin < count; begin += LINES)
        for (long stream = 0; stream < STREAMS; stream++)
            for (long i = begin; i < std::min(begin + LINES, count); i++) sum += numbers[stream * apart + i];
    return sum;
}

// One input of a panel of `inputs`. Returns its scale where it becomes int8: NaN, as all its outputs then are, where
// it is not finite.
CLONES float lay_out(const void* x, int type, const Shape& s, Form form, int inputs, uint8_t* out) {
    const size_t step = 64 * inputs, block_step = COLUMNS * element_bytes(form) * inputs;
    float block[COLUMNS], scale = 1;
    if (form == LANES_INT8) {
        uint32_t largest = 0;  // magnitudes compare as integers do, infinity and NaN above all
        if (type == F32)
            for (size_t c = 0; c < s.columns; c++) largest = std::max(largest, ((const uint32_t*)x)[c] & 0x7fffffff);
        else {
            uint16_t half = 0;
            for (size_t c = 0; c < s.columns; c++) half = std::max(half, uint16_t(((const uint16_t*)x)[c] & 0x7fff));
            largest = uint32_t(half) << 16;
        }
        std::memcpy(&scale, &largest, 4);
        scale = largest < 0x7f800000 ? scale / 127 : NAN;
    }
    const float inverse = scale > 0 ? 1 / scale : 0;
    const uint32_t zero = kernels->int8_is_unsigned ? 128 : 0;
    for (size_t b = 0; b < s.blocks; b++, out += block_step) {
        if (form == LANES_BF16 || form == NATURAL_BF16) {
            const uint16_t* values = (const uint16_t*)x + b * COLUMNS;
            uint16_t padded[COLUMNS] = {};
            if (s.columns - b * COLUMNS < COLUMNS) {
                std::memcpy(padded, values, 2 * (s.columns - b * COLUMNS));
                values = padded;
            }
            form == NATURAL_BF16 ? natural_order(values, out, step) : lane_order<4>(values, out, step);
            continue;
        }
        read_block(x, type, s, b, block);
        if (form == LANES_F32 || form == EVEN_FIRST_F32) {
            form == LANES_F32 ? lane_order<8>(block, out, step) : even_first(block, out, step);
            continue;
        }
        uint8_t bytes[COLUMNS];
        for (size_t c = 0; c < COLUMNS; c++) {
            const float rounded = block[c] * inverse + 12582912.f;  // 1.5 * 2^23: the integer is in the low bits
            uint32_t bits;
            std::memcpy(&bits, &rounded, 4);
            bytes[c] = uint8_t(bits + zero);
        }
        lane_order<2>(bytes, out, step);
    }
    return scale;
}

// ---- Products

struct Part {  // the rows [begin, end) of the order that are multiplied alike
    int slot;  // -1 dense, FUSED each with its own mask
    size_t begin, end;
};
constexpr int FUSED = -2;

struct Panel {
    const Part* part;
    size_t first;  // in the order
    int rows;      // of the batch; the inputs past them are zeros, as a wider panel beats two passes of the weight
    int inputs;
    size_t offset;  // of its inputs in what was laid out
};

struct Batch {
    Shape shape;
    const void* x;
    int x_type;
    size_t x_stride;
    const int32_t* row_slots;
    const uint16_t* weight;
    size_t weight_stride;
    const uint8_t* slots;
    size_t slot_stride;
    int slot_type;
    const float* bias;
    void* y;
    std::vector<int> order;  // rows by slot
    std::vector<Part> parts;

    Form form(const Part& part) const {
        if (part.slot < 0) return x_type == BF16 && kernels->dense_bf16 ? NATURAL_BF16 : EVEN_FIRST_F32;
        if (is_int8(slot_type)) return LANES_INT8;
        return x_type == BF16 && kernels->sparse_bf16 ? LANES_BF16 : LANES_F32;
    }
    const uint8_t* masks(int slot, size_t q, size_t block) const {
        return slots + slot * slot_stride + masks_at(shape, slot_type) + place(shape, slot_type, q, block) * MASK_BYTES;
    }
    const uint8_t* values(int slot, size_t q, size_t block) const {
        return slots + slot * slot_stride + values_at(shape, slot_type) + place(shape, slot_type, q, block) * value_bytes(slot_type);
    }
};

// Sums are of four bytes, floats or for int8 integers: ROWS for each input.
void multiply_dense(const Batch& batch, const Panel& panel, const uint8_t* data, size_t q, size_t block, size_t blocks, float* sums) {
    const Shape& s = batch.shape;
    const bool fused = panel.part->slot == FUSED;
    const uint8_t* masks[4];
    for (int t = 0; fused && t < panel.inputs; t++)
        masks[t] = batch.masks(batch.row_slots[batch.order[panel.first + std::min(t, panel.rows - 1)]], q, block);
    const uint16_t* weight = batch.weight + q * ROWS * batch.weight_stride + block * COLUMNS;
    const bool even_first = batch.form(*panel.part) == EVEN_FIRST_F32;
    size_t columns = std::min(blocks * COLUMNS, s.columns - block * COLUMNS), stride = batch.weight_stride;
    const size_t present = std::min(ROWS, s.outs - q * ROWS), padded = even_first ? ceil_div(columns, 32) * 32 : columns;
    static thread_local std::vector<uint16_t> copy;
    if (present < ROWS || columns < padded) {
        copy.assign(ROWS * padded, 0);
        for (size_t r = 0; r < present; r++) std::memcpy(&copy[r * padded], weight + r * stride, 2 * columns);
        weight = copy.data(), stride = columns = padded;
    }
    const size_t at = block * COLUMNS * panel.inputs;
    if (even_first)
        kernels->dense_f32(weight, stride, columns, (const float*)data + at, panel.inputs, sums);
    else
        kernels->dense_bf16(weight, stride, columns, fused ? masks : nullptr, s.quads * CHUNK * MASK_BYTES,
                            (const uint16_t*)data + at, panel.inputs, sums);
}

// Some blocks of as many quads, from `q` on, times the same of a panel; or of each of them and others, so many `apart`. A quad's
// sums are `width` from the next's.
void multiply(const Batch& batch, const Panel& panel, const uint8_t* data, size_t q, size_t quads, size_t block, size_t blocks,
              float* sums, size_t width, size_t apart) {
    const Form form = batch.form(*panel.part);
    const uint8_t* masks = batch.slot_type == INT8_DENSE ? nullptr : batch.masks(panel.part->slot, q, block);
    const uint8_t* values = batch.values(panel.part->slot, q, block);
    const uint8_t* inputs = data + block * COLUMNS * panel.inputs * element_bytes(form);
    const size_t mask_step = masks ? blocks * MASK_BYTES : 0, value_step = blocks * value_bytes(batch.slot_type);
    for (; quads > 0; quads--, masks += mask_step, values += value_step, sums += width)
        if (apart)
            kernels->sparse_f32_apart(masks, values, blocks, (const float*)inputs, sums, apart);
        else if (form == LANES_INT8)
            kernels->int8(masks, values, blocks, inputs, panel.inputs, (int32_t*)sums);
        else if (form == LANES_BF16)
            kernels->sparse_bf16(masks, values, blocks, (const uint16_t*)inputs, panel.inputs, sums);
        else
            kernels->sparse_f32(masks, values, blocks, (const float*)inputs, panel.inputs, sums);
}

// Sixteen outputs, of four quads.
constexpr size_t OUTS = 4 * ROWS;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));

// Always inlined: a vector is passed differently from clone to clone.
template <class T>
__attribute__((always_inline)) inline T load(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

__attribute__((always_inline)) inline Halves to_bf16(Floats value) {
    // By a subtraction's sign: a comparison gcc 12 would do one by one without AVX-512.
    const Bits bits = (Bits)value, nan = (Bits)((Ints)(0x7f800000 - (bits & 0x7fffffff)) >> 31);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (~nan & rounded), Halves);
}

CLONES void narrow(const float* in, size_t count, uint16_t* out) {
    size_t c = 0;
    for (; c + 16 <= count; c += 16) {
        const Halves halves = to_bf16(load<Floats>(in + c));
        std::memcpy(out + c, &halves, sizeof halves);
    }
    for (; c < count; c++) out[c] = maskllm::to_bf16(in[c]);
}

// Sums of quads to outputs: `width` of them for each quad from `first` on, and memory to read past the last.
CLONES void write(const Batch& batch, const Panel& panel, size_t first, size_t quads, const float* scales, const float* sums,
                  size_t width) {
    const bool int8 = batch.form(*panel.part) == LANES_INT8;
    const size_t size = batch.x_type == F32 ? 4 : 2, end = std::min((first + quads) * ROWS, batch.shape.outs);
    const float* weights = int8 ? (const float*)(batch.slots + panel.part->slot * batch.slot_stride) : nullptr;
    for (int t = 0; t < panel.rows; t++) {  // one row of y after the other, as rows lie pages apart
        const size_t row = batch.order[panel.first + t] * batch.shape.outs;
        const float scale = int8 ? scales[panel.first + t] : 1;
        const float* sum = sums + ROWS * t;
        for (size_t n = first * ROWS; n < end; n += OUTS, sum += 4 * width) {
            auto pair = [&](size_t quad) {
                const float* at = sum + quad * width;
                return __builtin_shufflevector(load<Quad>(at), load<Quad>(at + width), 0, 1, 2, 3, 4, 5, 6, 7);
            };
            Floats value = __builtin_shufflevector(pair(0), pair(2), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            if (int8) value = __builtin_convertvector((Ints)value, Floats) * (load<Floats>(weights + n) * scale);
            uint8_t* out = (uint8_t*)batch.y + (row + n) * size;
            const size_t count = std::min(OUTS, end - n);
            if (batch.bias) {
                Floats bias = {};
                count < OUTS ? std::memcpy(&bias, batch.bias + n, 4 * count) : std::memcpy(&bias, batch.bias + n, sizeof bias);
                value += bias;
            }
            if (size == 2) {
                const Halves halves = to_bf16(value);
                count < OUTS ? std::memcpy(out, &halves, 2 * count) : std::memcpy(out, &halves, sizeof halves);
            } else
                count < OUTS ? std::memcpy(out, &value, 4 * count) : std::memcpy(out, &value, sizeof value);
        }
    }
}

// Several panels take turns at the weights of some quads, which with their own part stay in the second cache; where the
// weights are dense at those of one quad, so that both stay in the first. A single panel takes all quads at once: one
// stream, or STREAMS.
constexpr size_t QUADS_TOGETHER = 64, PANELS_TOGETHER = 8;
// Where an instruction set can, up to PANELS_DECODED panels take their turns at weights that are decoded once for them: some
// quads at a time, as with the panels these are to stay in the second cache, and not for few panels, which do not gain by it.
constexpr size_t QUADS_DECODED = 8, PANELS_DECODED = 16, FEWEST_DECODED = 4;

void multiply(const Batch& batch, const std::vector<Panel>& panels, const uint8_t* laid_out, size_t first_quad, size_t last_quad) {
    static thread_local std::vector<float> sums;
    alignas(64) uint8_t decoded[QUADS_DECODED * CHUNK * DECODED_BYTES];
    const Shape& s = batch.shape;
    for (size_t begin = 0, end; begin < panels.size(); begin = end) {
        const Part* part = panels[begin].part;
        const bool can_decode = kernels->decode_f32 && batch.form(*part) == LANES_F32;
        const size_t most = can_decode ? PANELS_DECODED : PANELS_TOGETHER;
        for (end = begin; end < panels.size() && end - begin < most && panels[end].part == part;) end++;
        // The dense weight has no chunks: the fewer inputs there are, the longer the rows that are read at once. Masks
        // of full chunks are apart by one stride, a last one that is not full stands alone.
        const bool alone = end - begin == 1;
        const size_t step = part->slot < 0 && alone ? 4 * CHUNK * (4 / panels[begin].inputs) : chunk(batch.slot_type);
        const size_t full = part->slot == FUSED ? s.blocks / CHUNK * CHUNK : s.blocks;
        const bool decodes = can_decode && end - begin >= FEWEST_DECODED;
        const size_t together = !alone ? QUADS_TOGETHER : part->slot < 0 ? 1 : last_quad - first_quad;
        const size_t width = ROWS * panels[begin].inputs;
        const bool streams = alone && width == ROWS && kernels->sparse_f32_apart && batch.form(*part) == LANES_F32;
        sums.resize(std::max(sums.size(), (together * (end - begin) + 3) * width));  // and what `write` reads past them
        for (size_t quad = first_quad; quad < last_quad; quad += together) {
            const size_t quads = std::min(together, last_quad - quad);
            auto of = [&](size_t p, size_t q) { return &sums[((p - begin) * quads + q) * width]; };
            std::fill_n(sums.data(), quads * (end - begin) * width, 0.f);
            for (size_t block = 0, blocks; block < s.blocks; block += blocks) {
                blocks = std::min(step, (block < full ? full : s.blocks) - block);
                auto data = [&](size_t p) { return laid_out + panels[p].offset; };
                auto take = [&](size_t p, size_t first, size_t count, size_t apart = 0) {
                    multiply(batch, panels[p], data(p), quad + first, count, block, blocks, of(p, first), width, apart);
                };
                if (part->slot < 0)
                    for (size_t q = 0; q < quads; q++)
                        for (size_t p = begin; p < end; p++)
                            multiply_dense(batch, panels[p], data(p), quad + q, block, blocks, of(p, q));
                else if (streams) {
                    const size_t apart = quads / STREAMS;
                    take(begin, 0, apart, apart);
                    take(begin, apart * STREAMS, quads % STREAMS);
                } else if (decodes)
                    for (size_t first = 0; first < quads; first += QUADS_DECODED) {
                        const size_t last = std::min(first + QUADS_DECODED, quads);
                        auto at = [&](size_t q) { return decoded + (q - first) * CHUNK * DECODED_BYTES; };
                        for (size_t q = first; q < last; q++)
                            kernels->decode_f32(batch.masks(part->slot, quad + q, block), batch.values(part->slot, quad + q, block),
                                                blocks, at(q));
                        for (size_t p = begin; p < end; p++) {
                            const auto inputs = (const float*)data(p) + block * COLUMNS * panels[p].inputs;
                            for (size_t q = first; q < last; q++)
                                kernels->sparse_f32_decoded(nullptr, at(q), blocks, inputs, panels[p].inputs, of(p, q));
                        }
                    }
                else
                    for (size_t p = begin; p < end; p++) take(p, 0, quads);
            }
            for (size_t p = begin; p < end; p++)
                for (size_t q = 0; q < quads; q += QUADS_TOGETHER)  // whose sums stay in the first cache from row to row
                    write(batch, panels[p], quad + q, std::min(QUADS_TOGETHER, quads - q), (const float*)laid_out, of(p, q), width);
        }
    }
}

// What decides between two ways of doing the same. These are one thread's of Zen 4, until cpu.py has measured others.
struct Costs {  // in ns for 64 weights
    double slot = 3.2, slot_row = 0.55;  // of a slot at least, by reading it; and of each of its rows
    double once = 7, fixed = 8;          // of the dense weight read once for several masks, at least; and before any row
    double once_row = 0.45, once_mask = 1;
    double dense_rows = 32;      // more dense rows than this are faster as one product of torch's
    double sparse_rows = 1 << 30;  // and more rows of one mask by its weight made dense: none of Zen 4's
} costs;

// Several masks in a batch: each slot for its rows, or the dense weight read once for all.
void choose_form(Batch& batch) {
    double apart = 0;
    size_t begin = batch.parts.size(), rows = 0;
    while (begin > 0 && batch.parts[begin - 1].slot >= 0) {
        const Part& part = batch.parts[--begin];
        const double count = part.end - part.begin;
        apart += std::max(costs.slot, costs.slot_row * count);
        rows += part.end - part.begin;
    }
    const size_t masks = batch.parts.size() - begin;
    const double once = std::max(costs.once, costs.fixed + costs.once_row * rows + costs.once_mask * masks);
    if (masks > 1 && (form == 1 || (form < 0 && once < apart))) {
        batch.parts[begin] = {FUSED, batch.parts[begin].begin, batch.parts.back().end};
        batch.parts.resize(begin + 1);
    }
}

// How many dense rows are torch's.
long dense_left(int weight_type, const int32_t* row_slots, long rows) {
    const long dense = std::count_if(row_slots, row_slots + rows, [](int32_t slot) { return slot < 0; });
    return weight_type == BF16 && dense <= costs.dense_rows ? 0 : dense;
}

// The rows of a batch by slot; without the dense ones where they are left to torch.
void arrange(Batch& batch, long rows, bool leave_dense) {
    const int32_t* slots = batch.row_slots;
    for (long row = 0; row < rows; row++)
        if (slots[row] >= 0 || !leave_dense) batch.order.push_back(int(row));
    std::stable_sort(batch.order.begin(), batch.order.end(), [&](int a, int b) { return slots[a] < slots[b]; });
    for (size_t t = 0; t < batch.order.size(); t++) {
        const int slot = slots[batch.order[t]];
        if (batch.parts.empty() || batch.parts.back().slot != slot) batch.parts.push_back({slot, t, t});
        batch.parts.back().end = t + 1;
    }
}

// So many bytes of inputs each thread lays out for itself, of more each some panels: to fetch lines from another's cache takes
// longer, and longest where two write to neighbouring ones (64 rows of 4096: 50 us by one thread, 200 by two in turns).
constexpr size_t LAID_OUT_BY_EACH = 1 << 19;

void run(const Batch& batch, int threads) {
    const Shape& s = batch.shape;
    std::vector<Panel> panels;
    size_t bytes = batch.order.size() * sizeof(float);  // the scales first
    bytes = ceil_div(bytes, 64) * 64;
    for (const Part& part : batch.parts) {
        const size_t widest = part.slot < 0 ? 4 : kernels->tile;
        for (size_t first = part.begin; first < part.end; first += panels.back().rows) {
            size_t inputs = widest;
            while (inputs / 2 >= part.end - first) inputs /= 2;
            panels.push_back({&part, first, int(std::min(inputs, part.end - first)), int(inputs), bytes});
            bytes += inputs * s.blocks * COLUMNS * element_bytes(batch.form(part));
        }
    }
    auto lay = [&](uint8_t* memory, const Panel& panel) {
        const Form form = batch.form(*panel.part);
        const size_t size = batch.x_type == F32 ? 4 : 2;
        for (int t = 0; t < panel.inputs; t++) {
            uint8_t* out = memory + panel.offset + 64 * t;
            if (t < panel.rows) {
                const void* x = (const uint8_t*)batch.x + batch.order[panel.first + t] * batch.x_stride * size;
                ((float*)memory)[panel.first + t] = lay_out(x, batch.x_type, s, form, panel.inputs, out);
            } else
                for (size_t byte = 0; byte < s.blocks * COLUMNS * element_bytes(form); byte += 64)
                    std::memset(out + byte * panel.inputs, 0, 64);
        }
    };
    const bool few = bytes <= LAID_OUT_BY_EACH;
    uint8_t* memory = few ? nullptr : scratch(bytes);
#pragma omp parallel num_threads(threads) firstprivate(memory)
    {
        if (few) {
            memory = scratch(bytes);
            for (const Panel& panel : panels) lay(memory, panel);
        } else
#pragma omp for schedule(static, 1)
            for (size_t p = 0; p < panels.size(); p++) lay(memory, panels[p]);
        const size_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        multiply(batch, panels, memory, s.quads * thread / count, s.quads * (thread + 1) / count);
    }
}

// `count` of 128 columns of a block's row, whose masks and values begin here, with zeros between what is kept.
CLONES void expand_row(const uint8_t* masks, const uint8_t* values, size_t count, int type, void* out) {
    uint64_t groups[COLUMNS / 4];
    for (size_t l = 0; l < 4; l++) {
        uint32_t bits;
        std::memcpy(&bits, masks + 16 * l, 4);
        for (size_t g = 0; g < 8; g++) {
            uint32_t pair;
            std::memcpy(&pair, values + 64 * g + 16 * l, 4);
            const int group = bits >> 4 * g & 7;
            groups[8 * l + g] = uint64_t(pair & 0xffff) << 16 * FIRST[group] | uint64_t(pair >> 16) << 16 * SECOND[group];
        }
    }
    uint16_t row[COLUMNS];
    std::memcpy(row, groups, sizeof row);
    if (type == BF16) std::memcpy(out, row, 2 * count);
    for (size_t c = 0; type == F32 && c < count; c++) ((float*)out)[c] = to_float(row[c]);
}

}  // namespace
}  // namespace maskllm

using namespace maskllm;

extern "C" {

const char* maskllm_using() { return kernels->name; }

const char* maskllm_available() {
    static std::string names;
    if (names.empty())
        for (const Kernels* each : available()) names += std::string(each->name) + " ";
    return names.c_str();
}

void maskllm_use(const char* name) {
    for (const Kernels* each : available())
        if (!std::strcmp(each->name, name)) kernels = each;
}


// As many numbers as `Costs` has, in its order.
void maskllm_get_costs(double* present) { std::memcpy(present, &costs, sizeof costs); }
void maskllm_set_costs(const double* measured) { std::memcpy(&costs, measured, sizeof costs); }

// Whether a step of these rows would read the dense weight once, where it may.
bool maskllm_reads_once(const int32_t* row_slots, long rows) {
    Batch batch = {Shape(ROWS, COLUMNS), nullptr, BF16, 0, row_slots, nullptr, 0, nullptr, 0, BF16, nullptr, nullptr, {}, {}};
    arrange(batch, rows, true);
    choose_form(batch);
    return !batch.parts.empty() && batch.parts.back().slot == FUSED;
}

void maskllm_force_form(int forced) { form = forced; }

long maskllm_slot_bytes(long outs, long columns, int type) { return long(slot_bytes(Shape(outs, columns), type)); }

// Big pages where the kernel grants them: fewer misses in address translation, worth 1.3x out of cache.
void maskllm_advise(void* memory, long bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) / page * page, end = (uintptr_t)memory + bytes;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Sum of memory, STREAMS times as many numbers, for the speed at which it can be read at all.
long maskllm_read(const uint64_t* memory, long count, int threads) {
    uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) num_threads(threads)
    for (long i = 0; i < count; i += READ) sum += sum_of(memory + i, count, std::min(READ, count - i));
    return long(sum);
}

// Write a mask, packed base-6 codes (outs, ceil(columns / 12)), into a slot of a weight (outs, columns). An int8 slot
// has its scales already.
void maskllm_fill(uint8_t* slot, int slot_type, const void* weight, int weight_type, long weight_stride,
                  const uint8_t* packed, long outs, long columns, int threads) {
    const Shape s(outs, columns);
    const size_t row_bytes = ceil_div(s.columns, 12), words = s.blocks * COLUMNS / 32;
    uint8_t *masks = slot + masks_at(s, slot_type), *values = slot + values_at(s, slot_type);
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> mask(ROWS * (words + 2));  // of a quad; a row's last bytes may reach past it
#pragma omp for
        for (size_t q = 0; q < s.quads; q++) {
            const size_t present = std::min(ROWS, s.outs - q * ROWS);
            float inverse[ROWS] = {};
            for (size_t r = 0; r < ROWS; r++) {
                const size_t n = q * ROWS + r;
                uint32_t* bits = &mask[r * (words + 2)];
                if (r < present)
                    unpack(packed + n * row_bytes, row_bytes, bits);
                else
                    std::fill_n(bits, words, 0);
                if (slot_type == INT8 && r < present && ((const float*)slot)[n] > 0) inverse[r] = 1 / ((const float*)slot)[n];
            }
            for (size_t b = 0; b < s.blocks; b++) {
                alignas(64) uint8_t bits[MASK_BYTES], kept[BF16_BYTES];
                for (size_t l = 0; l < 4; l++)
                    for (size_t r = 0; r < ROWS; r++) std::memcpy(bits + 16 * l + 4 * r, &mask[r * (words + 2) + 4 * b + l], 4);
                const size_t count = std::min(COLUMNS, s.columns - b * COLUMNS);
                uint16_t copy[ROWS * COLUMNS];
                const uint16_t* dense = (const uint16_t*)weight + q * ROWS * weight_stride + b * COLUMNS;
                size_t stride = weight_stride;
                if (weight_type == F32 || count < COLUMNS || present < ROWS) {
                    std::memset(copy, 0, count < COLUMNS || present < ROWS ? sizeof copy : 0);
                    for (size_t r = 0; r < present; r++) {
                        const size_t at = (q * ROWS + r) * weight_stride + b * COLUMNS;
                        if (weight_type == F32)
                            narrow((const float*)weight + at, count, copy + r * COLUMNS);
                        else
                            std::memcpy(copy + r * COLUMNS, (const uint16_t*)weight + at, 2 * count);
                    }
                    dense = copy, stride = COLUMNS;
                }
                const size_t size = weight_type == F32 ? 4 : 2;
                const auto next = (const uint8_t*)weight + ((q + 1) * ROWS * weight_stride + b * COLUMNS) * size;
                for (size_t r = 0; r < ROWS; r++)
                    for (size_t byte = 0; byte < COLUMNS * size; byte += 64)  // the next quad's; into the first cache 1.45x slower
                        __builtin_prefetch(next + r * weight_stride * size + byte, 0, 2);
                const size_t at = place(s, slot_type, q, b);
                uint8_t *block = values + at * value_bytes(slot_type), *filled = kernels->fills_past_caches ? block : kept;
                if (slot_type == INT8)
                    kernels->fill_int8(dense, stride, inverse, bits, filled);
                else
                    kernels->fill_bf16(dense, stride, bits, filled);
                stream(masks + at * MASK_BYTES, bits, MASK_BYTES);
                if (filled == kept) stream(block, kept, value_bytes(slot_type));
            }
        }
#if defined(__x86_64__)
        _mm_sfence();
#endif
    }
}

// Write all weights (outs, columns) into an INT8_DENSE slot, which has its scales already.
void maskllm_quantize(uint8_t* slot, const void* weight, int weight_type, long weight_stride, long outs, long columns,
                      int threads) {
    const Shape s(outs, columns);
    uint8_t* values = slot + values_at(s, INT8_DENSE);
#pragma omp parallel for num_threads(threads)
    for (size_t q = 0; q < s.quads; q++)
        for (size_t b = 0; b < s.blocks; b++) {
            int8_t* block = (int8_t*)values + place(s, INT8_DENSE, q, b) * INT8_DENSE_BYTES;
            for (size_t r = 0; r < ROWS; r++)
                for (size_t c = 0; c < COLUMNS; c++) {
                    const size_t n = q * ROWS + r, column = b * COLUMNS + c, at = n * weight_stride + column;
                    float value = 0;
                    if (n < s.outs && column < s.columns)
                        value = weight_type == F32 ? ((const float*)weight)[at] : to_float(((const uint16_t*)weight)[at]);
                    const float steps = value < 0 || value > 0 ? value / ((const float*)slot)[n] : 0;  // NaN is 0
                    block[c / 4 % 8 * 64 + (c / 32 * 4 + r) * 4 + c % 4] = int8_t(std::lrintf(std::clamp(steps, -127.f, 127.f)));
                }
        }
}

// Rows `begin`, of a quad's first, to `end` of a bf16 slot's weight (outs, columns), as fp32 or bf16 with zeros where
// nothing is kept.
void maskllm_expand(const uint8_t* slot, void* out, int out_type, long outs, long columns, long begin, long end, int threads) {
    const Shape s(outs, columns);
    const uint8_t *masks = slot + masks_at(s, BF16), *values = slot + values_at(s, BF16);
    const size_t size = out_type == BF16 ? 2 : 4;
#pragma omp parallel for num_threads(threads)
    for (size_t first = begin; first < size_t(end); first += ROWS)
        for (size_t b = 0; b < s.blocks; b++) {
            const size_t at = place(s, BF16, first / ROWS, b), count = std::min(COLUMNS, s.columns - b * COLUMNS);
            for (size_t r = 0; r < std::min(ROWS, end - first); r++)
                expand_row(masks + at * MASK_BYTES + 4 * r, values + at * BF16_BYTES + 4 * r, count, out_type,
                           (uint8_t*)out + ((first - begin + r) * s.columns + b * COLUMNS) * size);
        }
}

// Whether `maskllm_multiply` leaves none of these rows, and no others are better left to it.
bool maskllm_multiplies_all(const int32_t* row_slots, long rows, int weight_type) {
    return rows <= costs.sparse_rows && !dense_left(weight_type, row_slots, rows);
}

// Multiply a batch x (rows, columns) by the slot of each row, -1 for dense, into y (rows, outs) of x's type. Returns
// how many dense rows it leaves, which is all or none: torch does them better where there are many, or of other weights.
// -1, and nothing done, where a row's slot is none of `count`.
long maskllm_multiply(const void* x, int x_type, long x_stride, long rows, const int32_t* row_slots, const void* weight,
                      int weight_type, long weight_stride, const uint8_t* slots, long count, long slot_stride, int slot_type,
                      long outs, long columns, const float* bias, void* y, int threads) {
    if (std::any_of(row_slots, row_slots + rows, [&](int32_t slot) { return slot < -1 || slot >= count; })) return -1;
    const long left = dense_left(weight_type, row_slots, rows);
    Batch batch = {Shape(outs, columns), x, x_type, size_t(x_stride), row_slots, (const uint16_t*)weight,
                   size_t(weight_stride), slots, size_t(slot_stride), slot_type, bias, y, {}, {}};
    arrange(batch, rows, left);
    if (batch.order.empty()) return left;
    if (kernels->dense_bf16 && weight_type == BF16 && x_type == BF16 && slot_type == BF16) choose_form(batch);
    run(batch, threads);
    return left;
}

}  // extern "C"
