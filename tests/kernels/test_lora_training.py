"""The adapted linear for training against double precision, its kernel interpreted or on a card.

`LoraTraining` is the kernel's path wherever it runs; `lora_training_reference` the plain one. The bound of each result
is its module's: u (one rounding) of the result, and of every rounded intermediate, of sums over all inner indices of
absolute values. The interpreter truncates to bf16, which is one u more.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_training import MANY_TOKENS, LoraTraining, kernel_fits, lora_training, lora_training_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
needs_kernel = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if ON_CARD else "cpu"
SCALE = 1.5
UNIT = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # fp32: sums, not the last rounding
PATHS = {"kernel": LoraTraining.apply, "reference": lora_training_reference}


@dataclass(frozen=True)
class Case:
    """A fused projection of `outs` columns a part, of which those numbered `adapted` have an adapter."""

    tokens: int
    outs: tuple[int, ...]
    adapted: tuple[int, ...]
    in_features: int
    rank: int
    bias: bool = False

    @property
    def parts(self) -> tuple[LoraPart, ...]:
        parts, rows = [], 0
        for index, part in enumerate(self.adapted):
            start, width = sum(self.outs[:part]), self.outs[part]
            ranks = slice(index * self.rank, (index + 1) * self.rank)
            parts.append(LoraPart(f"part{part}", slice(start, start + width), slice(rows, rows + width), ranks))
            rows += width
        return tuple(parts)


CASES = {
    "qkv_with_bias": Case(70, (128, 64, 64), (0, 1, 2), 48, 16, bias=True),
    "q_and_v": Case(33, (64, 64, 64), (0, 2), 64, 32),
    "k_alone_with_bias": Case(9, (24, 10, 10), (1,), 20, 4, bias=True),
    "gate_of_gate_up": Case(7, (40, 40), (0,), 24, 8),
    "two_parts_above_a_tile": Case(129 if ON_CARD else 65, (131, 67), (0, 1), 257 if ON_CARD else 66, 7),
    "rank_one": Case(5, (33,), (0,), 17, 1, bias=True),
    "rank_128": Case(20, (48, 16), (0, 1), 40, 128),
    "odd_rank": Case(20, (30, 12, 6), (0, 1, 2), 18, 5),
    "one_token": Case(1, (24, 8, 8), (0, 1, 2), 16, 3),
    "no_token": Case(0, (24, 8), (0, 1), 16, 4),
}


@dataclass
class Tensors:
    """The operands of a case: x, A and B (the slots' values) and the incoming gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> "Tensors":
        return Tensors(*(None if t is None else change(t.to(dtype)) for t in vars(self).values()))


def random_tensors(case: Case, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator(DEVICE).manual_seed(0)
    out, b_rows = sum(case.outs), sum(case.outs[part] for part in case.adapted)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)

    return Tensors(
        x=random(case.tokens, case.in_features),
        weight=random(out, case.in_features, scale=case.in_features**-0.5),
        bias=random(out) if case.bias else None,
        a=random(len(case.adapted) * case.rank, case.in_features, scale=case.in_features**-0.5),
        b=random(b_rows, case.rank, scale=case.rank**-0.5),
        grad=random(case.tokens, out),
    )


def run(path: Callable[..., Tensor], case: Case, given: Tensors, scale: float = SCALE) -> list[Tensor]:
    """y, dX, dA, dB; the masters' values are of no account."""
    x = given.x.detach().requires_grad_()
    masters = [torch.zeros(slot.shape, device=slot.device, requires_grad=True) for slot in (given.a, given.b)]
    y = path(x, given.weight, given.bias, given.a, given.b, *masters, scale, case.parts)
    grads = torch.autograd.grad(y, (x, *masters), given.grad)
    assert all(grad.dtype == torch.float32 for grad in grads[1:])
    return [y.detach(), *grads]


def exact(case: Case, given: Tensors, scale: float = SCALE) -> list[Tensor]:
    """y, dX, dA, dB by autograd of the merged weight; the slot B is scale * master, so dB of the master is scaled."""
    x, a, b = (tensor.detach().requires_grad_() for tensor in (given.x, given.a, given.b))
    update = torch.zeros_like(given.weight)
    for part in case.parts:
        update = update.index_add(
            0, torch.arange(part.out.start, part.out.stop, device=x.device), b[part.b] @ a[part.a]
        )
    y = x @ (given.weight + update).T + (0 if given.bias is None else given.bias)
    grad_x, grad_a, grad_b = torch.autograd.grad(y, (x, a, b), given.grad)
    return [y.detach(), grad_x, grad_a, grad_b * scale]


def assert_within_bound(case: Case, dtype: torch.dtype, path: Callable[..., Tensor]) -> None:
    given = random_tensors(case, dtype)
    absolute = exact(case, given.to(torch.float64, torch.abs))
    for name, ours, true, size in zip(
        ("y", "grad_x", "grad_a", "grad_b"), run(path, case, given), exact(case, given.to(torch.float64)), absolute,
        strict=True,
    ):  # fmt: skip
        assert ours.shape == true.shape, name
        assert ((ours.double() - true).abs() <= 3 * UNIT[dtype] * size).all(), name
        # Far below what absolute values allow where signs are random: a lost tile or index would show here.
        assert (ours.double() - true).norm() <= 4 * UNIT[dtype] * true.norm(), name


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_within_its_bound(case: Case, dtype: torch.dtype) -> None:
    assert_within_bound(case, dtype, LoraTraining.apply)


@needs_kernel
def test_kernel_of_h_within_the_bound() -> None:
    """With enough tokens one launch makes it for all parts; here one lies between them that has no adapter."""
    assert_within_bound(Case(MANY_TOKENS + 1, (40, 7, 10), (0, 2), 16, 4), torch.float32, LoraTraining.apply)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES["qkv_with_bias"], CASES["q_and_v"]], ids=["qkv_with_bias", "q_and_v"])
