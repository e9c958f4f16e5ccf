"""Text to token shards: `data/NAME/{manifest.json, NAME_train_%06d.bin, NAME_val_%06d.bin}`; or ready-made ones.

Every document is preceded by EOT and documents run on across shards, as in llm.c. The text is cut into units that
depend on the source alone; threads encode them (tiktoken releases the GIL) and they are written in order, so the files
are the same for any number of workers. A bounded number of units is in flight. The dataset is built in a hidden folder
beside its place and renamed into it at the end: it is there complete, or not there. A journal in that folder, written
whenever a shard is full and twice a minute, lets the same command go on after a kill, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from daybreak.data.catalogue import CATALOGUE, known_name, resolve_source
from daybreak.data.dataset import (
    MANIFEST,
    Manifest,
    ShardRecord,
    SplitRecord,
    check_name,
    dataset_name,
    token_counts,
)
from daybreak.data.formats import without_surrogates
from daybreak.data.hub import SPEC, Remote, download, hub_files
from daybreak.data.loader import ahead
from daybreak.data.shards import MAX_TOKENS, ShardWriter, read_header
from daybreak.data.sources import SPLITS, Piece, Source
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.errors import ConfigError, DataError, explained
from daybreak.files import fsync_folder, locked, sha256_of, write_atomic

log = logging.getLogger("daybreak")
UNIT = 1 << 20  # characters a worker encodes at a time
PROSE = "Most of what people write is prose like this sentence: GPT-2 makes a token of about four of its bytes."
SECONDS = 1 << 20  # bytes of text that are over before anybody has read what they will take
SAMPLE = 1 << 14  # characters of a piece
JOURNAL, JOURNAL_SECONDS = "journal.json", 30.0
PARALLEL = 4  # ready-made shards downloaded at once

Progress = Callable[[int, int, int], None]
Journal = dict[str, Any]


class Encoded(NamedTuple):
    """A unit's part of one split."""

    tokens: NDArray[np.integer]
    documents: int
    bytes: int


