// What stands between the products of a decoder layer, on a CPU: each chain of elementwise steps in one pass over a
// row, in float32, rounded to bfloat16 once. A row's result depends on nothing but the row.
//
// Compiled by ops/native.py, by g++. Columns of a row are contiguous; strides are in elements.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

using bfloat16 = uint16_t;

namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements for which a second thread pays
constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Signed __attribute__((vector_size(4 * LANES)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

inline Floats all(float x) { return x - Floats{}; }
inline Floats numbers(Bits b) { return (Floats)b; }

inline Floats wide(Halves x) { return numbers(__builtin_convertvector(x, Bits) << 16); }

inline Floats wide(Bytes x) {  // step by step: g++ knows no other way that is not number by number
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, Shorts), Signed), Floats);
}

inline Halves narrow(Floats x) {  // to nearest, ties to even; a NaN stays one
    Bits b = (Bits)x, rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16, nan = (Bits)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
}

// e^x to 2 units in the last place (the polynomial of Cephes' expf): 2^n e^r with |r| <= ln 2 / 2. For x below -87 it is
// 0, above 88 infinite, which is next to the ends of float32; a NaN stays one.
inline Floats exponential(Floats x) {
    Floats kept = x > 88.0f ? all(88.0f) : x;
    kept = kept < -87.0f ? all(-87.0f) : kept;
    Floats shifted = kept * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: n stands in the lowest bits
    Floats n = shifted - 12582912.0f;
    Floats r = kept - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Floats result = p * numbers(((Bits)shifted << 23) + 0x3f800000u);
    result = x > 88.0f ? all(INFINITY) : result;
    return x < -87.0f ? all(0.0f) : result;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// One number of sixteen, halves upon halves.
template <typename Both>
inline float fold(Floats x, Both both) {
    Eight eights[2];
    std::memcpy(eights, &x, sizeof x);
    Eight eight = both(eights[0], eights[1]);
    Four fours[2];
    std::memcpy(fours, &eight, sizeof eight);
    Four four = both(fours[0], fours[1]);
    float one = both(four[0], four[2]), other = both(four[1], four[3]);
    return both(one, other);
}

inline float sum(Floats x) { return fold(x, [](auto a, auto b) { return a + b; }); }

inline float largest(Floats x) {  // of numbers: a NaN shows in what is made of the rest
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Sixteen columns of a row.
struct Whole {
    Floats load(const bfloat16* at, float = 0) const { Halves x; std::memcpy(&x, at, sizeof x); return wide(x); }
    Floats load(const int8_t* at) const { Bytes x; std::memcpy(&x, at, sizeof x); return wide(x); }
    void store(bfloat16* at, Floats x) const { Halves y = narrow(x); std::memcpy(at, &y, sizeof y); }
};

// The last of them, of which there are fewer; `fill` stands in place of those that are not there.
struct Part {
    int64_t count;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 mask() const { return __mmask16((1u << count) - 1); }
    Floats load(const bfloat16* at, float fill = 0) const {
        return Floats(_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask(),
                                         __m512(wide(Halves(_mm256_maskz_loadu_epi16(mask(), at))))));
    }
    void store(bfloat16* at, Floats x) const { _mm256_mask_storeu_epi16(at, mask(), __m256i(narrow(x))); }
#else
    Floats load(const bfloat16* at, float fill = 0) const {
        Halves x{};
        std::memcpy(&x, at, count * sizeof(bfloat16));
        Floats found = wide(x);
        for (int i = 0; i < LANES; ++i) found[i] = i < count ? found[i] : fill;
        return found;
    }
    void store(bfloat16* at, Floats x) const { Halves y = narrow(x); std::memcpy(at, &y, count * sizeof(bfloat16)); }
#endif
    Floats load(const int8_t* at) const { Bytes x{}; std::memcpy(&x, at, count); return wide(x); }
};

// work(j, columns) for each sixteen columns of `count`.
template <typename Work>
inline __attribute__((always_inline)) void each_column(int64_t count, Work work) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) work(j, Whole{});
    if (j < count) work(j, Part{count - j});
}

