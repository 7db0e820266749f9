"""Drawing in plain torch: random numbers, the reference that states the mathematics, and torch's implementation."""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple:
    """Compute Philox-4x32-10: four 32-bit words from a counter of four and a key of two, as ints or int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A tensor's product wraps at 64 bits, and `>>` copies its sign: the mask leaves the high word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _halves(x):
    return x & _LOW, (x >> 32) & _LOW


def _uniform(seed, candidate, step):
    """Return one number in (0, 1) from 32 random bits."""
    return (philox((*_halves(step), *_halves(candidate)), _halves(seed))[0] + 0.5) * 2.0**-32


def _seen_tokens(seen, vocab_size):
    """Expand the bitmap `[N, words]` to bool `[N, vocab_size]`."""
    bits = (seen[:, :, None] >> torch.arange(32, dtype=torch.int32, device=seen.device)) & 1
    return bits.flatten(1)[:, :vocab_size].bool()


def advance(
    tokens, seen, lengths, done, stop_token, pad_token, stop=None, limit=None, token=None, seq_lens=None
):  # fmt: skip
    """Enter the tokens of unfinished candidates into their state; finished ones get `pad_token`.

    With `seq_lens` they are slots, whose state `kernels/sampling.py` explains.
    """
    if seq_lens is not None:
        torch.lt(seq_lens, 0, out=done)
    tokens = torch.where(done, pad_token, tokens)
    word = torch.where(done, 0, tokens)[:, None] // 32
    before = seen.gather(1, word)
    bit = torch.ones_like(before) << (tokens[:, None] % 32).to(seen.dtype)
    seen.scatter_(1, word, torch.where(done[:, None], before, before | bit))
    lengths += ~done
    done |= tokens == (stop_token if stop is None else stop)
    if seq_lens is not None:
        done |= lengths >= limit
        torch.clamp(tokens, min=0, out=token)
        # The start token is stored and the last drawn one is not yet.
        seq_lens.copy_(lengths).masked_fill_(done, -1)
    return tokens


def row_scores(scores, temperature, top_k, top_p, typical_p, min_p):
    """Apply transformers' warpers in their order to one row; forbidden tokens get -inf."""
    scores = scores / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(stable=True)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[-1] = False
        scores = scores.index_fill(0, order[removed], -torch.inf)
    if min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)
    if typical_p < 1:
        log_p = scores.log_softmax(-1)
        surprise = (-log_p + (log_p * log_p.exp()).nansum()).abs()
        ascending, order = surprise.sort(stable=True)
        last = int((scores[order].softmax(-1).cumsum(-1) < typical_p).sum().clamp(max=len(scores) - 1))
        removed = ascending > ascending[last]
        scores = scores.index_fill(0, order[removed], -torch.inf)
    return scores


def reference(
    logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed, candidate, step,
    stop_token, pad_token, do_sample, sampled, *slots,
):  # fmt: skip
    """Draw for one candidate after another."""
    tokens = torch.zeros_like(lengths, dtype=torch.int64)
    known = _seen_tokens(seen, logits.shape[1])
    for n, row in enumerate(logits.to(torch.promote_types(logits.dtype, torch.float32))):
        if repetition_penalty is not None:
            penalty = repetition_penalty[n].item()
            row = torch.where(known[n], torch.where(row < 0, row * penalty, row / penalty), row)
        if not (do_sample if sampled is None else sampled[n]):
            tokens[n] = row.argmax()
            continue
        neutral = ((temperature, 1.0), (top_k, 0), (top_p, 1.0), (typical_p, 1.0), (min_p, 0.0))
        scores = row_scores(row, *(default if x is None else x[n].item() for x, default in neutral))
        cumulated = scores.double().softmax(-1).cumsum(0)
        target = _uniform(seed[n].item(), candidate[n].item(), step[n].item()) * cumulated[-1]
        tokens[n] = (cumulated > target).nonzero()[0, 0]
    return advance(tokens, seen, lengths, done, stop_token, pad_token, *slots)


def _filter_sorted(scores, top_k, top_p):
    """Apply top-k and top-p with one sort of `[N, V]`."""
    ascending, order = scores.sort(stable=True)
    if top_k is not None:
        size = scores.shape[1]
        place = size - torch.where(top_k > 0, top_k, size).clamp(max=size)
        ascending = ascending.masked_fill(ascending < ascending.gather(1, place[:, None]), -torch.inf)
    if top_p is not None:
        tail = (1 - top_p.double()).to(scores.dtype)[:, None]
        removed = (ascending.softmax(-1).cumsum(-1) <= tail) & (top_p < 1)[:, None]
        removed[:, -1] = False
        ascending = ascending.masked_fill(removed, -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ascending)


def _filter_typical(scores, mass):
    log_p = scores.log_softmax(-1)
    surprise = (-log_p + (log_p * log_p.exp()).nansum(-1, keepdim=True)).abs()
    ascending, order = surprise.sort(stable=True)
    cumulated = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (cumulated < mass.to(scores.dtype)[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    removed = (ascending > ascending.gather(1, last)) & (mass < 1)[:, None]
    return scores.masked_fill(torch.empty_like(removed).scatter_(1, order, removed), -torch.inf)


def _penalized(scores, seen, repetition_penalty):
    penalty = repetition_penalty.to(scores.dtype)[:, None]
    punished = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_seen_tokens(seen, scores.shape[1]), punished, scores)


def keep_typical(logits, seen, repetition_penalty, mass):
    """Set `logits` `[N, V]` in place to -inf for tokens that typical sampling of `mass` `[N]` drops (1: none).

    It applies after the repetition penalty and before everything else that `sample` does, as Tortoise's
    `typical_sampling`. It has no kernel, and is not part of the operator.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = _filter_typical(_penalized(scores, seen, repetition_penalty), mass)
    logits.masked_fill_(kept == -torch.inf, -torch.inf)


def sample_torch(
    logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed, candidate, step,
    stop_token, pad_token, do_sample, sampled, *slots,
):  # fmt: skip
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if repetition_penalty is not None:
        scores = _penalized(scores, seen, repetition_penalty)
    likeliest = None if do_sample and sampled is None else scores.argmax(-1)
    if not do_sample:
        return advance(likeliest, seen, lengths, done, stop_token, pad_token, *slots)
    if temperature is not None:
        scores = scores / temperature.to(scores.dtype)[:, None]
    if top_k is not None or top_p is not None:
        scores = _filter_sorted(scores, top_k, top_p)
    if min_p is not None:
        probabilities = scores.softmax(-1)
        least = min_p.to(scores.dtype)[:, None] * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    if typical_p is not None:
        scores = _filter_typical(scores, typical_p)
    # float64, because in float32 a sum of 8194 terms would move the bounds of rare tokens.
    cumulated = scores.double().softmax(-1).cumsum(-1)
    target = _uniform(seed, candidate, step)[:, None] * cumulated[:, -1:]
    tokens = (cumulated <= target).sum(-1)
    if sampled is not None and likeliest is not None:
        tokens = torch.where(sampled, tokens, likeliest)
    return advance(tokens, seen, lengths, done, stop_token, pad_token, *slots)
