"""Rows picked into a smaller matrix, and their gradients carried back: copies, so all is compared bit for bit."""

from __future__ import annotations

import interpreter  # noqa: F401
import numpy as np
import pytest
import torch
from kernel_harness import DEVICE, draw, each_backend, each_dtype, poison, run, skip_unless_served

from daybreak.engine.passes import PARTS, learned_part, rows_of
from daybreak.kernels.cuda import pick as cuda_pick

# n and C; below and beyond a program's rows and columns, one row, one column, and every width of a program
SHAPES = [(1, 1), (3, 5), (8, 512), (13, 700), (67, 33), (40, 1025), (21, 768), (35, 640), (67, 576), (13, 1024)]


def some_targets(n: int, learned: float) -> torch.Tensor:
    """n targets, of which about this share is learned."""
    g = torch.Generator().manual_seed(n)
    targets = torch.randint(1000, (n,), generator=g)
    targets[torch.rand(n, generator=g) >= learned] = -1
    return targets


@each_backend
@each_dtype
@pytest.mark.parametrize(("n", "C"), SHAPES)
@pytest.mark.parametrize("learned", [0.0, 0.4, 1.0])
def test_pick(backend, dtype, n, C, learned):
    skip_unless_served("pick_forward", backend, dtype)
    targets, at = some_targets(n, learned), torch.empty(n, dtype=torch.int32)
    r = rows_of(learned_part(targets.numpy(), at.numpy()), n)
    targets, at = targets.to(DEVICE), at.to(DEVICE)
    x, out = draw(n, C, dtype=dtype), poison(r, C, dtype=dtype)
    x[targets < 0] += torch.inf  # copied or left out, and never computed with
    picked = torch.full((r,), -77, device=DEVICE)
    run("pick_forward", out, picked, x, targets, at, backend=backend)
    rows = [at.tolist().index(i) for i in range(r)]
    assert torch.equal(out, x[rows])
    assert torch.equal(picked, targets[rows])
    d_out, dx = draw(r, C, dtype=dtype, seed=1), poison(n, C, dtype=dtype)
    want = torch.zeros_like(dx)
    want[rows] = d_out
    run("pick_backward", dx, d_out, at, backend=backend)
    assert torch.equal(dx, want)
    assert not torch.signbit(dx[at >= r]).any()


@each_backend
def test_a_gradient_that_is_not_finite_stays_in_its_row(backend):
    """The reference reads the last row for every row that is left out."""
    at = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=DEVICE)
    d_out, dx = draw(2, 9, dtype=torch.float32), poison(4, 9, dtype=torch.float32)
    d_out[1] = torch.nan
    run("pick_backward", dx, d_out, at, backend=backend)
    assert dx.isnan().all(1).tolist() == [False, False, False, True]
    assert torch.equal(dx[1], d_out[0])
    assert not dx[[0, 2]].any()


def test_shapes_cover_every_tile():
    """Every width of a program, with several programs and a last one of fewer rows; one also with fewer columns."""
    seen, partly = set(), False
    for n, C in SHAPES:
        (programs,), how = cuda_pick.launch(n, C)
        rows, cols = how["ROWS"], how["COLS"]
        assert rows * cols == cuda_pick.TILE
        assert programs == -(-n // rows) * -(-C // cols)
        if n > rows and n % rows and cols < C:
            seen.add(cols)
            partly |= C % cols > 0
    assert seen == {64, 128, 256, 512}
    assert partly


@pytest.mark.parametrize(
    ("C", "cols"), [(576, 64), (768, 256), (896, 128), (960, 64), (1536, 512), (1600, 64), (2048, 512), (4096, 512)]
)
def test_no_lane_is_idle_with_sizes_of_models(C, cols):
    assert cuda_pick.launch(8, C)[1]["COLS"] == cols
    assert C % cols == 0


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 64, 67])
def test_the_rows_of_the_head(n):
    """The fewest eighths that hold the learned rows: those come first and in order, then the others in order."""
    for k in range(n + 1):
        targets = np.full(n, -1)
        learned = np.sort(np.random.default_rng(k).permutation(n)[:k])
        targets[learned] = 5
        at = np.full(n, 99, np.int32)
        part = learned_part(targets, at)
        assert part == min(e for e in range(1, PARTS + 1) if e * n >= PARTS * k)
        assert k <= rows_of(part, n) <= n
        assert rows_of(part, n) - k <= -(-n // PARTS)
        assert at[learned].tolist() == list(range(k))
        assert at[targets < 0].tolist() == list(range(k, n))
    assert part == PARTS
