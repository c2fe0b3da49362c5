"""The embedded rollout engine: a transformers model whose parameters are the shared tensors themselves."""

from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..kernels.fp4 import FP4Tensor
from ..kernels.fp4_linear import fp4_linear
from ..kernels.frozen import QuantizedTensor
from ..kernels.head_logits import head_logits
from ..kernels.nf4_linear import nf4_linear
from ..weightshare.linear import SharedLinear
from ..weightshare.weights import EMBEDDING, HEAD, SharedWeights
from .admission import check_requests
from .engine import RolloutRequest
from .kv_cache import GROUPED_SDPA
from .lifecycle import Lifecycle
from .trajectory import Trajectory
from .wave import Wave, join_similar


class _Fp32Head(nn.Module):
    """A head whose logits are not rounded to the dtype of its weight (vocab, hidden_size)."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return head_logits(hidden.flatten(0, -2), self.weight).unflatten(0, hidden.shape[:-1])


class _QuantizedProjection(nn.Module):
    """In place of a linear whose weight is quantised: `rows` of a shared matrix, and their bias. It owns nothing."""

    def __init__(self, rows: QuantizedTensor, bias: Tensor | None):
        super().__init__()
        self.rows, self.bias = rows, bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rows, FP4Tensor):
            return fp4_linear(x, *self.rows.tensors(), self.bias)
        return nf4_linear(x, *self.rows.tensors(), self.bias)


def _replace_projections(model: PreTrainedModel, linear: SharedLinear, weight: QuantizedTensor) -> None:
    """Put a `_QuantizedProjection` where the model has a linear for each part of a quantised one."""
    places = dict(model.named_parameters())
    for part in linear.parts:
        name, rows = linear.part_name(part), weight.rows(part.start, part.stop)
        place = places.get(f"{name}.weight")
        expected = None if place is None else tuple(place.shape)
        if expected != rows.shape:
            raise ValueError(
                f"the shared weights are not those of a {model.config.model_type} model with this config: {name} is "
                f"{rows.shape}, the config says {expected}; load both from the same checkpoint"
            )
        model.set_submodule(name, _QuantizedProjection(rows, None if linear.bias is None else linear.bias[part.rows]))


def shared_model(weights: SharedWeights, config: PretrainedConfig, fp32_head: bool = True) -> PreTrainedModel:
    """transformers' causal LM of `config`, in eval mode, with views of `weights` for parameters: no second copy.

    Args:
        fp32_head: logits in fp32 whatever the dtype.

    Raises ValueError where the weights are not those of the config.
    """
    config = deepcopy(config)  # from_config writes into it
    config.quantization_config = None  # the weights are as they are held, whatever the checkpoint's were
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=weights.dtype, attn_implementation=GROUPED_SDPA)
    parameters = dict(weights.tensors) | {HEAD: weights.head}
    for name in (EMBEDDING, HEAD):
        # Rows beyond the vocabulary are padding for the kernels' sake: an id from there must never be sampled.
        parameters[name] = parameters[name][: config.vocab_size]
    for linear in weights.linears.values():
        if isinstance(linear.weight.operand, Tensor):
            parameters |= linear.dense_parameters()
        else:
            _replace_projections(model, linear, linear.weight.operand)
    try:
        model.load_state_dict(parameters, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the shared weights are not those of a {config.model_type} model with this config; "
            f"load both from the same checkpoint: {error}"
        ) from error
    if fp32_head:
        model.set_output_embeddings(_Fp32Head(model.get_output_embeddings().weight))
    model.requires_grad_(False)
    return model.to(weights.device).eval()  # moves the buffers; the parameters are there already


def _lora_hook(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook adding (x A^T) B^T to a linear's output; a (r, in) and b (out, r) are the slot's own memory."""

    def add_update(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down = F.linear(inputs[0].reshape(-1, a.shape[1]), a)
        output.view(-1, b.shape[0]).addmm_(down, b.T)
        return output

    return add_update


def check_limits(**limits: object) -> None:
    """Raise ValueError, by its name, for one of TransformersEngine's limits that is no whole number of at least 1."""
    for name, limit in limits.items():
        if type(limit) is not int or limit < 1:
            raise ValueError(f"TransformersEngine: {name} must be a whole number of at least 1, got {limit!r}")


class TransformersEngine(Lifecycle):
    """`RolloutEngine` on a transformers model, on whatever device the weights are on.

    Waiting requests are admitted in *waves* (see `wave.Wave`), which join those that run where they are of similar
    length: a step is then one forward. No keys and values outlive their request, so a prompt that goes on where another
    has ended, such as an agent's next turn, is computed from its beginning.

    Args:
        weights: the shared base; an adapter bound to it is applied, read from its slots at every token.
        config: the checkpoint's transformers config.
        max_context: prompt + completion tokens of one sequence; the model's number of positions where None.
        max_sequences: sequences that run at once; the others wait.
        prefill_tokens: most prompt tokens of one forward, padding counted: bounds the prefill's memory.
        fp32_head: logits in fp32 whatever the dtype (kernels.head_logits), for the smallest gap to the trainer.

    Raises:
        ValueError: weights that do not fit the config, or limits that are not whole numbers of at least 1.
    """

    def __init__(
        self,
        weights: SharedWeights,
        config: PretrainedConfig,
        max_context: int | None = None,
        max_sequences: int = 256,
        prefill_tokens: int = 8192,
        fp32_head: bool = True,
    ):
        self.max_context = config.max_position_embeddings if max_context is None else max_context
        check_limits(max_context=self.max_context, max_sequences=max_sequences, prefill_tokens=prefill_tokens)
        self.model = shared_model(weights, config, fp32_head)
        self._weights = weights
        self._max_sequences, self._prefill_tokens = max_sequences, prefill_tokens
        self._waiting: deque[RolloutRequest] = deque()
        self._waves: list[Wave] = []
        self._in_flight: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        self._bind_adapter()

    def _bind_adapter(self) -> None:
        """Hook every linear that has a slot. Slots are written in place, so hooks stay true until a new adapter."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        for linear in self._weights.linears.values():
            for part in linear.parts:
                slot = linear.slot_of(part)
                if slot is not None:
                    module = self.model.get_submodule(linear.part_name(part))
                    self._hooks.append(module.register_forward_hook(_lora_hook(*slot)))

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests, all of them or, where one is refused, none.

        Raises:
            ValueError: see `admission.check_requests`.
            RuntimeError: asleep or closed.
        """
        self._require_awake("submit")
        check_requests(requests, self._in_flight, self.max_context, self.model.config.vocab_size)
        self._in_flight |= {request.request_id for request in requests}
        self._waiting.extend(requests)

    def step(self) -> list[Trajectory]:
        """Admit waiting requests, sample one token for every running sequence, return what has finished.

        Raises:
            FloatingPointError: logits that are not finite; the engine cannot go on.
            RuntimeError: asleep or closed.
        """
        self._require_awake("step")
        finished: list[Trajectory] = []
        with torch.inference_mode():
            self._admit()
            for wave in self._waves:
                finished += wave.advance()
            self._waves = join_similar([wave for wave in self._waves if wave.running])
        self._in_flight.difference_update(trajectory.request_id for trajectory in finished)
        return finished

    def _admit(self) -> None:
        free = self._max_sequences - sum(wave.running for wave in self._waves)
        # A wave's prefill is a forward, so places are given out together rather than one by one as they fall free.
        worthwhile = min(len(self._waiting), max(1, self._max_sequences // 4))
        if self._waiting and free >= worthwhile:
            admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._waves.append(Wave(admitted, self.model, self._prefill_tokens))

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._in_flight)

    def abort(self) -> None:
        """Drop every unfinished request and its caches."""
        self._waiting.clear()
        self._waves.clear()
        self._in_flight.clear()

    def adapter_changed(self) -> None:
        """The slots were written, or another adapter was bound. Nothing computed with the old ones is kept.

        Raises RuntimeError while requests are unfinished: their caches come from the old adapter.
        """
        self._require_idle("adapter_changed")
        self._bind_adapter()

    def sleep(self) -> None:
        """Refuse work until `wake`; caches live only while requests run, so there is nothing else to give back.

        Raises RuntimeError while requests are unfinished.
        """
        self._require_idle("sleep")
        self._state = "asleep"

    def wake(self) -> None:
        """Take requests again. Raises RuntimeError where closed."""
        if self._state == "closed":
            raise RuntimeError("wake: the engine is closed; make a new one")
        self._state = "awake"

    def close(self) -> None:
        """Drop every request and cache; the shared weights live on."""
        self._state = "closed"
        self.abort()
