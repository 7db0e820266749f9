/* Checks of a call's arguments that read nothing behind its pointers. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "clvp_fast.h"

static inline size_t clvp_fast_element_size(int32_t dtype) {
    switch (dtype) {
        case CLVP_FAST_FLOAT64: return 8;
        case CLVP_FAST_FLOAT32: return 4;
        case CLVP_FAST_INT8: return 1;
        default: return 2;
    }
}

static inline int clvp_fast_misaligned(const void *pointer, size_t size) { return (uintptr_t)pointer % size != 0; }

/* Returns CLVP_FAST_OK, or why a CPU (cuda = 0) or a GPU (cuda = 1) refuses log-mel. */
static inline int clvp_fast_check_log_mel(const struct clvp_fast_log_mel *call, int cuda) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;

    const int32_t in = call->samples_dtype, compute = call->compute_dtype, out = call->features_dtype;
    const int doubles = !cuda;
    if (!(in == CLVP_FAST_FLOAT32 || in == CLVP_FAST_INT16 || (doubles && in == CLVP_FAST_FLOAT64)) ||
        !(compute == CLVP_FAST_FLOAT32 || (doubles && compute == CLVP_FAST_FLOAT64)) ||
        !(out == CLVP_FAST_FLOAT32 || (doubles && out == CLVP_FAST_FLOAT64 && compute == CLVP_FAST_FLOAT64) ||
          (cuda && (out == CLVP_FAST_FLOAT16 || out == CLVP_FAST_BFLOAT16))))
        return CLVP_FAST_BAD_DTYPE;

    const int32_t n_fft = call->n_fft;
    /* Larger than any memory, and small enough that products of the sizes below cannot overflow. */
    const int64_t most = (int64_t)1 << 40;
    if (n_fft < 256 || n_fft > 4096 || (n_fft & (n_fft - 1)) != 0 || call->num_mels < 1 || call->num_mels > 256 ||
        call->batch < 0 || call->batch > most || call->time < 1 || call->time > most || call->hop_length < 1 ||
        call->samples_stride > most || call->samples_stride < -most ||
        call->frames != 1 + call->time / call->hop_length || call->frames * call->num_mels > most ||
        !(call->log_floor > 0) || call->top_db != call->top_db || (call->top_db >= 0 && !call->decibels))
        return CLVP_FAST_BAD_SIZE;

    if (call->batch == 0) return CLVP_FAST_OK;
    const int with_maxima = cuda && call->top_db >= 0;
    if (!call->samples || !call->window || !call->twiddles || !call->mel_filters || !call->bands || !call->features ||
        (with_maxima && !call->clip_maxima))
        return CLVP_FAST_NULL_POINTER;
    const size_t real = clvp_fast_element_size(compute);
    if (clvp_fast_misaligned(call->samples, clvp_fast_element_size(in)) || clvp_fast_misaligned(call->lengths, 8) ||
        clvp_fast_misaligned(call->window, real) || clvp_fast_misaligned(call->twiddles, 2 * real) ||
        clvp_fast_misaligned(call->mel_filters, real) || clvp_fast_misaligned(call->bands, 8) ||
        clvp_fast_misaligned(call->mel_norms, real) ||
        clvp_fast_misaligned(call->features, clvp_fast_element_size(out)) || clvp_fast_misaligned(call->clip_maxima, 8))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why a decode step is refused. */
static inline int clvp_fast_check_paged_decode(const struct clvp_fast_paged_decode *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) return CLVP_FAST_BAD_DTYPE;
    const int64_t most = (int64_t)1 << 31;
    if (call->num_candidates < 0 || call->num_candidates > most || call->num_heads < 1 || call->head_dim < 16 ||
        call->head_dim > 128 || call->head_dim % 16 != 0 || call->page_size < 1 || call->page_size > 1024 ||
        call->max_pages < 1 || call->max_pages > 1 << 20 || call->num_pages < 0 || call->num_pages > most ||
        call->max_prefix_pages < 0 || call->max_prefix_pages > 1 << 20 || call->num_prefixes < 0)
        return CLVP_FAST_BAD_SIZE;
    if (call->num_candidates == 0) return CLVP_FAST_OK;
    const int prefixes = call->prefix_table != NULL;
    if (!call->q || !call->k_new || !call->v_new || !call->k_pages || !call->v_pages || !call->out ||
        !call->block_table || !call->seq_lens || (prefixes && (!call->prefix_lens || !call->prefix_index)))
        return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype);
    if (clvp_fast_misaligned(call->q, element) || clvp_fast_misaligned(call->k_new, element) ||
        clvp_fast_misaligned(call->v_new, element) || clvp_fast_misaligned(call->k_pages, element) ||
        clvp_fast_misaligned(call->v_pages, element) || clvp_fast_misaligned(call->out, element) ||
        clvp_fast_misaligned(call->block_table, 4) || clvp_fast_misaligned(call->seq_lens, 4) ||
        clvp_fast_misaligned(call->prefix_table, 4) || clvp_fast_misaligned(call->prefix_lens, 4) ||
        clvp_fast_misaligned(call->prefix_index, 4))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why a prefill is refused. */
