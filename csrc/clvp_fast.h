/* The C interface of the native library, which Python loads through ctypes (clvp_fast/native/calls.py holds the
 * prototypes).
 *
 * No torch, no allocation that outlives a call, no exception across the boundary. Every function returns
 * CLVP_FAST_OK, a clvp_fast_status for a call that it refuses before it touches memory, or a cudaError_t, which is
 * positive. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum clvp_fast_status {
    CLVP_FAST_OK = 0,
    CLVP_FAST_NULL_POINTER = -1, /* a pointer that must be set is null */
    CLVP_FAST_MISALIGNED = -2,   /* a pointer is no multiple of its element's size */
    CLVP_FAST_BAD_SIZE = -3,     /* batch, time, stride, n_fft, hop_length, num_mels or frames out of range */
    CLVP_FAST_BAD_DTYPE = -4,    /* a dtype that the field does not take */
    CLVP_FAST_BAD_LENGTH = -5,   /* on a CPU: a row's length is not in 1 .. time */
    CLVP_FAST_BAD_BAND = -6,     /* on a CPU: a channel's band does not lie within the bins */
    CLVP_FAST_NO_MEMORY = -7,    /* scratch memory could not be allocated */
    CLVP_FAST_NO_ISA = -8,       /* this CPU lacks the instruction set that was named */
};

enum clvp_fast_dtype {
    CLVP_FAST_FLOAT32 = 0,
    CLVP_FAST_FLOAT64 = 1,
    CLVP_FAST_INT16 = 2,
    CLVP_FAST_FLOAT16 = 3,
    CLVP_FAST_BFLOAT16 = 4,
    CLVP_FAST_INT8 = 5,
};

/* One batch of log-mel spectrograms. All pointers lie on the device of the function that is called.
 *
 * mel[b, m, f] = log(max(sum_k filters[m, k] * |DFT(frame[b, f])[k]|^2, log_floor)) / mel_norms[m]
 *
 * with frame[b, f, i] = samples[b, reflect(f * hop_length + i - n_fft / 2)] * window[i]; a frame that reaches a sample
 * that is NaN or infinite is NaN in every channel; frames past a row's own last one are 0. */
struct clvp_fast_log_mel {
    const void *samples;     /* [batch, time] of samples_dtype, columns at stride 1; int16 is divided by 32768 */
    const int64_t *lengths;  /* [batch], the true samples of each row, 1 .. time; null: all rows are full */
    const void *window;      /* [n_fft] of compute_dtype */
    const void *twiddles;    /* [n_fft, 2] of compute_dtype: cos(2 pi k / n_fft), -sin(2 pi k / n_fft) */
    const void *mel_filters; /* [num_mels, n_fft / 2 + 1] of compute_dtype: a channel's weights of the bins */
    const int32_t *bands;    /* [num_mels, 2]: a channel's first bin and one past its last; may be empty */
    const void *mel_norms;   /* [num_mels] of compute_dtype; null: no division */
    void *features;          /* [batch, num_mels, frames] of features_dtype, contiguous; every element is written */
    uint32_t *clip_maxima;   /* CUDA with top_db: [batch, 2], zero on entry, scratch; else null */
    int64_t batch;           /* rows, 0 or more */
    int64_t time;            /* samples of the longest row, 1 or more */
    int64_t samples_stride;  /* elements from one row to the next, any sign */
    int64_t hop_length;      /* samples from one frame to the next, 1 or more */
    int64_t frames;          /* 1 + time / hop_length: frames of a full row */
    int32_t n_fft;           /* 256, 512, 1024, 2048 or 4096 */
    int32_t num_mels;        /* 1 .. 256 */
    int32_t samples_dtype;   /* FLOAT32 or INT16; on a CPU FLOAT64 too */
    int32_t compute_dtype;   /* FLOAT32; on a CPU FLOAT64 too */
    int32_t features_dtype;  /* FLOAT32; on CUDA FLOAT16 and BFLOAT16 too, on a CPU FLOAT64 */
    int32_t decibels;        /* 0: natural logarithm; else 10 log10 */
    double log_floor;        /* mel power below this is raised to it; positive */
    double top_db; /* decibels: what lies more than this under a row's loudest value is raised to it; negative: off */
};

