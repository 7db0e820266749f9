"""A whole call as an expert of torch would write it: conditioning, prefill, decoding, scoring.

Candidates have a static cache. On a GPU a step with its draw is captured, once for each stretch of `STRETCH` tokens, so
that attention reads no more of the cache than the stretch has; on a CPU steps run eagerly over just what is there.
Conditioning and scoring are transformers' modules. Stop tokens are not checked: all candidates have the full length.
"""

import torch
import torch.nn.functional as F

from benchmarks.kernels import captured
from benchmarks.rivals.torch_decoder import TorchLayers
from clvp_fast import SamplingParams

STRETCH = 128


class TorchGenerator:
    """Candidates of one prompt.

    Args:
        model: transformers' `ClvpModelForConditionalGeneration`.
        candidates, new_tokens: of each call.
        temperature, top_k, top_p, penalty: as transformers' processors apply them, one after the other.
        capture: replay steps as CUDA graphs.
    """

    def __init__(
        self,
        model,
        candidates: int,
        new_tokens: int,
        temperature: float = SamplingParams.temperature,
        top_k: int = SamplingParams.top_k,
        top_p: float = SamplingParams.top_p,
        penalty: float = SamplingParams.repetition_penalty,
        capture: bool = False,
    ):
        self.model, self.layers = model, TorchLayers(model.speech_decoder_model)
        self.candidates, self.new_tokens, self.capture = candidates, new_tokens, capture
        self.temperature, self.top_k, self.top_p, self.penalty = temperature, top_k, top_p, penalty
        self.config, device = model.config.decoder_config, model.device
        self.token = torch.zeros(candidates, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # of the token among the candidate's own
        self.logits = torch.zeros(candidates, self.config.vocab_size, dtype=model.dtype, device=device)
        self.seen = torch.zeros(candidates, self.config.vocab_size, dtype=torch.bool, device=device)
        self.codes = torch.zeros(candidates, new_tokens, dtype=torch.long, device=device)
        self._prompt_len, self._steps = None, {}

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, input_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Speech codes `[candidates, new_tokens]` and how well each says the text, `[candidates]`.

        Args:
            input_ids: `[1, text]`. input_features: `[1, 80, frames]`.
        """
        # The end token behind the text, which transformers' encoder wants from its caller.
        ended = F.pad(input_ids, (0, 1))
        prompt = self.model.conditioning_encoder(input_ids=ended, input_features=input_features)[0]
        self.prefill(prompt)
        for place in range(1, self.new_tokens):
            self.step(place)
        speech = self.model.fix_speech_decoder_output(F.pad(self.codes, (1, 0), value=self.config.bos_token_id))
        speech = self.model.speech_encoder_model(input_ids=speech).embeds
        text = self.model.text_encoder_model(input_ids=input_ids).embeds
        return self.codes, F.normalize(speech, dim=-1) @ F.normalize(text, dim=-1)[0]

    @torch.no_grad()
    def prefill(self, prompt: torch.Tensor) -> None:
        """Enter `prompt` `[tokens, hidden_size]`, which carries its positions, and the start token; draw the next."""
        if len(prompt) != self._prompt_len:
            self._allocate(len(prompt))
        start = torch.full((1,), self.config.bos_token_id, device=prompt.device)
        self.place.zero_()
        self.seen.zero_()
        self.seen[:, self.config.bos_token_id] = True
        own = self.layers.embedded(start, self.place)
        hidden = self.layers(torch.cat([prompt, own]), self._attend_prompt)
        self.logits.copy_(self.layers.logits(hidden[-1:]).expand(self.candidates, -1))
        self._draw()

    def step(self, place: int) -> None:
        """Enter `self.token`, each candidate's `place`-th, leave the logits behind in `self.logits`, draw the next."""
        self.place.fill_(place)
        length = self._prompt_len + place + 1
        if not self.capture:
            self._advance(length)
            return
        limit = min(-(-length // STRETCH) * STRETCH, self.keys.shape[3])
        if limit not in self._steps:
            self._steps[limit] = self._captured(limit)
        self._steps[limit]()

    def _captured(self, limit: int):
        state = self.token, self.seen  # what a step, which is run to be captured, reads and changes
        before = [x.clone() for x in state]
        replay = captured(lambda: self._advance(limit))
        for x, kept in zip(state, before, strict=True):
            x.copy_(kept)
        if replay is None:
            raise RuntimeError("a decode step of torch's operators could not be captured")
        return replay

    def _allocate(self, prompt_len: int) -> None:
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        shape = (layers, self.candidates, heads, prompt_len + self.new_tokens, self.config.hidden_size // heads)
        self.keys, self.values = torch.zeros(2, *shape, dtype=self.logits.dtype, device=self.logits.device)
        self._prompt_len, self._steps = prompt_len, {}

    def _attend_prompt(self, index, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [num_heads, tokens, head_dim]
        self.keys[index, :, :, : k.shape[1]], self.values[index, :, :, : v.shape[1]] = k, v
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1)

    @torch.no_grad()
    def _advance(self, limit: int) -> None:
        """Run a step over the cache's first `limit` tokens."""
        entered = self.place + self._prompt_len
        mask = (torch.arange(limit, device=entered.device) <= entered)[None, None, None] if self.capture else None

        def attend(index, q, k, v):
            keys, values = self.keys[index, :, :, :limit], self.values[index, :, :, :limit]
            keys.index_copy_(2, entered, k[:, :, None])
            values.index_copy_(2, entered, v[:, :, None])
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)

        # The start token has position 0, and the second of a candidate's own has 2, as in transformers.
        hidden = self.layers(self.layers.embedded(self.token, self.place + 1), attend)
        self.logits.copy_(self.layers.logits(hidden))
        self._draw()

    def _draw(self) -> None:
        """Draw the next token from `self.logits` without the host."""
        logits = self.logits.float()
        logits = torch.where(self.seen, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)
        scores, order = (logits / self.temperature).topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        chances = scores.softmax(-1)
        chances = chances.masked_fill(chances.cumsum(-1) - chances > self.top_p, 0)
        # The largest of probabilities divided by exponential random numbers falls on each with its probability.
        drawn = (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)
        token = order.gather(1, drawn)
        self.codes.index_copy_(1, self.place, token)
        self.seen.scatter_(1, token, True)
        self.token.copy_(token[:, 0])
