"""A wave: requests that are decoded as one batch, which shrinks as they finish and takes in those of other waves."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .engine import RolloutRequest
from .kv_cache import crop_left, join_caches, new_cache
from .trajectory import FinishReason, Segment, Trajectory

NO_TOKEN = -1  # fills the table of stop tokens; no sampled id equals it
SIMILAR, CLOSE = 2, 256  # waves are joined where the longer is at most so many times, or tokens, longer


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, from the counter-based Philox generator keyed by `seed` alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def sample(logits: Tensor, temperature: Tensor, greedy: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, by inverse CDF in float64.

    Args:
        logits: (rows, vocab), any float dtype.
        temperature: (rows,) fp32, positive.
        greedy: (rows,) bool: take the most likely token instead.
        uniform: (rows,) float64 in [0, 1).

    Returns:
        token ids (rows,) and their log-probs (rows,) in fp32, those of log_softmax(logits / temperature). Rows with
        logits that are not finite give some valid id.
    """
    logprobs = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
    cdf = logprobs.double().exp().cumsum(dim=-1)
    total = cdf[:, -1:]
    # The product may round up to the total, which no entry exceeds; just below it lies a token of positive probability.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy[:, None], logprobs.argmax(dim=-1, keepdim=True), tokens)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


@dataclass(eq=False)
class _Row:
    """A request that runs: what was sampled, and the random numbers for what is to come."""

    request: RolloutRequest
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Tensors:
    """What decoding needs of every running row, on the model's device; (rows, ...) each."""

    temperature: Tensor
    greedy: Tensor
    stops: Tensor  # (rows, most stop tokens of a row), filled up with NO_TOKEN
    position: Tensor  # of the token that is sampled next
    padding: Tensor  # columns of the cache before the row's first token
    last: Tensor  # the token sampled last

    def select(self, keep: Tensor) -> "_Tensors":
        return _Tensors(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    def joined(self, other: "_Tensors") -> "_Tensors":
        """The rows of both."""
        most = max(self.stops.shape[1], other.stops.shape[1])
        filled = [
            torch.nn.functional.pad(part.stops, (0, most - part.stops.shape[1]), value=NO_TOKEN)
            for part in (self, other)
        ]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return _Tensors(**{name: torch.cat(pair) for name, pair in (pairs | {"stops": tuple(filled)}).items()})


class Wave:
    """Requests that are prefilled together (each distinct prompt once) and then decoded a token at a time.

    Args:
        requests: at least one.
        model: a causal LM of transformers, in eval mode.
        prefill_tokens: most tokens of one forward of the prefill, which is cut along the sequence where there are more.

    Attributes:
        width: columns of the cache: the tokens, and padding on the left, that every running row has.
    """

    def __init__(self, requests: Sequence[RolloutRequest], model: PreTrainedModel, prefill_tokens: int):
        self._live = [_Row(request, uniforms(request.seed, request.sampling.max_tokens)) for request in requests]
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._cache = new_cache(model.config)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}
        self._prompts = list(numbers)
        self._prompt_of_row = torch.tensor([numbers[r.prompt_ids] for r in requests], device=model.device)
        self.width = max(len(prompt) for prompt in self._prompts)
        self._padded = any(len(prompt) < self.width for prompt in self._prompts)
        self._tensors = self._make_tensors(requests)

    def _make_tensors(self, requests: Sequence[RolloutRequest]) -> _Tensors:
        temperature = torch.tensor([r.sampling.temperature for r in requests], dtype=torch.float32)
        greedy = temperature == 0
        stops = torch.full((len(requests), max(len(r.sampling.stop_token_ids) for r in requests)), NO_TOKEN)
        for row, request in enumerate(requests):
            stops[row, : len(request.sampling.stop_token_ids)] = torch.tensor(request.sampling.stop_token_ids)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests])
        last = torch.zeros_like(lengths)
        tensors = (torch.where(greedy, 1.0, temperature), greedy, stops, lengths, self.width - lengths, last)
        return _Tensors(*(tensor.to(self._model.device) for tensor in tensors))

    @property
    def running(self) -> int:
        """Requests that have not finished."""
        return len(self._live)

    def advance(self) -> list[Trajectory]:
        """Sample one more token for every running row and return those that finished with it.

        Raises:
            FloatingPointError: logits that are not finite, naming the request.
        """
        logits = self._decode() if self._live[0].tokens else self._prefill()
        rows = self._tensors
        uniform = torch.tensor([row.uniforms[len(row.tokens)] for row in self._live], dtype=torch.float64)
        rows.last, logprobs = sample(logits, rows.temperature, rows.greedy, uniform.to(logits.device))
        stopped = (rows.last[:, None] == rows.stops).any(dim=-1)
        finite = logits.isfinite().all(dim=-1)
        # The only time that a step waits for the device; a double holds all of them exactly.
        results = torch.stack([tensor.double() for tensor in (rows.last, logprobs, stopped, finite)]).tolist()
        self._check_finite(results[3])
        for row, token, logprob in zip(self._live, results[0], results[1], strict=True):
            row.tokens.append(int(token))
            row.logprobs.append(logprob)
        return self._retire(results[2])

    def similar(self, other: "Wave") -> bool:
        """Whether one batch of both would have little more padding than the two have."""
        short, long = sorted((self.width, other.width))
        return long <= max(SIMILAR * short, short + CLOSE)

    def join(self, other: "Wave") -> None:
        """Take in the rows of another wave, both having been advanced. What rows sample does not change by it."""
        width = max(self.width, other.width)
        join_caches(self._cache, other._cache)
        for wave in (self, other):
            wave._tensors.padding += width - wave.width
        self._padded |= other._padded or self.width != other.width
        self.width = width
        self._live += other._live
        self._tensors = self._tensors.joined(other._tensors)

    def _prefill(self) -> Tensor:
        """Fill the cache from the prompts; logits (rows, vocab) of each row's first token."""
        device, longest, count = self._model.device, self.width, len(self._prompts)
        ids = torch.zeros((count, longest), dtype=torch.int64)
        attended = torch.zeros((count, longest), dtype=torch.bool)
        for number, prompt in enumerate(self._prompts):
            ids[number, longest - len(prompt) :] = torch.tensor(prompt)
            attended[number, longest - len(prompt) :] = True
        positions = (attended.cumsum(dim=-1) - 1).clamp(min=0).to(device)
        mask = attended.to(device) if self._padded else None
        ids = ids.to(device)
        width = max(1, self._prefill_tokens // count)
        for start in range(0, longest, width):
            stop = min(start + width, longest)
            seen = None if mask is None else mask[:, :stop]
            logits = self._forward(ids[:, start:stop], seen, positions[:, start:stop])
        if count == len(self._live):
            return logits  # every prompt is asked for once, in this order
        self._cache.batch_select_indices(self._prompt_of_row)
        return logits[self._prompt_of_row]

    def _decode(self) -> Tensor:
        """Logits (rows, vocab) after the tokens sampled last."""
        rows = self._tensors
        self.width += 1
        seen = None
        if self._padded:
            seen = torch.arange(self.width, device=rows.padding.device) >= rows.padding[:, None]
        logits = self._forward(rows.last[:, None], seen, rows.position[:, None])
        rows.position += 1
        return logits

    def _forward(self, ids: Tensor, attended: Tensor | None, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _check_finite(self, finite: list[float]) -> None:
        for row, good in zip(self._live, finite, strict=True):
            if not good:
                raise FloatingPointError(
                    f"request {row.request.request_id!r}: the model's logits are not finite after "
                    f"{len(row.request.prompt_ids)} prompt and {len(row.tokens)} completion tokens; check the adapter "
                    f"and the base weights for NaN or infinity, or an overflow of {self._model.dtype}"
                )

    def _retire(self, stopped: list[float]) -> list[Trajectory]:
        """Take the finished rows out of the batch and out of the cache."""
        finished, kept = [], []
        for number, (row, stop) in enumerate(zip(self._live, stopped, strict=True)):
            request = row.request
            if not stop and len(row.tokens) < request.sampling.max_tokens:
                kept.append(number)
                continue
            reason: FinishReason = "stop" if stop else "length"
            segment = Segment(row.tokens, "model", row.logprobs)
            finished.append(
                Trajectory(request.request_id, list(request.prompt_ids), [segment], reason, request.seed),
            )
        if finished:
            self._keep(kept)
        return finished

    def _keep(self, kept: list[int]) -> None:
        self._live = [self._live[number] for number in kept]
        if not kept:
            return
        keep = torch.tensor(kept, device=self._model.device)
        self._tensors = self._tensors.select(keep)
        self._cache.batch_select_indices(keep)
        if self._padded:
            least, most = torch.stack(self._tensors.padding.aminmax()).tolist()
            if least:  # the longest rows have left
                crop_left(self._cache, least)
                self._tensors.padding -= least
                self.width -= least
            self._padded = most > least  # attention without a mask is faster


def join_similar(waves: Sequence[Wave]) -> list[Wave]:
    """The waves, those of similar widths joined: every wave costs a forward a step."""
    joined: list[Wave] = []
    for wave in sorted(waves, key=lambda wave: -wave.width):
        if joined and joined[-1].similar(wave):
            joined[-1].join(wave)
        else:
            joined.append(wave)
    return joined
