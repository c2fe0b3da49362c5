"""The parity guard: the engine's log-probs against the trainer's on the same tokens, and the storage they share.

Both read the same tensors, so what they compute may differ by rounding only. A larger gap means that one of them does
not see the policy that the other does, and then every gradient is wrong while nothing else looks wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import EMBEDDING, HEAD, SharedWeights

# Mean |gap| in nats, over what rounding gives on the same tensors: about 1e-6 in fp32; in 16 bits every layer rounds
# and kernels sum in other orders, which for bf16 (8 significant bits) is 0.005 to 0.02 and for fp16 (11 bits) less.
# A forgotten adapter update or a stale prefix cache moves it by 0.1 and more once an adapter has learnt anything.
DEFAULT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}

SLOT_A, SLOT_B = "lora_slot_a", "lora_slot_b"


class ParityError(RuntimeError):
    """Engine and trainer do not compute the same policy."""


@dataclass(frozen=True)
class ParityReport:
    """How far the engine's log-probs are from the trainer's over `tokens` sampled tokens.

    Attributes:
        mean_abs, max_abs: of the difference, in nats.
        ratio_mean: of p_trainer / p_engine; 1 where they agree.
        k3: the estimate of KL(engine || trainer), mean of ratio - 1 - log ratio (Schulman 2020, "Approximating KL
            Divergence"); never negative.
    """

    mean_abs: float
    max_abs: float
    ratio_mean: float
    k3: float
    tokens: int

    def metrics(self, prefix: str = "parity/") -> dict[str, float]:
        """For the log."""
        return {
            f"{prefix}mean_abs": self.mean_abs,
            f"{prefix}max_abs": self.max_abs,
            f"{prefix}ratio_mean": self.ratio_mean,
            f"{prefix}k3": self.k3,
        }


class ParityGuard:
    """Stops a run whose engine and trainer have come apart.

    Args:
        limit: on the mean absolute gap, in nats, above 0; by default 1e-3 for fp32, 0.05 for bf16, 0.02 for fp16.
        dtype: the compute dtype.

    Raises:
        ValueError: a limit that is not above 0.
    """

    def __init__(self, limit: float | None, dtype: torch.dtype):
        if limit is not None and not limit > 0:
            raise ValueError(f"the limit on the log-prob gap must be above 0 (inf: never stop), got {limit}")
        self.limit = DEFAULT_LIMITS[dtype] if limit is None else limit

    def observe(self, step: int, engine_logprobs: Tensor, trainer_logprobs: Tensor) -> ParityReport:
        """Compare the log-probs of one step's sampled tokens, both (tokens,).

        Raises:
            ParityError: values that are not finite, or a mean gap over the limit.
            ValueError: tensors of different lengths.
        """
        if engine_logprobs.shape != trainer_logprobs.shape or engine_logprobs.ndim != 1:
            raise ValueError(
                f"log-probs of shapes {tuple(engine_logprobs.shape)} (engine) and {tuple(trainer_logprobs.shape)} "
                "(trainer) are not of the same tokens"
            )
        count = engine_logprobs.numel()
        if not count:
            return ParityReport(0.0, 0.0, 1.0, 0.0, 0)
        trainer = trainer_logprobs.detach().double()
        engine = engine_logprobs.detach().to(trainer)
        self._require_finite(step, "engine", engine)
        self._require_finite(step, "trainer", trainer)
        gap = trainer - engine
        ratio = gap.exp()
        figures = torch.stack([gap.abs().mean(), gap.abs().max(), ratio.mean(), (ratio - 1 - gap).mean()]).tolist()
        report = ParityReport(figures[0], figures[1], figures[2], figures[3], count)
        if not report.mean_abs <= self.limit:
            raise ParityError(self._explanation(step, report))
        return report

    def _require_finite(self, step: int, side: str, values: Tensor) -> None:
        bad = (~torch.isfinite(values)).nonzero()[:, 0]
        if len(bad):
            raise ParityError(
                f"step {step}: {len(bad)} of the {len(values)} log-probs of the {side} are not finite, the first "
                f"({values[bad[0]].item()}) at token {bad[0].item()}; lower the learning rate or set max_grad_norm, "
                "use bfloat16 where float16 overflows, and resume from the last checkpoint"
            )

    def _explanation(self, step: int, report: ParityReport) -> str:
        return (
            f"step {step}: engine and trainer disagree: mean |log-prob gap| {report.mean_abs:.3g} over {report.tokens} "
            f"sampled tokens is over the limit {self.limit:g} (max {report.max_abs:.3g}, mean ratio "
            f"{report.ratio_mean:.4g}, k3 {report.k3:.3g}). Check: is something writing the adapter's slots or the "
            "base weights besides the optimizer's publish (a callback, an adapter loaded without publish()); was the "
            "prefix cache reset after the last write (engine.adapter_changed()); do engine and trainer run the same "
            "dtype and attention; do engine_kwargs round more (kv_cache_dtype='fp8', another attention_backend). If "
            "the gap is rounding that you accept, raise parity_limit"
        )


def check_storage(weights: SharedWeights, engine_tensors: Mapping[str, Tensor]) -> int:
    """Compare every tensor the trainer holds with the engine's tensor of that name: the memory must be the same.

    Args:
        weights: the policy's; its adapter's slots are compared as well.
        engine_tensors: the engine's parameters by module name, slots as `<linear>.lora_slot_a` and `..._b`.

    Returns:
        How many tensors were compared.

    Raises:
        ParityError: a tensor that the engine does not have, or holds elsewhere or in another layout.
    """
    held = dict(weights.tensors)
    if weights.layout.tied_head:
        held[HEAD] = weights.head
    for name, linear in weights.linears.items():
        held |= {f"{name}.{key}": tensor for key, tensor in linear.weight.tensors().items()}
        if linear.bias is not None:
            held[f"{name}.bias"] = linear.bias
        if linear.slot is not None:
            held[f"{name}.{SLOT_A}"], held[f"{name}.{SLOT_B}"] = linear.slot.a, linear.slot.b
    for name, tensor in held.items():
        theirs = engine_tensors.get(name)
        if theirs is None:
            raise ParityError(f"the engine has no tensor {name}: it does not run the model that is trained")
        padded = name in (EMBEDDING, HEAD) and theirs.shape[0] >= tensor.shape[0]
        same_shape = theirs.shape[1:] == tensor.shape[1:] if padded else theirs.shape == tensor.shape
        if (
            theirs.data_ptr() != tensor.data_ptr()
            or theirs.dtype != tensor.dtype
            or not same_shape
            or theirs.stride() != tensor.stride()
        ):
            raise ParityError(
                f"{name} is not shared: the trainer's {_where(tensor)}, the engine's {_where(theirs)}; an update of "
                "one would not reach the other. Was the policy or the engine moved, cast or loaded again?"
            )
    return len(held)


def _where(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} strides {tensor.stride()} at {tensor.data_ptr():#x}"
