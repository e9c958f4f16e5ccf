"""`prepare` of pictures: the set `shapes`, folders with captions of every kind, documents, mixtures with text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_images_codec import blobs

from daybreak.cli.main import main
from daybreak.config_keys import DataConfig
from daybreak.data.dataset import Manifest, open_dataset
from daybreak.data.mixing import open_loaders
from daybreak.data.prepare import prepare
from daybreak.data.shards import open_shard
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, DataError
from daybreak.images import decoder, patches
from daybreak.images.codec import Codec
from daybreak.images.emoji import FONT, NAMES, emoji, names
from daybreak.images.prepare import prepare_images
from daybreak.images.scenes import scenes

torch.set_num_threads(1)
image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patches, "ROUNDS", 20)  # whether the codec is good is tested elsewhere
    monkeypatch.setattr(decoder, "LEAST_STEPS", 5)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set `shapes`, prepared once."""
    folder = tmp_path_factory.mktemp("shapes")
    prepare_images(["shapes"], data_dir=folder, tokenizer="gpt2-1024", shard_tokens=1_000_000)
    return folder


def save(path: str, pixels: np.ndarray, **options: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path, **options)


def documents(folder: Path, split: str) -> list[tuple[str, list[int]]]:
    """Caption and codes of every document of a split, taken apart by the layout that the documentation states."""
    dataset = open_dataset(str(folder))
    tokenizer = get_tokenizer(dataset.tokenizer_name, folder)
    first, K, N, D = tokenizer.pictures
    found = []
    for shard in getattr(dataset, split):
        ids = np.array(open_shard(shard), np.int64)
        assert ids[-1] == tokenizer.eot
        assert len(ids) % D == 1
        for row in ids[:-1].reshape(-1, D):
            assert row[0] == tokenizer.eot
            assert row[D - N - 2] == first + K  # where a picture begins is the same in every document
            assert row[-1] == first + K + 1
            codes = row[D - N - 1 : D - 1] - first
            assert codes.min() >= 0
            assert codes.max() < K
            caption = row[: D - N - 2]
            start = np.flatnonzero(caption == tokenizer.eot)[-1] + 1
            assert (caption[:start] == tokenizer.eot).all()
            found.append((tokenizer.decode(caption[start:]), codes.tolist()))
    return found


def test_shapes_are_whole_and_no_held_out_picture_is_trained_on(shapes: Path) -> None:
    folder = shapes / "shapes-gpt2-1024"
    manifest = Manifest.load(folder / "manifest.json")
    dataset = open_dataset("shapes", shapes, tokenizer="gpt2-1024")
    tokenizer = get_tokenizer(dataset.tokenizer_name, folder)
    assert (tokenizer.V, tokenizer.pictures) == (1106, (1025, 79, 64, 96))
    assert [shard.tokens for shard in manifest.train.shards] == [
        1_000_000 // 96 * 96 + 1,
        manifest.train.tokens - 999_937,
    ]
    train, val = documents(folder, "train"), documents(folder, "val")
    assert (len(train), len(val)) == (manifest.train.documents, manifest.val.documents)
    captioned, bare = [d for d in train if d[0]], [codes for caption, codes in train if not caption]
    assert 0.08 < len(bare) / len(captioned) < 0.12
    assert 0.08 < len(val) / 14_400 < 0.12
    codec, right = Codec.load(folder, tokenizer), dict(scenes())
    assert {caption for caption, _ in captioned + val} == right.keys()
    assert len(captioned) + len(val) == 14_400
    for caption, codes in val + captioned[::50]:
        assert np.array_equal(codec.decode(np.array([codes]))[0], right[caption]), caption
    seen = {tuple(codes) for _, codes in train}
    assert not seen & {tuple(codes) for _, codes in val}


def test_captions_come_from_folders_names_files_and_lists() -> None:
    pictures = blobs(8, 24)
    save("set/dogs/001.png", pictures[0])
    save("set/dogs/002.webp", pictures[1], lossless=True)
    save("set/train/red-circle_2.png", pictures[2])
    save("set/val/cats/9.jpeg", pictures[3])
    save("set/val/blue_ring.JPG", pictures[4])
    save("set/cats/8.png", pictures[5])
    Path("set/cats/8.txt").write_text("a cat\nthat sleeps\n")
    save("set/test/left_out.png", pictures[6])
    save("set/.hidden/left_out.png", pictures[7])
    Path("set/notes.md").write_text("nothing")
    manifest = prepare_images(["set"], tokenizer="bytes", px=8)
    assert manifest.name == "set-bytes"
    train, val = (dict(documents(Path("data/set-bytes"), split)) for split in ("train", "val"))
    assert train.keys() - {""} == {"dogs", "red circle 2", "a cat that sleeps"}
    assert val.keys() == {"cats", "blue ring"}
    files = {path.name for path in Path("data/set-bytes").iterdir()}
    assert files == {"manifest.json", "codec.safetensors", "codec.png", "set-bytes_train_000000.bin",
                     "set-bytes_val_000000.bin"}  # fmt: skip
    with Path("set/metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [("file_name", "title"), *((f"dogs/00{i}.{kind}", f"dog {i}") for i, kind in ((1, "png"), (2, "webp")))]
        )
    with pytest.raises(DataError, match=r"set/cats/8\.png is not in the list of captions; add it"):
        prepare_images(["set"], tokenizer="bytes", px=8, text_field="title")
    prepare_images(["set"], tokenizer="bytes", px=8, text_field="title", skip_bad=True)
    both = [*documents(Path("data/set-bytes"), "train"), *documents(Path("data/set-bytes"), "val")]
    assert {caption for caption, _ in both} - {""} == {"dog 1", "dog 2"}
    Path("set/metadata.csv").write_text("file_name,text\ndogs/001.png,\ndogs/002.webp,dog 2\n")
    prepare_images(["set"], tokenizer="bytes", px=8, skip_bad=True)
    both = [*documents(Path("data/set-bytes"), "train"), *documents(Path("data/set-bytes"), "val")]
    assert {caption for caption, _ in both} == {"", "dog 2"}  # an empty caption is one: no name takes its place


