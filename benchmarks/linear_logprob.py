"""Log-probs through the head, forward and backward, beside TRL's chunked and Liger's fused ones, on the same inputs.

32K tokens, hidden 4096, a vocabulary of 151,936, bf16. The floor is the time of the two matrix products that no one can
do without (logits, gradient of the hidden states), in the tiles that ours works in.
"""

from collections.abc import Callable

import torch
from colora.kernels.linear_logprob import TILE_ELEMENTS, linear_logprob
from common import GIB, Report, best_of, parser
from torch import Tensor

TOKENS, HIDDEN, VOCABULARY = 32768, 4096, 151_936


def products_alone(hidden: Tensor, head: Tensor) -> None:
    tile = TILE_ELEMENTS // head.shape[0]
    logits = torch.empty(tile, head.shape[0], dtype=torch.float32, device="cuda")
    rounded = torch.empty(tile, head.shape[0], dtype=head.dtype, device="cuda")
    for start in range(0, len(hidden), tile):
        rows = hidden[start : start + tile]
        torch.mm(rows, head.T, out_dtype=torch.float32, out=logits[: len(rows)])
        torch.mm(rounded[: len(rows)], head)


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, head, targets)[0]


def trl(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[0]


def liger(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    losses = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, head, targets, None, None, -100, 0.0, 0.0, "none", None, False, torch.float32
    )
    return -(losses[0] if isinstance(losses, tuple) else losses)


def measure(
    run: Callable[..., Tensor], hidden: Tensor, head: Tensor, targets: Tensor, repeats: int
) -> dict[str, float]:
    """Seconds, their spread, and GiB beyond the inputs, the outputs and the gradient of the hidden states."""
    weights = torch.rand(len(hidden), device="cuda") - 0.5

    def step() -> None:
        hidden.grad = None
        run(hidden, head, targets).backward(weights)

    step()
    torch.cuda.empty_cache()
    hidden.grad = None
    before = torch.cuda.memory_allocated() + hidden.nbytes
    torch.cuda.reset_peak_memory_stats()
    seconds, spread = best_of(step, repeats)
    return {"seconds": seconds, "spread": spread, "extra_gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def check(hidden: Tensor, head: Tensor, targets: Tensor) -> dict[str, float]:
    """Relative error of ours on some tokens, log-probs and gradient, against fp32 logits of fp32 copies."""
    few = hidden.detach()[:512].requires_grad_()
    weights = torch.rand(len(few), device="cuda") - 0.5
    logprobs = ours(few, head, targets[:512])
    (gradient,) = torch.autograd.grad(logprobs, few, weights)
    exact = few.detach().float().requires_grad_()
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = (exact @ head.float().T).log_softmax(-1).gather(1, targets[:512, None])[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights)
    errors = {
        "logprob_error": (logprobs - expected).abs().max().item(),
        "gradient_error": ((gradient.float() - expected_gradient).norm() / expected_gradient.norm()).item(),
    }
    assert errors["logprob_error"] < 1e-3 and errors["gradient_error"] < 1e-2, errors
    return {name: round(value, 6) for name, value in errors.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    report = Report("linear_logprob", arguments)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.02
    targets = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    errors = check(hidden, head, targets)
    with torch.no_grad():
        products_alone(hidden, head)
        floor, _ = best_of(lambda: products_alone(hidden, head), arguments.repeats)
    found = {run.__name__: measure(run, hidden, head, targets, arguments.repeats) for run in (ours, trl, liger)}
    mine = found.pop("ours")
    report.add(
        "linear_logprob.time_ratio.32k",
        mine["seconds"] / floor,
        "ratio",
        "lower",
        bar=1.25,
        bar_is="its matrix products alone, same run",
        peers={name: round(peer["seconds"] / floor, 3) for name, peer in found.items()},
        floor_ms=round(floor * 1e3, 1),
        repeats=arguments.repeats,
        spread=round(mine["spread"], 3),
        **errors,
    )
    report.add(
        "linear_logprob.extra_gib.32k",
        mine["extra_gib"],
        "GiB",
        "lower",
        bar=1.0,
        bar_is="beyond inputs, outputs and the gradient of the hidden states",
        peers={name: round(peer["extra_gib"], 3) for name, peer in found.items()},
    )
    print(report.write())


if __name__ == "__main__":
    main()