/* Runs on at most num_threads threads, on the named instruction set, "avx512bf16", "avx512vnni", "avx512", "avxvnni",
 * "avx2" or "portable" (null: the set that clvp_fast_cpu_isa names), and returns when all is written. */
int clvp_fast_log_mel_cpu(const struct clvp_fast_log_mel *call, int32_t num_threads, const char *isa);

/* Returns the instruction set of calls that name none: this machine's best, unless another one was chosen. */
const char *clvp_fast_cpu_isa(void);

/* Returns 1 if this machine and this library have the named instruction set, else 0. */
int clvp_fast_has_isa(const char *name);

/* Chooses the instruction set of calls that name none; null: the best that this machine has. Not during such calls. */
int clvp_fast_choose_isa(const char *name);

/* Launches one kernel on the cudaStream_t `stream` of the current device and returns at once. Lengths and bands are not
 * read on the host, and are clamped to their range. In the CUDA part. */
int clvp_fast_log_mel_cuda(const struct clvp_fast_log_mel *call, void *stream);

/* Returns 0 where the CUDA part can serve on this machine; else 1, and a sentence of up to `size` bytes on the lack: a
 * driver, a newer driver, a device. In the CUDA part. */
int clvp_fast_cuda_missing(char *sentence, int32_t size);

/* Does the same for log-mel of n_fft on the current device, which may have too little shared memory. */
int clvp_fast_log_mel_cuda_missing(int32_t n_fft, char *sentence, int32_t size);

/* Returns CUDA's own name, number and words for an error of a function of the CUDA part; valid until the thread's
 * next call. */
const char *clvp_fast_cuda_error(int code);

/* One decode step over paged keys and values on a CPU: each candidate's new key and value are stored at place
 * seq_lens[n] of its own pages, and its query attends to its prefix and to its own tokens, the new one included.
 *
 * Pages that do not exist, and places past a table, are left out. Strides count elements; channels lie at stride 1. */
struct clvp_fast_paged_decode {
    const void *q, *k_new, *v_new; /* [num_candidates, num_heads, head_dim] of dtype */
    void *k_pages, *v_pages;       /* [num_pages, page_size, num_heads, head_dim] of dtype, of the same strides */
    void *out;                     /* as q, contiguous; zeros for an inactive candidate */
    const int32_t *block_table;    /* [num_candidates, max_pages] */
    const int32_t *seq_lens;       /* [num_candidates], own tokens stored so far; negative: inactive */
    const int32_t *prefix_table;   /* [num_prefixes, max_prefix_pages]; null with the next two: no prefixes */
    const int32_t *prefix_lens;    /* [num_prefixes] */
    const int32_t *prefix_index;   /* [num_candidates], -1: none */
    int64_t q_strides[2], k_new_strides[2], v_new_strides[2]; /* of a candidate, of a head */
    int64_t page_strides[3];                                  /* of a page, of a token, of a head */
    int64_t block_table_stride, prefix_table_stride;          /* of a row */
    int64_t num_candidates, num_pages, num_prefixes;
    int32_t num_heads, head_dim; /* head_dim: a multiple of 16 up to 128 */
    int32_t page_size, max_pages, max_prefix_pages;
    int32_t dtype; /* FLOAT32 or BFLOAT16; sums in float32 */
    float scale;   /* of the scores */
};

/* Threads and instruction set as above. The candidates' own pages must be theirs alone. */
int clvp_fast_paged_decode_cpu(const struct clvp_fast_paged_decode *call, int32_t num_threads, const char *isa);

/* Causal attention within each sequence of a ragged batch on a CPU; its keys and values are stored from place 0 of its
 * pages on.
 *
 * Sequence s has the rows from cu_seqlens[s] to before cu_seqlens[s + 1]. One that begins before the end of another, or
 * ends behind the last row, is left out, as are pages that do not exist and places past the table. The bits of a
 * sequence depend on it alone. */