static inline int clvp_fast_check_paged_prefill(const struct clvp_fast_paged_prefill *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) return CLVP_FAST_BAD_DTYPE;
    const int64_t most = (int64_t)1 << 31;
    if (call->rows < 0 || call->rows > most || call->num_sequences < 0 || call->num_sequences > most ||
        call->num_heads < 1 || call->head_dim < 16 || call->head_dim > 128 || call->head_dim % 16 != 0 ||
        call->page_size < 1 || call->page_size > 1024 || call->max_pages < 1 || call->max_pages > 1 << 20 ||
        call->num_pages < 0 || call->num_pages > most)
        return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0 || call->num_sequences == 0) return CLVP_FAST_OK;
    if (!call->q || !call->k || !call->v || !call->k_pages || !call->v_pages || !call->out || !call->cu_seqlens ||
        !call->block_table)
        return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype);
    if (clvp_fast_misaligned(call->q, element) || clvp_fast_misaligned(call->k, element) ||
        clvp_fast_misaligned(call->v, element) || clvp_fast_misaligned(call->k_pages, element) ||
        clvp_fast_misaligned(call->v_pages, element) || clvp_fast_misaligned(call->out, element) ||
        clvp_fast_misaligned(call->cu_seqlens, 4) || clvp_fast_misaligned(call->block_table, 4))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why an attention is refused. */
static inline int clvp_fast_check_rotary_attention(const struct clvp_fast_rotary_attention *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) return CLVP_FAST_BAD_DTYPE;
    const int64_t most = (int64_t)1 << 31;
    const int ragged = call->cu_seqlens != NULL, bounded = call->causal || call->cos != NULL;
    if (call->batch < 0 || call->batch > most || call->q_len < 0 || call->q_len > most || call->k_len < 0 ||
        call->k_len > most || (!ragged && call->k_len == 0) || call->num_heads < 1 || call->num_heads > 1 << 20 ||
        call->head_dim < 1 || call->head_dim > 128 || call->rotary_dim < 0 || call->rotary_dim > call->head_dim ||
        call->rotary_dim % 2 != 0 || call->item_queries < 1 || call->item_queries > most || call->query_offset < 0 ||
        call->query_offset > most || (!ragged && bounded && call->query_offset > call->k_len - call->q_len) ||
        (ragged && (call->query_offset != 0 || call->key_mask)))
        return CLVP_FAST_BAD_SIZE;
    if (call->batch == 0 || call->q_len == 0) return CLVP_FAST_OK;
    if (!call->q || !call->k || !call->v || !call->out || (call->cos == NULL) != (call->sin == NULL))
        return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype);
    if (clvp_fast_misaligned(call->q, element) || clvp_fast_misaligned(call->k, element) ||
        clvp_fast_misaligned(call->v, element) || clvp_fast_misaligned(call->out, element) ||
        clvp_fast_misaligned(call->cos, 4) || clvp_fast_misaligned(call->sin, 4) ||
        clvp_fast_misaligned(call->cu_seqlens, 4))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why a linear layer is refused. */