def test_reference_within_the_bound(case: Case, dtype: torch.dtype) -> None:
    assert_within_bound(case, dtype, lora_training_reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(8192, (4096, 1024, 1024), (0, 1, 2), 4096, 32),
        Case(3001, (2048, 256, 256), (0, 2), 2048, 16, bias=True),
        Case(8192, (12288, 12288), (0, 1), 4096, 32),
    ],
    ids=["qkv", "partly_with_bias", "gate_up"],
)
def test_large_shapes_on_the_card(case: Case, dtype: torch.dtype) -> None:
    given = random_tensors(case, dtype)
    results = run(lora_training, case, given)
    for name, ours, true in zip(
        ("y", "grad_x", "grad_a", "grad_b"), results, exact(case, given.to(torch.float64)), strict=True
    ):
        assert (ours.double() - true).norm() <= 2 * UNIT[dtype] * true.norm(), name
    for first, second in zip(results, run(lora_training, case, given), strict=True):
        assert torch.equal(first, second)


@needs_kernel
def test_two_runs_give_the_same_bits() -> None:
    case = CASES["two_parts_above_a_tile"]
    given = random_tensors(case, torch.bfloat16)
    for first, second in zip(run(LoraTraining.apply, case, given), run(LoraTraining.apply, case, given), strict=True):
        assert torch.equal(first, second)