struct clvp_fast_paged_prefill {
    const void *q, *k, *v;      /* [rows, num_heads, head_dim] of dtype */
    void *k_pages, *v_pages;    /* [num_pages, page_size, num_heads, head_dim] of dtype, of the same strides */
    void *out;                  /* as q, contiguous; rows of no sequence stay as they are */
    const int32_t *cu_seqlens;  /* [num_sequences + 1] */
    const int32_t *block_table; /* [num_sequences, max_pages] */
    int64_t q_strides[2], k_strides[2], v_strides[2]; /* of a row, of a head */
    int64_t page_strides[3];                          /* of a page, of a token, of a head */
    int64_t block_table_stride;                       /* of a row */
    int64_t rows, num_sequences, num_pages;
    int32_t num_heads, head_dim; /* head_dim: a multiple of 16 up to 128 */
    int32_t page_size, max_pages;
    int32_t dtype; /* FLOAT32 or BFLOAT16; sums in float32 */
    float scale;   /* of the scores */
};

/* Threads and instruction set as above. A page must be of one sequence. */
int clvp_fast_paged_prefill_cpu(const struct clvp_fast_paged_prefill *call, int32_t num_threads, const char *isa);

/* Attention with rotary positions on a CPU: softmax(scale * q k^T) v, the first rotary_dim channels of queries, keys
 * and values turned by their angles before, and rounded once. Query i sees the keys up to place query_offset + i if
 * causal, of which key_mask has a one; a query that sees none weighs all alike.
 *
 * With cu_seqlens the batch is ragged: its sequences lie in the first of q, k and v as in a prefill, q_len is the
 * number of rows, k_len that of angles, and there is no mask and no offset. A sequence without angles is left out. The
 * bits of a sequence depend on it alone. */
struct clvp_fast_rotary_attention {
    const void *q, *k, *v;                            /* [batch, q_len or k_len, num_heads, head_dim] of dtype */
    void *out;                                        /* as q, contiguous */
    const float *cos, *sin;                           /* [batch, k_len, rotary_dim]; null: no rotation */
    const uint8_t *key_mask;                          /* [batch, k_len], contiguous, zeros and others; null: all ones */
    const int32_t *cu_seqlens;                        /* [batch + 1]; null: not ragged */
    int64_t q_strides[3], k_strides[3], v_strides[3]; /* of a sequence, of a row, of a head */
    int64_t angle_stride;                             /* of a sequence; rows are contiguous */
    int64_t batch, q_len, k_len, query_offset;
    int64_t item_queries;                    /* that one thread computes at a time; it changes no bit */
    int32_t num_heads, head_dim, rotary_dim; /* head_dim: up to 128; rotary_dim: even */
    int32_t causal;
    int32_t dtype; /* FLOAT32 or BFLOAT16; sums in float32 */
    float scale;
};

/* Threads and instruction set as above. */
int clvp_fast_rotary_attention_cpu(const struct clvp_fast_rotary_attention *call, int32_t num_threads, const char *isa);

enum clvp_fast_activation { CLVP_FAST_NO_ACTIVATION = 0, CLVP_FAST_GELU_TANH = 1, CLVP_FAST_GELU = 2 };

/* A linear layer of few rows: out[m, n] = activation(scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]) +
 * residual[m, n], summed in float32. The bits of a row depend on that row alone. */
struct clvp_fast_linear {
    const void *x;         /* [rows, in_features] of dtype, columns at stride 1 */
    const void *weight;    /* [out_features, in_features] of weight_dtype, columns at stride 1 */
    const float *scale;    /* [out_features]; null: 1 */
    const void *bias;      /* [out_features] of dtype; null: none */
    const float *residual; /* [rows, out_features], contiguous; null: none */
    void *out;             /* [rows, out_features] of dtype, with a residual float32; contiguous */
    /* Null, or the weights again, which are read in place of `weight`: for each 48 rows of them, the last ones
     * filled up with anything finite, [in_features / u, 48, u], where u is 1 for FLOAT32 and 2 for other types; with
     * int8_x 4, and 128 is added to each weight, which then has no sign. */
    const void *panels;
    int64_t x_stride; /* elements from one row to the next */
    int64_t weight_stride;
    int64_t rows, in_features, out_features; /* in_features: a multiple of 32 */
    int32_t dtype;                           /* FLOAT32 or BFLOAT16 */
    int32_t weight_dtype;                    /* dtype, or INT8 */
    int32_t activation;
    /* 1: rows of x are rounded to 8 bits, -127 .. 127 in steps of a 127th of their largest number, and multiplied in
     * integers; with INT8 panels alone, and in_features up to 65536. 0: they are multiplied as they are. */
    int32_t int8_x;
};

