"""FP4's kernels, interpreted or on a card: the decoded matrix bit for bit, and the product of few rows."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from colora.kernels import fp4
from torch import Tensor

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if ON_CARD else "cpu"
# The interpreter multiplies the bits of bf16, and the kernel takes nothing else on a card.
DTYPE, BOUND = (torch.bfloat16, 4e-3) if ON_CARD else (torch.float16, 6e-4)


def random_matrix(out_features: int, in_features: int) -> fp4.FP4Tensor:
    """Every code and scale code, and different row scales."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    stored = fp4.empty(out_features, in_features, DEVICE)
    stored.codes.random_(0, 256, generator=generator)
    stored.scale_codes.random_(0, 256, generator=generator)
    stored.row_scales.copy_(2.0 ** torch.arange(-6, out_features - 6).remainder(5))
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (70, 128), (33, 320), (5, 1216)], ids=str)
def test_dequantised_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from colora.kernels.fp4_triton import dequantize

    stored = random_matrix(*shape)
    assert torch.equal(dequantize(stored, dtype), fp4.dequantize_reference(stored, dtype))


def test_dequantised_rows_and_columns() -> None:
    """Within wider rows, whose rest is left alone; and none at all."""
    from colora.kernels.fp4_triton import dequantize

    stored = random_matrix(129, 192)
    for part in (stored, stored.rows(64, 125), stored.columns(64, 192)):
        wide = torch.full((part.shape[0], 200), 7.0, device=DEVICE, dtype=torch.bfloat16)
        out = wide[:, : part.shape[1]]
        assert dequantize(part, torch.bfloat16, out) is out
        assert torch.equal(out, fp4.dequantize_reference(part, torch.bfloat16))
        assert (wide[:, part.shape[1] :] == 7).all(), "beyond the result"
    assert dequantize(stored.rows(5, 5), torch.bfloat16).shape == (0, 192)


@dataclass(frozen=True)
class Case:
    rows: int
    out_features: int
    in_features: int
    bias: bool = False


CASES = {
    "one_row": Case(1, 64, 64),
    "rows_beyond_a_tile": Case(5, 129, 256, bias=True),
    "steps_of_two_chunks": Case(8, 130, 384),
    "steps_of_one_chunk": Case(9, 70, 192, bias=True),
    "many_rows": Case(40, 48, 512),
}
WAYS = {
    "plain": {},
    "splits": {"splits": 3},
    "groups": {"outs": 32, "groups": 2},
    "groups_of_one_warp_and_splits": {"outs": 16, "groups": 4, "splits": 2, "chunks": 2},
    "few_chunks": {"chunks": 1, "warps": 2},
    "one_warp": {"outs": 16, "warps": 1},
}


def operands(case: Case) -> tuple[Tensor, fp4.FP4Tensor, Tensor | None]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(case.rows, case.in_features, generator=generator, device=DEVICE).to(DTYPE)
    weight = torch.randn(case.out_features, case.in_features, generator=generator, device=DEVICE)
    weight *= 2.0 ** torch.arange(case.out_features, device=DEVICE).remainder(7)[:, None]
    bias = torch.randn(case.out_features, generator=generator, device=DEVICE).to(DTYPE) if case.bias else None
    return x, fp4.quantize(weight), bias


def exact(x: Tensor, weight: fp4.FP4Tensor, bias: Tensor | None) -> Tensor:
    """In double precision, of the weights that the trainer decodes."""
    y = x.double() @ fp4.dequantize_reference(weight, torch.float32).double().T
    return y if bias is None else y + bias.double()


