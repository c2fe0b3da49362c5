"""The NF4 product of few rows against the decoded weights in double precision, interpreted or on a card."""

import os
from dataclasses import replace

import pytest
import torch
from colora.kernels import nf4
from torch import Tensor

pytest.importorskip("triton")

from .few_rows import Case, Operands, assert_same, exact, random_operands, run

ON_CARD = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if ON_CARD else "cpu"
# The interpreter multiplies the bits of bf16.
BOUND = {torch.float16: 7e-4} | ({torch.bfloat16: 5e-3} if ON_CARD else {})
CASES = {
    "one_row": Case(1, (64,), 64),
    "rows_beyond_a_tile": Case(5, (100, 29), 256, bias=True),
    "two_scale_codes_a_word": Case(8, (130,), 384),
    "one_scale_code_a_word": Case(9, (70,), 192, bias=True),
    "qkv": Case(3, (128, 64, 64), 512, 8, ((0, 128, 0, 0), (128, 192, 8, 128), (192, 256, 16, 192)), bias=True),
    "v_alone_not_of_whole_tiles": Case(2, (100, 30, 30), 256, 5, ((130, 160, 0, 0),)),
    "several_pieces_of_x_a": Case(4, (64,), 2304, 16, ((0, 64, 0, 0),)),
    "more_ranks_than_a_tile": Case(2, (80, 48), 256, 64, ((0, 80, 0, 0), (80, 128, 64, 80))),
    "a_tile_of_three_parts": Case(7, (24, 16, 24), 128, 16, ((0, 24, 0, 0), (24, 40, 16, 24), (40, 64, 32, 40))),
    "some_rows_of_w_alone": Case(33, (72,), 256, 4, ((8, 40, 0, 0),)),
    "parts_in_another_order_than_b": Case(20, (48, 80), 320, 8, ((0, 48, 8, 80), (48, 128, 0, 0))),
    "most_rows": Case(128, (70,), 320, 8, ((0, 20, 0, 0), (30, 70, 8, 20)), bias=True),
    "three_groups_of_scales_a_row": Case(2, (20,), 576 * 64),
}