@dataclass
class _Split:
    """One split being written: its shards so far and its counts."""

    prefix: str
    folder: Path
    shard_tokens: int
    width: int
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    shards: list[ShardRecord] = field(default_factory=list)
    writer: ShardWriter | None = None

    def open(self, resume: int = 0) -> ShardWriter:
        return ShardWriter(self.folder / f"{self.prefix}_{len(self.shards):06d}.bin", self.width, resume)

    def write(self, encoded: Encoded) -> None:
        tokens = encoded.tokens
        self.tokens += tokens.size
        self.documents += encoded.documents
        self.bytes += encoded.bytes
        while tokens.size:
            if self.writer is None:
                self.writer = self.open()
            room = self.shard_tokens - self.writer.tokens
            self.writer.write(tokens[:room])
            tokens = tokens[room:]
            if self.writer.tokens == self.shard_tokens:
                self.finish_shard()

    def finish_shard(self) -> None:
        if self.writer is not None:
            info, self.writer = self.writer.close(), None
            self.shards.append(ShardRecord(info.path.name, info.tokens, info.size, sha256_of(info.path)))

    def state(self) -> Journal:
        """What `restore` needs, all of it on the disk."""
        if self.writer is not None:
            self.writer.flush()
        counts = {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens}
        partial = self.writer.tokens if self.writer else 0
        return {**counts, "partial": partial, "shards": [asdict(shard) for shard in self.shards]}

    def restore(self, state: Journal) -> None:
        self.documents, self.bytes, self.tokens = (state[key] for key in ("documents", "bytes", "tokens"))
        self.shards = [ShardRecord(**shard) for shard in state["shards"]]
        for shard in self.shards:
            read_header(self.folder / shard.file)
        if state["partial"]:
            self.writer = self.open(state["partial"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.abandon()

    def record(self) -> SplitRecord:
        self.finish_shard()
        return SplitRecord(self.tokens, self.documents, self.bytes, tuple(self.shards))


def prepare(
    names: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    data_dir: str | Path = "data",
    tokenizer: str = "gpt2",
    val_fraction: float | None = None,
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    text_field: str = "text",
    skip_bad: bool = False,
    progress: Progress = lambda done, total, tokens: None,
) -> Manifest:
    """Tokenize a catalogue name, hf:owner/name, URLs or files (`catalogue.resolve_source`) into `data_dir/NAME`.

    name: the dataset's; by default the catalogue name or the first path's stem, with `-TOKENIZER` appended unless that
    is gpt2. val_fraction: see `sources.file_source`. workers: threads, 0 = all cores; they don't change the result.
    skip_bad: pass over bad files, lines and rows, and log how many there were of each kind.
    progress(done, total, tokens) is called as units are written, in UTF-8 bytes of text; `total` is an estimate until
    the last call. A dataset of the same name, source and tokenizer is replaced; any other is a ConfigError.
    Raises DataError for text that cannot be read or is too little for both splits. A preparation that ended early, in
    whatever way, is continued by the next one of the same source and options, if the text that it had written is
    still the same.
    """
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ConfigError(f"shard-tokens = {shard_tokens} must be from 1 to {MAX_TOKENS}.")
    if workers < 0:
        raise ConfigError(f"workers = {workers} must be 0 (all cores) or more.")
    encoder = get_tokenizer(tokenizer)
    source = resolve_source([names] if isinstance(names, str | Path) else names, text_field, val_fraction, skip_bad)
    name = name or dataset_name(source.name, encoder.name)
    check_name(name)
    final = Path(data_dir) / name
    check_replaceable(final, source.origin, encoder.name)
    identity = [source.origin, source.revision, source.state, encoder.fingerprint, shard_tokens, val_fraction,
                text_field, UNIT]  # fmt: skip
    with explained(DataError, f"preparing {name!r} failed"), workspace(final, identity) as (folder, journal):
        _announce(source, folder, encoder)
        threads = workers or os.cpu_count() or 1
        try:
            return _Job(folder, name, source, encoder, shard_tokens, identity, journal).run(threads, progress)
        except _TextChangedError:
            log.warning("%s: the text written so far has changed since; starting over.", name)
            _empty(folder, "download")
            source.faults.counts.clear()
            return _Job(folder, name, source, encoder, shard_tokens, identity, None).run(threads, progress)


def _announce(source: Source, folder: Path, tokenizer: Tokenizer) -> None:
    """What it will take, before it starts. Text is taken to have as many bytes a token as its first pieces, or as PROSE
    if these must be downloaded. DataError where twice the room would not do for what `folder` still lacks."""
    if source.size < SECONDS:
        return
    pieces = source.pieces(0, 0, folder) if source.state is None else iter(())
    sample = "".join(piece.text[:SAMPLE] for piece in islice(pieces, 16)) or PROSE
    source.faults.counts.clear()
    tokens = source.size * tokenizer.encode(sample).size / len(sample.encode())
    size, done = tokens * tokenizer.dtype.itemsize, sum(path.stat().st_size for path in folder.glob("*.bin"))
    mb, free = 1e-6, shutil.disk_usage(folder).free
    log.info(
        "%s: %s MB of text, about %.3g tokens, %s MB of shards (estimated from the files' sizes); %s MB are free",
        source.name, f"{source.size * mb:,.1f}", tokens, f"{size * mb:,.1f}", f"{free * mb:,.1f}",
    )  # fmt: skip
    if size - done > 2 * free:
        raise DataError(
            f"{source.name} needs about {size * mb:,.1f} MB of disk, {free * mb:,.1f} MB are free at {folder.parent}; "
            "make room or name another --data-dir."
        )
    if size - done > free:
        log.warning("the disk may be too small; if it fills up, make room and run the same command again to continue.")


class _TextChangedError(Exception):
    """The text before the place that a journal names is not what was written."""


class _Job:
    """A preparation in progress: the splits, and how far the source has been read and written."""

    def __init__(
        self, folder: Path, name: str, source: Source, tokenizer: Tokenizer, shard_tokens: int, identity: Any,
        journal: Journal | None,
    ) -> None:  # fmt: skip
        self.folder, self.name, self.source, self.tokenizer, self.identity = folder, name, source, tokenizer, identity
        width = tokenizer.dtype.itemsize
        self.splits = {split: _Split(f"{name}_{split}", folder, shard_tokens, width) for split in SPLITS}
        self.digest, self.cuts = hashlib.sha256(), hashlib.sha256()  # of the text; of how it is cut and split
        # Written so far: pieces in all; the file they end in, its pieces among them, the documents before that file.
        self.place: Journal = {"pieces": 0, "file": 0, "in_file": 0, "before": 0, "text": ""}
        self.saved, self.shards = time.monotonic(), 0
        if journal is not None:
            self.place = journal["place"]
            for split in SPLITS:
                self.splits[split].restore(journal[split])
            log.info("%s: continuing after %s tokens", name, f"{self.count('tokens'):,}")

    def count(self, key: str) -> int:
        return sum(getattr(split, key) for split in self.splits.values())

    def run(self, workers: int, progress: Progress) -> Manifest:
        try:
            encode, lossless = partial(_encode_unit, self.tokenizer), True
            for unit, encoded in ahead(encode, _units(self._pieces()), workers, 2 * workers):
                for key, part in encoded.items():
                    self.splits[key].write(part)
                self._advance(unit)
                lossless = lossless and _round_trip(self.tokenizer, unit[0].text)
                progress(done := self.count("bytes"), max(done, self.source.size), self.count("tokens"))
            train, val = (self.splits[key].record() for key in SPLITS)
        except DataError:  # of a bad file: when it is mended, the work before it stays
            self._save()
            raise
        finally:
            for split in self.splits.values():
                split.close()
        if self.source.faults.counts:
            log.warning("%s: skipped %s", self.name, self.source.faults)
        if not (train.tokens and val.tokens):
            raise DataError(f"{self.source.origin} is too little text to split into train and val; add more.")
        progress(self.count("bytes"), self.count("bytes"), self.count("tokens"))
        revision = self.source.revision or f"sha256:{self.digest.hexdigest()}"
        t, s = self.tokenizer, self.source
        manifest = Manifest(self.name, t.name, t.fingerprint, s.origin, revision, s.licence, train, val)
        finish(self.folder, manifest, t)
        return manifest

    def _pieces(self) -> Iterator[Piece]:
        """The pieces not written yet. Those of local files are all read again, for the hash of the text, and must be
        those that were written."""
        start, local = self.place, not self.source.revision
        first, before, skip = (0, 0, start["pieces"]) if local else (start["file"], start["before"], start["in_file"])
        number = -1
        for number, piece in enumerate(self.source.pieces(first, before, self.folder)):
            if number >= skip:
                yield piece
            elif local and self._hashed(piece, number == skip - 1) != start["text"]:
                raise _TextChangedError
        if number + 1 < skip:
            raise _TextChangedError

    def _hashed(self, piece: Piece, ends: bool = True) -> str:
        """Of all local text up to this piece and of its cuts, where that `ends` here; else the journal's."""
        self.digest.update(piece.text.encode())
        self.cuts.update(f"{piece.split} {piece.starts} {len(piece.text)}\n".encode())
        return self.digest.hexdigest() + self.cuts.hexdigest() if ends else str(self.place["text"])

    def _advance(self, unit: Sequence[Piece]) -> None:
        """Note what was written, and put it in the journal when a shard was finished or some time has passed."""
        p = dict(self.place)
        documents = self.count("documents") - sum(piece.starts for piece in unit)
        for piece in unit:
            if piece.file != p["file"]:
                p.update(file=piece.file, in_file=0, before=documents)
            documents += piece.starts
            p["pieces"] += 1
            p["in_file"] += 1
            if not self.source.revision:
                p["text"] = self._hashed(piece)
        self.place = p
        shards = sum(len(split.shards) for split in self.splits.values())
        if shards > self.shards or time.monotonic() - self.saved > JOURNAL_SECONDS:
            self.shards, self.saved = shards, time.monotonic()
            self._save()

    def _save(self) -> None:
        state = {split: self.splits[split].state() for split in SPLITS}
        if self.place["pieces"]:
            write_atomic(self.folder / JOURNAL, json.dumps({"identity": self.identity, "place": self.place, **state}))


def finish(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Complete a workspace: the manifest, a tokenizer that is not one of ours, and nothing else but the shards."""
    write_atomic(folder / MANIFEST, manifest.to_json())
    if tokenizer.source:
        write_atomic(folder / TOKENIZER_FILE, tokenizer.source)
    for leftover in (folder / JOURNAL, *folder.glob(".*")):  # hidden: what a kill left of a writing
        leftover.unlink(missing_ok=True)
    shutil.rmtree(folder / "download", ignore_errors=True)


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _encode_unit(tokenizer: Tokenizer, unit: list[Piece]) -> tuple[list[Piece], dict[str, Encoded]]:
    """The unit and what its part of each split encodes to."""
    eot: NDArray[np.integer] = np.array([tokenizer.eot], tokenizer.dtype)
    found = {}
    for split in dict.fromkeys(piece.split for piece in unit):
        pieces = [piece for piece in unit if piece.split == split]
        parts: list[NDArray[np.integer]] = []
        for piece in pieces:
            parts += [eot, tokenizer.encode(piece.text)] if piece.starts else [tokenizer.encode(piece.text)]
        size = sum(len(piece.text.encode()) for piece in pieces)
        found[split] = Encoded(np.concatenate(parts), sum(piece.starts for piece in pieces), size)
    return unit, found


def _round_trip(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text comes back from its tokens, but for spaces before it; one warning where it does not. Our own
    tokenizers lose nothing."""
    if not tokenizer.source:
        return True
    text, back = (t.lstrip(" ") for t in (without_surrogates(text), tokenizer.decode(tokenizer.encode(text))))
    if text != back:
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        log.warning(
            "tokenizer %s loses text: %r comes back as %r. Bits per byte count the bytes of your text.",
            tokenizer.name, text[at : at + 20], back[at : at + 20],
        )  # fmt: skip
    return text == back


def check_replaceable(final: Path, origin: str, tokenizer: str) -> None:
    """Raise ConfigError if `final` holds anything but an earlier preparation of the same source."""
    if not final.exists():
        return
    if not (final / MANIFEST).is_file():
        raise ConfigError(f"{final} exists and is not a prepared dataset; choose another --name.")
    old = Manifest.load(final / MANIFEST)
    if (old.source, old.tokenizer) != (origin, tokenizer):
        raise ConfigError(
            f"{final} exists, made from {old.source} with tokenizer {old.tokenizer!r}; choose another --name or "
            "delete it."
        )
    ours = {MANIFEST, TOKENIZER_FILE, *(shard.file for split in (old.train, old.val) for shard in split.shards)}
    if foreign := sorted(path.name for path in final.iterdir() if path.name not in ours):
        raise ConfigError(f"{final} also holds {foreign[0]!r}, which is not part of the dataset; move it away first.")


@contextmanager
def workspace(final: Path, identity: Any) -> Iterator[tuple[Path, Journal | None]]:
    """A folder beside `final` that takes its place when the block ends well; with the journal of an earlier attempt.

    Without a journal of this `identity` it is empty. When the block fails it stays if there is something to go on with.
    """
    folder, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    folder.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{final} is being prepared by another process; wait for it or choose another --name.")
    with locked(folder, busy):
        journal = _read_journal(folder, identity)
        try:
            yield folder, journal
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            fsync_folder(folder)
            folder.rename(final)
            fsync_folder(final.parent)
        except BaseException:
            if (folder / JOURNAL).exists():
                log.warning("%s is kept; run the same command again to continue.", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _read_journal(folder: Path, identity: Any) -> Journal | None:
    """The journal of an earlier attempt at the same; without one the folder is emptied."""
    try:
        journal: Journal = json.loads((folder / JOURNAL).read_text("utf-8"))
        if journal["identity"] == json.loads(json.dumps(identity)):
            return journal
        log.warning("%s is from another source, other options or an older daybreak; starting over.", folder)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged; starting over.", folder / JOURNAL)
    _empty(folder)
    return None


def _empty(folder: Path, but: str = "") -> None:
    for leftover in (path for path in folder.iterdir() if path.name != but):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


# ---- ready-made shards


def pretokenized(
    source: str, shards: int = 0, *, name: str | None = None, data_dir: str | Path = "data",
    progress: Progress = lambda done, total, tokens: None,
) -> Manifest:  # fmt: skip
    """The validation shards and the first `shards` training shards (0: all) of GPT-2 tokens, into `data_dir/NAME`.

    source: a catalogue name that has them, or hf:owner/name[@revision]. Each file is checked: size, sha256, magic
    number, header. A download that ended early goes on with the files that are missing. progress(bytes, total bytes,
    tokens). DataError, ConfigError.
    """
    known = known_name(source)
    spec = SPEC.fullmatch(f"hf:{CATALOGUE[known].shards}" if known else source)
    if spec is None:
        ready = ", ".join(n for n, entry in CATALOGUE.items() if entry.shards)
        raise ConfigError(f"there are no ready-made shards of {source!r}; there are of {ready}, or give hf:owner/name.")
    name = name or known or spec["repo"].partition("/")[2]
    check_name(name)
    commit, licence, files = hub_files(spec["repo"], spec["revision"], spec["config"] or "", ((".bin",),))
    val = [file for file in files if "val" in file.name and "train" not in file.name]
    train = [file for file in files if "train" in file.name]
    if not (train and val):
        raise DataError(f"hf:{spec['repo']} has no *train*.bin and *val*.bin token shards.")
    train = train[: shards or None]
    wanted = {
        f"{name}_{split}_{i:06d}.bin": f for split, fs in (("train", train), ("val", val)) for i, f in enumerate(fs)
    }
    tokenizer, final = get_tokenizer("gpt2"), Path(data_dir) / name
    check_replaceable(final, f"hf:{spec['repo']}", tokenizer.name)
    total, done, tokens = sum(max(f.size, 0) for f in wanted.values()), 0, 0
    identity = [spec["repo"], commit, name]
    with explained(DataError, f"preparing {name!r} failed"), workspace(final, identity) as (folder, journal):
        if journal is None:
            write_atomic(folder / JOURNAL, json.dumps({"identity": identity}))
        left = total - sum(path.stat().st_size for path in folder.glob("*.bin") if path.name in wanted)
        free = shutil.disk_usage(folder).free
        log.info("%s: %d shards, %.1f GB to download, %.1f GB are free", name, len(wanted), left / 1e9, free / 1e9)
        if left > free:
            raise DataError(f"{name} needs {left / 1e9:.1f} GB, {free / 1e9:.1f} are free; ask for fewer shards.")
        records = {}
        for record in ahead(lambda item: _shard(folder, *item), wanted.items(), PARALLEL, 2 * PARALLEL):
            records[record.file] = record
            done, tokens = done + record.size, tokens + record.tokens
            progress(done, total, tokens)
        for path in folder.glob("*.bin"):  # of an earlier attempt at more shards
            if path.name not in records:
                path.unlink()
        lengths, splits = tokenizer.lengths(tokenizer.V), []
        for split in ("train", "val"):
            these = tuple(r for file, r in records.items() if file.startswith(f"{name}_{split}_"))
            counts = token_counts([read_header(folder / r.file) for r in these], tokenizer.V)
            splits.append(SplitRecord(int(counts.sum()), int(counts[tokenizer.eot]), int(counts @ lengths), these))
        manifest = Manifest(name, tokenizer.name, tokenizer.fingerprint, f"hf:{spec['repo']}", commit, licence, *splits)
        finish(folder, manifest, tokenizer)
        return manifest


def _shard(folder: Path, file: str, remote: Remote) -> ShardRecord:
    path = folder / file
    if not path.exists():
        download(remote, folder / "download").replace(path)
    try:
        info = read_header(path)
    except DataError:
        path.unlink()  # so that the next attempt does not trust it
        raise
    return ShardRecord(file, info.tokens, info.size, sha256_of(path))