/* Threads and instruction set as above. */
int clvp_fast_linear_cpu(const struct clvp_fast_linear *call, int32_t num_threads, const char *isa);

/* sum = x + residual, and out = a norm of it over its columns, with statistics in float32. The bits of a row depend on
 * that row alone. */
struct clvp_fast_norm {
    const void *x; /* [rows, columns] of dtype, columns at stride 1 */
    const void
        *residual;      /* [rows, columns] of sum_dtype, contiguous; null: the norm is that of x, and `sum` is unused */
    const void *weight; /* [columns] of affine_dtype */
    const void *bias;   /* [columns] of affine_dtype; null: none; null with rms */
    void *sum;          /* [rows, columns] of sum_dtype, contiguous */
    void *out;          /* [rows, columns] of out_dtype, contiguous */
    int64_t x_stride;   /* elements from one row to the next */
    int64_t rows, columns;
    int32_t dtype;                   /* FLOAT32 or BFLOAT16, as the others */
    int32_t sum_dtype;               /* dtype or FLOAT32 */
    int32_t affine_dtype, out_dtype; /* each FLOAT32 or BFLOAT16 */
    /* 1: sum / sqrt(mean of sum^2 + eps), rounded to its type, times weight; 0: (sum - mean) / sqrt(variance + eps) *
     * weight + bias, rounded once. */
    int32_t rms;
    float eps;
};

/* Threads and instruction set as above. */
int clvp_fast_norm_cpu(const struct clvp_fast_norm *call, int32_t num_threads, const char *isa);

enum clvp_fast_operation { CLVP_FAST_PAGED_DECODE = 0, CLVP_FAST_LINEAR = 1, CLVP_FAST_NORM = 2 };

/* One of several calls: its operation, and the call. */
struct clvp_fast_call {
    int32_t operation;
    union {
        const struct clvp_fast_paged_decode *paged_decode;
        const struct clvp_fast_linear *linear;
        const struct clvp_fast_norm *norm;
    };
};

/* Makes `count` calls one after another, with the bits that their own functions give; threads begin once for all. If
 * one call is refused, none is made. Threads and instruction set as above. */
int clvp_fast_calls_cpu(const struct clvp_fast_call *calls, int64_t count, int32_t num_threads, const char *isa);

/* A feed-forward block of many rows: out = activation(x w_in^T + b_in) w_out^T + b_out + residual; gated, the values
 * between the layers are h * activation(g), h and g the halves of x w_in^T + b_in; or the first layer alone: out =
 * activation(x w_in^T + b_in) + residual. Summed in float32; the values between the layers are rounded to bfloat16
 * where the CPU multiplies that. The bits of a row depend on that row alone. */
struct clvp_fast_mlp {
    const void *x;        /* [rows, in_features] of dtype, columns at stride 1 */
    const void *w_in;     /* [inner_features, in_features] of dtype, columns at stride 1; gated, twice as many rows */
    const void *b_in;     /* [inner_features] of dtype, gated twice as many; null: none */
    const void *w_out;    /* [out_features, inner_features] of dtype, columns at stride 1; null: one layer */
    const void *b_out;    /* [out_features] of dtype; null: none */
    const void *residual; /* [rows, out_features] of out_dtype, contiguous; null: none */
    void *out;            /* [rows, out_features] of out_dtype, contiguous */
    int64_t x_stride;     /* elements from one row to the next */
    int64_t w_in_stride, w_out_stride;
    int64_t rows, in_features, inner_features; /* features: multiples of 32 */
    int64_t out_features;                      /* with one layer inner_features, which then may be any number */
    int32_t dtype;                             /* FLOAT32 or BFLOAT16 */
    int32_t out_dtype;                         /* dtype or FLOAT32 */
    int32_t activation;
    int32_t item_rows; /* how many rows a thread computes at a time, 1 .. 4096 */
    int32_t gated;     /* 1 with two layers alone, or 0 */
    /* [in_features] of dtype: x is first layer-normed over its columns; norm_weight null: it is not, norm_bias null: 0
     */
    const void *norm_weight, *norm_bias;
    float eps; /* added to the variance */
};

