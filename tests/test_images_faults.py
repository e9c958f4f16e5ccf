"""Bad pictures: read right, or refused by name with nothing half-written."""

from __future__ import annotations

import io
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_images_codec import blobs

from daybreak.cli.main import main
from daybreak.cli.prepare import _progress
from daybreak.errors import DataError
from daybreak.images.prepare import prepare_images
from daybreak.images.read import read_picture

torch.set_num_threads(1)
image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few kilobytes that claims so many white pixels."""
    body = zlib.compress(bytes(1 << 20))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def halves(mode: str, left: object, right: object, size: tuple[int, int] = (32, 32)) -> object:
    """A picture whose left and right halves have one colour each."""
    made = image.new(mode, size, left)
    made.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return made


def colours(path: str) -> list[list[int]]:
    """The colours in the middles of the left and the right half, as they are read at 16 pixels."""
    pixels, _ = read_picture(Path(path), 16)
    assert pixels.shape == (16, 16, 3)
    return [pixels[8, 3].tolist(), pixels[8, 12].tolist()]


def test_odd_pictures_are_read_right() -> None:
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    halves("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)).save("alpha.png")
    assert colours("alpha.png") == [red, white]
    halves("RGBA", (0, 0, 0, 128), (0, 0, 255, 255)).save("half.png")
    assert colours("half.png") == [[127] * 3, blue]
    halves("LA", (0, 255), (0, 0)).save("grey-alpha.png")
    assert colours("grey-alpha.png") == [[0] * 3, white]
    halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(4).save("palette.png", transparency=b"\xff\xff")
    assert colours("palette.png") == [red, blue]
    halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)).save("cmyk.jpg", quality=100)
    found = np.array(colours("cmyk.jpg")) - [red, blue]
    assert abs(found).max() < 12
    image.fromarray(np.repeat(np.array([[0, 65535]], np.uint16), 16, 1).repeat(32, 0)).save("deep.png")
    assert colours("deep.png") == [[0] * 3, white]
    halves("1", 0, 1).save("bits.png")
    assert colours("bits.png") == [[0] * 3, white]
    # Of a wide picture the middle counts: 64 x 32 pixels, of which columns 16 to 47 are read.
    halves("RGB", (255, 0, 0), (0, 0, 255), (64, 32)).save("wide.webp", lossless=True)
    assert colours("wide.webp") == [red, blue]


def test_a_rotation_in_exif_is_followed() -> None:
    made, exif = halves("RGB", (255, 0, 0), (0, 0, 255)), image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    made.save("turned.png", exif=exif)
    made.save("turned.jpg", exif=exif, quality=100)
    assert colours("turned.png") == [[0, 0, 255], [255, 0, 0]]
    assert abs(np.array(colours("turned.jpg")) - [[0, 0, 255], [255, 0, 0]]).max() < 12


def test_white_behind_a_transparent_edge_leaves_no_dark_line() -> None:
    made = image.new("RGBA", (64, 64), (0, 0, 0, 0))  # transparent black around a red square
    made.paste((255, 0, 0, 255), (16, 16, 48, 48))
    made.save("edge.png")
    pixels, _ = read_picture(Path("edge.png"), 16)
    assert pixels[..., 0].min() > 240  # from white to red, the red channel is always full


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_of_an_animation_the_first_frame_is_read_and_it_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    for i, picture in enumerate(blobs(5, 16)):
        Path("set").mkdir(exist_ok=True)
        image.fromarray(picture).save(f"set/{i}.png")
    frames = [image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(f"set/moves.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(Path(f"set/moves.{kind}"), 16)[0].reshape(-1, 3).tolist() == [[255, 0, 0]] * 256
    prepare_images(["set"], tokenizer="bytes", px=8)
    assert "1 of 6 pictures are animations, of which the first frame is read" in caplog.text


def whole(kind: str) -> bytes:
    file = io.BytesIO()
    image.fromarray(blobs(1, 64)[0]).save(file, kind)
    return file.getvalue()


BAD = {
    "cut.png": whole("png")[:-2000],
    "cut.jpg": whole("jpeg")[:-500],
    "cut.webp": whole("webp")[:-100],
    "empty.png": b"",
    "text.png": b"no picture",
    "page.jpg": b"<html>",
    "flipped.png": whole("png").replace(b"IDAT", b"IDAX"),
    "tiff.png": b"II*\0" + bytes(100),
    "head.jpeg": whole("jpeg")[:20],
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_damaged_files_are_refused_by_name_and_nothing_is_left(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("set").mkdir()
    for i, picture in enumerate(blobs(6, 16)):
        image.fromarray(picture).save(f"set/{i}.png")
    Path("set", name).write_bytes(BAD[name])
    words = ["prepare", "set", "--as", "images", "--px", "8", "--tokenizer", "bytes"]
    assert main(words) == 4
    said = capsys.readouterr().err
    assert f"set/{name} is damaged or is no picture" in said
    assert "Traceback" not in said
    assert not [path for path in Path("data").rglob("*") if path.is_file()]
    assert main([*words, "--skip-bad"]) == 0
    assert f"skipped 1 bad pictures (first: set/{name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (12_000, 12_000), (8_001, 8_000), (2**31 - 1,) * 2])
def test_a_bomb_is_refused_before_it_takes_memory(width: int, height: int) -> None:
    Path("bomb.png").write_bytes(bomb(width, height))
    with pytest.raises(DataError, match=r"bomb\.png is (too large|damaged)") as error:
        read_picture(Path("bomb.png"), 16)
    if width < 60_000:
        assert "the most is 64,000,000 pixels" in str(error.value)


def test_folders_without_pictures_and_bad_captions_are_named() -> None:
    Path("set").mkdir()
    with pytest.raises(DataError, match="set has no PNG, JPEG or WebP file"):
        prepare_images(["set"])
    image.fromarray(blobs(1, 8)[0]).save("set/a.png")
    with pytest.raises(DataError, match="too few different pictures"):
        prepare_images(["set"], px=8)
    os.mkfifo("set/pipe.png")
    with pytest.raises(DataError, match=r"set/pipe\.png is a pipe or device"):
        prepare_images(["set"], px=8)
    Path("set/pipe.png").unlink()
    Path("set/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"set/a\.txt.*UTF-8"):
        prepare_images(["set"], px=8)
    Path("set/metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl record 1: each needs a file_name and a text 'text'"):
        prepare_images(["set"], px=8)
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


def test_pictures_that_nothing_reads_are_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of GIF files, one such file, and a Python without Pillow."""
    Path("set").mkdir()
    image.new("RGB", (8, 8)).save("set/a.gif")
    for words, said in [
        (["set", "--as", "images"], "set has no PNG, JPEG or WebP file (.png, .jpg, .jpeg, .webp); give a folder of"),
        (["set"], "left out: 1, .gif files (a.gif); to train a model that draws, convert them to PNG and add --as"),
        (["set/a.gif"], "cannot read .gif files; for a model that draws, give a folder of pictures with --as images"),
    ]:
        assert main(["prepare", *words]) == 4
        assert said in capsys.readouterr().err
    image.new("RGB", (8, 8)).save("set/a.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert main(["prepare", "set", "--as", "images"]) == 2
    assert "set/a.png needs Pillow: pip install -e '.[images]'" in capsys.readouterr().err


def test_the_speed_of_preparing_leaves_out_what_comes_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A clock: 100 s in which pictures are read and a codec learns, then 40 s for half of the bytes. At the end nothing
    is left to say."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with _progress() as report:
        for seconds, done, tokens in [(0, 0, 0), (100, 0, 0), (40, 50, 4_000_000), (40, 100, 8_000_000)]:
            now[0] += seconds
            report(done, 100, tokens)
    assert caplog.messages == ["50.0 %, 0.10 M tokens/s, about 40 s left"]


def test_a_killed_preparation_starts_over_and_gives_the_same(tmp_path: Path) -> None:
    Path("set").mkdir()
    for i, picture in enumerate(blobs(8, 16)):
        image.fromarray(picture).save(f"set/{i}.png")
    command = [
        sys.executable,
        "-m",
        "daybreak",
        "prepare",
        "set",
        "--as",
        "images",
        "--px",
        "16",
        "--tokenizer",
        "bytes",
    ]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not Path("data/.set-bytes.tmp/pixels").exists() and killed.poll() is None:
        os.sched_yield()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not Path("data/set-bytes").exists()
    assert prepare_images(["set"], tokenizer="bytes", px=16).train.documents >= 7
    assert not Path("data/.set-bytes.tmp").exists()