def run(x: Tensor, weight: fp4.FP4Tensor, bias: Tensor | None, **changes: int) -> Tensor:
    from colora.kernels.fp4_few_rows import Config, launch

    return launch(
        x, weight, bias, replace(Config(outs=64, warps=4, groups=1, chunks=4, buffers=2, splits=1), **changes)
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_decoded_weights(case: Case, way: dict[str, int]) -> None:
    from colora.kernels.fp4_few_rows import counters

    given = operands(case)
    ours, true = run(*given, **way), exact(*given)
    assert ours.shape == true.shape
    assert ours.dtype == DTYPE
    assert (ours.double() - true).norm() / true.norm() < BOUND
    assert not counters(given[0].device).any(), "the next launch would not add its splits up"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_columns_that_each_pick_one_weight(way: dict[str, int]) -> None:
    """x = the identity: the product is the matrix, bit for bit: every code, scale and column is where it should be."""
    x, weight, _ = operands(Case(64, 70, 64))
    x = torch.eye(64, device=DEVICE, dtype=DTYPE)
    assert torch.equal(run(x, weight, None, **way).T, fp4.dequantize_reference(weight, DTYPE))


def test_rows_of_a_matrix_and_of_x() -> None:
    """What `FP4Tensor.rows` gives, and an x whose rows are part of wider ones."""
    x, weight, _ = operands(Case(3, 100, 256))
    whole = run(x, weight, None)
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(run(wide[:, 256:], weight.rows(24, 88), None), whole[:, 24:88])


def test_fits() -> None:
    from colora.kernels.fp4_few_rows import MAX_ROWS, fits

    x = torch.zeros(MAX_ROWS + 1, 64, dtype=torch.bfloat16, device=DEVICE)
    assert fits(x[:1]) and fits(x[:MAX_ROWS])
    assert not fits(x[:1].half()), "its range is too small for weights that lack their row's scale"
    assert not fits(x), "many rows"
    assert not fits(x[:0]), "none"
    assert not fits(x[:64, :64].T), "columns first"
    weight = fp4.quantize(torch.ones(64, 64, device=DEVICE))
    with pytest.raises(ValueError, match="65 rows of x are too many for one launch, which takes 64; decode W instead"):
        run(x, weight, None)


LARGE = {
    "4b.qkv": Case(8, 6144, 2560),
    "4b.down": Case(64, 2560, 9728),
    "8b.gate_up": Case(33, 24576, 4096, bias=True),
    "qwen2.5_0.5b.qkv": Case(17, 1152, 896, bias=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_shapes_on_the_card(case: Case) -> None:
    """All candidates for the shape, twice each: the same bits, whoever finishes last."""
    from colora.kernels.fp4_few_rows import rows_of_program
    from colora.kernels.fp4_tuning import candidates

    given = operands(case)
    true = exact(*given)
    for config in candidates((case.out_features, case.in_features), rows_of_program(case.rows), 132):
        first, second = (run(*given, **vars(config)) for _ in range(2))
        assert (first.double() - true).norm() / true.norm() < BOUND, config
        assert torch.equal(first, second), config


@pytest.mark.gpu
def test_in_a_cuda_graph_of_the_operator() -> None:
    from colora.kernels.fp4_linear import fp4_linear
    from colora.kernels.lora_add import LoraPart
    from colora.kernels.lora_linear import PartOffsets

    x, weight, _ = operands(LARGE["4b.qkv"])
    a = torch.randn(16, 2560, device=DEVICE, dtype=DTYPE) * 0.05
    b = torch.randn(1024, 16, device=DEVICE, dtype=DTYPE) * 0.1
    offsets = PartOffsets((LoraPart("", slice(4096, 5120), slice(0, 1024), slice(0, 16)),))

    def product() -> Tensor:
        return fp4_linear(x, *weight.tensors(), None, a, b, offsets)

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [product() for _ in range(20)]
    for seed in range(3):
        x.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
        graph.replay()
        true = exact(x, weight, None)
        true[:, 4096:5120] += x.double() @ a.double().T @ b.double().T
        for y in outputs:
            assert (y.double() - true).norm() / true.norm() < BOUND
        assert torch.equal(outputs[0], product()), "as outside the graph"