/* Threads and instruction set as above. */
int clvp_fast_mlp_cpu(const struct clvp_fast_mlp *call, int32_t num_threads, const char *isa);

/* Attention of each place of an image to those of its window, which begins `shift` rows and columns later than the
 * image and goes around its edges: softmax(q k^T * scale + bias, and -100 between places from opposite edges) v. */
struct clvp_fast_window_attention {
    const void *q, *k, *v; /* [batch, height, width, num_heads, head_dim] of dtype, channels at stride 1 */
    const void *bias;      /* [num_heads, window * window, window * window] of bias_dtype: of a query, of a key */
    void *out;             /* as q, contiguous */
    int64_t q_strides[4], k_strides[4], v_strides[4]; /* elements, of all axes but the last */
    int64_t bias_strides[3];
    int64_t batch, height, width; /* height and width: multiples of window */
    int32_t num_heads, head_dim;  /* head_dim: 1 .. 128 */
    int32_t window, shift;        /* window: 1 .. 32; shift: less than that */
    int32_t dtype, bias_dtype;    /* FLOAT32 or BFLOAT16 */
    float scale;
};

/* Threads and instruction set as above. */
int clvp_fast_window_attention_cpu(const struct clvp_fast_window_attention *call, int32_t num_threads, const char *isa);

/* The first half of a Swin layer: out = x + (attention in windows, as above, of queries, keys and values that are
 * layer_norm(x) w_qkv^T + b_qkv) w_out^T + b_out, where scores are scaled by 1 / sqrt(head_dim). Values in between are
 * rounded to dtype. The bits of an image depend on that image alone. */
struct clvp_fast_window_block {
    const void *x;                       /* [batch, height, width, channels] of dtype, contiguous */
    const void *norm_weight, *norm_bias; /* [channels] of dtype; norm_bias null: none */
    const void *w_qkv, *b_qkv; /* [3 * channels, channels] of dtype, columns at stride 1; [3 * channels], null: none */
    const void *bias;          /* [num_heads, window * window, window * window] of dtype: of a query, of a key */
    const void *w_out, *b_out; /* [channels, channels] of dtype, columns at stride 1; [channels], null: none */
    void *out;                 /* as x; may be x */
    int64_t w_qkv_stride, w_out_stride, bias_strides[3];
    int64_t batch, height, width; /* height and width: multiples of window */
    int32_t num_heads, head_dim;  /* channels are their product, a multiple of 32; head_dim: 1 .. 128 */
    int32_t window, shift;        /* window: 1 .. 32; shift: less than that */
    int32_t dtype;                /* FLOAT32 or BFLOAT16 */
    float eps;                    /* added to the variance */
};

/* Threads and instruction set as above. */
int clvp_fast_window_block_cpu(const struct clvp_fast_window_block *call, int32_t num_threads, const char *isa);

/* The next token of each row of logits: repetition penalty, temperature, top-k, top-p, min-p and typical-p as
 * transformers applies them, and a draw. A row's token depends on that row alone. A row of nothing but NaN and -inf
 * gets some token of the vocabulary. */
struct clvp_fast_sample {
    const void *logits; /* [rows, vocab_size] of dtype, columns at stride 1 */
    const int32_t *
        seen; /* [rows, ceil(vocab_size / 32)], words at stride 1: the penalty falls on the tokens whose bits are set */
    const uint8_t *done; /* [rows], other than 0: the row gets pad_token */
    const uint8_t
        *sampled; /* [rows], 0: the first of the largest scores, before the temperature; null: see do_sample */
    const double *temperature, *top_p, *typical_p, *min_p, *repetition_penalty; /* [rows]; null: left out */
    const int64_t *top_k;                                                       /* [rows]; null: left out */
    const int64_t *seed, *candidate,
        *step;       /* [rows]: the draw takes Philox-4x32-10 of the key seed, at (step, candidate) */
    int64_t *tokens; /* [rows] */
    int64_t logits_stride, seen_stride; /* elements from one row to the next */
    int64_t rows, vocab_size;
    int64_t pad_token;
    int32_t dtype; /* FLOAT32 or BFLOAT16; processed in float32 */
    int32_t do_sample;
};

