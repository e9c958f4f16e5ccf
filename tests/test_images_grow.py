"""A model of text learns pictures too: `--init-from` with a larger vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_images_codec import blobs

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.images.png import write_png
from daybreak.images.prepare import prepare_images
from daybreak.state.run import Run

torch.set_num_threads(1)
QUICK = ["--run.device", "cpu", "--eval.sample_tokens", "0", "--eval.every", "0", "--quiet"]


def train(*words: str) -> int:
    return main(["train", *words, *QUICK])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, and pictures whose text has the same tokenizer."""
    folder = tmp_path_factory.mktemp("grow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("set").mkdir()
        for i, picture in enumerate(blobs(30, 8)):
            write_png(Path(f"set/picture-{i}.png"), picture)
        Path("a.txt").write_text("\n\n".join(f"{i} spam and eggs, " * 9 for i in range(60)))
        prepare_images(["set"], tokenizer="bytes", px=8, val_fraction=0.3)
        prepare_images(["set"], tokenizer="gpt2-300", name="others", px=8, val_fraction=0.3)
        assert main(["prepare", "a.txt", "--tokenizer", "bytes"]) == 0
        D = get_tokenizer(json.loads(Path("data/set-bytes/manifest.json").read_text())["tokenizer"],
                          Path("data/set-bytes")).pictures.D  # fmt: skip
        shape = ["--model.L", "1", "--model.C", "32", "--model.NH", "2", "--model.max_T", str(D), "--batch.B", "2"]
        Path("shape.json").write_text(json.dumps(shape))
        assert train("d12", "--data", "a-bytes", "--name", "text", "--steps", "3", *shape, "--model.V", "257") == 0
        llama = ["--model.arch", "llama", "--model.NKV", "2", "--model.F", "64", "--model.tied", "false"]
        assert (
            train("d12", "--data", "a-bytes", "--name", "untied", "--steps", "3", *llama, *shape, "--model.V", "257")
            == 0
        )
    return folder


@pytest.mark.parametrize(("name", "tables"), [("text", ["wte"]), ("untied", ["wte", "headw"])])
def test_new_ids_begin_at_the_mean_of_the_known_ones_and_all_else_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, tables: list[str]
) -> None:
    """700 ids, where 627 are enough: more than the padding of the text's 257 has. Each row is that mean and what the
    family draws for it. Moments are zero."""
    monkeypatch.chdir(home)
    old = Run(f"runs/{name}")
    flags = [w for k, v in vars(old.config.model).items() if k in ("NKV", "F") for w in (f"--model.{k}", str(v))]
    family = ["--model.arch", "llama", "--model.tied", "false", *flags] if name == "untied" else []
    words = ["--data", "set-bytes=0.5,a-bytes=0.5", *family, *json.loads(Path("shape.json").read_text())]
    grown = [*words, "--model.V", "700", "--init-from", f"runs/{name}", "--checkpoint.keep", "0", "--steps", "1"]
    assert train("d12", "--name", f"{name}-grown", *grown) == 0
    new = Run(f"runs/{name}-grown")
    was = load_file(old.checkpoints[0] / "model.safetensors")
    now = load_file(new.checkpoint(0).path / "model.safetensors")
    drawn = Engine(EngineSpec(new.config.model, B=1, T=16), seed=new.config.run.seed)
    assert was.keys() == now.keys()
    for key, value in now.items():
        if key not in tables:
            assert torch.equal(value, was[key])
            continue
        assert value.shape == (768, 32)
        assert torch.equal(value[:257], was[key][:257])
        assert torch.equal(value[257:700], drawn.param(key)[257:700] + was[key][:257].mean(0))
        assert (value[257:700] - was[key][:257].double().mean(0)).std() == pytest.approx(0.02, rel=0.05)
        assert not value[700:].any()
    moments = load_file(new.checkpoint(0).path / "optimizer-00000-of-00001.safetensors")
    assert not any(value.any() for key, value in moments.items() if key[:2] in ("m[", "v["))
    assert new.checkpoint().step == 1
    assert new.load_engine()[1].pictures is not None


def test_what_cannot_grow_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text of another tokenizer, a smaller vocabulary, another shape."""
    monkeypatch.chdir(home)
    shape = json.loads(Path("shape.json").read_text())
    for data, more, code, why in [
        ("others", ["--model.V", "700"], 4, "was trained with tokenizer 'bytes', and data set 'others' is made with"),
        ("set-bytes", ["--model.V", "700", "--model.L", "2"], 5, "model.L is 1 there and 2 here"),
    ]:
        words = ["--data", data, *shape, *more, "--init-from", "runs/text", "--steps", "1"]
        assert train("d12", "--name", "wrong", *words) == code
        assert why in capsys.readouterr().err
    assert train("d12", "--data", "a-bytes", "--name", "wrong2", *shape, "--model.V", "257", "--steps", "1",
                 "--init-from", "runs/text-grown") == 5  # fmt: skip
    assert "model.V is 700 there and 257 here" in capsys.readouterr().err


def text_loss(run: str, capsys: pytest.CaptureFixture[str]) -> float:
    """Nats per token of the standard library's text."""
    capsys.readouterr()
    assert main(["eval", run, "--data", "stdlib-gpt2-1024", "--json"]) == 0
    return next(s["value"] for s in json.loads(capsys.readouterr().out) if s["metric"].startswith("validation loss"))


def test_text_stays_known(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 steps of text and pictures: the loss of text is at most 0.02 above, and pictures are learned."""
    if not full:
        pytest.skip("a minute of training; make test-images")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "shapes", "--tokenizer", "gpt2-1024"]) == 0
    shape = ["--model.max_T", "96", "--eval.tokens", "49152"]
    assert train("tiny", "--name", "text", "--steps", "800", *shape) == 0
    before = text_loss("runs/text", capsys)
    words = ["--data", "shapes-gpt2-1024=0.3,stdlib-gpt2-1024=0.7", "--model.V", "1106", "--batch.B", "16"]
    rate = ["--optim.lr", "5e-4", "--init-from", "runs/text", "--steps", "200"]
    assert main(["train", "tiny", "--name", "both", *words, *shape, *rate, "--quiet"]) == 0
    after, vals = text_loss("runs/both", capsys), Run("runs/both").metrics("val")
    print(f"\nnats per token of text: {before:.4f} before, {after:.4f} after; of pictures {vals[-1]['image_loss']:.4f}")
    assert after <= before + 0.02
    assert vals[-1]["image_loss"] < 0.5 * vals[0]["image_loss"]
    assert np.isfinite(after)
