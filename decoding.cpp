// decoding.cpp: on a CPU, attention for one new token in each row of a KV cache.
//
// A step of decoding reads each key and value once and does little with it: it should take as long
// as the reading. torch's kernels, made for many queries at a time, take two to three times as
// long. Here a thread takes a row and a key head, turns the new key to its position, writes it and
// its value into the cache, and walks over all keys of the row, then over all values, for each of
// the query heads that share them.
//
// decoding.py compiles this file at its first use: for one number of channels D, so that the inner
// loops become a few vector instructions, and one type T, float or bf16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The upper half of a float. Arithmetic is in floats
struct bf16 {
    uint16_t bits;

    bf16() = default;

    bf16(float x) {
        uint32_t all;
        memcpy(&all, &x, 4);
        bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;  // to the nearest; of two, to the even one
    }

    operator float() const {
        uint32_t all = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &all, 4);
        return x;
    }
};

// 2^x for x <= 0, without a call: the nearest whole number becomes the exponent's bits, Taylor's
// polynomial makes the rest, e^f with f in [-ln 2 / 2, ln 2 / 2], to a float's precision
static float power_of_two(float x) {
    x = x < -126 ? -126 : x;
    float whole = floorf(x + 0.5f);
    float f = 0.69314718f * (x - whole);
    float y = 1 + f * (1 + f / 2 * (1 + f / 3 * (1 + f / 4 * (1 + f / 5 * (1 + f / 6)))));
    uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power * y;
}

// model.rotate: channels 2j and 2j + 1 are turned by an angle, given as cos and sin
static void rotate(const T *x, const float *angle, T *y) {
    for (long j = 0; j < D; j += 2) {
        float a = x[j];
        float b = x[j + 1];
        y[j] = a * angle[j] - b * angle[j + 1];
        y[j + 1] = a * angle[j + 1] + b * angle[j];
    }
}

// out = softmax(keys query) values, for keys and values (n, D). Scores are in bits; p: room for n
static void attention(const float *query, const T *keys, const T *values, long n, float *p,
                      T *out) {
    for (long i = 0; i < n; i++) {
        const T *key = keys + i * D;
        float dot = 0;
        for (long j = 0; j < D; j++)
            dot += query[j] * float(key[j]);
        p[i] = dot;
    }
    float top = p[0];
    for (long i = 1; i < n; i++)
        top = p[i] > top ? p[i] : top;
    float total = 0;
    for (long i = 0; i < n; i++) {
        p[i] = power_of_two(p[i] - top);
        total += p[i];
    }
    float sum[D] = {};
    for (long i = 0; i < n; i++) {
        const T *value = values + i * D;
        for (long j = 0; j < D; j++)
            sum[j] += p[i] * float(value[j]);
    }
    for (long j = 0; j < D; j++)
        out[j] = sum[j] / total;
}

extern "C" void attend(
    const T *q,           // (R, H, D)
    const T *k,           // (R, K, D)
    const T *v,           // (R, K, D)
    const float *angles,  // (R, D / 2, 2)
    T *keys,              // the cache, (R, K, capacity, D): k and v are written here
    T *values,
    const int64_t *lens,  // (R,) tokens of each row, the new one included
    T *out,               // written here, (R, H, D)
    long q_s,             // strides of a row
    long k_s,
    long v_s,
    long R,
    long H,
    long K,
    long capacity) {
    const long group = H / K;                    // query heads of a key head
    const float scale = 1.44269504f / sqrtf(D);  // log2(e): scores become powers of two
#pragma omp parallel
    {
        std::vector<float> p(capacity);
#pragma omp for collapse(2)
        for (long r = 0; r < R; r++) {
            for (long h = 0; h < K; h++) {
                const float *angle = angles + r * D;
                const long n = lens[r];
                T *key = keys + (r * K + h) * capacity * D;
                T *value = values + (r * K + h) * capacity * D;
                rotate(k + r * k_s + h * D, angle, key + (n - 1) * D);
                std::copy_n(v + r * v_s + h * D, D, value + (n - 1) * D);
                for (long g = h * group; g < (h + 1) * group; g++) {
                    T turned[D];
                    rotate(q + r * q_s + g * D, angle, turned);
                    float query[D];
                    for (long j = 0; j < D; j++)
                        query[j] = scale * float(turned[j]);
                    attention(query, key, value, n, p.data(), out + (r * H + g) * D);
                }
            }
        }
    }
}