// work(i) for each of the rows, by as many threads as torch has where there are elements enough.
template <typename Work>
inline void each_row(int64_t rows, int64_t elements, int threads, Work work) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * elements > GRAIN)
    for (int64_t i = 0; i < rows; ++i) work(i);
}

// softmax(scale * x) of `count` numbers, in place; log of the sum of exp(scale * (x - top)), and top.
struct Total { float top, log; };

inline Total softmax(bfloat16* own, int64_t count, float scale, bool write) {
    Floats tops = all(-INFINITY), sums = all(0.0f);
    each_column(count, [&](int64_t j, auto columns) {
        Floats x = columns.load(own + j, -INFINITY);
        tops = x > tops ? x : tops;
    });
    float top = largest(tops);
    each_column(count, [&](int64_t j, auto columns) {
        sums += exponential((columns.load(own + j, -INFINITY) - top) * scale);
    });
    float total = sum(sums), inverse = 1.0f / total;
    if (write)
        each_column(count, [&](int64_t j, auto columns) {
            columns.store(own + j, exponential((columns.load(own + j, -INFINITY) - top) * scale) * inverse);
        });
    return {top, std::log(total)};
}

inline float number(bfloat16 x) { uint32_t b = uint32_t(x) << 16; float y; std::memcpy(&y, &b, sizeof y); return y; }

}  // namespace

