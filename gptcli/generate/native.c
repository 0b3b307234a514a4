/* Decoding on a CPU: a token for each of some rows, and another, from a GPT's weights and cache as torch holds them.

   Where a model is small, saying what to compute takes Python longer than the computing. Here all threads walk through
   a whole step together, each with its share of every stage. What is computed is what gptcli/model says, and every
   shape of it is tested against that. A row's numbers depend on that row alone, to the last bit: its sums have one
   order, whatever rows stand beside it and however many threads there are.

   Matrices are (outputs, inputs). Pointers are NULL where a shape lacks the thing. */

#include "native_math.h"

/* Matrix, Block, Model and Draws are mirrored, field by field, in native.py. */
typedef struct {
    const float *ln_1, *ln_1_bias, *ln_2, *ln_2_bias;
    Matrix c_attn, attn_proj, c_fc, mlp_proj;
    float *k, *v; /* (rows, kv_heads, slots, D) */
    long band;    /* tokens that it looks back at, itself included */
} Block;

typedef struct {
    long n_layer, n_head, kv_heads, n_embd, inner, vocab_size, slots;
    long threads;
    long activation, post_norm, rmsnorm, qk_norm;
    double norm_eps, attention_scale, embedding_scale;
    const float *wte, *positions, *rope_cos, *rope_sin, *alibi_slopes, *ln_f, *ln_f_bias;
    Matrix head;
    const Block *blocks;
} Model;

typedef struct {
    const long *top_k;         /* (rows), vocab_size where all may be drawn */
    const float *temperature;  /* (rows), 0: the likeliest token */
    const float *uniforms;     /* (steps, rows) */
    const unsigned char *ends; /* (vocab_size), 1: after this token no step follows */
} Draws;

typedef struct {
    const Model *model;
    long rows;
    long *tokens, *positions;
    float *x, *normed, *added, *y, *qkv, *inner, *logits, *largest, *work; /* work: each thread's own */
    unsigned char *rounded; /* what is multiplied by int8, with each row's largest value */
} Step;

/* ---- attention --------------------------------------------------------------------------------------------------- */

static void rotate(float *x, const float *cos, const float *sin, long half) {
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = a * sin[i] + b * cos[i];
    }
}

/* (e^(scores - their largest)) in place; their sum. */
static float exponentials(float *scores, long n) {
    float most = largest(scores, n), sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long t = 0; t < n; t++) sum += scores[t] = exp_of(scores[t] - most);
    return sum;
}

/* Stores one head's key and value, and lets the queries that share it look: y (their heads, D). */
static void attend(const Model *m, const Block *b, float *y, float *qkv, long row, long head, long position, float *work) {
    long D = m->n_embd / m->n_head, sharing = m->n_head / m->kv_heads;
    float *q = qkv + head * sharing * D, *k = qkv + (m->n_head + head) * D, *v = k + m->kv_heads * D;
    float *keys = b->k + (row * m->kv_heads + head) * m->slots * D;
    float *values = b->v + (row * m->kv_heads + head) * m->slots * D;
    for (long s = 0; s <= sharing; s++) {
        float *turned = s < sharing ? q + s * D : k;
        if (m->qk_norm) normalise(turned, turned, D, NULL, NULL, 0, 1.1920929e-7f);
        if (m->rope_cos) rotate(turned, m->rope_cos + position * (D / 2), m->rope_sin + position * (D / 2), D / 2);
    }
    for (long i = 0; i < (position + 1) * D; i += 16) { /* the next head's, meanwhile: it is memory that is slow here */
        __builtin_prefetch(keys + m->slots * D + i, 0, 2);
        __builtin_prefetch(values + m->slots * D + i, 0, 2);
    }
    memcpy(keys + position * D, k, D * sizeof(float));
    memcpy(values + position * D, v, D * sizeof(float));

    long first = position >= b->band ? position - b->band + 1 : 0, n = position - first + 1;
    keys += first * D, values += first * D;
    product(sharing, n, work, n, q, D, keys, D);
    for (long s = 0; s < sharing; s++, y += D) {
        float *scores = work + s * n, slope = m->alibi_slopes ? m->alibi_slopes[head * sharing + s] : 0;
        for (long t = 0; t < n; t++) scores[t] = scores[t] * (float)m->attention_scale - slope * (n - 1 - t);
        float sum = exponentials(scores, n);
        long d = 0;
        for (; d + LANES <= D; d += LANES) {
            Vec seen = {0};
            for (long t = 0; t < n; t++) seen += scores[t] * load(values + t * D + d);
            seen /= sum;
            memcpy(y + d, &seen, sizeof seen);
        }
        for (; d < D; d++) {
            float seen = 0;
            for (long t = 0; t < n; t++) seen += scores[t] * values[t * D + d];
            y[d] = seen / sum;
        }
    }
}

