"""FP4's kernels, interpreted or on a card: the decoded matrix bit for bit, and the product of few rows."""

import os
from dataclasses import replace

import pytest
import torch
from colora.kernels import fp4
from torch import Tensor

pytest.importorskip("triton")

from .few_rows import Case, Operands, assert_same, exact, random_operands, run

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


CASES = {
    "one_row": Case(1, (64,), 64),
    "rows_beyond_a_tile": Case(5, (129,), 256, bias=True),
    "steps_of_two_chunks": Case(8, (130,), 384, 16, ((0, 130, 0, 0),), bias=True),
    "steps_of_one_chunk": Case(9, (70,), 192, bias=True),
    "many_rows": Case(40, (48,), 512, 4, ((8, 40, 0, 0),)),
    "most_rows": Case(128, (70,), 320, 8, ((0, 20, 0, 0), (30, 70, 8, 20)), bias=True),
    "three_parts_and_pieces_of_x_a": Case(
        3, (80,), 768, 32, ((0, 30, 0, 0), (30, 50, 64, 30), (50, 80, 32, 50)), bias=True
    ),
}
WAYS = {
    "plain": {},
    "splits": {"splits": 3},
    "few_chunks": {"chunks": 1, "outs": 32, "warps": 2},
    "one_warp": {"outs": 16, "warps": 1},
    "more_threads_than_sums": {"outs": 128, "warps": 8, "splits": 2},
    "together": {"together": True},
    "together_two_chunks": {"together": True, "chunks": 2},
    "together_few_chunks_and_splits": {"together": True, "chunks": 1, "outs": 128, "warps": 8, "splits": 2},
}


def operands(case: Case) -> Operands[fp4.FP4Tensor]:
    generator, out_features = torch.Generator(DEVICE).manual_seed(1), sum(case.outs)
    weight = torch.randn(out_features, case.in_features, generator=generator, device=DEVICE)
    weight *= 2.0 ** torch.arange(out_features, device=DEVICE).remainder(7)[:, None]
    return random_operands(case, fp4.quantize(weight), DTYPE, generator, b_scale=3.0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_decoded_weights(case: Case, way: dict[str, int]) -> None:
    from colora.kernels.few_rows_adapter import counters

    given = operands(case)
    ours, true = run(case, given, **way), exact(case, given)
    assert ours.shape == true.shape
    assert ours.dtype == DTYPE
    assert (ours.double() - true).norm() / true.norm() < BOUND
    assert not counters(given.x.device).any(), "the next launch would not add its splits up, or not wait for x A^T"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_columns_that_each_pick_one_weight(way: dict[str, int]) -> None:
    """x = the identity: the product is the matrix, bit for bit: every code, scale and column is where it should be."""
    case = Case(128, (70,), 128)
    given = replace(operands(case), x=torch.eye(128, device=DEVICE, dtype=DTYPE))
    assert torch.equal(run(case, given, **way).T, fp4.dequantize_reference(given.weight, DTYPE))


def test_rows_of_a_matrix_and_of_x() -> None:
    """What `FP4Tensor.rows` gives, and an x whose rows are part of wider ones."""
    case = Case(3, (100,), 256)
    given = operands(case)
    whole = run(case, given)
    wide = torch.cat((given.x, given.x), dim=1)
    part = replace(given, x=wide[:, 256:], weight=given.weight.rows(24, 88))
    assert_same(run(case, part), whole[:, 24:88])


def test_fits() -> None:
    from colora.kernels.fp4_few_rows import MAX_ROWS, fits

    x = torch.zeros(MAX_ROWS + 1, 64, dtype=torch.bfloat16, device=DEVICE)
    assert fits(x[:1]) and fits(x[:MAX_ROWS])
    assert fits(x[:1], parts=3, rank=256)
    assert not fits(x[:1], parts=4), "more parts than the kernel has arguments for"
    assert not fits(x[:1], parts=1, rank=257), "a tile of B for which there is too little shared memory"
    assert not fits(x[:1].half()), "its range is too small for weights that lack their row's scale"
    assert not fits(x), "many rows"
    assert not fits(x[:0]), "none"
    assert not fits(x[:64, :64].T), "columns first"
    case = Case(129, (64,), 64)
    with pytest.raises(
        ValueError, match="129 rows of x are too many for one launch, which takes 128; decode W instead"
    ):
        run(case, operands(case))


LARGE = {
    "4b.qkv": Case(8, (6144,), 2560, 16, ((0, 4096, 0, 0), (4096, 5120, 16, 4096), (5120, 6144, 32, 5120))),
    "4b.down": Case(64, (2560,), 9728, 32, ((0, 2560, 0, 0),)),
    "4b.gate_up": Case(128, (19456,), 2560, 16, ((0, 9728, 0, 0), (9728, 19456, 16, 9728))),
    "8b.gate_up": Case(33, (24576,), 4096, 16, ((0, 12288, 0, 0), (12288, 24576, 16, 12288)), bias=True),
    "qwen2.5_0.5b.qkv": Case(17, (1152,), 896, 8, ((0, 896, 0, 0), (1024, 1152, 8, 896)), bias=True),
    "4b.o_alone": Case(8, (2560,), 4096),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_shapes_on_the_card(case: Case) -> None:
    """All candidates for the shape, twice each: the same bits, whoever finishes last."""
    from colora.kernels.few_rows_adapter import rows_of_program
    from colora.kernels.fp4_tuning import candidates

    given = operands(case)
    true = exact(case, given)
    for config in candidates((sum(case.outs), case.in_features), rows_of_program(case.rows), 132):
        first, second = (run(case, given, **vars(config)) for _ in range(2))
        assert (first.double() - true).norm() / true.norm() < BOUND, config
        assert torch.equal(first, second), config


@pytest.mark.gpu
@pytest.mark.parametrize("rows, way", [(8, {}), (128, {"together": True, "chunks": 1})], ids=["few", "together"])
def test_products_that_follow_one_another(rows: int, way: dict[str, int]) -> None:
    """Each starts before the one ahead has ended, reads what that wrote and takes memory that it has freed."""
    case = Case(rows, (2048,), 2048, rank=16, parts=((0, 2048, 0, 0),))
    given = operands(case)

    def chain(check: bool) -> Tensor:
        x = given.x
        for index in range(30):
            now, step = replace(case, parts=case.parts if index % 3 else ()), replace(given, x=x)
            y = run(now, step, splits=index % 5 + 1, **way)
            if check:
                true = exact(now, step)
                assert (y.double() - true).norm() / true.norm() < BOUND, index
            x = y / y.float().norm() * 128
        return x

    apart = chain(check=True)
    for _ in range(10):
        assert torch.equal(chain(check=False), apart)


@pytest.mark.gpu
def test_in_a_cuda_graph_of_the_operator() -> None:
    from colora.kernels.fp4_linear import fp4_linear
    from colora.kernels.lora_add import LoraPart
    from colora.kernels.lora_linear import PartOffsets

    case = LARGE["4b.qkv"]
    given = operands(case)
    parts = [LoraPart("", slice(s, t), slice(b, b + t - s), slice(a, a + case.rank)) for s, t, a, b in case.parts]

    def product() -> Tensor:
        return fp4_linear(given.x, *given.weight.tensors(), None, given.a, given.b, PartOffsets(tuple(parts)))

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [product() for _ in range(20)]
    for seed in range(3):
        given.x.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
        graph.replay()
        true = exact(case, given)
        for y in outputs:
            assert (y.double() - true).norm() / true.norm() < BOUND
        assert torch.equal(outputs[0], product()), "as outside the graph"