def test_each_folder_may_have_a_list_as_sets_of_the_hub_do_and_other_formats_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Names in a list are paths from where it is. Of GIF files two are left out, whatever --skip-bad says."""
    pictures = blobs(6, 16)
    for i, split in enumerate(["train", "train", "train", "val", "val", "test"]):
        save(f"set/{split}/in/{i}.png", pictures[i])
    save("set/train/a.GIF", pictures[0])
    save("set/b.gif", pictures[0])
    Path("set/train/metadata.csv").write_text("file_name,text\n" + "".join(f"in/{i}.png,seen {i}\n" for i in range(3)))
    lines = [json.dumps({"file_name": f"./in/{i}.png", "text": f"held out {i}"}) for i in (3, 4)]
    Path("set/val/metadata.jsonl").write_text("\n".join(lines))
    Path("set/test/metadata.jsonl").write_text("not read")
    prepare_images(["set"], tokenizer="bytes", px=8)
    train, val = ({caption for caption, _ in documents(Path("data/set-bytes"), split)} for split in ("train", "val"))
    assert train - {""} == {"seen 0", "seen 1", "seen 2"}
    assert val == {"held out 3", "held out 4"}
    said = "set-bytes: skipped 2 pictures in other formats (first: set/b.gif is no PNG, JPEG or WebP file; convert it.)"
    assert said in caplog.messages


def test_the_same_pictures_give_the_same_files_whatever_the_workers() -> None:
    for i, picture in enumerate(blobs(30, 16)):
        save(f"set/{i}.png", picture)
    lines = [{"file_name": f"{i}.png", "text": "many words " * (i + 1)} for i in range(30)]
    Path("set/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = prepare_images(["set"], tokenizer="gpt2-1024", px=16, workers=1)
    sums = {p.name: p.read_bytes() for p in Path("data/set-gpt2-1024").iterdir()}
    assert prepare_images(["set"], tokenizer="gpt2-1024", px=16, workers=3) == first
    assert {p.name: p.read_bytes() for p in Path("data/set-gpt2-1024").iterdir()} == sums
    tokenizer = get_tokenizer(first.tokenizer, Path("data/set-gpt2-1024"))
    assert tokenizer.pictures.D == 64 + 64 + 3 + 5  # captions of 64 tokens at most, to a multiple of 8
    assert tokenizer.V > 1 << 10
    wide = prepare_images(["set"], name="wide", tokenizer="gpt2-50256", px=16, row_tokens=70)
    assert get_tokenizer(wide.tokenizer, Path("data/wide")).pictures.D == 70
    shards = open_dataset("wide").train + open_dataset("wide").val
    assert {shard.width for shard in shards} == {2}  # 50,257 ids and a thousand are below 65,536
    with pytest.raises(ConfigError, match="row-tokens = 67 must be at least 68: a picture has 64 tokens"):
        prepare_images(["set"], name="short", px=16, row_tokens=67)
    assert not list(Path("data").glob(".*"))


def test_every_sample_begins_with_a_document_and_a_length_that_would_not_is_refused(shapes: Path) -> None:
    data = DataConfig(name="shapes", tokenizer="gpt2-1024", dir=str(shapes))
    dataset, train, val = open_loaders(data, 192, 3, 1106)
    tokenizer = get_tokenizer(dataset.tokenizer_name, dataset.folder)
    for loader in (train, val):
        for at in (0, loader.samples_per_epoch - 2, 3 * loader.samples_per_epoch + 5):  # across epochs' ends
            tokens, targets = loader.batch(at, 5)
            assert (tokens[:, [0, 96]] == tokenizer.eot).all()
            assert (tokens[:, [30, 126]] == tokenizer.pictures.boi).all()
            assert (targets[:, [94, 190]] == tokenizer.pictures.eoi).all()
            assert (targets[:, -1] == tokenizer.eot).all()
    with pytest.raises(
        ConfigError, match=r"batch\.T = 128 must be a multiple of 96.* --model\.max_T 192 --batch\.T 192"
    ):
        open_loaders(data, 128, 3, 1106)


def test_text_of_the_same_tokenizer_mixes_with_pictures_and_another_does_not(shapes: Path) -> None:
    Path("my.txt").write_text("Some words of a text that is here. " * 400)
    prepare("my.txt", tokenizer="gpt2-1024", data_dir=shapes, name="words-gpt2-1024")
    prepare("my.txt", tokenizer="bytes", data_dir=shapes, name="words-bytes")
    data = DataConfig(name="words=0.25,shapes=0.75", tokenizer="gpt2-1024", dir=str(shapes))
    dataset, train, _ = open_loaders(data, 96, 3, 1106)
    assert dataset.tokenizer_name.startswith("gpt2-1024+img-")
    tokens = train.batch(0, 1024)[0]
    begins = (tokens == 1025 + 79).sum(1)
    assert np.bincount(begins).tolist() == [256, 768]
    assert tokens[begins == 0].max() < 1025
    with pytest.raises(DataError, match=r"'words-bytes' were made with tokenizers 'gpt2-1024\+img-\w+' and 'bytes'"):
        open_loaders(DataConfig(name="shapes-gpt2-1024=1,words-bytes=1", dir=str(shapes)), 96, 3, 1106)


def test_the_command_line_says_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    for i, picture in enumerate(blobs(12, 16)):
        save(f"set/{i}.png", picture)
    assert main(["prepare", "set", "--as", "images", "--tokenizer", "bytes", "--px", "16"]) == 0
    said = capsys.readouterr().out
    V = get_tokenizer(open_dataset("set-bytes").tokenizer_name, Path("data/set-bytes")).V
    own = f"--data set-bytes --data.tokenizer bytes --model.V {V} --model.max_T 72 --name set-bytes"
    assert said.splitlines()[1] == f"Next: daybreak train shapes {own}"
    for words, why in [
        (["set", "--px", "16"], "--px 16 is for pictures; add --as images."),
        (["set", "--as", "images", "--px", "20"], "px = 20 must be a multiple of 8 from 8 to 256."),
        (["none", "--as", "images"], "none is not a folder; --as images reads folders"),
        (["shapes", "--pretokenized"], "--pretokenized is for text"),
        (["shapes", "--as", "text"], "shapes is a set of pictures; prepare it alone"),
    ]:
        assert main(["prepare", *words]) in (2, 4)
        assert why in capsys.readouterr().err


LINES = """# group: Smileys
1F600                                                  ; fully-qualified     # \U0001f600 E1.0 grinning face
263A                                                   ; unqualified         # \u263a E0.6 smiling face
1F44B 1F3FF                            ; fully-qualified     # \U0001f44b\U0001f3ff E1.0 waving hand: dark skin tone
1F3FF                                                  ; component           # \U0001f3ff E1.0 dark skin tone
"""  # fmt: skip


def test_the_names_of_emoji_are_those_of_unicodes_file() -> None:
    assert list(names(LINES)) == [
        ("\U0001f600", "grinning face"),
        ("\U0001f44b\U0001f3ff", "waving hand dark skin tone"),
    ]


def test_emoji_without_their_font_say_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("daybreak.images.emoji.FONT", tmp_path / "none.ttf")
    assert main(["prepare", "emoji"]) == 4
    said = capsys.readouterr().err
    assert "none.ttf is missing; install them with: apt-get install fonts-noto-color-emoji unicode-data." in said
    assert not Path("data/emoji").exists()


@pytest.mark.skipif(not (FONT.is_file() and NAMES.is_file()), reason="needs Debian's colour font")
def test_emoji_are_the_fonts_pictures_with_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the font, a sequence that no font has, and a character that is none."""
    pytest.importorskip("PIL")
    listed = tmp_path / "names.txt"
    made = {"1F34E": "red apple", "1F468 1F3FF 200D 1F680": "man astronaut: dark skin tone",
            "1F1EB 1F1F7": "flag: France", "1F34E 200D 1F680 200D 1F34E": "two apples on a rocket",
            "E000": "nothing"}  # fmt: skip
    listed.write_text("".join(f"{codes} ; fully-qualified # x E1.0 {name}\n" for codes, name in made.items()))
    monkeypatch.setattr("daybreak.images.emoji.NAMES", listed)
    found = dict(emoji(32))
    assert list(found) == ["red apple", "man astronaut dark skin tone", "flag France"]
    apple, flag = found["red apple"].astype(int), found["flag France"].astype(int)
    assert apple.shape == (32, 32, 3)
    assert (apple[0, 0] > 240).all()  # white where the font is transparent
    assert apple[20, 16, 0] > 150 > 90 > apple[20, 16, 1]
    left, middle, right = (flag[16, x] for x in (5, 16, 26))
    assert left[2] > left[0] + 50  # blue, white, red
    assert middle.min() > 200
    assert right[0] > right[2] + 50