static inline int clvp_fast_check_linear(const struct clvp_fast_linear *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if ((call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) ||
        (call->weight_dtype != call->dtype && call->weight_dtype != CLVP_FAST_INT8) ||
        (call->int8_x && call->weight_dtype != CLVP_FAST_INT8))
        return CLVP_FAST_BAD_DTYPE;
    /* So large that no product of two sizes overflows, and no sum of 32 bits. */
    const int64_t most = (int64_t)1 << 28, most_features = call->int8_x ? (int64_t)1 << 16 : most;
    if (call->rows < 0 || call->rows > most || call->out_features < 0 || call->out_features > most ||
        call->in_features < 32 || call->in_features > most_features || call->in_features % 32 != 0 ||
        call->x_stride > most || call->x_stride < -most || call->weight_stride > most || call->weight_stride < -most ||
        call->activation < CLVP_FAST_NO_ACTIVATION || call->activation > CLVP_FAST_GELU_TANH || call->int8_x < 0 ||
        call->int8_x > 1)
        return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0 || call->out_features == 0) return CLVP_FAST_OK;
    if (!call->x || !((call->weight && !call->int8_x) || call->panels) || !call->out) return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype);
    if (clvp_fast_misaligned(call->x, element) ||
        clvp_fast_misaligned(call->weight, clvp_fast_element_size(call->weight_dtype)) ||
        clvp_fast_misaligned(call->panels, clvp_fast_element_size(call->weight_dtype)) ||
        clvp_fast_misaligned(call->scale, sizeof(float)) || clvp_fast_misaligned(call->bias, element) ||
        clvp_fast_misaligned(call->residual, sizeof(float)) ||
        clvp_fast_misaligned(call->out, call->residual ? sizeof(float) : element))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

static inline int clvp_fast_is_floating(int32_t dtype) {
    return dtype == CLVP_FAST_FLOAT32 || dtype == CLVP_FAST_BFLOAT16;
}

/* Returns CLVP_FAST_OK, or why a norm is refused. */
static inline int clvp_fast_check_norm(const struct clvp_fast_norm *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (!clvp_fast_is_floating(call->dtype) || !clvp_fast_is_floating(call->affine_dtype) ||
        !clvp_fast_is_floating(call->out_dtype) ||
        (call->sum_dtype != call->dtype && call->sum_dtype != CLVP_FAST_FLOAT32))
        return CLVP_FAST_BAD_DTYPE;
    /* So large that no product of two sizes overflows. */
    const int64_t most = (int64_t)1 << 28;
    if (call->rows < 0 || call->rows > most || call->columns < 1 || call->columns > most || call->x_stride > most ||
        call->x_stride < -most || call->rms < 0 || call->rms > 1 || (call->rms && call->bias))
        return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0) return CLVP_FAST_OK;
    if (!call->x || !call->weight || !call->out || (call->residual && !call->sum)) return CLVP_FAST_NULL_POINTER;
    const size_t affine = clvp_fast_element_size(call->affine_dtype), sum = clvp_fast_element_size(call->sum_dtype);
    if (clvp_fast_misaligned(call->x, clvp_fast_element_size(call->dtype)) ||
        clvp_fast_misaligned(call->residual, sum) || clvp_fast_misaligned(call->weight, affine) ||
        clvp_fast_misaligned(call->bias, affine) || clvp_fast_misaligned(call->sum, sum) ||
        clvp_fast_misaligned(call->out, clvp_fast_element_size(call->out_dtype)))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why a feed-forward block is refused. */
static inline int clvp_fast_check_mlp(const struct clvp_fast_mlp *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if ((call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) ||
        (call->out_dtype != call->dtype && call->out_dtype != CLVP_FAST_FLOAT32))
        return CLVP_FAST_BAD_DTYPE;
    /* So large that no product of two sizes overflows. */
    const int64_t most = (int64_t)1 << 28;
    if (call->rows < 0 || call->rows > most || call->in_features < 32 || call->in_features > most ||
        call->in_features % 32 != 0 || call->inner_features < 0 || call->inner_features > most ||
        call->out_features < 0 || call->out_features > most || call->x_stride > most || call->x_stride < -most ||
        call->w_in_stride > most || call->w_in_stride < -most || call->w_out_stride > most ||
        call->w_out_stride < -most || call->activation < CLVP_FAST_NO_ACTIVATION || call->activation > CLVP_FAST_GELU ||
        call->item_rows < 1 || call->item_rows > 4096 || (call->norm_bias && !call->norm_weight) || call->gated < 0 ||
        call->gated > (call->w_out ? 1 : 0) ||
        (call->w_out ? call->inner_features < 32 || call->inner_features % 32 != 0
                     : call->inner_features != call->out_features))
        return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0 || call->out_features == 0) return CLVP_FAST_OK;
    if (!call->x || !call->w_in || !call->out) return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype), out = clvp_fast_element_size(call->out_dtype);
    if (clvp_fast_misaligned(call->x, element) || clvp_fast_misaligned(call->w_in, element) ||
        clvp_fast_misaligned(call->b_in, element) || clvp_fast_misaligned(call->w_out, element) ||
        clvp_fast_misaligned(call->b_out, element) || clvp_fast_misaligned(call->residual, out) ||
        clvp_fast_misaligned(call->norm_weight, element) || clvp_fast_misaligned(call->norm_bias, element) ||
        clvp_fast_misaligned(call->out, out))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns 1 if images can be cut into such windows, else 0. */
