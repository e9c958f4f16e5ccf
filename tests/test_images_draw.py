"""Drawing: exactly N codes and nothing else, guidance, seeds, `sample --out`, and runs that draw while they train."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from test_images_codec import blobs

import daybreak
from daybreak.cli.main import main
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine
from daybreak.engine.spec import EngineSpec
from daybreak.errors import ConfigError
from daybreak.generate import Sampling, Text, write_all
from daybreak.images.codec import Codec
from daybreak.images.draw import draw
from daybreak.images.png import write_png
from daybreak.images.prepare import prepare_images
from daybreak.shapes import GPT2Config
from daybreak.state.run import Run
from daybreak.training import samples

torch.set_num_threads(1)
N, K, D = 9, 20, 24
GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=5.0, seed=7)
CAPTIONS = ["a dog", "", "two cats", "a b c", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return get_tokenizer("bytes").with_pictures("f" * 64, K, N, D)


def engine_of(tokenizer: Tokenizer, rows: int) -> Engine:
    cfg = GPT2Config(L=2, C=32, NH=2, max_T=D, V=tokenizer.V)
    engine = Engine(EngineSpec(cfg, B=1, T=D, train=False, rows=rows))
    random = torch.Generator().manual_seed(3)
    engine.load_params({n: 0.3 * torch.randn(engine.param(n).shape, generator=random) for n in engine.names()})
    return engine


def oracle(engine: Engine, tokenizer: Tokenizer, caption: str, guidance: float) -> list[int]:
    """The likeliest codes, from the logits of whole sequences and the layout that the documentation states."""
    first, codes = 257, list[int]()
    for _ in range(N):
        rows = []
        for text in (caption, ""):
            ids = [*text.encode(), first + K]
            rows.append([256] * (D - N - 1 - len(ids)) + ids + [first + code for code in codes])
        both = [engine.logits(torch.tensor([row]))[0, -1, first : first + K].double() for row in rows]
        codes.append(int((both[1] + guidance * (both[0] - both[1])).argmax()))
    return codes


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_codes_are_those_of_the_formula(tokenizer: Tokenizer, guidance: float) -> None:
    engine = engine_of(tokenizer, 4)
    found = draw(engine, tokenizer, CAPTIONS, GREEDY, guidance)
    assert found.shape == (len(CAPTIONS), N)
    assert found.tolist() == [oracle(engine, tokenizer, caption, guidance) for caption in CAPTIONS]


def test_guidance_changes_what_is_drawn(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer, 4)
    plain, guided = (draw(engine, tokenizer, CAPTIONS, GREEDY, guidance) for guidance in (1.0, 4.0))
    assert plain.tolist() != guided.tolist()
    assert plain[1].tolist() == guided[1].tolist()  # of no caption there is nothing to follow


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_is_the_same_alone_and_among_others(tokenizer: Tokenizer, guidance: float) -> None:
    together = draw(engine_of(tokenizer, 6), tokenizer, CAPTIONS, HOT, guidance)
    few = engine_of(tokenizer, 2)
    for i, caption in enumerate(CAPTIONS):
        how = Sampling(temperature=5.0, seed=7 + i)
        assert draw(few, tokenizer, [caption], how, guidance).tolist() == [together[i].tolist()]
    assert len({tuple(row) for row in draw(few, tokenizer, ["x"] * 4, HOT, guidance)}) == 4


def test_every_code_is_one_of_a_picture_and_text_holds_none(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer, 8)
    codes = draw(engine, tokenizer, ["dog"] * 40, HOT)
    assert (codes.min(), codes.max()) == (0, K - 1)
    texts = [Text([256, 65], Sampling(21, temperature=5.0, seed=i), tokenizer) for i in range(24)]
    write_all(engine, texts)
    made = [token.id for text in texts for token in text.made]
    assert len(made) > 300
    assert max(made) < 257


def test_a_caption_without_room_is_refused(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer, 1)
    assert draw(engine, tokenizer, ["x" * 12], GREEDY).shape == (1, N)
    with pytest.raises(
        ConfigError, match="the prompt has 13 tokens, and before a picture there is room for 12; shorten"
    ):
        draw(engine, tokenizer, ["x" * 13], GREEDY)
    with pytest.raises(ConfigError, match="this model has learned text only"):
        draw(engine, get_tokenizer("bytes"), ["x"], GREEDY)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small model was trained on pictures for a few steps, stopped and resumed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for i, picture in enumerate(blobs(40, 8)):
            Path("set").mkdir(exist_ok=True)
            write_png(Path(f"set/picture-{i}-of_many.png"), picture)
        manifest = prepare_images(["set"], tokenizer="bytes", px=8, val_fraction=0.3)
        tokenizer = get_tokenizer(manifest.tokenizer, Path("data/set-bytes"))
        small = {"model.L": 1, "model.C": 32, "model.NH": 1, "model.V": tokenizer.V, "batch.B": 4, "log.every": 1}
        small |= {"eval.every": 2, "eval.sample_every": 2, "checkpoint.every": 2, "model.max_T": tokenizer.pictures.D}
        keys = [word for key, value in small.items() for word in (f"--{key}", str(value))]
        words = ["train", "shapes", "--data", "set-bytes", "--data.tokenizer", "bytes", *keys, "--name"]
        Path("words.json").write_text(json.dumps(words))
        assert main([*words, "drawn", "--steps", "2"]) == 0
        assert main(["train", "runs/drawn", "--steps", "4"]) == 0
    return folder


def test_a_run_draws_held_out_captions_and_tells_text_and_pictures_apart(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    run, image = Run("runs/drawn"), pytest.importorskip("PIL.Image")
    assert (run.path / "codec.safetensors").read_bytes() == Path("data/set-bytes/codec.safetensors").read_bytes()
    drawn, vals = run.metrics("image"), run.metrics("val")
    assert sorted({record["step"] for record in drawn}) == [2, 4]
    assert len(drawn) == 16
    assert [record["path"] for record in drawn[:2]] == ["images/step-00000002-0.png", "images/step-00000002-1.png"]
    assert len({record["caption"] for record in drawn}) == 8
    engine, tokenizer = run.load_engine()
    codes = draw(engine, tokenizer, [record["caption"] for record in drawn[8:]], Sampling(temperature=0.0, seed=1337))
    pixels = Codec.load(run.path, tokenizer).decode(codes)
    for record, wanted in zip(drawn[8:], pixels, strict=True):
        with image.open(run.path / record["path"]) as file:
            assert np.array_equal(np.asarray(file), wanted)
    assert [record["step"] for record in vals] == [0, 2, 4]
    assert not run.metrics("sample")
    records = run.folder.metrics.read_bytes()
    assert main(["train", "runs/drawn"]) == 0
    assert "nothing to do: runs/drawn has made its 4 steps" in capsys.readouterr().err
    assert run.folder.metrics.read_bytes() == records
    assert main(["eval", "runs/drawn", "--data", "set-bytes", "--json"]) == 0
    found = {score["metric"]: score["value"] for score in json.loads(capsys.readouterr().out)}
    assert found["nats per text token"] == pytest.approx(vals[-1]["text_loss"], rel=1e-6)
    assert found["nats per image token"] == pytest.approx(vals[-1]["image_loss"], rel=1e-6)
    assert vals[0]["image_loss"] == pytest.approx(np.log(tokenizer.V), rel=0.05)
    assert vals[-1]["loss"] < vals[0]["loss"]


def test_a_prompt_without_room_is_refused_at_the_start(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    words = [*json.loads(Path("words.json").read_text()), "long", "--steps", "2", "--eval.prompt", "x" * 99]
    assert main(words) == 2
    assert "the prompt has 99 tokens, and before a picture there is room for" in capsys.readouterr().err
    assert not Run("runs/long").metrics()


@pytest.mark.parametrize("fault", ["full", "renamed"])
def test_pictures_that_cannot_be_written_do_not_end_the_run(
    fault: str, made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full for the second of eight pictures of step 2, or the folder has another name when they come."""
    monkeypatch.chdir(made)
    keys = {"run.name": fault, "checkpoint.background": False}
    config, tried = Run("runs/drawn").config.override(keys), list[Path]()

    def save(path: Path, pixels: Any) -> None:
        tried.append(path)
        if fault == "full" and len(tried) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_png(path, pixels)

    def rename(checkpoint: Path) -> None:
        if fault == "renamed" and checkpoint.name == "step-00000002":
            Path("runs/renamed").rename("runs/other")

    monkeypatch.setattr(samples, "write_png", save)
    run = daybreak.train(config, on_save=rename)
    assert [record["step"] for record in run.metrics("image")] == ([2] if fault == "full" else [2] * 8) + [4] * 8
    assert all((run.path / record["path"]).is_file() for record in run.metrics("image"))
    told = "runs/full/images could not be written (No space left on device)."
    assert [told in caplog.messages, run.path.name] == [fault == "full", "full" if fault == "full" else "other"]