extern "C" {

// out = codes * scale, of [rows, columns], a scale a row.
void dequantize(const int8_t* codes, const float* scale, bfloat16* out, int64_t rows, int64_t columns, int threads) {
    each_row(rows, columns, threads, [=](int64_t i) {
        each_column(columns, [=](int64_t j, auto part) {
            part.store(out + i * columns + j, part.load(codes + i * columns + j) * scale[i]);
        });
    });
}

// y = x / rms(x) * weight, rounded before the weight too, as transformers' RMSNorm is; rstd = 1 / rms(x).
void rms_norm(const bfloat16* x, const bfloat16* weight, bfloat16* y, float* rstd, int64_t rows, int64_t d,
              int64_t stride, float eps, int threads) {
    each_row(rows, d, threads, [=](int64_t i) {
        const bfloat16* from = x + i * stride;
        Floats squares{};
        each_column(d, [&](int64_t j, auto part) { Floats v = part.load(from + j); squares += v * v; });
        float own = rstd[i] = 1.0f / std::sqrt(sum(squares) / float(d) + eps);
        each_column(d, [=](int64_t j, auto part) {
            part.store(y + i * d + j, wide(narrow(part.load(from + j) * own)) * part.load(weight + j));
        });
    });
}

// Its gradient: out = rstd (g - hat mean(g hat)), with g = grad * weight and hat = x rstd.
void rms_norm_backward(const bfloat16* grad, const bfloat16* x, const bfloat16* weight, const float* rstd,
                       bfloat16* out, int64_t rows, int64_t d, int64_t stride_grad, int64_t stride_x, int threads) {
    each_row(rows, d, threads, [=](int64_t i) {
        const bfloat16 *g = grad + i * stride_grad, *from = x + i * stride_x;
        Floats products{};
        each_column(d, [&](int64_t j, auto part) {
            products += part.load(g + j) * part.load(weight + j) * part.load(from + j);
        });
        float own = rstd[i], along = sum(products) * own * own / float(d);
        each_column(d, [=](int64_t j, auto part) {
            part.store(out + i * d + j,
                       (part.load(g + j) * part.load(weight + j) - part.load(from + j) * along) * own);
        });
    });
}

// out = silu(gate) * up; gate and up side by side in both.
void swiglu(const bfloat16* both, bfloat16* out, int64_t rows, int64_t f, int64_t stride, int threads) {
    each_row(rows, f, threads, [=](int64_t i) {
        const bfloat16 *gate = both + i * stride, *up = gate + f;
        each_column(f, [=](int64_t j, auto part) {
            Floats g = part.load(gate + j);
            part.store(out + i * f + j, g * sigmoid(g) * part.load(up + j));
        });
    });
}

// Its gradient, of gate and up side by side; over grad, silu(gate) * up again.
void swiglu_backward(bfloat16* grad, const bfloat16* both, bfloat16* out, int64_t rows, int64_t f, int64_t stride,
                     int threads) {
    each_row(rows, f, threads, [=](int64_t i) {
        const bfloat16 *gate = both + i * stride, *up = gate + f;
        bfloat16 *own = grad + i * f, *of_gate = out + i * 2 * f, *of_up = of_gate + f;
        each_column(f, [=](int64_t j, auto part) {
            Floats g = part.load(gate + j), u = part.load(up + j), slope = part.load(own + j);
            Floats s = sigmoid(g), silu = g * s;
            part.store(of_gate + j, slope * u * (s + silu * (1.0f - s)));
            part.store(of_up + j, slope * silu);
            part.store(own + j, silu * u);
        });
    });
}

// Rotary embedding of heads [rows, count, size], in place, or of its gradient; cos and sin: [rows, size].
void rotate(bfloat16* heads, const bfloat16* cos, const bfloat16* sin, int64_t rows, int64_t count, int64_t size,
            int64_t stride, int64_t stride_cos, int64_t stride_sin, int64_t backward, int threads) {
    int64_t half = size / 2;
    each_row(rows, count * size, threads, [=](int64_t i) {
        // x' = x cos - y sin and y' = y cos + x sin; backwards the sines change places, and their sign
        const bfloat16 *c = cos + i * stride_cos, *s = sin + i * stride_sin;
        const bfloat16 *of_first = backward ? s + half : s, *of_second = backward ? s : s + half;
        float sign = backward ? -1.0f : 1.0f;
        for (int64_t h = 0; h < count; ++h) {
            bfloat16 *first = heads + i * stride + h * size, *second = first + half;
            each_column(half, [=](int64_t j, auto part) {
                Floats x = part.load(first + j), y = part.load(second + j);
                part.store(first + j, x * part.load(c + j) - y * part.load(of_first + j) * sign);
                part.store(second + j, y * part.load(c + half + j) + x * part.load(of_second + j) * sign);
            });
        }
    });
}

// losses = log sum exp(logits) - logits[label]; with gradient, softmax(logits) - onehot(label) over the logits. A row
// whose label is ignored has loss 0 and gradient 0.
void cross_entropy(bfloat16* logits, const int64_t* labels, float* losses, int64_t rows, int64_t count, int64_t stride,
                   int64_t ignored, int64_t gradient, int threads) {
    each_row(rows, count, threads, [=](int64_t i) {
        bfloat16* own = logits + i * stride;
        if (labels[i] == ignored) {
            losses[i] = 0;
            if (gradient) std::memset(own, 0, count * sizeof(bfloat16));
            return;
        }
        float at = number(own[labels[i]]);
        Total total = softmax(own, count, 1.0f, gradient);
        losses[i] = total.log - (at - total.top);
        if (gradient) {
            Part one{1};
            one.store(own + labels[i], all(std::expm1(-losses[i])));
        }
    });
}

// P = softmax(scale * scores), scale > 0, of [matrices, tokens, tokens], in place: of each row up to its own column, 0
// beyond.
void causal_softmax(bfloat16* scores, int64_t matrices, int64_t tokens, float scale, int threads) {
    each_row(matrices * tokens, tokens, threads, [=](int64_t i) {
        bfloat16* own = scores + i * tokens;
        int64_t count = i % tokens + 1;
        softmax(own, count, scale, true);
        std::memset(own + count, 0, (tokens - count) * sizeof(bfloat16));
    });
}

// Its gradient, over slope, that of P: scale P (slope - rowsum(P slope)).
void causal_softmax_backward(bfloat16* slope, const bfloat16* weights, int64_t matrices, int64_t tokens, float scale,
                             int threads) {
    each_row(matrices * tokens, tokens, threads, [=](int64_t i) {
        bfloat16* own = slope + i * tokens;
        const bfloat16* p = weights + i * tokens;
        int64_t count = i % tokens + 1;
        Floats products{};
        each_column(count, [&](int64_t j, auto part) { products += part.load(p + j) * part.load(own + j); });
        float along = sum(products);
        each_column(count, [=](int64_t j, auto part) {
            part.store(own + j, part.load(p + j) * (part.load(own + j) - along) * scale);
        });
        std::memset(own + count, 0, (tokens - count) * sizeof(bfloat16));
    });
}

}  // extern "C"