static inline int clvp_fast_are_windows(int64_t batch, int64_t height, int64_t width, int32_t num_heads,
                                        int32_t head_dim, int32_t window, int32_t shift) {
    const int64_t most = (int64_t)1 << 20; /* So large that no product of sizes overflows. */
    return window >= 1 && window <= 32 && shift >= 0 && shift < window && batch >= 0 && batch <= most && height >= 0 &&
           height <= most && height % window == 0 && width >= 0 && width <= most && width % window == 0 &&
           num_heads >= 0 && num_heads <= 4096 && head_dim >= 1 && head_dim <= 128;
}

/* Returns CLVP_FAST_OK, or why attention in windows is refused. */
static inline int clvp_fast_check_window_attention(const struct clvp_fast_window_attention *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if ((call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) ||
        (call->bias_dtype != CLVP_FAST_FLOAT32 && call->bias_dtype != CLVP_FAST_BFLOAT16))
        return CLVP_FAST_BAD_DTYPE;
    if (!clvp_fast_are_windows(call->batch, call->height, call->width, call->num_heads, call->head_dim, call->window,
                               call->shift))
        return CLVP_FAST_BAD_SIZE;
    if (call->batch == 0 || call->height == 0 || call->width == 0 || call->num_heads == 0) return CLVP_FAST_OK;
    if (!call->q || !call->k || !call->v || !call->bias || !call->out) return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype);
    if (clvp_fast_misaligned(call->q, element) || clvp_fast_misaligned(call->k, element) ||
        clvp_fast_misaligned(call->v, element) || clvp_fast_misaligned(call->out, element) ||
        clvp_fast_misaligned(call->bias, clvp_fast_element_size(call->bias_dtype)))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why the first half of a Swin layer is refused. */
static inline int clvp_fast_check_window_block(const struct clvp_fast_window_block *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) return CLVP_FAST_BAD_DTYPE;
    const int64_t most = (int64_t)1 << 28; /* So large that no product of two sizes overflows. */
    if (!clvp_fast_are_windows(call->batch, call->height, call->width, call->num_heads, call->head_dim, call->window,
                               call->shift) ||
        call->num_heads < 1 || call->num_heads * call->head_dim % 32 != 0 || call->w_qkv_stride > most ||
        call->w_qkv_stride < -most || call->w_out_stride > most || call->w_out_stride < -most)
        return CLVP_FAST_BAD_SIZE;
    if (call->batch == 0 || call->height == 0 || call->width == 0) return CLVP_FAST_OK;
    if (!call->x || !call->norm_weight || !call->w_qkv || !call->bias || !call->w_out || !call->out)
        return CLVP_FAST_NULL_POINTER;
    const size_t element = clvp_fast_element_size(call->dtype);
    if (clvp_fast_misaligned(call->x, element) || clvp_fast_misaligned(call->norm_weight, element) ||
        clvp_fast_misaligned(call->norm_bias, element) || clvp_fast_misaligned(call->w_qkv, element) ||
        clvp_fast_misaligned(call->b_qkv, element) || clvp_fast_misaligned(call->bias, element) ||
        clvp_fast_misaligned(call->w_out, element) || clvp_fast_misaligned(call->b_out, element) ||
        clvp_fast_misaligned(call->out, element))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why drawing tokens is refused. */