/* Threads and instruction set as above. */
int clvp_fast_sample_cpu(const struct clvp_fast_sample *call, int32_t num_threads, const char *isa);

/* One layer of the decoder: weights [out, in] of the call's dtype, contiguous, with biases [out] (null: none). */
struct clvp_fast_decoder_layer {
    const void *input_norm_weight, *input_norm_bias; /* [hidden_size] */
    const void *qkv_weight, *qkv_bias;               /* [3 * hidden_size, hidden_size]: queries, keys, values */
    const void *out_weight, *out_bias;               /* [hidden_size, hidden_size] */
    const void *post_norm_weight, *post_norm_bias;   /* [hidden_size] */
    const void *mlp_in_weight, *mlp_in_bias;         /* [intermediate_size, hidden_size] */
    const void *mlp_out_weight, *mlp_out_bias;       /* [hidden_size, intermediate_size] */
    void *k_pages, *v_pages; /* [num_pages, page_size, num_heads, 64] of dtype, of the same strides */
};

/* One decode step of one to four candidates in one launch: from their tokens to the logits of the next. The residual
 * is float32; inputs of products, queries, keys, values, hidden states and logits are of dtype. The activation
 * is gelu in its tanh form.
 *
 * Heads have 64 channels. Pages that do not exist, and places past a table, are left out; a token or position that is
 * not in its table makes its candidate's results NaN. Strides count elements. */
struct clvp_fast_persistent_decode {
    const struct clvp_fast_decoder_layer *layers; /* [num_layers], on the device */
    const void *token_table;                      /* [vocab_size, hidden_size] */
    const void *position_table;                   /* [num_positions, hidden_size] */
    const void *first_norm_weight, *first_norm_bias, *final_norm_weight, *final_norm_bias; /* [hidden_size] */
    const void *head_weight, *head_bias; /* [vocab_size, hidden_size] */
    const int64_t *tokens;               /* [num_candidates] */
    const int32_t *seq_lens; /* [num_candidates], own tokens stored so far; negative: inactive, results mean nothing */
    const int32_t *block_table;  /* [num_candidates, max_pages] */
    const int32_t *prefix_table; /* [num_prefixes, max_prefix_pages]; null with the next two: no prefixes */
    const int32_t *prefix_lens;  /* [num_prefixes] */
    const int32_t *prefix_index; /* [num_candidates], -1: none */
    void *hidden;                /* [num_candidates, hidden_size], after both norms */
    void *logits;                /* [num_candidates, vocab_size] */
    void *workspace;             /* clvp_fast_persistent_decode_workspace(call) bytes, zero before the first call */
    int64_t page_strides[3];     /* of a page, of a token, of a head; multiples of 8 */
    int64_t block_table_stride, prefix_table_stride; /* of a row */
    int64_t num_pages, num_prefixes;
    int32_t num_candidates;    /* 1 .. 4 */
    int32_t num_layers;        /* 1 .. 256 */
    int32_t hidden_size;       /* a multiple of 64 up to 2048 */
    int32_t intermediate_size; /* a multiple of 8 up to 8192 */
    int32_t vocab_size, num_positions;
    int32_t page_size, max_pages, max_prefix_pages;
    int32_t contiguous_positions; /* 0: the k-th token stands at position k + 1, the first one at 0 */
    int32_t dtype;                /* FLOAT16 or BFLOAT16 */
    float layer_eps, first_eps, final_eps;
    float scale; /* of the scores */
};

/* Returns the bytes of workspace that a call needs; calls that run at the same time may not share it. */
int64_t clvp_fast_persistent_decode_workspace(const struct clvp_fast_persistent_decode *call);

/* Launches one cooperative kernel, a block on each multiprocessor, on the cudaStream_t `stream` of the current device
 * and returns at once. In the CUDA part. */
int clvp_fast_persistent_decode_cuda(const struct clvp_fast_persistent_decode *call, void *stream);

/* Returns a sentence on a clvp_fast_status; never null. */
const char *clvp_fast_error(int code);

/* Returns the version that Python compares with its own prototypes before any call; each part of the library has one.
 */
const char *clvp_fast_version(void);

#ifdef __cplusplus
}
#endif
