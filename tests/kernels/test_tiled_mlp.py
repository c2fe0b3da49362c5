"""The MLP in tiles against the MLP at once, in double precision."""

import pytest
import torch
from colora.kernels.tiled_mlp import tiled_add_, tiled_gradients, tiles
from torch import Tensor

ROWS = pytest.mark.parametrize(("tokens", "tile"), [(1, 1), (1, 7), (7, 7), (8, 7), (13, 4), (23, 100), (9, 1)])


class MLP:
    """A gated MLP with two trained matrices; notes how many rows it is given at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.gate_up = torch.randn(10, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.down = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
        self.rows: list[int] = []

    @property
    def parameters(self) -> list[Tensor]:
        return [self.gate_up, self.down]

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        gate, up = (x @ self.gate_up.T).chunk(2, dim=1)
        return (gate.sigmoid() * up) @ self.down.T


def random(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@ROWS
def test_tiles_cover_the_row_in_order_and_are_of_nearly_one_length(tokens: int, tile: int) -> None:
    cut = tiles(tokens, tile)
    assert [row for rows in cut for row in range(tokens)[rows]] == list(range(tokens))
    lengths = [rows.stop - rows.start for rows in cut]
    assert max(lengths) <= tile and max(lengths) - min(lengths) <= 1


@ROWS
def test_forward_equals_the_whole(tokens: int, tile: int) -> None:
    mlp, x, residual = MLP(), random(tokens, 2), random(tokens, 3)
    expected = residual + mlp(x).detach()
    mlp.rows.clear()
    out = tiled_add_(residual, x, mlp, tile)
    assert out is residual and not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    assert max(mlp.rows) <= tile and sum(mlp.rows) == tokens


@ROWS
def test_gradients_equal_autograd_and_each_row_is_computed_once(tokens: int, tile: int) -> None:
    mlp, x, grad = MLP(), random(tokens, 2).requires_grad_(), random(tokens, 4)
    expected = torch.autograd.grad(mlp(x), [x, *mlp.parameters], grad)
    mlp.rows.clear()
    grad_x, sums = tiled_gradients(x, grad, mlp, mlp.parameters, tile)
    for ours, theirs in zip([grad_x, *sums], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert max(mlp.rows) <= tile and sum(mlp.rows) == tokens


def test_only_what_is_wanted_is_computed() -> None:
    mlp, grad = MLP(), random(9, 4)
    expected = torch.autograd.grad(mlp(random(9, 2)), mlp.parameters, grad)
    grad_x, sums = tiled_gradients(random(9, 2), grad, mlp, mlp.parameters, 4)
    assert grad_x is None
    torch.testing.assert_close(sums, list(expected), rtol=1e-12, atol=1e-12)
    for parameter in mlp.parameters:
        parameter.requires_grad_(False)
    grad_x, sums = tiled_gradients(random(9, 2).requires_grad_(), grad, mlp, [], 4)
    assert grad_x is not None and sums == []
    assert tiled_gradients(random(9, 2), grad, mlp, [], 4) == (None, [])


def test_gradients_of_parameters_are_summed_in_their_dtype() -> None:
    """1 and 255 times 2^-9: added up one after the other in bf16 the small ones would be lost."""
    parameter = torch.ones(1, 1, requires_grad=True)
    x = torch.full((256, 1), 2.0**-9, dtype=torch.bfloat16)
    x[0] = 1.0
    _, (total,) = tiled_gradients(x, torch.ones_like(x), lambda rows: rows * parameter.bfloat16(), [parameter], 1)
    assert total.dtype == torch.float32 and total.item() == 1 + 255 / 512


def test_a_tile_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a tile has at least 1 token, got 0"):
        tiles(5, 0)
