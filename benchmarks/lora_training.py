"""`lora_training`: forward and backward of adapted linears over the time of the frozen products alone (x W^T, g W).

The projections of an 8B model (Qwen3, Llama 3), r 32, 8192 tokens, bf16; each alone and all four in a chain. Peers: the
frozen linear followed by `lora_add_` (autograd adds the two gradients of x), and PEFT's Linear, a module a projection
that is not fused, its adapter in bf16 too. Times are medians of rounds in which everyone takes turns. The rows of the
projections also hold the milliseconds of each piece, the frozen product with and without adding to its result, and the
forward with W and A in one matrix and the update added afterwards.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets
from colora.kernels.lora_training import lora_training, lora_training_reference
from colora.kernels.lora_training_triton import ColumnRange, down_gradient, low_rank
from colora.kernels.lora_up import lora_up
from common import Report, parser
from torch import Tensor, nn

PROJECTIONS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((12288, 12288), 4096),
    "down": ((4096,), 12288),
}
TOKENS, RANK, SCALE = 8192, 32, 2.0
BAR = 1.12
BANDWIDTH = 4.3e12  # bytes/s of a device-to-device copy on an H200
TOLERANCE = 6e-3
ROUNDS, CALLS = 9, 3
FILLERS = 8  # products of over a millisecond each

Run = Callable[[], Any]


class Projection:
    """One fused projection with its adapter, its input and the gradient of its output."""

    def __init__(self, outs: Sequence[int], in_features: int):
        self.outs, self.out, self.in_features = outs, sum(outs), in_features
        self.stacked = self._random(self.out + len(outs) * RANK, in_features, scale=0.02)  # W, then A
        self.weight, self.a = self.stacked[: self.out], self.stacked[self.out :]
        self.b = self._random(self.out, RANK, scale=0.1)
        self.x = self._random(TOKENS, in_features, scale=1.0).requires_grad_()
        self.grad = self._random(TOKENS, self.out, scale=1.0)
        self.masters = [torch.zeros(slot.shape, device="cuda", requires_grad=True) for slot in (self.a, self.b)]
        parts, start = [], 0
        for index, out in enumerate(outs):
            rows = slice(start, start + out)
            parts.append(LoraPart("", rows, rows, slice(index * RANK, (index + 1) * RANK)))
            start += out
        self.parts = tuple(parts)

    @staticmethod
    def _random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

    def frozen(self) -> None:
        with torch.no_grad():
            F.linear(self.x, self.weight)
            torch.mm(self.grad, self.weight)

    def adapted(self, op: Callable[..., Tensor]) -> list[Tensor]:
        """y, dX, dA, dB."""
        y = op(self.x, self.weight, None, self.a, self.b, *self.masters, SCALE, self.parts)
        return [y.detach(), *torch.autograd.grad(y, (self.x, *self.masters), self.grad)]

    def peft(self) -> Run:
        """The same by PEFT's modules."""
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        modules = []
        for part in self.parts:
            base = nn.Linear(self.in_features, part.out.stop - part.out.start, bias=False, device="meta")
            base.weight = nn.Parameter(self.weight[part.out], requires_grad=False)
            config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules="all-linear")
            module = Linear(base, "default", config, r=RANK, lora_alpha=int(SCALE * RANK))
            module.lora_A.default.weight = nn.Parameter(self.a[part.a].clone())
            module.lora_B.default.weight = nn.Parameter(self.b[part.b] / SCALE)
            modules.append(module)
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        gradients = [self.grad[:, part.out].contiguous() for part in self.parts]

        def run() -> tuple[list[Tensor], tuple[Tensor, ...]]:
            outputs = [module(self.x) for module in modules]
            return outputs, torch.autograd.grad(outputs, (self.x, *trained), gradients)

        return run

    def exact(self) -> list[Tensor]:
        """y, dX, dA, dB in fp32."""
        x, weight, a, b, grad = (t.detach().float() for t in (self.x, self.weight, self.a, self.b, self.grad))
        down, grad_down = x @ a.T, torch.empty(TOKENS, a.shape[0], device="cuda")
        y, grad_b = x @ weight.T, torch.empty_like(b)
        for part in self.parts:
            y[:, part.out] += down[:, part.a] @ b[part.b].T
            grad_down[:, part.a] = grad[:, part.out] @ b[part.b]
            grad_b[part.b] = grad[:, part.out].T @ down[:, part.a] * SCALE
        return [y, grad @ weight + grad_down @ a, grad_down.T @ x, grad_b]

    def check(self) -> float:
        """The greatest relative error of y and the gradients; ours is at most TOLERANCE, PEFT computes the same."""
        expected = self.exact()
        errors = [relative_error(ours, true) for ours, true in zip(self.adapted(lora_training), expected, strict=True)]
        assert max(errors) < TOLERANCE, f"relative errors of y, dX, dA, dB: {errors}"
        outputs, (grad_x, *_) = self.peft()()
        theirs = relative_error(torch.cat(outputs, dim=1), expected[0]), relative_error(grad_x, expected[1])
        assert max(theirs) < 2 * TOLERANCE, f"PEFT computes something else: relative errors {theirs}"
        return max(errors)

    @property
    def floor_ms(self) -> float:
        """What the adapter moves outside the frozen products, at the bandwidth of a copy."""
        return 2 * TOKENS * (3 * self.in_features + 3 * self.out) / BANDWIDTH * 1e3

    def pieces(self) -> dict[str, Run]:
        """Every step of `lora_training`, and of the alternatives."""
        x, rank_rows, offsets = self.x.detach(), self.a.shape[0], PartOffsets(self.parts)
        down, y = x @ self.a.T, torch.empty_like(self.grad)
        grad_x, grad_down = torch.empty_like(x), torch.empty_like(down)
        columns = [ColumnRange(part.out.start, part.out.stop, part.a.start, part.b.start) for part in self.parts]
        starts = (offsets.out_starts, offsets.out_stops, offsets.a_starts, offsets.b_starts)
        whole = [ColumnRange(0, self.in_features, 0, 0)]
        fp32 = partial(torch.mm, out_dtype=torch.float32)
        return {
            "x W^T": lambda: torch.mm(x, self.weight.T, out=y),
            "y += x W^T": lambda: y.addmm_(x, self.weight.T),
            "g W": lambda: torch.mm(self.grad, self.weight, out=grad_x),
            "dX += g W": lambda: grad_x.addmm_(self.grad, self.weight),
            "u = x A^T": lambda: x @ self.a.T,
            "y = u B^T": lambda: low_rank(down, self.b, None, y, columns, RANK),
            "h = g B": lambda: [
                torch.mm(self.grad[:, part.out], self.b[part.b], out=grad_down[:, part.a]) for part in self.parts
            ],
            "h = g B, one launch": lambda: down_gradient(self.grad, self.b, grad_down, columns),
            "dB = g^T u": lambda: [fp32(self.grad[:, part.out].T, down[:, part.a]) for part in self.parts],
            "dB = g^T u, one call": lambda: fp32(self.grad.T, down),
            "dX = h A": lambda: low_rank(grad_down, self.a.T, None, grad_x, whole, rank_rows),
            "dA = h^T x": lambda: fp32(grad_down.T, x),
            "x [W; A]^T": lambda: F.linear(x, self.stacked),
            "x [W; A]^T, y += u B^T": lambda: lora_up(F.linear(x, self.stacked), None, self.b, self.out, *starts),
        }


