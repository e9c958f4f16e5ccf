"""Pictures to token shards: `prepare --as images`, and the sets `shapes` and `emoji`.

    files -> pixels -> codec, trained on the training split -> documents of D tokens -> shards, codec.safetensors

Documents are in an order that a hash of their pixels gives. So a shard holds no block of one class, and equal pictures
are in one split. Of the training split, one picture in ten is also written without its caption: of these the model
learns pictures of any kind, which guidance needs. A shard holds whole documents, and one more end-of-text token, which
is the last target. Nothing is kept of an unfinished preparation: it starts over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.data.catalogue import DRAWN, is_drawn
from daybreak.data.dataset import Manifest, ShardRecord, SplitRecord, dataset_name
from daybreak.data.formats import Faults
from daybreak.data.loader import ahead
from daybreak.data.pictures import CODEC_FILE, CODEC_PICTURE
from daybreak.data.prepare import Progress, finish, place, workspace
from daybreak.data.shards import ShardWriter, check_shard_tokens
from daybreak.data.sources import SPLITS, is_val
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.errors import ConfigError, DataError, explained
from daybreak.files import sha256_of
from daybreak.images import codec, scenes
from daybreak.images.emoji import emoji
from daybreak.images.patches import grid_of
from daybreak.images.png import sheet, write_png
from daybreak.images.read import OTHER, Picture, list_pictures, read_picture

log = logging.getLogger("daybreak")
PX = 32  # pixels a side, if nothing else is asked for
VAL_FRACTION = 0.1
MOST_CAPTION = 64  # tokens, if no other D is asked for
UNCAPTIONED = 0.1  # of the training pictures are written without their captions too
ENCODED = 1024  # pictures that are encoded at a time
MOST_FITTED, MOST_BYTES = 20_000, 1 << 30  # pictures that a codec is trained on, and bytes of their pixels
LEAST_FREE = 4 << 30  # bytes of a GPU's memory, without which a codec is trained on the CPU
SHOWN, COLUMNS = 256, 12  # held-out pictures that come back, and of these in codec.png
Pixels = NDArray[np.uint8]


class Item(NamedTuple):
    """A picture: the caption, the split that its place tells, the hash of its pixels, and its row among them."""

    caption: str
    split: str
    key: str
    row: int


def prepare_images(
    words: Sequence[str | Path], *, name: str | None = None, data_dir: str | Path = "data", tokenizer: str = "gpt2",
    px: int = PX, val_fraction: float | None = None, shard_tokens: int = 100_000_000, workers: int = 0,
    text_field: str = "text", skip_bad: bool = False, row_tokens: int = 0,
    progress: Progress = lambda done, total, tokens: None,
) -> Manifest:  # fmt: skip
    """Turn folders of pictures, `shapes` or `emoji` into `data_dir/NAME`: token shards and the codec that made them.

    px: pixels a side, a multiple of 8 from 8 to 256. row_tokens: D, the tokens of a document; 0: the least multiple of
    8 that holds the captions, but MOST_CAPTION tokens of each at most. The other options are those of `data.prepare`.
    progress counts bytes of pixels. Raises DataError for pictures that cannot be read, ConfigError.
    """
    if not 8 <= px <= 256 or px % 8:
        raise ConfigError(f"px = {px} must be a multiple of 8 from 8 to 256.")
    check_shard_tokens(shard_tokens)
    if workers < 0:
        raise ConfigError(f"workers = {workers} must be 0 (all cores) or more.")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ConfigError(f"val-fraction = {val_fraction} must be above 0 and below 1.")
    text, drawn, faults = get_tokenizer(tokenizer), is_drawn(words), Faults(skip_bad, (OTHER,))
    files = [] if drawn else list_pictures(words, text_field, faults)
    origin = " ".join(map(str, words))
    name = name or dataset_name(origin if drawn else Path(words[0]).resolve().name, text.name)
    final = place(data_dir, name, origin, text)
    with explained(DataError, f"preparing {name!r} failed"), workspace(final, []) as (folder, _):
        if drawn:
            px = scenes.PX if origin == DRAWN else px
            captions, each = zip(*(scenes.scenes() if origin == DRAWN else emoji(px)), strict=True)
            pixels = np.stack(each)
            items = [Item(c, "", key_of(x), i) for i, (c, x) in enumerate(zip(captions, each, strict=True))]
        else:
            pixels, items = _read(files, px, workers or os.cpu_count() or 1, faults, folder, progress)
        parts = divided(items, val_fraction or VAL_FRACTION)
        if not all(parts):
            raise DataError(f"{origin} has too few different pictures to split into train and val; add more.")
        size = 3 * px * px  # bytes
        rows = [item.row for item in parts[0][: min(MOST_FITTED, MOST_BYTES // size)]]
        log.info("%s: read %d pictures; now their codec learns, for a minute or two", name, len(items))
        made = codec.train(grid_of(px), pixels[rows], lambda: progress(0, size * len(items), 0), codec_device())
        joined = _joined(text, made, folder, items, row_tokens)
        done, writers = 0, [_Writer(folder, f"{name}_{split}", joined, shard_tokens) for split in SPLITS]
        for block in _blocks(parts):
            codes = made.encode(pixels[[item.row for _, item in block]])
            for (split, item), ids in zip(block, codes, strict=True):
                writers[split].add(item, ids, copies=split == 0)
            done += size * len(block)
            progress(done, size * len(items), sum(writer.tokens for writer in writers))
        train, val = (writer.finish() for writer in writers)
        _say(name, made, pixels[[item.row for item in parts[1][:SHOWN]]], folder)
        if faults.counts:
            log.warning("%s: skipped %s", name, faults)
        return finish(folder, name, joined, origin, "", "", train, val)


def codec_device() -> torch.device:
    """Where a codec is trained: the GPU, if there is one with enough free memory, else the CPU."""
    with suppress(RuntimeError):  # another program may have the GPU for itself
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= LEAST_FREE:
            return torch.device("cuda")
    return codec.CPU


def key_of(pixels: Pixels) -> str:
    """A hash of a picture's pixels."""
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()


