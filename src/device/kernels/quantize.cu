// Quantize and dequantize on CUDA devices: the rules of src/quant, with the bytes of its scalar reference.
//
// Every result is one that IEEE 754 fixes: sums, products and quotients are rounded to nearest even one by one (nothing is
// fused, nothing is flushed to zero), conversions are integer arithmetic. A product that is NaN is the canonical NaN.
// The same text compiles as C++ for the processor, where a test runs one thread after the other; so there is no shared
// memory and no talk between threads but two atomic operations whose order does not matter.
//
// Elements are named by a number: 0 is f16, 1 is bf16, 2 is f32. Counts are numbers of values.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__
#define THREAD ((u64)blockIdx.x * blockDim.x + threadIdx.x)
#define UNROLL _Pragma("unroll")
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE float to_even(float value) { return rintf(value); }
DEVICE void raise_to(u32 *place, u32 value) { atomicMax(place, value); }
DEVICE void add_to(u64 *place, u64 value) { atomicAdd(place, value); }
#else
#include <cmath>
#include <cstring>
#define KERNEL extern "C" void
#define DEVICE static inline
#define UNROLL
static u64 THREAD;
extern "C" void weightcast_set_thread(u64 thread) { THREAD = thread; }
struct uint4 { u32 x, y, z, w; };
DEVICE float multiply(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE u32 bits_of(float value) { u32 bits; std::memcpy(&bits, &value, 4); return bits; }
DEVICE float float_of(u32 bits) { float value; std::memcpy(&value, &bits, 4); return value; }
DEVICE float to_even(float value) { return std::nearbyint(value); }
DEVICE void raise_to(u32 *place, u32 value) { if (value > *place) *place = value; }
DEVICE void add_to(u64 *place, u64 value) { *place += value; }
#endif

enum { F16 = 0, BF16 = 1, F32 = 2 };

// Values that one thread encodes or decodes: 16 bytes of a half type, 4 bytes of codes.
#define RUN 8
#define INFINITE 0x7f800000u
#define NOT_A_NUMBER 0x7fc00000u
// The least divisor, 1e-38: a subnormal.
#define LEAST_ABSMAX 0x006ce3eeu

DEVICE u32 widen_f16(u32 half) {
    u32 sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return sign | INFINITE | (magnitude & 0x3ffu) << 13;
    if (magnitude < 0x400u) return sign | bits_of(multiply((float)magnitude, 5.9604644775390625e-8f));
    return sign | ((magnitude << 13) + (112u << 23));
}

DEVICE u32 narrow_f16(u32 bits) {
    u32 sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > INFINITE) return sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
    // 65520, the middle between the largest number and the next power of two.
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    // Below 2^-14 the unit is 2^-24, that of f32 from 0.5 to 1: the sum rounds as it should.
    if (magnitude < 0x38800000u) return sign | (bits_of(add(float_of(magnitude), 0.5f)) - 0x3f000000u);
    return sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
}

