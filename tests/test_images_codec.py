"""The codec of pictures: the decoder's gradients against autograd, exact dictionaries, k-means, its file, PNG."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import DataError
from daybreak.images import codec, decoder, patches
from daybreak.images.patches import Grid, fit, grid_of, nearest
from daybreak.images.png import png, sheet
from daybreak.images.scenes import scenes

torch.set_num_threads(1)
F = torch.nn.functional


def blobs(count: int, px: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures of many colours, which no small dictionary holds."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:px, :px] / px
    made = np.empty((count, px, px, 3))
    for i in range(count):
        a, b, c = random.uniform(0.5, 3, (3, 3))
        made[i] = 127.5 + 127.5 * np.sin(a * x[..., None] * 3 + b * y[..., None] * 3 + 6 * c)
    return made.round().astype(np.uint8)


class Oracle(torch.nn.Module):
    """The decoder of decoder.py's picture, from torch's own layers."""

    def __init__(self, patch: int, w: int) -> None:
        super().__init__()
        conv, self.patch = torch.nn.Conv2d, patch
        self.layers = torch.nn.ModuleDict({"norm": torch.nn.GroupNorm(8, w), "up": conv(2 * w, 4 * w, 1)})
        self.layers["in"] = conv(3 * patch**2, 2 * w, 3, padding=1)
        self.layers["out"] = conv(w, 3 * patch**2 // 4, 3, padding=1)
        for name, c in (("r0", 2 * w), ("r1", 2 * w), ("r2", w)):
            self.layers[f"{name}_norm"] = torch.nn.GroupNorm(8, c)
            self.layers[f"{name}_a"], self.layers[f"{name}_b"] = conv(c, c, 3, padding=1), conv(c, c, 1)

    def res(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.layers[f"{name}_a"](F.silu(self.layers[f"{name}_norm"](x)))
        return x + self.layers[f"{name}_b"](F.silu(h))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.res("r1", self.res("r0", self.layers["in"](x)))
        h = self.res("r2", F.pixel_shuffle(self.layers["up"](h), 2))
        h = self.layers["out"](F.silu(self.layers["norm"](h)))
        return F.pixel_shuffle(x, self.patch) + F.pixel_shuffle(h, self.patch // 2)


@pytest.mark.parametrize(("px", "patch", "b"), [(20, 4, 3), (10, 2, 1), (12, 4, 2)])
def test_every_gradient_of_the_decoder_equals_autograds_in_fp64(px: int, patch: int, b: int) -> None:
    grid, random = Grid(px, patch), torch.Generator().manual_seed(7)
    p = decoder.init(grid, 1, torch.float64)
    for value in p.values():  # zeros would hide errors behind them
        value += 0.1 * torch.randn(value.shape, generator=random, dtype=torch.float64)
    x = torch.rand(b, 3 * patch**2, grid.side, grid.side, generator=random, dtype=torch.float64) * 2 - 1
    pictures = torch.rand(b, 3, px, px, generator=random, dtype=torch.float64) * 2 - 1
    oracle = Oracle(patch, decoder.WIDTH).double()
    theirs = {}
    for name, value in p.items():
        layer, _, part = name.rpartition(".")
        module = oracle.layers[layer.replace(".", "_")]
        theirs[name] = module.weight if part == "w" else module.bias
        theirs[name].data.copy_(value)
    loss = F.mse_loss(oracle(x), pictures)
    loss.backward()
    ours, g = decoder.loss_and_grads(p, grid, x, pictures)
    assert ours == pytest.approx(loss.item(), rel=1e-13)
    assert g.keys() == p.keys()
    for name, value in g.items():
        assert value.shape == p[name].shape
        error = (value - theirs[name].grad).abs().max() / theirs[name].grad.abs().max()
        assert error <= 1e-12, name


def test_a_new_decoder_adds_nothing_to_the_patches() -> None:
    grid = Grid(16, 4)
    x = torch.rand(2, 48, 4, 4)
    assert torch.equal(decoder.forward(decoder.init(grid, 3), grid, x, {}), F.pixel_shuffle(x, 4))


def test_patches_are_cut_by_hand_and_join_again() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    grid = Grid(8, 4)
    parts = grid.cut(pictures)
    assert parts.shape == (2, 4, 48)
    assert np.array_equal(parts[1, 2], pictures[1, 4:8, 0:4].transpose(2, 0, 1).ravel())  # second row, first column
    assert np.array_equal(grid.join(parts), pictures)


def test_ids_are_the_nearest_patches_whatever_the_threads() -> None:
    random = np.random.default_rng(1)
    book, parts = random.integers(0, 256, (50, 12), np.uint8), random.integers(0, 256, (3, 200, 12), np.uint8)
    book[30] = book[20]  # of equals the first
    parts[0, 0] = book[30]
    distance = np.square(parts[:, :, None].astype(np.int64) - book).sum(-1)
    assert np.array_equal(nearest(book, parts), distance.argmin(-1))
    assert nearest(book, parts)[0, 0] == 20
    torch.set_num_threads(3)
    assert np.array_equal(nearest(book, parts), distance.argmin(-1))
    torch.set_num_threads(1)


def test_shapes_come_back_to_the_pixel() -> None:
    pictures = np.stack([x for _, x in scenes()][::37])
    made = codec.train(grid_of(16), pictures)
    assert (len(made.book), made.grid.N, made.parameters) == (79, 64, {})
    assert np.array_equal(made.decode(made.encode(pictures)), pictures)
    assert made.psnr(pictures) == float("inf")


def test_centres_are_better_than_patches_at_random_and_the_decoder_better_than_centres(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patches, "ROUNDS", 80)
    pictures, held_out = blobs(120, 16), blobs(20, 16, seed=5)
    grid = Grid(16, 4)
    made = codec.train(grid, pictures)
    assert made.parameters
    assert 500 < len(made.book) <= 1000
    parts = grid.cut(pictures).reshape(-1, 48)
    chosen = parts[np.random.default_rng(0).permutation(len(parts))[: len(made.book)]]
    at_random, centres = codec.Codec(grid, chosen), codec.Codec(grid, made.book)
    assert at_random.psnr(held_out) + 0.3 < centres.psnr(held_out)
    assert centres.psnr(held_out) + 0.3 < made.psnr(held_out)
    again = codec.train(grid, pictures)
    assert np.array_equal(again.book, made.book)
    assert all(torch.equal(again.parameters[name], made.parameters[name]) for name in made.parameters)
    ids = made.encode(held_out)
    assert np.array_equal(made.decode(ids)[:1], made.decode(ids[:1]))


def test_few_kinds_of_patches_are_a_dictionary_of_them_all() -> None:
    parts = np.random.default_rng(2).integers(0, 2, (4000, 8), np.uint8)
    book, exact = fit(parts, 0, lambda: None)
    assert exact
    assert {tuple(row) for row in book} == {tuple(row) for row in parts}


def test_a_codec_is_read_as_it_was_saved_and_refused_when_it_changes(tmp_path: Path) -> None:
    made = codec.train(Grid(16, 4), blobs(40, 16))
    path = tmp_path / "codec.safetensors"
    made.save(path, 40)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tokenizer = get_tokenizer(f"gpt2-1024+img-{digest[:12]}", tmp_path)
    K = len(made.book)
    assert (tokenizer.V, tokenizer.text_V, tokenizer.eot) == (1025 + K + 2, 1025, 1024)
    assert tokenizer.pictures == (1025, K, 16, 40)
    assert (tokenizer.pictures.boi, tokenizer.pictures.eoi) == (1025 + K, 1026 + K)
    assert tokenizer.encode("a red").tolist() == get_tokenizer("gpt2-1024").encode("a red").tolist()
    assert tokenizer.lengths(tokenizer.V)[1024:].sum() == 0
    back = codec.Codec.load(tmp_path, tokenizer)
    ids = made.encode(blobs(3, 16, seed=9))
    assert np.array_equal(back.decode(ids), made.decode(ids))
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(
        DataError, match=rf"codec\.safetensors is codec \w+, not {digest[:12]}; bring the old file back"
    ):
        get_tokenizer(tokenizer.name, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"codec\.safetensors is missing, and tokenizer gpt2-1024\+img-"):
        get_tokenizer(tokenizer.name, tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    ({"K": 0}, "K = 0 must be a whole number from 1 to 2"),
    ({"N": "16"}, "N = '16' must be a whole number"),
    ({"format": 3}, "has format 3, and this daybreak reads 1 and 2; update daybreak"),
    ({"D": 17}, "D = 17 must be at least N \\+ 3 = 19"),
])  # fmt: skip
def test_a_codec_of_somebody_else_is_checked(tmp_path: Path, change: dict[str, object], said: str) -> None:
    numbers = {"format": 1, "px": 16, "patch": 4, "K": 5, "N": 16, "D": 40} | change
    path = tmp_path / "codec.safetensors"
    save_file({"book": torch.zeros(5, 48, dtype=torch.uint8)}, path, {"daybreak": json.dumps(numbers)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=said):
        get_tokenizer(f"bytes+img-{digest[:12]}", tmp_path)


def test_png_is_as_the_standard_says_and_as_pillow_reads_it() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    data = png(pixels)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I4sIIBBBBB", data[8:29]) == (13, b"IHDR", 7, 5, 8, 2, 0, 0, 0)
    assert struct.unpack(">I", data[29:33])[0] == zlib.crc32(data[12:29])
    image = pytest.importorskip("PIL.Image")
    with image.open(io.BytesIO(data)) as file:
        file.load()
        assert (file.format, file.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(file), pixels)
    assert sheet(np.stack([pixels] * 3), 2).shape == (2 * 7, 2 * 9, 3)