static inline int clvp_fast_check_sample(const struct clvp_fast_sample *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (call->dtype != CLVP_FAST_FLOAT32 && call->dtype != CLVP_FAST_BFLOAT16) return CLVP_FAST_BAD_DTYPE;
    const int64_t most = (int64_t)1 << 28; /* So large that no product of two sizes overflows. */
    if (call->rows < 0 || call->rows > most || call->vocab_size < 1 || call->vocab_size > most ||
        call->logits_stride > most || call->logits_stride < -most || call->seen_stride > most ||
        call->seen_stride < -most)
        return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0) return CLVP_FAST_OK;
    if (!call->logits || !call->seen || !call->done || !call->seed || !call->candidate || !call->step || !call->tokens)
        return CLVP_FAST_NULL_POINTER;
    if (clvp_fast_misaligned(call->logits, clvp_fast_element_size(call->dtype)) ||
        clvp_fast_misaligned(call->seen, 4) || clvp_fast_misaligned(call->temperature, 8) ||
        clvp_fast_misaligned(call->top_p, 8) || clvp_fast_misaligned(call->typical_p, 8) ||
        clvp_fast_misaligned(call->min_p, 8) || clvp_fast_misaligned(call->repetition_penalty, 8) ||
        clvp_fast_misaligned(call->top_k, 8) || clvp_fast_misaligned(call->seed, 8) ||
        clvp_fast_misaligned(call->candidate, 8) || clvp_fast_misaligned(call->step, 8) ||
        clvp_fast_misaligned(call->tokens, 8))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}

/* Returns CLVP_FAST_OK, or why a persistent decode step is refused. */
static inline int clvp_fast_check_persistent_decode(const struct clvp_fast_persistent_decode *call) {
    if (call == NULL) return CLVP_FAST_NULL_POINTER;
    if (call->dtype != CLVP_FAST_FLOAT16 && call->dtype != CLVP_FAST_BFLOAT16) return CLVP_FAST_BAD_DTYPE;
    const int64_t most = (int64_t)1 << 31;
    const int prefixes = call->prefix_table != NULL;
    if (call->num_candidates < 1 || call->num_candidates > 4 || call->num_layers < 1 || call->num_layers > 256 ||
        call->hidden_size < 64 || call->hidden_size > 2048 || call->hidden_size % 64 != 0 ||
        call->intermediate_size < 8 || call->intermediate_size > 8192 || call->intermediate_size % 8 != 0 ||
        call->vocab_size < 1 || call->vocab_size > 1 << 20 || call->num_positions < 1 || call->page_size < 1 ||
        call->page_size > 1024 || call->max_pages < 1 || call->max_pages > 1 << 12 || call->num_pages < 0 ||
        call->num_pages > most || call->num_prefixes < 0 || call->num_prefixes > most ||
        (prefixes && (call->max_prefix_pages < 1 || call->max_prefix_pages > 1 << 12)) ||
        call->page_strides[0] % 8 != 0 || call->page_strides[1] % 8 != 0 || call->page_strides[2] % 8 != 0)
        return CLVP_FAST_BAD_SIZE;
    if (!call->layers || !call->token_table || !call->position_table || !call->first_norm_weight ||
        !call->final_norm_weight || !call->head_weight || !call->tokens || !call->seq_lens || !call->block_table ||
        (prefixes && (!call->prefix_lens || !call->prefix_index)) || !call->hidden || !call->logits || !call->workspace)
        return CLVP_FAST_NULL_POINTER;
    if (clvp_fast_misaligned(call->layers, 8) || clvp_fast_misaligned(call->token_table, 2) ||
        clvp_fast_misaligned(call->position_table, 2) || clvp_fast_misaligned(call->head_weight, 16) ||
        clvp_fast_misaligned(call->first_norm_weight, 2) || clvp_fast_misaligned(call->first_norm_bias, 2) ||
        clvp_fast_misaligned(call->final_norm_weight, 2) || clvp_fast_misaligned(call->final_norm_bias, 2) ||
        clvp_fast_misaligned(call->head_bias, 2) || clvp_fast_misaligned(call->tokens, 8) ||
        clvp_fast_misaligned(call->seq_lens, 4) || clvp_fast_misaligned(call->block_table, 4) ||
        clvp_fast_misaligned(call->prefix_table, 4) || clvp_fast_misaligned(call->prefix_lens, 4) ||
        clvp_fast_misaligned(call->prefix_index, 4) || clvp_fast_misaligned(call->hidden, 2) ||
        clvp_fast_misaligned(call->logits, 2) || clvp_fast_misaligned(call->workspace, 16))
        return CLVP_FAST_MISALIGNED;
    return CLVP_FAST_OK;
}
