"""The convolutional codec: its backward against autograd in fp64, and ids that come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_images_codec import blobs
from torch import Tensor

from daybreak.data.tokenizer import get_tokenizer
from daybreak.files import sha256_of
from daybreak.images import decoder, fsq
from daybreak.images.codec import Codec, train
from daybreak.images.patches import Grid, grid_of

torch.set_num_threads(1)


@pytest.mark.parametrize(("px", "patch"), [(20, 4), (28, 4), (40, 8)])
def test_gradients_are_autograds(px: int, patch: int) -> None:
    """Odd heights in the middle, three pictures, and convolutions that begin at zero made not zero."""
    random, grid = torch.Generator().manual_seed(0), Grid(px, patch)
    p = {
        name: x + 0.1 * torch.randn(x.shape, generator=random, dtype=x.dtype)
        for name, x in fsq.init(grid, 1, torch.float64, 8).items()
    }
    x = torch.rand(3, 3, px, px, generator=random, dtype=torch.float64) * 2 - 1
    loss, grads = fsq.loss_and_grads(p, grid, x)

    def straight(z: Tensor) -> Tensor:
        levels, half, off = fsq._limits(z)
        y = torch.tanh(z + torch.atanh(off / half)) * half - off
        return (y + (y.round() - y).detach()) / (levels // 2)

    q = {name: v.clone().requires_grad_() for name, v in p.items()}
    other = (fsq.decode(q, grid, straight(fsq.encode(q, grid, x, {})), {}) - x).square().mean()
    other.backward()
    assert loss == pytest.approx(other.item(), rel=1e-14)
    assert grads.keys() == q.keys()
    for name, v in q.items():
        assert v.grad is not None
        assert float((grads[name] - v.grad).abs().max() / v.grad.abs().max()) < 1e-14, name


def test_every_id_comes_back_and_no_value_leaves_its_levels() -> None:
    ids = torch.arange(1000).view(10, 10, 10)
    values = fsq.values_of(ids)
    assert torch.equal(fsq.ids_of(values), ids)
    assert len(values.permute(0, 2, 3, 1).reshape(-1, 4).unique(dim=0)) == 1000
    for far, wanted in ((1e6, 999), (-1e6, 0)):
        z = torch.full((1, 4, 1, 1), far)
        assert fsq.ids_of(fsq.fsq_forward(z, {})).item() == wanted


def test_a_codec_for_large_pictures_learns_and_comes_back_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """136 pixels a side, in patches of 8. A few steps bring pictures nearer, and the file gives the same ids."""
    pixels, grid = np.repeat(np.repeat(blobs(12, 8), 17, axis=1), 17, axis=2), grid_of(136)
    assert (grid.patch, grid.N, grid_of(128).patch) == (8, 289, 4)
    found = []
    for steps in (1, 40):
        monkeypatch.setattr(decoder, "LEAST_STEPS", steps)
        codec = train(grid, pixels)
        ids = codec.encode(pixels)
        assert (ids.shape, codec.K) == ((12, 289), 1000)
        assert 0 <= ids.min() <= ids.max() < 1000
        found.append(codec.psnr(pixels))
    assert found[1] > found[0] + 3
    codec.save(tmp_path / "codec.safetensors", D=304)
    digest = sha256_of(tmp_path / "codec.safetensors")
    tokenizer = get_tokenizer(f"bytes+img-{digest[:12]}", tmp_path)
    assert (tokenizer.pictures.K, tokenizer.pictures.N, tokenizer.V) == (1000, 289, 257 + 1002)
    back = Codec.load(tmp_path, tokenizer)
    assert np.array_equal(back.encode(pixels), ids)
    assert np.array_equal(back.decode(ids), codec.decode(ids))