def test_sample_writes_pictures(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(made)
    image = pytest.importorskip("PIL.Image")
    words = ["sample", "runs/drawn", "--prompt", "a Red/dog", "--out", str(tmp_path / "a/b"), "-n", "3", "--seed", "5"]
    assert main([*words, "--guidance", "2"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert paths == [str(tmp_path / f"a/b/a-Red-dog-{seed}.png") for seed in (5, 6, 7)]
    engine, tokenizer = Run("runs/drawn").load_engine(rows=6)
    codes = draw(engine, tokenizer, ["a Red/dog"] * 3, Sampling(seed=5), 2.0)
    for path, wanted in zip(paths, Codec.load(Path("runs/drawn"), tokenizer).decode(codes), strict=True):
        with image.open(path) as file:
            assert np.array_equal(np.asarray(file), wanted)
    assert main(["sample", "runs/drawn", "--prompt", "dog", "--tokens", "5"]) == 0
    assert "img" not in capsys.readouterr().out
    for more, why in [
        (["--prompt", "x" * 99], "the prompt has 99 tokens, and before a picture there is room for"),
        (["--stop", "x"], "--stop and the penalties are for text"),
    ]:
        assert main(["sample", "runs/drawn", "--out", str(tmp_path / "none"), *more]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["sample", "runs/drawn", "--guidance", "2"]) == 2
    assert "--guidance 2.0 is for pictures; add --out DIR." in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["sample", "runs/drawn", "--out", str(tmp_path / "file")]) == 2


def test_a_run_without_its_codec_says_so(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = made / "runs/drawn/codec.safetensors"
    codec.rename(tmp_path / "codec")
    try:
        assert main(["sample", str(made / "runs/drawn"), "--out", str(tmp_path / "x")]) == 4
        assert "codec.safetensors is missing, and tokenizer bytes+img-" in capsys.readouterr().err
    finally:
        (tmp_path / "codec").rename(codec)


def test_two_ranks_learn_and_draw_as_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ZeRO stage 1, in fp64: losses of both kinds within rounding, and the same pictures."""
    monkeypatch.chdir(made)
    words = json.loads(Path("words.json").read_text())
    same = ["--precision.compute", "fp64", "--batch.B", "2", "--batch.total_tokens", str(4 * 80), "--steps", "4"]
    try:
        for name, world in (("one", 1), ("two", 2)):
            zero = ["--parallel.zero", "1"] if world > 1 else []
            assert ranks.finish(ranks.start(world, [*words, name, *same, *zero], made)) == [0] * world
    finally:
        ranks.end_all()
    one, two = Run("runs/one"), Run("runs/two")
    assert one.checkpoint().manifest["world"] != two.checkpoint().manifest["world"]
    for kind, keys in {"step": ["loss", "norm"], "val": ["loss", "text_loss", "image_loss"]}.items():
        a, b = one.metrics(kind), two.metrics(kind)
        assert len(a) > 2
        for key in keys:
            assert [r[key] for r in b] == [pytest.approx(r[key], rel=1e-9) for r in a]
    drawn = [[(r["caption"], (run.path / r["path"]).read_bytes()) for r in run.metrics("image")] for run in (one, two)]
    assert len(drawn[0]) == 16
    assert drawn[0] == drawn[1]


def test_an_exported_model_draws_the_same_pictures(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder of Hugging Face's format, and as a run that was imported from it."""
    monkeypatch.chdir(made)
    folder = tmp_path / "hf"
    assert main(["export", "runs/drawn", "--to", "hf", str(folder)]) == 0
    assert main(["import", str(folder), "--name", "back"]) == 0
    found = []
    for target in ("runs/drawn", str(folder), "runs/back"):
        out = tmp_path / f"from-{len(found)}"
        assert main(["sample", target, "--prompt", "a dog", "--out", str(out), "-n", "2", "--guidance", "2"]) == 0
        found.append([path.read_bytes() for path in sorted(out.iterdir())])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 2
    capsys.readouterr()
    whole = (folder / "codec.safetensors").read_bytes()
    (folder / "codec.safetensors").write_bytes(whole[:-9])
    assert main(["sample", str(folder), "--out", str(tmp_path / "none")]) == 5
    assert "codec.safetensors is not a codec of pictures" in capsys.readouterr().err
    (folder / "codec.safetensors").unlink()
    assert main(["sample", str(folder), "--out", str(tmp_path / "none")]) == 5
    assert "if the model draws, copy its codec.safetensors too." in capsys.readouterr().err