def relative_error(ours: Tensor, true: Tensor) -> float:
    return ((ours.float() - true).norm() / true.norm()).item()


def milliseconds(runs: dict[str, Run]) -> tuple[dict[str, float], dict[str, float]]:
    """(medians, spreads: slowest over fastest less 1) of each run, one round of all after the other."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    filler = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            for _ in range(FILLERS):  # the card is busy while what is timed is queued: launches are not part of it
                torch.mm(filler, filler)
            begin.record()
            for _ in range(CALLS):
                run()
            end.record()
            end.synchronize()
            if turn:  # the first one compiles
                times[name].append(begin.elapsed_time(end) / CALLS)
    return {k: median(t) for k, t in times.items()}, {k: max(t) / min(t) - 1 for k, t in times.items()}


def measure(name: str, projections: Sequence[Projection], report: Report, **more: Any) -> None:
    """The ratio of all `projections`, one after the other."""
    pefts = [projection.peft() for projection in projections]
    runs: dict[str, Run] = {
        "frozen": lambda: [projection.frozen() for projection in projections],
        "ours": lambda: [projection.adapted(lora_training) for projection in projections],
        "lora_add": lambda: [projection.adapted(lora_training_reference) for projection in projections],
        "peft": lambda: [peft() for peft in pefts],
    }
    medians, spreads = milliseconds(runs)
    frozen = medians["frozen"]
    flops = sum(4 * TOKENS * projection.out * projection.in_features for projection in projections)
    report.add(
        f"lora_linear.train_ratio.8b.r32{name}",
        medians["ours"] / frozen,
        "x",
        "lower",
        bar=BAR,
        bar_is="the time of x W^T and g W alone, same run, is 1",
        peers={peer: round(medians[peer] / frozen, 3) for peer in ("lora_add", "peft")},
        floor=round(1 + sum(projection.floor_ms for projection in projections) / frozen, 3),
        frozen_tflop_s=round(flops / frozen / 1e9),
        milliseconds={run: round(value, 3) for run, value in medians.items()},
        repeats=ROUNDS,
        spread=round(spreads["ours"], 3),
        **more,
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line a figure; below it a column of milliseconds a projection, a line a piece."""
    print(f"\n{'':36}{'ours':>8}{'floor':>8}{'lora_add':>10}{'peft':>8}{'frozen ms':>11}{'TFLOP/s':>9}")
    for row in rows:
        peers = f"{row['peers']['lora_add']:10.3f}{row['peers']['peft']:8.3f}"
        milliseconds_alone = f"{row['milliseconds']['frozen']:11.3f}{row['frozen_tflop_s']:9}"
        print(f"{row['figure']:36}{row['value']:8.3f}{row['floor']:8.3f}{peers}{milliseconds_alone}")
    with_pieces = [row for row in rows if "pieces" in row]
    print(f"\n{'ms':36}" + "".join(f"{row['figure'].rpartition('.')[2]:>10}" for row in with_pieces))
    for piece in with_pieces[0]["pieces"]:
        print(f"{piece:36}" + "".join(f"{row['pieces'][piece]:10.3f}" for row in with_pieces))


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report = Report("lora_training", arguments)
    torch.manual_seed(0)
    projections = {name: Projection(*shape) for name, shape in PROJECTIONS.items()}
    errors = {name: round(projection.check(), 5) for name, projection in projections.items()}
    measure("", list(projections.values()), report, relative_error=max(errors.values()))
    for name, projection in projections.items():
        pieces, _ = milliseconds(projection.pieces())
        more = {"pieces": {piece: round(value, 4) for piece, value in pieces.items()}, "relative_error": errors[name]}
        measure(f".{name}", [projection], report, **more)
    print_table(report.rows)
    print(report.write())


if __name__ == "__main__":
    main()