def operands(case: Case, dtype: torch.dtype) -> Operands[nf4.NF4Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = nf4.empty(case.outs, case.in_features, DEVICE)
    weight.codes.random_(0, 256, generator=generator)
    weight.scale_codes.random_(0, 256, generator=generator)
    weight.group_scales.uniform_(0.01, 0.03, generator=generator)
    weight.offset.uniform_(0.04, 0.06, generator=generator)
    return random_operands(case, weight, dtype, generator, b_scale=0.1)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_decoded_weights(case: Case, splits: int, dtype: torch.dtype) -> None:
    from colora.kernels.few_rows_adapter import counters

    given = operands(case, dtype)
    ours, true = run(case, given, splits=splits), exact(case, given)
    assert ours.shape == true.shape
    assert ours.dtype == dtype
    assert (ours.double() - true).norm() / true.norm() < BOUND[dtype]
    assert not counters(given.x.device).any(), "the next launch would wait for nothing, or for ever"


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": 1},
        {"blocks": 2, "splits": 2},
        {"outs": 128},
        {"outs": 32, "warps": 2, "registers": 128},
        {"outs": 16, "warps": 1},
        {"together": True},
        {"together": True, "blocks": 2, "splits": 3},
        {"together": True, "blocks": 1, "outs": 128, "warps": 8, "registers": 128},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qkv", "some_rows_of_w_alone", "most_rows"])
def test_other_ways_to_cut_it_up(name: str, changes: dict[str, object]) -> None:
    case = CASES[name]
    given = operands(case, torch.float16)
    true = exact(case, given)
    assert (run(case, given, **changes).double() - true).norm() / true.norm() < BOUND[torch.float16]


@pytest.mark.parametrize("together", [False, True])
def test_columns_that_each_pick_one_weight(together: bool) -> None:
    """x = the identity: the product is the matrix, bit for bit: every code, scale and column is where it should be."""
    case = Case(128, (70, 30), 128)
    for dtype in BOUND:
        given = operands(case, dtype)
        given.x = torch.eye(128, device=DEVICE, dtype=dtype)
        assert torch.equal(run(case, given, together=together).T, nf4.dequantize_reference(given.weight, dtype))


def test_rows_of_a_stacked_matrix_and_of_x() -> None:
    """What `NF4Tensor.rows` gives, and an x whose rows are part of wider ones."""
    case = Case(3, (40, 60), 256)
    given = operands(case, torch.float16)
    whole = run(case, given)
    wide = torch.cat((given.x, given.x), dim=1)
    part = replace(given, x=wide[:, 256:], weight=given.weight.rows(24, 88))
    assert_same(run(case, part), whole[:, 24:88])


def test_fits() -> None:
    from colora.kernels.nf4_few_rows import MAX_ROWS, fits

    x = torch.zeros(MAX_ROWS + 1, 64, dtype=torch.float16, device=DEVICE)
    assert fits(x[:1], parts=3, rank=256)
    assert not fits(x[:1], parts=4), "more parts than the kernel has arguments for"
    assert not fits(x[:1], parts=1, rank=257), "a tile of B for which there is too little shared memory"
    assert not fits(x[:1].float()), "not half precision"
    assert not fits(x), "many rows"
    assert not fits(x[:0]), "none"
    assert not fits(x[:64, :64].T), "columns first"


def test_more_rows_than_a_launch_takes() -> None:
    case = Case(129, (64,), 64)
    with pytest.raises(ValueError, match="129 rows of x are too many for one launch, which takes 128"):
        run(case, operands(case, torch.float16))


LARGE = {
    "4b.qkv": Case(8, (4096, 1024, 1024), 2560, 16, ((0, 4096, 0, 0), (4096, 5120, 16, 4096), (5120, 6144, 32, 5120))),
    "4b.o": Case(16, (2560,), 4096),
    "4b.down": Case(64, (2560,), 9728, 32, ((0, 2560, 0, 0),)),
    "8b.gate_up": Case(29, (12288, 12288), 4096, 32, ((0, 12288, 0, 0), (12288, 24576, 32, 12288)), bias=True),
    "qwen2.5_0.5b.qkv": Case(17, (896, 128, 128), 896, 8, ((0, 896, 0, 0), (1024, 1152, 8, 896)), bias=True),
    "4b.gate_up": Case(128, (9728, 9728), 2560, 16, ((0, 9728, 0, 0), (9728, 19456, 16, 9728))),
    "70b.down": Case(5, (8192,), 28672, 16, ((0, 8192, 0, 0),)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_shapes_on_the_card(case: Case) -> None:
    """All candidates for the shape, twice each: the same bits, whoever finishes last."""
    from colora.kernels.few_rows_adapter import rows_of_program
    from colora.kernels.nf4_tuning import candidates

    given = operands(case, torch.bfloat16)
    true = exact(case, given)
    for config in candidates((sum(case.outs), case.in_features), rows_of_program(case.rows), 132):
        first, second = (run(case, given, **vars(config)) for _ in range(2))
        assert (first.double() - true).norm() / true.norm() < BOUND[torch.bfloat16], config
        assert torch.equal(first, second), config


@pytest.mark.gpu
@pytest.mark.parametrize("rows, way", [(8, {}), (128, {"together": True, "blocks": 1})], ids=["few", "together"])
def test_products_that_follow_one_another(rows: int, way: dict[str, int]) -> None:
    """Each starts before the one ahead has ended, reads what that wrote and takes memory that it has freed."""
    case = Case(rows, (2048,), 2048, 16, ((0, 2048, 0, 0),))
    given = operands(case, torch.bfloat16)
    given.weight.group_scales.mul_(0.3)  # the sizes of the results stay about the same
    given.weight.offset.mul_(0.3)

    def chain(check: bool) -> Tensor:
        x = given.x
        for index in range(30):
            step = replace(given, x=x)
            y = run(replace(case, parts=case.parts if index % 3 else ()), step, splits=index % 5 + 1, **way)
            if check:
                true = exact(replace(case, parts=case.parts if index % 3 else ()), step)
                assert (y.double() - true).norm() / true.norm() < BOUND[torch.bfloat16], index
            x = y / y.float().norm() * 128 if index % 7 == 0 else y
        return x

    apart = chain(check=True)
    for _ in range(10):
        assert torch.equal(chain(check=False), apart)


@pytest.mark.gpu
def test_in_a_cuda_graph_of_the_operator() -> None:
    from colora.kernels.lora_add import LoraPart
    from colora.kernels.lora_linear import PartOffsets
    from colora.kernels.nf4_linear import nf4_linear

    case = LARGE["4b.qkv"]
    given = operands(case, torch.bfloat16)
    parts = [LoraPart("", slice(s, t), slice(b, b + t - s), slice(a, a + case.rank)) for s, t, a, b in case.parts]

    def product() -> Tensor:
        return nf4_linear(given.x, *given.weight.tensors(), None, given.a, given.b, PartOffsets(tuple(parts)))

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [product() for _ in range(20)]
    for seed in range(3):
        given.x.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
        graph.replay()
        true = exact(case, given)
        for y in outputs:
            assert (y.double() - true).norm() / true.norm() < BOUND[torch.bfloat16]
        assert torch.equal(outputs[0], product()), "as outside the graph"