/* ---- the draw ---------------------------------------------------------------------------------------------------- */

static void sink(float *heap, long n, long i) {
    for (long child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[i] <= heap[child]) return;
        float moved = heap[i];
        heap[i] = heap[child], heap[child] = moved;
    }
}

/* The k-th largest of n: the least of the heap of the k largest so far. */
static float kth_largest(const float *values, long n, long k, float *heap) {
    memcpy(heap, values, k * sizeof(float));
    for (long i = k / 2; i-- > 0;) sink(heap, k, i);
    for (long i = k; i < n; i++)
        if (values[i] > heap[0]) {
            heap[0] = values[i];
            sink(heap, k, 0);
        }
    return heap[0];
}

/* The token whose share of the cumulative distribution holds `uniform`. work: 2 V */
static long draw(const float *logits, long V, long k, float temperature, float uniform, float *work) {
    float most = largest(logits, V), least = temperature == 0 ? most : k < V ? kth_largest(logits, V, k, work) : -INFINITY;
    int *ids = (int *)(work + V);
    long n = 0, token = 0;
    for (int i = 0; i < V; i++) ids[n] = i, work[n] = logits[i], n += logits[i] >= least;
    if (temperature == 0 || n == 0) return n ? ids[0] : V - 1;
    float sum = 0, before = 0;
    for (long i = 0; i < n; i++) work[i] = exp_of((work[i] - most) / temperature);
    for (long i = 0; i < n; i++) sum += work[i];
    /* a number that rounds to 1 must not fall behind the last token that has any probability */
    float at = uniform * sum < sum ? uniform * sum : nextafterf(sum, 0);
    while (token < n - 1 && (before += work[token]) <= at) token++;
    return ids[token];
}

/* Under the model itself, whatever the draw was from. work: V */
static float logprob_of(long token, const float *logits, long V, float *work) {
    memcpy(work, logits, V * sizeof(float));
    return logits[token] - largest(logits, V) - logf(exponentials(work, V));
}

/* The draws of this thread's rows in one of the steps. */
static void draw_rows(
    const Draws *d, long step, long rows, const float *logits, long V, long *ids, float *logprobs, float *work) {
    long from, to;
    share(rows, 1, &from, &to);
    for (long r = from, at = step * rows + from; r < to; r++, at++) {
        ids[at] = draw(logits + r * V, V, d->top_k[r], d->temperature[r], d->uniforms[at], work);
        if (logprobs) logprobs[at] = logprob_of(ids[at], logits + r * V, V, work);
    }
}