DEVICE u32 narrow_bf16(u32 bits) {
    if ((bits & 0x7fffffffu) > INFINITE) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

DEVICE float widen(u32 half, u32 element) { return float_of(element == BF16 ? half << 16 : widen_f16(half)); }

DEVICE float load(const void *source, u32 element, u64 index) {
    if (element == F32) return ((const float *)source)[index];
    return widen(((const u16 *)source)[index], element);
}

DEVICE void store(void *out, u32 element, u64 index, float value) {
    if (element == F32) ((float *)out)[index] = value;
    else ((u16 *)out)[index] = (u16)(element == BF16 ? narrow_bf16(bits_of(value)) : narrow_f16(bits_of(value)));
}

DEVICE bool aligned(const void *address, u64 bytes) { return (u64)address % bytes == 0; }

// The values `first` to `first + RUN`, of which the first `count` exist; in one load of 16 bytes where that is possible.
DEVICE void load_run(const void *source, u32 element, u64 first, u32 count, float values[RUN]) {
    const u16 *start = (const u16 *)source + first;
    if (element != F32 && count == RUN && aligned(start, 16)) {
        uint4 all = *(const uint4 *)start;
        u32 words[4] = {all.x, all.y, all.z, all.w};
        UNROLL for (u32 word = 0; word < 4; word++) {
            values[2 * word] = widen(words[word] & 0xffffu, element);
            values[2 * word + 1] = widen(words[word] >> 16, element);
        }
        return;
    }
    UNROLL for (u32 value = 0; value < RUN; value++) {
        values[value] = value < count ? load(source, element, first + value) : 0.0f;
    }
}

DEVICE void store_run(void *out, u32 element, u64 first, u32 count, const float values[RUN]) {
    u16 *start = (u16 *)out + first;
    if (element != F32 && count == RUN && aligned(start, 16)) {
        u32 words[4];
        UNROLL for (u32 word = 0; word < 4; word++) {
            u32 low = bits_of(values[2 * word]), high = bits_of(values[2 * word + 1]);
            words[word] = element == BF16 ? narrow_bf16(low) | narrow_bf16(high) << 16 : narrow_f16(low) | narrow_f16(high) << 16;
        }
        uint4 all = {words[0], words[1], words[2], words[3]};
        *(uint4 *)start = all;
        return;
    }
    UNROLL for (u32 value = 0; value < RUN; value++) {
        if (value < count) store(out, element, first + value, values[value]);
    }
}

DEVICE u32 run_count(u64 first, u64 count) { return count - first < RUN ? (u32)(count - first) : RUN; }

DEVICE float at_least(float absmax) { return absmax < float_of(LEAST_ABSMAX) ? float_of(LEAST_ABSMAX) : absmax; }

DEVICE float product(float a, float b) {
    float result = multiply(a, b);
    return result != result ? float_of(NOT_A_NUMBER) : result;
}

// The largest magnitude of each group of `group` values, into `absmax`, which must be zero before; a group that has a NaN
// gets NaN. A thread looks at `segment` values, a multiple of RUN. `rounded`: values are rounded to f16 first (int8).
// `least`: a short last group gets at least 1e-38 (4 bit). `not_finite` counts values.
KERNEL weightcast_absmax(const void *source, u32 element, u64 count, u64 group, u64 segment, u32 rounded, u32 least,
                         u32 *absmax, u64 *not_finite) {
    u64 segments = (group + segment - 1) / segment;
    u64 index = THREAD / segments;
    u64 start = index * group + THREAD % segments * segment;
    u64 end = index * group + group < count ? index * group + group : count;
    if (start >= end) return;
    u64 stop = start + segment < end ? start + segment : end;
    u32 largest = 0, bad = 0;
    for (u64 first = start; first < stop; first += RUN) {
        float values[RUN];
        load_run(source, element, first, run_count(first, stop), values);
        UNROLL for (u32 value = 0; value < RUN; value++) {
            u32 bits = bits_of(values[value]);
            if (rounded && element != F16) bits = widen_f16(narrow_f16(bits));
            bits &= 0x7fffffffu;
            bad += bits >= INFINITE;
            largest = bits > largest ? bits : largest;
        }
    }
    if (largest > INFINITE) largest = NOT_A_NUMBER;
    if (least && end - index * group < group) largest = bits_of(at_least(float_of(largest)));
    raise_to(absmax + index, largest);
    if (bad > 0) add_to(not_finite, bad);
}

// 4-bit codes of RUN values for each thread. `order` has the code of each rank, four bits each, the lowest rank lowest.
KERNEL weightcast_quantize_4bit(const void *source, u32 element, u64 count, u64 block, const float *thresholds, u64 order,
                                const float *absmax, u8 *packed) {
    u64 first = THREAD * RUN;
    if (first >= count) return;
    u32 here = run_count(first, count);
    float values[RUN];
    load_run(source, element, first, here, values);
    u64 index = first / block;
    bool short_block = count - index * block < block;
    float statistic = absmax[index];
    float inverse = divide(1.0f, at_least(statistic));
    u32 ranks[RUN];
    UNROLL for (u32 value = 0; value < RUN; value++) {
        // The last code of an odd tensor is that of 0.
        if (value < here) values[value] = short_block ? divide(values[value], statistic) : multiply(values[value], inverse);
        ranks[value] = 0;
    }
    UNROLL for (u32 rank = 0; rank < 15; rank++) {
        float threshold = thresholds[rank];
        // A NaN is above every threshold.
        UNROLL for (u32 value = 0; value < RUN; value++) ranks[value] += !(threshold >= values[value]);
    }
    u32 word = 0;
    UNROLL for (u32 value = 0; value < RUN; value += 2) {
        u32 high = (u32)(order >> 4 * ranks[value]) & 15u, low = (u32)(order >> 4 * ranks[value + 1]) & 15u;
        word |= (high << 4 | low) << 4 * value;
    }
    u8 *out = packed + first / 2;
    if (here == RUN && aligned(out, 4)) {
        *(u32 *)out = word;
        return;
    }
    for (u32 byte = 0; 2 * byte < here; byte++) out[byte] = (u8)(word >> 8 * byte);
}

// RUN values for each thread; `values` has that of each code.
KERNEL weightcast_dequantize_4bit(const u8 *packed, const float *absmax, u64 count, u64 block, const float *values, void *out,
                                  u32 element) {
    u64 first = THREAD * RUN;
    if (first >= count) return;
    u32 here = run_count(first, count);
    const u8 *codes = packed + first / 2;
    u32 word = 0;
    if (here == RUN && aligned(codes, 4)) word = *(const u32 *)codes;
    else for (u32 byte = 0; 2 * byte < here; byte++) word |= (u32)codes[byte] << 8 * byte;
    float statistic = absmax[first / block];
    float results[RUN];
    UNROLL for (u32 value = 0; value < RUN; value += 2) {
        u32 byte = word >> 4 * value & 0xffu;
        results[value] = product(values[byte >> 4], statistic);
        results[value + 1] = product(values[byte & 15u], statistic);
    }
    store_run(out, element, first, here, results);
}

// The statistic of one block for each thread: `map[code] * nested + offset`, two roundings. `phase` is the place of the
// first code in its group of 256.
KERNEL weightcast_dequantize_nested(const u8 *codes, u64 count, u64 phase, const float *nested, float offset, const float *map,
                                    float *out) {
    u64 index = THREAD;
    if (index >= count) return;
    float sum = add(product(map[codes[index]], nested[(phase + index) / 256]), offset);
    out[index] = sum != sum ? float_of(NOT_A_NUMBER) : sum;
}

// Signed bytes of RUN values for each thread; `scb` is the largest magnitude of each row of `columns` values.
KERNEL weightcast_quantize_int8(const void *source, u32 element, u64 count, u64 columns, const float *scb, u8 *codes) {
    u64 first = THREAD * RUN;
    if (first >= count) return;
    u32 here = run_count(first, count);
    float values[RUN];
    load_run(source, element, first, here, values);
    u64 row = first / columns, column = first % columns;
    float scale = divide(127.0f, scb[row]);
    u8 results[RUN];
    UNROLL for (u32 value = 0; value < RUN; value++) {
        if (column == columns && value < here) {
            column = 0;
            scale = divide(127.0f, scb[++row]);
        }
        column++;
        u32 bits = bits_of(values[value]);
        if (element != F16) bits = widen_f16(narrow_f16(bits));
        float code = to_even(multiply(float_of(bits), scale));
        // Within 127 of 0; a NaN becomes 0.
        results[value] = code == code ? (u8)(int)code : 0;
    }
    for (u32 value = 0; value < here; value++) codes[first + value] = results[value];
}

// RUN values for each thread: `code * scb * (1 / 127)`, two roundings.
KERNEL weightcast_dequantize_int8(const u8 *codes, const float *scb, u64 count, u64 columns, void *out, u32 element) {
    u64 first = THREAD * RUN;
    if (first >= count) return;
    u32 here = run_count(first, count);
    float results[RUN];
    UNROLL for (u32 value = 0; value < RUN; value++) {
        results[value] = 0.0f;
        if (value < here) {
            float code = (float)(signed char)codes[first + value];
            results[value] = product(product(code, scb[(first + value) / columns]), 0.007874015718698502f);
        }
    }
    store_run(out, element, first, here, results);
}