def _read(
    files: Sequence[Picture], px: int, workers: int, faults: Faults, folder: Path, progress: Progress
) -> tuple[Pixels, list[Item]]:
    """The pixels (n, px, px, 3) of files, in a file of their own, and what they are. DataError for bad ones."""
    pixels, items = np.memmap(folder / "pixels", np.uint8, "w+", shape=(len(files), px, px, 3)), list[Item]()
    remarks = Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        for file, (square, remark, error) in zip(
            files, ahead(partial(_try, px), files, workers, 4 * workers), strict=True
        ):
            progress(0, pixels.nbytes, 0)
            if square is None:
                faults("bad pictures", error)
                continue
            remarks.update([remark] * bool(remark))
            row = len(items)
            pixels[row] = square
            items.append(Item(file.caption, file.split, key_of(square), row))
    for remark, count in remarks.items():
        log.warning("%d of %d pictures are %s", count, len(files), remark)
    return pixels, items


def _try(px: int, file: Picture) -> tuple[Pixels | None, str, str]:
    """The pixels of a file and a remark, or what is wrong with it."""
    try:
        return *read_picture(file.path, px), ""
    except DataError as error:
        return None, "", str(error)


def divided(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Training and validation pictures, each ordered by the hash of the pixels. The names of folders tell the split, if
    one says so, else that hash. Without any for validation, those of the last hash are."""
    ordered = sorted(items, key=lambda item: (item.key, item.caption))
    told = any(item.split == "val" for item in ordered)
    held = {i.key for i in ordered if (i.split == "val" if told else is_val(i.key, fraction))}
    held = held or {item.key for item in ordered[-1:]}
    return [i for i in ordered if i.key not in held], [i for i in ordered if i.key in held]


def _joined(text: Tokenizer, made: codec.Codec, folder: Path, items: Sequence[Item], D: int) -> Tokenizer:
    """Save the codec for documents of D tokens, 0: as the captions need. The tokenizer of both. Captions that will be
    cut are counted. ConfigError for a D without room."""
    lengths, N = [text.encode(item.caption).size for item in items], made.grid.N
    D = D or -(-(min(max(lengths), MOST_CAPTION) + N + 3) // 8) * 8
    if D < N + 4:
        raise ConfigError(f"row-tokens = {D} must be at least {N + 4}: a picture has {N} tokens, and its caption some.")
    made.save(folder / CODEC_FILE, D)
    joined = text.with_pictures(sha256_of(folder / CODEC_FILE), made.K, N, D)
    if cut := sum(length > D - N - 3 for length in lengths):
        longer = "--row-tokens T makes longer documents"
        log.warning("%d of %d captions have over %d tokens, and are cut; %s", cut, len(items), D - N - 3, longer)
    return joined


def _blocks(parts: Sequence[Sequence[Item]]) -> Iterator[list[tuple[int, Item]]]:
    """All pictures, ENCODED at a time, each with the place of its split."""
    every = ((split, item) for split, part in enumerate(parts) for item in part)
    while block := list(islice(every, ENCODED)):
        yield block


class _Writer:
    """Writes the documents of one split into shards."""

    def __init__(self, folder: Path, prefix: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        assert tokenizer.pictures
        self.folder, self.prefix, self.tokenizer, self.pictures = folder, prefix, tokenizer, tokenizer.pictures
        self.each = max(1, (shard_tokens - 1) // self.pictures.D)  # documents of a shard
        self.lengths = tokenizer.lengths(tokenizer.V)
        self.counts, self.shards = Counter[str](documents=0, bytes=0, tokens=0), list[ShardRecord]()
        self._waiting: list[list[int]] = []

    @property
    def tokens(self) -> int:
        return self.counts["tokens"]

    def add(self, item: Item, codes: NDArray[np.integer], copies: bool) -> None:
        """Write a picture; with `copies`, some of them also without their captions."""
        caption = self.tokenizer.encode(item.caption)[: self.pictures.room]
        self._add(caption, codes)
        if copies and is_val(f"{item.key} without", UNCAPTIONED):
            self._add(caption[:0], codes)

    def _add(self, caption: NDArray[np.integer], codes: NDArray[np.integer]) -> None:
        self._waiting.append(self.pictures.document(caption.tolist(), codes, self.tokenizer.eot))
        self.counts.update(documents=1, bytes=int(self.lengths[caption].sum()), tokens=self.pictures.D)
        if len(self._waiting) == self.each:
            self._finish_shard()

    def _finish_shard(self) -> None:
        path = self.folder / f"{self.prefix}_{len(self.shards):06d}.bin"
        writer = ShardWriter(path, self.tokenizer.dtype.itemsize)
        writer.write(np.array(self._waiting).ravel())
        writer.write([self.tokenizer.eot])
        self.shards.append(ShardRecord.of(writer.close()))
        self._waiting = []
        self.counts["tokens"] += 1

    def finish(self) -> SplitRecord:
        """Write what waits, and what the manifest says of it all."""
        if self._waiting:
            self._finish_shard()
        return SplitRecord(self.tokens, self.counts["documents"], self.counts["bytes"], tuple(self.shards))


def _say(name: str, made: codec.Codec, held_out: Pixels, folder: Path) -> None:
    """Log how well held-out pictures come back, and show them above those that come back, in codec.png."""
    back = made.decode(made.encode(held_out))
    near = made.psnr(held_out)
    lost = "nothing is lost" if near == float("inf") else f"{near:.1f} dB"
    log.info("%s: %d tokens a picture, of %d kinds; %d held-out pictures come back, and %s", name, made.grid.N,
             made.K, len(held_out), lost)  # fmt: skip
    n = min(len(held_out), COLUMNS)
    write_png(folder / CODEC_PICTURE, sheet(np.concatenate([held_out[:n], back[:n]]), n))