/* A token for each row of logits (rows, V); -1 where memory is short. */
long choose(long rows, long V, long threads, const Draws *draws, long *ids, const float *logits) {
    float *work = malloc(threads * 2 * V * sizeof(float));
    if (!work) return -1;
    #pragma omp parallel num_threads(threads)
    draw_rows(draws, 0, rows, logits, V, ids, NULL, work + omp_get_thread_num() * 2 * V);
    free(work);
    return rows;
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

static void normalise_rows(const Step *s, const float *weight, const float *bias) {
    long C = s->model->n_embd, from, to;
    share(s->rows, 1, &from, &to);
    for (long r = from; r < to; r++)
        normalise(s->normed + r * C, s->x + r * C, C, weight, bias, !s->model->rmsnorm, s->model->norm_eps);
    WAIT_FOR_ALL
}

/* Before `linear`: of int8 weights, the rows that they are multiplied with. */
static void prepare(const Step *s, const float *in, long in_stride, const Matrix *m, long K) {
    if (!m->scale) return;
    long from, to;
    share(s->rows, 1, &from, &to);
    for (long r = from; r < to; r++) s->largest[r] = round_row(s->rounded + r * K, in + r * in_stride, K);
    WAIT_FOR_ALL
}

/* y = in times the matrix transposed + bias, this thread's outputs of it. */
static void linear(
    const Step *s, float *y, long y_stride, const float *in, long in_stride, const Matrix *m, long K, long from, long to) {
    if (!m->scale)
        product(s->rows, to - from, y + from, y_stride, in, in_stride, (const float *)m->weight + from * K, K);
#if defined __AVX512VNNI__
    else
        product_int8(s->rows, from, to, y, y_stride, s->rounded, s->largest, m, K);
#endif
    for (long r = 0; m->bias && r < s->rows; r++)
        for (long n = from; n < to; n++) y[r * y_stride + n] += m->bias[n];
}

/* x = what the block saw + a linear layer of `in`: x itself, or with post-norm what its norm made of it. */
static void add_linear(const Step *s, const float *in, long in_stride, long K, const Matrix *m) {
    long C = s->model->n_embd, from, to;
    const float *seen = s->model->post_norm ? s->normed : s->x;
    prepare(s, in, in_stride, m, K);
    share(C, LANES, &from, &to);
    linear(s, s->added, C, in, in_stride, m, K, from, to);
    for (long r = 0; r < s->rows; r++)
        for (long n = from; n < to; n++) s->x[r * C + n] = seen[r * C + n] + s->added[r * C + n];
    WAIT_FOR_ALL
}

static void run_block(const Step *s, const Block *b) {
    const Model *m = s->model;
    long C = m->n_embd, D = C / m->n_head, wide = (m->n_head + 2 * m->kv_heads) * D, from, to;
    if (!m->post_norm) normalise_rows(s, b->ln_1, b->ln_1_bias);
    prepare(s, s->normed, C, &b->c_attn, C);
    share(wide, LANES, &from, &to);
    linear(s, s->qkv, wide, s->normed, C, &b->c_attn, C, from, to);
    WAIT_FOR_ALL
    share(s->rows * m->kv_heads, 1, &from, &to);
    for (long i = from; i < to; i++) {
        long r = i / m->kv_heads, head = i % m->kv_heads;
        float *y = s->y + r * C + head * (m->n_head / m->kv_heads) * D;
        attend(m, b, y, s->qkv + r * wide, r, head, s->positions[r], s->work);
    }
    WAIT_FOR_ALL
    add_linear(s, s->y, C, C, &b->attn_proj);

    long gated = m->activation == SWIGLU ? m->inner : 0, stride = m->inner + gated; /* a gate, then what it lets by */
    normalise_rows(s, m->post_norm ? b->ln_1 : b->ln_2, m->post_norm ? b->ln_1_bias : b->ln_2_bias);
    prepare(s, s->normed, C, &b->c_fc, C);
    share(m->inner, LANES, &from, &to);
    linear(s, s->inner, stride, s->normed, C, &b->c_fc, C, from, to);
    if (gated) linear(s, s->inner, stride, s->normed, C, &b->c_fc, C, gated + from, gated + to);
    for (long r = 0; r < s->rows; r++) {
        float *h = s->inner + r * stride + from;
        activate(h, h + gated, to - from, m->activation);
    }
    WAIT_FOR_ALL
    add_linear(s, s->inner, stride, m->inner, &b->mlp_proj);
    if (m->post_norm) normalise_rows(s, b->ln_2, b->ln_2_bias);
}

static void embed(const Step *s) {
    const Model *m = s->model;
    long C = m->n_embd, from, to;
    share(s->rows, 1, &from, &to);
    for (long r = from; r < to; r++)
        for (long i = 0; i < C; i++) {
            float place = m->positions ? m->positions[s->positions[r] * C + i] : 0;
            s->x[r * C + i] = s->normed[r * C + i] = m->wte[s->tokens[r] * C + i] * (float)m->embedding_scale + place;
        }
    WAIT_FOR_ALL
}

static void forward(const Step *s) {
    const Model *m = s->model;
    long from, to;
    embed(s);
    for (long layer = 0; layer < m->n_layer; layer++) run_block(s, m->blocks + layer);
    if (!m->post_norm) normalise_rows(s, m->ln_f, m->ln_f_bias);
    prepare(s, s->normed, m->n_embd, &m->head, m->n_embd);
    share(m->vocab_size, LANES, &from, &to);
    linear(s, s->logits, m->vocab_size, s->normed, m->n_embd, &m->head, m->n_embd, from, to);
    WAIT_FOR_ALL
}

static long whole_lines(long floats) { return (floats + 15) / 16 * 16; } /* of the cache: loads across two are slow */

/* `steps` tokens for each row, or as many as until one of them ends a row; how many, or -1 where memory is short.

   tokens (rows) and positions (rows) go on from what they are. Into ids and logprobs (steps, rows), and the last step's
   logits (rows, vocab_size). Without draws: one step, of which there are only logits. logprobs may be NULL. */
long decode(
    const Model *m, long rows, long steps, long *tokens, long *positions, const Draws *draws, long *ids,
    float *logprobs, float *logits) {
    long C = m->n_embd, V = m->vocab_size, gated = m->activation == SWIGLU ? 2 : 1, done = 0, ended = 0;
    long scores = m->n_head / m->kv_heads * m->slots, of_thread = whole_lines(scores > 2 * V ? scores : 2 * V);
    long bytes = (C > m->inner ? C : m->inner) / 4 + 1, floats = m->threads * of_thread; /* a float has room for four */
    long widths[] = {C, C, C, C, C + 2 * m->kv_heads * (C / m->n_head), m->inner * gated, 1, bytes};
    for (int i = 0; i < 8; i++) floats += whole_lines(rows * widths[i]);
    float *memory = aligned_alloc(64, floats * sizeof(float));
    if (!memory) return -1;

    #pragma omp parallel num_threads(m->threads)
    {
        Step s = {.model = m, .rows = rows, .tokens = tokens, .positions = positions, .logits = logits};
        float *rounded, *next = memory, **parts[] = {&s.x, &s.normed, &s.added, &s.y, &s.qkv, &s.inner, &s.largest, &rounded};
        for (int i = 0; i < 8; next += whole_lines(rows * widths[i++])) *parts[i] = next;
        s.rounded = (unsigned char *)rounded;
        s.work = next + omp_get_thread_num() * of_thread;
        for (long n = 0; n < steps && !ended; n++) {
            forward(&s);
            if (!draws) break;
            draw_rows(draws, n, rows, logits, V, ids, logprobs, s.work);
            WAIT_FOR_ALL
            #pragma omp single
            {
                done = n + 1;
                for (long r = 0; r < rows; r++) {
                    tokens[r] = ids[n * rows + r];
                    positions[r]++;
                    ended |= draws->ends[tokens[r]];
                }
            }
        }
    }
    free(memory);
    return done;
}

/* Whether there are products of int8. */
long has_int8(void) {
#if defined __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}
