"""A wave: requests admitted together, decoded in lockstep as one batch that shrinks as they finish."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .engine import RolloutRequest
from .kv_cache import new_cache
from .trajectory import FinishReason, Segment, Trajectory

NO_TOKEN = -1  # fills the table of stop tokens; no sampled id equals it


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


@dataclass
class _Rows:
    """What decoding needs of every running row, on the model's device; (rows, ...) each."""

    index: Tensor  # column in the wave's tables
    temperature: Tensor
    greedy: Tensor
    stops: Tensor  # (rows, most stop tokens of a row), filled up with NO_TOKEN
    prompt_length: Tensor
    attended: Tensor | None  # (rows, longest prompt + most tokens) bool, False on left padding; None without padding

    def select(self, keep: Tensor) -> "_Rows":
        attended = None if self.attended is None else self.attended[keep]
        if attended is not None and bool(attended[:, 0].all()):
            attended = None  # the padded rows are gone, and attention without a mask is faster
        return _Rows(
            self.index[keep],
            self.temperature[keep],
            self.greedy[keep],
            self.stops[keep],
            self.prompt_length[keep],
            attended,
        )


class Wave:
    """Requests that are prefilled together (each distinct prompt once) and then decoded a token at a time.

    Args:
        requests: at least one.
        model: a causal LM of transformers, in eval mode.
        prefill_tokens: most tokens of one forward of the prefill, which is cut along the sequence where there are more.
    """

    def __init__(self, requests: Sequence[RolloutRequest], model: PreTrainedModel, prefill_tokens: int):
        self._live = list(requests)
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._cache = new_cache(model.config)
        device = model.device
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}
        self._prompts = list(numbers)
        self._prompt_of_row = torch.tensor([numbers[r.prompt_ids] for r in requests], device=device)
        self._longest_prompt = max(len(prompt) for prompt in self._prompts)

        most_tokens = max(r.sampling.max_tokens for r in requests)
        table = np.zeros((most_tokens, len(requests)))
        for column, request in enumerate(requests):
            table[: request.sampling.max_tokens, column] = uniforms(request.seed, request.sampling.max_tokens)
        self._uniform = torch.from_numpy(table).to(device)  # tables: (most tokens, requests)
        self._tokens = torch.zeros(table.shape, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(table.shape, dtype=torch.float32, device=device)
        self._count = 0  # tokens sampled so far, the same in every running row
        self._last = torch.empty(0)  # (rows,) the tokens sampled last
        self._rows = self._make_rows(most_tokens, device)

    def _make_rows(self, most_tokens: int, device: torch.device) -> _Rows:
        temperatures = torch.tensor([r.sampling.temperature for r in self._live], dtype=torch.float32)
        greedy = temperatures == 0
        most_stops = max(len(r.sampling.stop_token_ids) for r in self._live)
        stops = torch.full((len(self._live), most_stops), NO_TOKEN)
        for row, request in enumerate(self._live):
            stops[row, : len(request.sampling.stop_token_ids)] = torch.tensor(request.sampling.stop_token_ids)
        lengths = torch.tensor([len(r.prompt_ids) for r in self._live])
        columns = torch.arange(self._longest_prompt + most_tokens)
        attended = columns[None] >= (self._longest_prompt - lengths)[:, None]
        return _Rows(
            torch.arange(len(self._live), device=device),
            torch.where(greedy, 1.0, temperatures).to(device),
            greedy.to(device),
            stops.to(device),
            lengths.to(device),
            None if bool(attended.all()) else attended.to(device),
        )

    @property
    def running(self) -> int:
        """Requests that have not finished."""
        return len(self._live)

    def advance(self) -> list[Trajectory]:
        """Sample one more token for every running row and return those that finished with it.

        Raises:
            FloatingPointError: logits that are not finite, naming the request.
        """
        logits = self._prefill() if self._count == 0 else self._decode()
        rows = self._rows
        uniform = self._uniform[self._count][rows.index]
        self._last, logprobs = sample(logits, rows.temperature, rows.greedy, uniform)
        self._tokens[self._count, rows.index] = self._last
        self._logprobs[self._count, rows.index] = logprobs
        stopped = (self._last[:, None] == rows.stops).any(dim=-1)
        finite = logits.isfinite().all(dim=-1)
        stop_flags, finite_flags = torch.stack((stopped, finite)).tolist()  # waits for the device
        self._check_finite(finite_flags)
        self._count += 1
        return self._retire(stop_flags)

    def _prefill(self) -> Tensor:
        """Fill the cache from the prompts; logits (rows, vocab) of each row's first token."""
        device, longest, count = self._model.device, self._longest_prompt, len(self._prompts)
        ids = torch.zeros((count, longest), dtype=torch.int64)
        attended = torch.zeros((count, longest), dtype=torch.bool)
        for number, prompt in enumerate(self._prompts):
            ids[number, longest - len(prompt) :] = torch.tensor(prompt)
            attended[number, longest - len(prompt) :] = True
        positions = (attended.cumsum(dim=-1) - 1).clamp(min=0).to(device)
        mask = None if bool(attended.all()) else attended.to(device)
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
        rows = self._rows
        seen = None if rows.attended is None else rows.attended[:, : self._longest_prompt + self._count]
        positions = rows.prompt_length + (self._count - 1)
        return self._forward(self._last[:, None], seen, positions[:, None])

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

    def _check_finite(self, finite: list[bool]) -> None:
        for request, good in zip(self._live, finite, strict=True):
            if not good:
                raise FloatingPointError(
                    f"request {request.request_id!r}: the model's logits are not finite after "
                    f"{len(request.prompt_ids)} prompt and {self._count} completion tokens; check the adapter and the "
                    f"base weights for NaN or infinity, or an overflow of {self._model.dtype}"
                )

    def _retire(self, stopped: list[bool]) -> list[Trajectory]:
        """Take the finished rows out of the batch and out of the cache."""
        done: dict[int, FinishReason] = {}
        for row, (request, stop) in enumerate(zip(self._live, stopped, strict=True)):
            if stop or self._count == request.sampling.max_tokens:
                done[row] = "stop" if stop else "length"
        if not done:
            return []
        columns = self._rows.index[torch.tensor(list(done), device=self._model.device)]
        tokens = self._tokens[: self._count, columns].T.tolist()
        logprobs = self._logprobs[: self._count, columns].T.tolist()
        finished = []
        for (row, reason), row_tokens, row_logprobs in zip(done.items(), tokens, logprobs, strict=True):
            request = self._live[row]
            segment = Segment(row_tokens, "model", row_logprobs)
            finished.append(
                Trajectory(request.request_id, list(request.prompt_ids), [segment], reason, request.seed),
            )
        kept = [row for row in range(len(self._live)) if row not in done]
        self._live = [self._live[row] for row in kept]
        if kept:
            keep = torch.tensor(kept, device=self._model.device)
            self._rows, self._last = self._rows.select(keep), self._last[keep]
            self._cache.batch_select_indices(keep)
        return finished
