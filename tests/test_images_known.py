"""Pictures that a model has not seen, told by likelihood: the caption that makes one likeliest. All with `--full`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from daybreak.cli.main import main
from daybreak.data.dataset import open_dataset
from daybreak.data.shards import open_shard
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine
from daybreak.images.emoji import FONT, NAMES
from daybreak.images.png import write_png
from daybreak.state.run import Run

torch.set_num_threads(1)
TONES = ["medium-light", "medium-dark", "light", "medium", "dark"]


def documents(folder: Path, split: str) -> tuple[Tokenizer, list[str], NDArray[np.int64]]:
    """The tokenizer of a set, and the captions and pictures (n, N + 1 ids, the end included) of a split."""
    dataset = open_dataset(str(folder))
    tokenizer = get_tokenizer(dataset.tokenizer_name, folder)
    ids = np.concatenate([np.array(open_shard(shard))[:-1] for shard in getattr(dataset, split)]).astype(np.int64)
    p = tokenizer.pictures
    rows = ids.reshape(-1, p.D)
    captions = [tokenizer.decode(int(i) for i in row[: p.room + 1] if i != tokenizer.eot) for row in rows]
    return tokenizer, captions, rows[:, -p.N - 1 :]


def likeliest(engine: Engine, tokenizer: Tokenizer, picture: NDArray[np.int64], captions: Sequence[str]) -> int:
    """The place of the caption under which the picture's codes have the highest probability together."""
    p, found = tokenizer.pictures, list[float]()
    heads = [p.head(tokenizer.encode(caption)[: p.room].tolist(), tokenizer.eot) for caption in captions]
    rows = torch.from_numpy(np.array([[*head, *picture] for head in heads]))
    for part in rows.split(engine.B):
        whole = torch.cat([part, part[:1].expand(engine.B - len(part), -1)])
        losses = engine.eval_losses(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())
        found += losses[: len(part), -p.N - 1 : -1].double().sum(1).tolist()
    return int(np.argmin(found))


def loaded(run: str, tokenizer: Tokenizer, B: int) -> Engine:
    """A run's engine for B documents without their last token."""
    config = Run(run).config
    assert config.T == tokenizer.pictures.D
    return Run(run).load_engine(B=B)[0]


def test_a_digit_is_told_by_the_name_that_makes_it_likeliest(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: at least 85 % of the held-out ones. Twice as large,
    a patch is one of their pixels, of which there are 17 kinds, so nothing is lost."""
    if not full:
        pytest.skip("a minute of training; make test-images")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    monkeypatch.chdir(tmp_path)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = (255 - np.kron(image, np.ones((2, 2))) * 255 / 16).round().astype(np.uint8)
        path = Path("digits", words[target], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, np.repeat(grey[..., None], 3, axis=2))
    assert (
        main(["prepare", "digits", "--as", "images", "--px", "16", "--tokenizer", "bytes", "--val-fraction", "0.2"])
        == 0
    )
    tokenizer, captions, pictures = documents(Path("data/digits-bytes"), "val")
    assert (tokenizer.pictures.K, tokenizer.pictures.N) == (17, 64)
    keys = {"model.L": 3, "model.C": 64, "model.NH": 2, "model.V": tokenizer.V, "model.max_T": tokenizer.pictures.D,
            "batch.B": 32, "eval.every": 0, "eval.sample_tokens": 0, "run.steps": 400, "optim.lr": 3e-3}  # fmt: skip
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert (
        main(["train", "shapes", "--data", "digits-bytes", "--data.tokenizer", "bytes", "--name", "digits", *flags])
        == 0
    )
    engine = loaded("runs/digits", tokenizer, len(words))
    right = [words[likeliest(engine, tokenizer, x, words)] == c for c, x in zip(captions, pictures, strict=True)]
    print(f"\n{100 * np.mean(right):.1f} % of {len(right)} held-out digits")
    assert len(right) > 250
    assert np.mean(right) >= 0.85


@pytest.mark.skipif(not (FONT.is_file() and NAMES.is_file()), reason="needs Debian's colour font")
def test_a_held_out_variant_of_an_emoji_is_told_among_sixteen(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skin tones that were held out, of people that were seen in others: at least 90 % of 200 captions are right."""
    if not full:
        pytest.skip("minutes of training; make test-images")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "emoji", "--tokenizer", "gpt2-1024"]) == 0
    folder = Path("data/emoji-gpt2-1024")
    tokenizer, captions, pictures = documents(folder, "val")
    known = {untoned(caption) for caption in documents(folder, "train")[1]}
    keys = {"model.L": 4, "model.C": 128, "model.NH": 4, "model.V": tokenizer.V, "model.max_T": tokenizer.pictures.D,
            "batch.B": 16, "eval.every": 0, "eval.sample_tokens": 0, "run.steps": 500}  # fmt: skip
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert main(["train", "shapes", "--data", "emoji-gpt2-1024", "--name", "emoji", *flags]) == 0
    engine, random = loaded("runs/emoji", tokenizer, 16), np.random.default_rng(0)
    variants = [i for i, c in enumerate(captions) if "skin tone" in c and untoned(c) in known][:200]
    right = []
    for i in variants:
        others = random.permutation([j for j in range(len(captions)) if captions[j] != captions[i]])[:15]
        right.append(likeliest(engine, tokenizer, pictures[i], [captions[j] for j in (i, *others)]) == 0)
    print(f"\n{100 * np.mean(right):.1f} % of {len(right)} held-out variants")
    assert len(right) > 100
    assert np.mean(right) >= 0.9


def untoned(caption: str) -> str:
    """A caption without its skin tones."""
    for tone in TONES:
        caption = caption.replace(f"{tone} skin tone", "")
    return " ".join(caption.replace(",", "").split())
