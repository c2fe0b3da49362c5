"""A checkpointed block against the same block with everything kept, in double precision."""

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from colora.kernels.attention import KeptAttention, kept_attention, packed_attention
from colora.kernels.block_checkpoint import checkpointed_block
from colora.kernels.host_memory import Copies
from colora.kernels.offload import ActivationOffload
from torch import Tensor

from ..attention_on_cpu import play_kernels


class Block:
    """Mixes tokens in its first half and not in its second; each half has a matrix, which may be frozen."""

    def __init__(self, seed: int = 0, attention: bool = True, mlp: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_(attention)
        self.up = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_(mlp)
        self.attended, self.from_kept, self.rows, self.fail = 0, 0, [], False

    def attend(self, x: Tensor, factor: float, kept: KeptAttention | None = None) -> tuple[Tensor, Tensor]:
        self.attended += 1
        if self.fail:
            raise ArithmeticError("no")
        mixed = x.cumsum(0) @ self.mix
        if kept is not None:
            kept.fill()
        if kept is not None and kept.out is not None:
            self.from_kept += 1
            mixed = mixed + (kept.out - mixed.detach())  # 0 where it is the block's own
        elif kept is not None:
            kept.out, kept.log_sum = mixed.detach().clone(), mixed.detach().T.float()
        residual = x + factor * mixed.tanh()
        return residual.sin(), residual

    def feed_forward(self, normed: Tensor) -> Tensor:
        self.rows.append(len(normed))
        return (normed @ self.up).sigmoid() * normed

    def attention_parameters(self) -> Sequence[Tensor]:
        return [self.mix] if self.mix.requires_grad else []

    def feed_forward_parameters(self) -> Sequence[Tensor]:
        return [self.up] if self.up.requires_grad else []

    def __call__(self, x: Tensor, factor: float) -> Tensor:
        normed, residual = self.attend(x, factor)
        return residual + self.feed_forward(normed)


def row(tokens: int = 7) -> Tensor:
    return torch.randn(tokens, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def run(
    blocks: list[Block], x: Tensor, tile: int, offload: ActivationOffload | None, keep_attention: bool = False
) -> Tensor:
    more = (x, x.T.float()) if keep_attention else ()
    inputs = None if offload is None else offload.begin(x, len(blocks), more)
    for index, block in enumerate(blocks):
        x = checkpointed_block(block, x, (0.5,), tile, inputs, index)
    return x


def leaves(blocks: list[Block]) -> list[Tensor]:
    return [p for block in blocks for p in (*block.attention_parameters(), *block.feed_forward_parameters())]


@pytest.mark.parametrize("keep", [None, 1, 2], ids=["on_device", "offload", "offload_two_kept"])
@pytest.mark.parametrize(("tokens", "tile"), [(7, 3), (7, 100), (1, 1), (8, 7)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["both", "attention", "mlp"])
def test_gradients_equal_those_with_everything_kept(
    keep: int | None, tokens: int, tile: int, trained: tuple[bool, bool]
) -> None:
    offload = None if keep is None else ActivationOffload(torch.device("cpu"), keep)
    blocks = [Block(seed, *trained) for seed in range(3)]
    x = row(tokens)  # the first block's input needs no gradient, as embeddings do not
    expected = x
    for block in blocks:
        expected = block(expected, 0.5)
    gradients = torch.autograd.grad(expected.square().sum(), leaves(blocks))
    out = run(blocks, x, tile, offload)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out.square().sum(), leaves(blocks))
    torch.testing.assert_close(ours, gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keep", [1, 2, 3, 7])
def test_what_attention_left_is_used_again(keep: int) -> None:
    blocks, x = [Block(seed) for seed in range(3)], row()
    expected = torch.autograd.grad(run(blocks, x, 3, None).square().sum(), leaves(blocks))
    offload = ActivationOffload(torch.device("cpu"), keep)
    out = run(blocks, x, 3, offload, keep_attention=True)
    assert [block.from_kept for block in blocks] == [0, 0, 0]
    ours = torch.autograd.grad(out.square().sum(), leaves(blocks))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert [block.from_kept for block in blocks] == [1, 1, 1]
    assert offload.host_bytes == max(0, 3 - keep) * (2 * x.nbytes + x.nbytes // 2)


HEADS = 4


class AttentionBlock(Block):
    """With softmax attention in its first half, of `HEADS` heads."""

    def __init__(self, seed: int, x: Tensor, events: list[str]):
        super().__init__(seed)
        generator, width = torch.Generator().manual_seed(seed), x.shape[1]
        self.mix = (torch.randn(width, 3 * width, generator=generator) / width**0.5).to(x).requires_grad_()
        self.up = (torch.randn(width, width, generator=generator) / width**0.5).to(x).requires_grad_()
        self.events = events

    def attend(self, x: Tensor, factor: float, kept: KeptAttention | None = None) -> tuple[Tensor, Tensor]:
        self.events.append("projections")
        q, k, v = (x @ self.mix).unflatten(1, (3, HEADS, -1)).unbind(1)
        residual = x + factor * packed_attention(q, k, v, [len(x)], 0.3, kept=kept).flatten(1)
        return residual.sin(), residual

    def feed_forward(self, normed: Tensor) -> Tensor:
        self.events.append("mlp")
        return super().feed_forward(normed)


class RecordedCopies(Copies):
    def __init__(self, names: dict[torch.Size, str], events: list[str]):
        super().__init__(torch.device("cpu"))
        self.names, self.events = names, events

    def start(self, target: Tensor, source: Tensor, compute: None) -> None:
        super().start(target, source, compute)
        self.events.append(self.names[target.shape])


def run_attention(blocks: list[AttentionBlock], x: Tensor, offload: ActivationOffload | None) -> Tensor:
    likes = kept_attention(x, HEADS, x.shape[1] // HEADS)
    inputs = None if offload is None else offload.begin(x, len(blocks), likes)
    for index, block in enumerate(blocks):
        x = checkpointed_block(block, x, (0.5,), 8192, inputs, index)
    return x


def test_what_attention_left_comes_back_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    played, events = play_kernels(monkeypatch), []
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    blocks = [AttentionBlock(seed, x, events) for seed in range(3)]
    expected = torch.autograd.grad(run_attention(blocks, x, None).square().sum(), leaves(blocks))
    offload = ActivationOffload(torch.device("cpu"), keep=1)
    shapes = [x.shape, *(like.shape for like in kept_attention(x, HEADS, 2))]
    offload.copies = RecordedCopies(dict(zip(shapes, ("input", "out", "log_sum"), strict=True)), events)
    out = run_attention(blocks, x, offload)
    events.clear()
    before = played.forwards, played.backwards
    ours = torch.autograd.grad(out.square().sum(), leaves(blocks))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (played.forwards, played.backwards) == (before[0], before[1] + 3)
    # While a block is differentiated there is the next one's input, and nothing else of it.
    last, middle, first = ["input", "projections", "mlp"], ["input", "projections", "mlp"], ["projections", "mlp"]
    assert events == [*last, "out", "log_sum", *middle, "out", "log_sum", *first]
    assert offload.host_bytes == 2 * (2 * x.nbytes + HEADS * 7 * 4)


def test_what_attention_left_is_loaded_once() -> None:
    there = [torch.zeros(1), torch.ones(1)]
    kept = KeptAttention(load=lambda: [there.pop(0), there.pop(0)])
    for _ in range(2):
        kept.fill()
        assert kept.out is not None and kept.log_sum is not None and (kept.out.item(), kept.log_sum.item()) == (0, 1)
    nothing = KeptAttention(load=list)
    nothing.fill()
    assert nothing == KeptAttention()


@pytest.mark.gpu
def test_of_what_waits_two_inputs_are_on_the_gpu_at_the_peak() -> None:
    """The block's own and the next one's. Besides them a pass needs what one does that keeps all inputs on the GPU,
    whose first is not counted, as it is there before."""
    layers, device = 8, torch.device("cuda")
    x = torch.randn(32768, 512, dtype=torch.bfloat16, device=device)
    blocks, offload = [AttentionBlock(seed, x, []) for seed in range(layers)], ActivationOffload(device, keep=1)

    def peak(offload: ActivationOffload | None) -> int:
        for _ in range(2):  # the first time makes the parameters' gradients and what libraries keep
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run_attention(blocks, x, offload).square().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    saved = peak(None) - peak(offload)
    assert offload.host_bytes == (layers - 1) * (2 * x.nbytes + HEADS * len(x) * 4)  # attention's results as well
    assert layers - 1 - saved / x.nbytes < 2.5


def test_gradient_of_the_input() -> None:
    block = Block()
    assert torch.autograd.gradcheck(lambda x: checkpointed_block(block, x, (0.5,), 3), row().requires_grad_())
    frozen = Block(0, False, False)
    assert torch.autograd.gradcheck(lambda x: checkpointed_block(frozen, x, (0.5,), 3), row().requires_grad_())


def test_the_mlp_is_computed_twice_in_all() -> None:
    """Once forward and once for the gradients: what checkpointing costs anyway."""
    block = Block()
    out = checkpointed_block(block, row(), (0.5,), 3)
    assert (block.attended, block.rows) == (1, [2, 2, 3])
    out.sum().backward()
    assert (block.attended, block.rows) == (2, [2, 2, 3] * 2)


def test_without_a_graph_the_same_bits_and_nothing_kept() -> None:
    offload, blocks = ActivationOffload(torch.device("cpu"), keep=1), [Block(0), Block(1)]
    out = run(blocks, row(), 3, offload)
    with torch.no_grad():
        scored = run(blocks, row(), 3, offload)
    assert not scored.requires_grad and torch.equal(scored, out.detach())
    assert not run([Block(0, False, False)], row(), 3, offload).requires_grad


def test_gradients_add_up_over_graphs_that_live_at_once() -> None:
    offload, blocks = ActivationOffload(torch.device("cpu"), keep=1), [Block(0), Block(1), Block(2)]
    rows = [row(5), row(7) + 1]
    expected = [torch.autograd.grad(run(blocks, x, 3, None).sum(), leaves(blocks)) for x in rows]
    outs = [run(blocks, x, 3, offload) for x in rows]
    for out in outs:
        out.sum().backward()
    for index, leaf in enumerate(leaves(blocks)):
        torch.testing.assert_close(leaf.grad, expected[0][index] + expected[1][index], rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_dropped_frees_everything() -> None:
    """Without the garbage collector: a cycle would hold a micro-batch's inputs until it happens to run."""
    offload, blocks = ActivationOffload(torch.device("cpu"), keep=2), [Block(0), Block(1), Block(2)]
    gc.collect()
    gc.disable()
    try:
        x = row()
        inputs = offload.begin(x, 3)
        gone = weakref.ref(inputs)
        for index, block in enumerate(blocks):
            x = checkpointed_block(block, x, (0.5,), 3, inputs, index)
        del x, inputs
        assert gone() is None
    finally:
        gc.enable()
    assert offload.host_bytes == row().nbytes


def test_after_an_exception_the_next_pass_is_right() -> None:
    offload, blocks = ActivationOffload(torch.device("cpu"), keep=1), [Block(0), Block(1), Block(2)]
    expected = torch.autograd.grad(run(blocks, row(), 3, None).sum(), leaves(blocks))
    for backward in (False, True):
        out = run(blocks, row(), 3, offload) if backward else None
        blocks[1].fail = True
        with pytest.raises(ArithmeticError):
            out.sum().backward() if out is not None else run(blocks, row(), 3, offload)
        del out
        blocks[1].fail = False
    for leaf in leaves(blocks):
        leaf.grad = None
    gc.collect()  # tracebacks hold frames
    ours = torch.autograd.grad(run(blocks, row(), 3, offload).sum(), leaves(blocks))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert offload.host_bytes == 2 * row().nbytes


def test_a_second_walk_over_the_graph() -> None:
    block, offload = Block(), ActivationOffload(torch.device("cpu"), keep=1)
    out = checkpointed_block(block, row(), (0.5,), 3).sum()
    first = torch.autograd.grad(out, leaves([block]), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, leaves([block])), first)
    out = run([block, block], row(), 3, offload).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a graph can be walked once"):
        out.backward()


def test_parameters_that_change_before_the_backward_pass_are_noticed() -> None:
    block = Block()
    out = checkpointed_block(block, row(), (0.5,), 3)
    block.mix.requires_grad_(False)
    with pytest.raises(RuntimeError, match="block 0: the adapter was switched on or off"):
        out.sum().backward()
