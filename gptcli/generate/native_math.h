/* Sums and values: what native.c is made of. */

#if defined __x86_64__
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define UNROLL _Pragma("GCC unroll 4")
#define TILE 4 /* outputs whose sums a product keeps in registers, of so many rows: */
#if defined __AVX512F__ || defined __aarch64__
#define ROWS 4
#else
#define ROWS 2 /* there are but 16 registers */
#endif
#define WAIT_FOR_ALL _Pragma("omp barrier")
#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__(int __attribute__((vector_size(16))))){__VA_ARGS__})
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Quad __attribute__((vector_size(16)));

enum Activation { GELU_TANH, GELU, RELU, RELU2, SWIGLU };

/* A linear layer, (outputs, inputs). With a scale (outputs) its weights are int8, and `sums` (outputs) are theirs. */
typedef struct {
    const void *weight;
    const float *bias, *scale;
    const int *sums;
} Matrix;

/* This thread's part [from, to) of n things, which are handed out `unit` at a time. */
static void share(long n, long unit, long *from, long *to) {
    long me = omp_get_thread_num(), all = omp_get_num_threads(), units = (n + unit - 1) / unit;
    *from = units * me / all * unit;
    *to = units * (me + 1) / all * unit < n ? units * (me + 1) / all * unit : n;
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

static inline Vec load(const float *from) {
    Vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline Quad folded(Vec v) {
    Quad part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int i = 1; i < LANES / 4; i++) part[0] += part[i];
    return part[0];
}

/* The sums of four, which each add up as `total` does. */
static inline Quad totals(const Vec *v) {
    Quad a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
    Quad ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
    return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

static inline float total(Vec v) {
    Quad q = folded(v);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

/* y[i][j] = x[i] . w[j] for i < rows, j < outputs: at most ROWS and TILE, known when this is compiled. */
static inline __attribute__((always_inline)) void tile(
    int rows, int outputs, float *y, long y_stride, const float *x, long x_stride, const float *w, long K) {
    Vec sum[ROWS][TILE] = {0}, b[TILE];
    long k = 0;
    for (; k + LANES <= K; k += LANES) {
        UNROLL for (int j = 0; j < outputs; j++) b[j] = load(w + j * K + k);
        UNROLL for (int i = 0; i < rows; i++) {
            Vec a = load(x + i * x_stride + k);
            UNROLL for (int j = 0; j < outputs; j++) sum[i][j] += a * b[j];
        }
    }
    Quad whole[ROWS];
    UNROLL for (int i = 0; i < rows; i++) whole[i] = outputs == TILE ? totals(sum[i]) : (Quad){total(sum[i][0])};
    for (; k < K; k++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < outputs; j++) whole[i][j] += x[i * x_stride + k] * w[j * K + k];
    for (int i = 0; i < rows; i++) memcpy(y + i * y_stride, whole + i, outputs * sizeof(float));
}

/* y (rows, outputs) = x (rows, K) times w (outputs, K) transposed. */
static void product(
    long rows, long outputs, float *y, long y_stride, const float *x, long x_stride, const float *w, long K) {
    long n = 0, r;
    for (; n + TILE <= outputs; n += TILE, y += TILE, w += TILE * K) {
        for (r = 0; r + ROWS <= rows; r += ROWS) tile(ROWS, TILE, y + r * y_stride, y_stride, x + r * x_stride, x_stride, w, K);
        for (; r < rows; r++) tile(1, TILE, y + r * y_stride, y_stride, x + r * x_stride, x_stride, w, K);
    }
    for (; n < outputs; n++, y++, w += K)
        for (r = 0; r < rows; r++) tile(1, 1, y + r * y_stride, y_stride, x + r * x_stride, x_stride, w, K);
}

/* ---- products of int8 --------------------------------------------------------------------------------------------- */

#if defined __AVX512VNNI__
#define BYTES 64 /* of a row that are multiplied at once */
typedef int IntVec __attribute__((vector_size(BYTES)));
typedef int IntQuad __attribute__((vector_size(16)));

static inline IntQuad folded_int(IntVec v) {
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256((__m512i)v), _mm512_extracti64x4_epi64((__m512i)v, 1));
    return (IntQuad)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* y[i][j] = sum of x[i] (0 to 255) times w[j], as `tile`. */
static inline __attribute__((always_inline)) void tile_int8(
    int rows, int outputs, IntQuad *y, const unsigned char *x, const signed char *w, long K) {
    IntVec sum[TILE][TILE] = {0}, b[TILE];
    long k = 0;
    for (; k + BYTES <= K; k += BYTES) {
        UNROLL for (int j = 0; j < outputs; j++) memcpy(b + j, w + j * K + k, BYTES);
        UNROLL for (int j = 0; j < outputs; j++) __asm__("" : "+v"(b[j])); /* else gcc reads it for each row again */
        UNROLL for (int i = 0; i < rows; i++) {
            IntVec a;
            memcpy(&a, x + i * K + k, BYTES);
            UNROLL for (int j = 0; j < outputs; j++)
                sum[i][j] = (IntVec)_mm512_dpbusd_epi32((__m512i)sum[i][j], (__m512i)a, (__m512i)b[j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        IntQuad p = folded_int(sum[i][0]), q = folded_int(sum[i][1]), r = folded_int(sum[i][2]), s = folded_int(sum[i][3]);
        IntQuad pq = SHUFFLE(p, q, 0, 4, 1, 5) + SHUFFLE(p, q, 2, 6, 3, 7), rs = SHUFFLE(r, s, 0, 4, 1, 5) + SHUFFLE(r, s, 2, 6, 3, 7);
        y[i] = SHUFFLE(pq, rs, 0, 1, 4, 5) + SHUFFLE(pq, rs, 2, 3, 6, 7);
    }
    for (; k < K; k++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < outputs; j++) y[i][j] += x[i * K + k] * w[j * K + k];
}

/* As `product`, of x (rows, K) that round_row made, each row's largest value in `largest`; outputs [from, to) of y. */
static void product_int8(
    long rows, long from, long to, float *y, long y_stride, const unsigned char *x, const float *largest,
    const Matrix *m, long K) {
    for (long n = from; n < to; n += TILE) {
        const signed char *w = (const signed char *)m->weight + n * K;
        long width = to - n < TILE ? to - n : TILE;
        Quad scale = {0};
        IntQuad zeros = {0};
        memcpy(&scale, m->scale + n, width * sizeof(float));
        memcpy(&zeros, m->sums + n, width * sizeof(int));
        for (long r = 0, height; r < rows; r += height) {
            IntQuad sums[TILE] = {0};
            height = width == TILE && r + TILE <= rows ? TILE : 1;
            if (height == TILE) tile_int8(TILE, TILE, sums, x + r * K, w, K);
            else if (width == TILE) tile_int8(1, TILE, sums, x + r * K, w, K);
            else for (long j = 0; j < width; j++) {
                IntQuad one;
                tile_int8(1, 1, &one, x + r * K, w + j * K, K);
                sums[0][j] = one[0];
            }
            for (long i = 0; i < height; i++) {
                Quad values = __builtin_convertvector(sums[i] - 128 * zeros, Quad) * scale * (largest[r + i] / 127);
                memcpy(y + (r + i) * y_stride + n, &values, width * sizeof(float));
            }
        }
    }
}
#endif

/* x in steps of a 127th of its largest value, which is returned, from 1 to 255: 128 is 0. */
static float round_row(unsigned char *out, const float *x, long n) {
    float most = 1e-12f;
    #pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    for (long i = 0; i < n; i++) out[i] = (unsigned char)(int)(nearbyintf(x[i] / most * 127) + 128);
    return most;
}

/* ---- of single values -------------------------------------------------------------------------------------------- */

/* e^x within a unit or two in the last place, in loops that a compiler makes vectors of; 0 below -87. */
static inline float exp_of(float x) {
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, ln 2 in two parts */
    float p = 1 + r * (1 + r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
    int power = ((int)(n < -126 ? -126 : n > 127 ? 127 : n) + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return x < -87 ? 0 : p * scale;
}

static float largest(const float *values, long n) {
    float most = -INFINITY;
    #pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++) most = values[i] > most ? values[i] : most;
    return most;
}

static void normalise(
    float *out, const float *x, long n, const float *weight, const float *bias, int centred, float eps) {
    float mean = 0, square = 0;
    if (centred) {
        #pragma omp simd reduction(+ : mean)
        for (long i = 0; i < n; i++) mean += x[i];
        mean /= n;
    }
    #pragma omp simd reduction(+ : square)
    for (long i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(square / n + eps);
    for (long i = 0; i < n; i++) out[i] = (x[i] - mean) * scale;
    if (weight) for (long i = 0; i < n; i++) out[i] *= weight[i];
    if (bias) for (long i = 0; i < n; i++) out[i] += bias[i];
}

/* In place; gated: SwiGLU's other half. */
static void activate(float *h, const float *gated, long n, enum Activation kind) {
    switch (kind) {
    case GELU_TANH: /* x/2 (1 + tanh u) = x / (1 + e^-2u) */
        #pragma omp simd
        for (long i = 0; i < n; i++)
            h[i] /= 1 + exp_of(-1.5957691216f * h[i] * (1 + 0.044715f * h[i] * h[i]));
        break;
    case GELU:
        for (long i = 0; i < n; i++) h[i] *= 0.5f * (1 + erff(h[i] * 0.70710678f));
        break;
    case RELU:
        for (long i = 0; i < n; i++) h[i] = h[i] > 0 ? h[i] : 0;
        break;
    case RELU2:
        for (long i = 0; i < n; i++) h[i] = h[i] > 0 ? h[i] * h[i] : 0;
        break;
    case SWIGLU:
        #pragma omp simd
        for (long i = 0; i < n; i++) h[i] = h[i] / (1 + exp_of(-h[i])) * gated[i];
        break;
    }
}

