"""The codecs of pictures on a CUDA device: the same bits twice, gradients of fp64, and pictures as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_images_codec import blobs

from daybreak.images import codec, decoder, fsq
from daybreak.images.patches import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("grid", [Grid(32, 4), Grid(64, 8)], ids=["dictionary", "convolutional"])
def test_a_codec_trains_with_the_same_bits_twice(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its networks are on the GPU. Pictures come back as they do on the CPU, but for a rare value near a half."""
    monkeypatch.setattr(decoder, "LEAST_STEPS", 30)
    pixels = blobs(40, grid.px)
    one, two = (codec.train(grid, pixels, device=torch.device("cuda")) for _ in range(2))
    assert {x.device.type for x in one.parameters.values()} == {"cuda"}
    assert all(torch.equal(x, two.parameters[name]) for name, x in one.parameters.items())
    on_cpu = codec.Codec(grid, one.book, {name: x.cpu() for name, x in one.parameters.items()})
    ids = one.encode(pixels)
    assert (ids == on_cpu.encode(pixels)).mean() > 0.999
    assert np.abs(one.decode(ids).astype(int) - on_cpu.decode(ids)).max() <= 1


@pytest.mark.parametrize("px", [64, 136])
def test_gradients_are_those_of_fp64(px: int) -> None:
    grid, random = Grid(px, 8), torch.Generator().manual_seed(0)
    p = fsq.init(grid, 1, torch.float64)
    x = torch.rand(2, 3, px, px, generator=random, dtype=torch.float64) * 2 - 1
    _, right = fsq.loss_and_grads(p, grid, x)
    with decoder.exact():
        _, found = fsq.loss_and_grads({n: v.float().cuda() for n, v in p.items()}, grid, x.float().cuda())
    for name, g in right.items():
        assert float((found[name].double().cpu() - g).norm()) <= 1e-4 * float(g.norm()), name