@needs_kernel
@pytest.mark.parametrize("name", ["x", "weight", "bias", "a", "b", "grad"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(name: str, poison: float) -> None:
    """Wherever the exact result is not finite, and nowhere else."""
    case = CASES["k_alone_with_bias"]
    given = random_tensors(case, torch.float32)
    getattr(given, name).view(-1)[25 % getattr(given, name).numel()] = poison
    for ours, true in zip(run(LoraTraining.apply, case, given), run(lora_training_reference, case, given), strict=True):
        assert torch.equal(ours.isfinite(), true.isfinite())


class _Sizes(TorchDispatchMode):
    """The numbers of elements of what operators return in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.seen.append(result.numel())
        return result


@needs_kernel
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_nothing_of_the_weights_size_is_made(path: Callable[..., Tensor]) -> None:
    case = Case(8, (200, 120), (0, 1), 256, 4)
    given = random_tensors(case, torch.float32)
    with _Sizes() as sizes:
        run(path, case, given)
    assert max(sizes.seen) == (120 + 200) * 4 * 2, "y, and dB's parts in one"


@pytest.mark.gpu
def test_memory_of_forward_and_backward() -> None:
    """Kept: y and u; made by the backward pass: dX, dA, dB, h and, before dX, the products that dB is cut out of."""
    case = Case(2048, (4096, 4096), (0, 1), 4096, 32)
    given = random_tensors(case, torch.bfloat16)
    run(lora_training, case, given)  # cuBLAS takes its workspace, Triton compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(lora_training, case, given)
    grown = torch.cuda.max_memory_allocated() - before
    rows, b_numel, a_numel = case.tokens, 8192 * 32, 64 * 4096
    expected = 2 * rows * (8192 + 4096 + 2 * 64) + 4 * (2 * a_numel + 2.5 * b_numel)
    assert grown < expected + 2**21


@needs_kernel
def test_output_may_be_overwritten() -> None:
    """As rope does to q and k, and GLU's backward to its input: nothing of it is needed for the gradients."""
    case = CASES["q_and_v"]
    given = random_tensors(case, torch.float32)

    def doubled(*operands: object) -> Tensor:
        return LoraTraining.apply(*operands).mul_(2)  # type: ignore[no-any-return]

    expected = run(LoraTraining.apply, case, replace(given, grad=2 * given.grad))
    for ours, true in zip(run(doubled, case, given)[1:], expected[1:], strict=True):
        assert torch.equal(ours, true)


@needs_kernel
def test_gradients_of_any_layout() -> None:
    """A row-strided gradient, as GLU writes it into a wider buffer, and an expanded one, as sum() gives it."""
    case = CASES["qkv_with_bias"]
    given = random_tensors(case, torch.float32)
    wide = torch.cat((given.grad, given.grad), dim=1)[:, : given.grad.shape[1]]
    for grad in (wide, torch.ones((), device=DEVICE).expand(given.grad.shape)):
        ours = run(LoraTraining.apply, case, replace(given, grad=grad))
        true = run(LoraTraining.apply, case, replace(given, grad=grad.contiguous()))
        for one, other in zip(ours, true, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("wanted", [(False, True, True), (True, False, False), (False, True, False)])
def test_computes_only_what_is_asked_for(wanted: tuple[bool, bool, bool]) -> None:
    """E.g. the first block's input, which comes from a frozen embedding, has no gradient."""
    case = CASES["gate_of_gate_up"]
    given = random_tensors(case, torch.float32)
    leaves = [given.x.detach(), torch.zeros_like(given.a), torch.zeros_like(given.b)]
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    x, *masters = leaves
    LoraTraining.apply(x, given.weight, None, given.a, given.b, *masters, SCALE, case.parts).backward(given.grad)
    for leaf, want, true in zip(leaves, wanted, run(LoraTraining.apply, case, given)[1:], strict=True):
        assert torch.equal(leaf.grad, true) if want else leaf.grad is None


def test_the_rule_for_the_kernel() -> None:
    case = CASES["q_and_v"]
    given = random_tensors(case, torch.bfloat16)
    operands = {"x": given.x, "weight": given.weight, "bias": None, "slot_a": given.a, "slot_b": given.b}
    assert kernel_fits(**operands, parts=case.parts)
    double = {name: None if tensor is None else tensor.double() for name, tensor in operands.items()}
    assert not kernel_fits(**double, parts=case.parts), "double precision"
    assert not kernel_fits(**operands | {"slot_b": given.b.float()}, parts=case.parts), "two dtypes"
    assert not kernel_fits(**operands | {"weight": given.weight.T.contiguous().T}, parts=case.parts), "columns first"
    scattered = Case(1, (8,) * 5, (1, 3), 64, 32)
    assert not kernel_fits(**operands | {"weight": given.weight[:40]}, parts=scattered.parts), "five ranges of columns"
