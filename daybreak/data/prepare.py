"""Text to token shards: `data/NAME/{manifest.json, NAME_train_%06d.bin, NAME_val_%06d.bin}`; or ready-made ones.

    source -> pieces -> units of about UNIT characters -> threads encode -> written in order -> shards -> rename

EOT stands before every document, and a document may continue in the next shard, as in llm.c. Units depend on the source
alone, so the files are the same for any number of workers. A bounded number of units is in flight. The dataset is built
in a hidden folder beside its place, and renamed at the end. So it is either complete or absent.

The journal is a file in that folder, written when a shard is full, every 30 seconds, and before a DataError of the
source. It lets the same command resume after a kill and write the same bytes. It says how much is written, and how
much of the text that was:

    text    | file 0: 0 1 2 | file 1: 3 4 | 5 6    place: pieces 5, file 1, in_file 2, before = documents of file 0
    shards  | train_000000 | train_000001 | ...    shards: one full; partial: tokens of train_000001
                                          ^ everything before this point is on the disk

1. `_read_journal` compares its identity: source, options, tokenizer. If that differs, the folder is emptied.
2. `_Split.restore` reopens the unfinished shard at `partial` tokens; tokens behind them are cut off.
3. `_Job._pieces` skips the pieces that are written. A source with a revision starts at `file` and skips `in_file`
   pieces. Local files may have changed, so they are read from the start, and their hash at `place` must be `text` of
   the journal. If it is not, `prepare` empties the folder and starts over.

For ready-made shards the journal holds only the identity: complete files stay, and the missing ones are downloaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daybreak.checked import ANY, TEXT, read_json
from daybreak.data.catalogue import CATALOGUE, known_name, resolve_source
from daybreak.data.chat import ChatEncoder
from daybreak.data.dataset import MANIFEST, Manifest, ShardRecord, SplitRecord, check_name, dataset_name, token_counts
from daybreak.data.formats import without_surrogates
from daybreak.data.hub import SPEC, Remote, download, hub_files
from daybreak.data.loader import ahead
from daybreak.data.pictures import text_name
from daybreak.data.prepare_chat import kind_of, write_rows
from daybreak.data.shards import ShardWriter, check_shard_tokens, read_header
from daybreak.data.sources import SPLITS, Piece, TextSource
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.data.train_tokenizer import made_for
from daybreak.errors import ConfigError, DataError, explained
from daybreak.files import HOLDER, fsync_folder, holder_of, locked, signed, write_atomic
from daybreak.manifest import checksum, kept_files

log = logging.getLogger("daybreak")
UNIT = 1 << 20  # characters that a worker encodes at a time
PROSE = "Most of what people write is prose like this sentence: GPT-2 makes a token of about four of its bytes."
SECONDS = 1 << 20  # bytes of text that take so little time that no estimate is printed
SAMPLE = 1 << 14  # characters of each piece that the estimate encodes
JOURNAL, JOURNAL_SECONDS = "journal.json", 30.0
PARALLEL = 4  # ready-made shards downloaded at once

Progress = Callable[[int, int, int], None]
Journal = dict[str, Any]
Encoded = tuple[NDArray[np.integer], Counter[str]]  # tokens of one split, and the counts of a _Split


@dataclass
class _Split:
    """One split being written: its shards so far, and its tokens, documents and bytes of text, counted."""

    prefix: str
    folder: Path
    shard_tokens: int
    width: int
    counts: Counter[str] = field(default_factory=lambda: Counter(tokens=0, documents=0, bytes=0))
    shards: list[ShardRecord] = field(default_factory=list)
    writer: ShardWriter | None = None

    def open(self, resume: int = 0) -> ShardWriter:
        return ShardWriter(self.folder / f"{self.prefix}_{len(self.shards):06d}.bin", self.width, resume)

    def write(self, tokens: NDArray[np.integer], counts: Counter[str]) -> None:
        self.counts.update(counts)
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
            self.shards.append(ShardRecord.of(info))

    def state(self) -> Journal:
        """The journal's part about this split. All that it counts is on the disk."""
        if self.writer is not None:
            self.writer.flush()
        partial = self.writer.tokens if self.writer else 0
        return {**self.counts, "partial": partial, "shards": [asdict(shard) for shard in self.shards]}

    def restore(self, state: Journal) -> None:
        self.counts.update({key: state[key] for key in self.counts})
        self.shards = [ShardRecord(**shard) for shard in state["shards"]]
        try:
            for shard in self.shards:
                read_header(self.folder / shard.file)
            if state["partial"]:
                self.writer = self.open(state["partial"])
        except (DataError, OSError):
            raise _TextChangedError from None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.abandon()

    def record(self) -> SplitRecord:
        self.finish_shard()
        return SplitRecord(**self.counts, shards=tuple(self.shards))


def prepare(
    names: str | Path | Sequence[str | Path], *, name: str | None = None, data_dir: str | Path = "data",
    tokenizer: str = "gpt2", val_fraction: float | None = None, shard_tokens: int = 100_000_000, workers: int = 0,
    text_field: str = "text", skip_bad: bool = False, kind: str = "", row_tokens: int = 0,
    train_tokenizer: int = 0, progress: Progress = lambda done, total, tokens: None,
) -> Manifest:  # fmt: skip
    """Tokenize a catalogue name, hf:owner/name, URLs or files (`catalogue.resolve_source`) into `data_dir/NAME`.

    name: the dataset's; by default the catalogue name or the first path's stem, with `-TOKENIZER` appended unless that
    is gpt2. val_fraction: see `sources.file_source`. workers: threads, 0 = all cores; they don't change the result.
    skip_bad: pass over bad files, lines and rows, and log how many there were of each kind. train_tokenizer: see
    train_tokenizer.made_for; it takes the place of `tokenizer`.
    kind: text, or chat for packed rows of row_tokens tokens each (chat.ChatEncoder); "" = as the files look.
    progress(done, total, tokens) is called as units are written, in UTF-8 bytes of text; `total` is an estimate until
    the last call. A dataset of the same name, source and tokenizer is replaced; any other is a ConfigError.
    Raises DataError for text that cannot be read or is too little for both splits. After an early end of any kind, the
    same source and options continue the preparation, if the text that was written is still the same.
    """
    check_shard_tokens(shard_tokens)
    if workers < 0:
        raise ConfigError(f"workers = {workers} must be 0 (all cores) or more.")
    words = [names] if isinstance(names, str | Path) else list(names)
    kind = kind or kind_of(words, text_field)
    source = resolve_source(words, text_field if kind == "text" else "", val_fraction, skip_bad)
    alone = kind == "text" and tokenizer == "gpt2"
    encoder = made_for(source, train_tokenizer, alone) if train_tokenizer else get_tokenizer(tokenizer)
    name = name or dataset_name(source.name, encoder.name)
    final = place(data_dir, name, source.origin, encoder)
    identity = [source.origin, source.revision, source.state, encoder.fingerprint, shard_tokens, val_fraction,
                text_field, UNIT]  # fmt: skip
    threads = workers or os.cpu_count() or 1
    if kind == "chat":
        folder = Path(tokenizer).parent if tokenizer.endswith(".json") else None
        chats = ChatEncoder(encoder, folder, row_tokens)
        return _prepare_chats(final, name, source, chats, shard_tokens, threads, progress)
    with explained(DataError, f"preparing {name!r} failed"), workspace(final, identity) as (folder, journal):
        _announce(source, folder, encoder)
        job = partial(_Job, folder, name, source, encoder, shard_tokens, identity)
        try:
            return job(journal).run(threads, progress)
        except _TextChangedError:
            log.warning("%s: the text written so far has changed since; starting over.", name)
            _empty(folder, {"download", HOLDER})
            source.faults.counts.clear()
            return job(None).run(threads, progress)


def _prepare_chats(
    final: Path, name: str, source: TextSource, encoder: ChatEncoder, shard_tokens: int, workers: int,
    progress: Progress,
) -> Manifest:  # fmt: skip
    kept = kept_files(encoder.folder) if encoder.folder else {}
    with explained(DataError, f"preparing {name!r} failed"), workspace(final, []) as (folder, _):
        train, val = write_rows(folder, name, source, encoder, shard_tokens, workers, progress)
        if source.faults.counts:
            log.warning("%s: skipped %s", name, source.faults)
        for file, text in kept.items():
            write_atomic(folder / file, text)
        origin = source.origin, source.revision, source.licence
        return finish(folder, name, encoder.tokenizer, *origin, train, val, encoder.T)


def _announce(source: TextSource, folder: Path, tokenizer: Tokenizer) -> None:
    """Log an estimate of size and disk space before the start. It counts the bytes per token of the first pieces, or of
    PROSE if the text is not here yet. Raises DataError if even twice the free space is too little."""
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
        said = f"{source.name} needs about {size * mb:,.1f} MB of disk, {free * mb:,.1f} MB are free at {folder.parent}"
        raise DataError(f"{said}; make room or name another --data-dir.")
    if size - done > free:
        log.warning("the disk may be too small; if it fills up, make room and run the same command again to continue.")


class _TextChangedError(Exception):
    """The text before the journal's place, or a shard that it names, has changed since it was written."""


class _Job:
    """A preparation in progress: the splits, and how far the source has been read and written."""

    def __init__(
        self, folder: Path, name: str, source: TextSource, tokenizer: Tokenizer, shard_tokens: int, identity: Any,
        journal: Journal | None,
    ) -> None:  # fmt: skip
        self.folder, self.name, self.source, self.tokenizer, self.identity = folder, name, source, tokenizer, identity
        width = tokenizer.dtype.itemsize
        self.splits = {split: _Split(f"{name}_{split}", folder, shard_tokens, width) for split in SPLITS}
        self.digest, self.cuts = hashlib.sha256(), hashlib.sha256()  # of the text; of its cuts and splits
        # Written so far: pieces in all; the file of the last one, pieces of that file, documents before it, the hash.
        self.place: Journal = {"pieces": 0, "file": 0, "in_file": 0, "before": 0, "text": ""}
        self.saved, self.shards = time.monotonic(), 0
        if journal is not None:
            self.place = journal["place"]
            for split in SPLITS:
                self.splits[split].restore(journal[split])
            log.info("%s: continuing after %s tokens", name, f"{self.count('tokens'):,}")

    def count(self, key: str) -> int:
        return sum(split.counts[key] for split in self.splits.values())

    def run(self, workers: int, progress: Progress) -> Manifest:
        try:
            encode, lossless = partial(_encode_unit, self.tokenizer), True
            for unit, encoded in ahead(encode, _units(self._pieces()), workers, 2 * workers):
                for key, part in encoded.items():
                    self.splits[key].write(*part)
                self._advance(unit)
                lossless = lossless and _round_trip(self.tokenizer, unit[0].text)
                progress(done := self.count("bytes"), max(done, self.source.size), self.count("tokens"))
            train, val = (self.splits[key].record() for key in SPLITS)
        except DataError:  # of a bad file: after its repair, the work before it is not repeated
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
        s, revision = self.source, self.source.revision or f"sha256:{self.digest.hexdigest()}"
        return finish(self.folder, self.name, self.tokenizer, s.origin, revision, s.licence, train, val)

    def _pieces(self) -> Iterator[Piece]:
        """The pieces not written yet: step 3 at the top of the file. Raises _TextChangedError."""
        start, local = self.place, not self.source.revision
        first, before, skip = (0, 0, start["pieces"]) if local else (start["file"], start["before"], start["in_file"])
        number = -1
        for number, piece in enumerate(self.source.pieces(first, before, self.folder)):
            if number >= skip:
                yield piece
            elif local and self._hashed(piece) != start["text"] and number == skip - 1:
                raise _TextChangedError
        if number + 1 < skip:
            raise _TextChangedError

    def _hashed(self, piece: Piece) -> str:
        """The hash of the local text and its cuts, with this piece added."""
        self.digest.update(piece.text.encode())
        self.cuts.update(f"{piece.split} {piece.starts} {len(piece.text)}\n".encode())
        return self.digest.hexdigest() + self.cuts.hexdigest()

    def _advance(self, unit: Sequence[Piece]) -> None:
        """Move the place behind a written unit. Save the journal if a shard was finished or JOURNAL_SECONDS passed."""
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
            _write_journal(self.folder, {"identity": self.identity, "place": self.place, **state})


def finish(
    folder: Path, name: str, tokenizer: Tokenizer, origin: str, revision: str, licence: str, train: SplitRecord,
    val: SplitRecord, rows: int = 0,
) -> Manifest:  # fmt: skip
    """Complete a workspace: write the manifest and a foreign tokenizer, and delete everything else but the shards.
    revision: the source's; "" stands for a hash over the sums of all shards."""
    sums = "".join(shard.sha256 + shard.marks for split in (train, val) for shard in split.shards)
    revision = revision or f"sha256:{hashlib.sha256(sums.encode()).hexdigest()}"
    manifest = Manifest(name, tokenizer.name, tokenizer.fingerprint, origin, revision, licence, train, val, rows)
    write_atomic(folder / MANIFEST, manifest.to_json())
    if tokenizer.source:
        write_atomic(folder / TOKENIZER_FILE, tokenizer.source)
    _empty(folder, manifest.files())
    return manifest


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
    """The unit, and the tokens of its part of each split."""
    eot: NDArray[np.integer] = np.array([tokenizer.eot], tokenizer.dtype)
    found = {}
    for split in dict.fromkeys(piece.split for piece in unit):
        parts, counts = list[NDArray[np.integer]](), Counter[str]()
        for piece in (piece for piece in unit if piece.split == split):
            parts += [eot, tokenizer.encode(piece.text)] if piece.starts else [tokenizer.encode(piece.text)]
            counts.update(documents=piece.starts, bytes=len(piece.text.encode()))
        tokens = np.concatenate(parts)
        found[split] = tokens, counts + Counter(tokens=tokens.size)
    return unit, found


def _round_trip(tokenizer: Tokenizer, text: str) -> bool:
    """Whether decoding gives the text back, except for leading spaces; logs one warning if not. Only foreign tokenizers
    are checked, since ours lose nothing."""
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


def place(data_dir: str | Path, name: str, origin: str, tokenizer: Tokenizer) -> Path:
    """The folder of the dataset. ConfigError if it holds anything but an earlier preparation of the same source."""
    check_name(name)
    final = Path(data_dir) / name
    if not final.exists():
        return final
    if not (final / MANIFEST).is_file():
        raise ConfigError(f"{final} exists and is not a prepared dataset; choose another --name.")
    old = Manifest.load(final / MANIFEST)
    if (old.source, text_name(old.tokenizer)) != (origin, tokenizer.name):
        made = f"made from {old.source} with tokenizer {old.tokenizer!r}"
        raise ConfigError(f"{final} exists, {made}; choose another --name or delete it.")
    if foreign := sorted({path.name for path in final.iterdir()} - old.files()):
        raise ConfigError(f"{final} also holds {foreign[0]!r}, which is not part of the dataset; move it away first.")
    return final


@contextmanager
def workspace(final: Path, identity: Any) -> Iterator[tuple[Path, Journal | None]]:
    """A folder beside `final` that replaces it if the block succeeds, and the journal of an earlier attempt.

    Without a journal of this `identity` it is empty. If the block fails, the folder stays only if it has a journal.
    """
    folder, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    folder.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{final} is being prepared by {holder_of(folder)}; wait for it or choose another --name.")
    with locked(folder, busy):
        try:
            with signed(lambda: folder):
                yield folder, _read_journal(folder, identity)
            fsync_folder(folder)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            folder.rename(final)
            fsync_folder(final.parent)
        except BaseException:
            if old.exists() and not final.exists():
                old.rename(final)
            if (folder / JOURNAL).exists():
                log.warning("%s is kept; run the same command again to continue.", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _write_journal(folder: Path, journal: Journal) -> None:
    write_atomic(folder / JOURNAL, json.dumps(journal | {"checksum": checksum(journal)}))


def _read_journal(folder: Path, identity: Any) -> Journal | None:
    """The journal of an earlier attempt with this identity. Without one, the folder is emptied."""
    try:
        if (path := folder / JOURNAL).exists():
            fix = "the preparation starts over"
            journal: Journal = read_json(path, {"identity": ANY, "checksum": TEXT}, DataError, fix)
            if journal["checksum"] != checksum(journal):
                raise DataError(f"{path} was altered (its checksum does not match); {fix}.")
            if journal["identity"] == json.loads(json.dumps(identity)):
                return journal
            log.warning("%s is from another source, other options or an older daybreak; starting over.", folder)
    except DataError as error:
        log.warning("%s", error)
    _empty(folder, {HOLDER})
    return None


def _empty(folder: Path, but: Container[str] = ()) -> None:
    for leftover in (path for path in folder.iterdir() if path.name not in but):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def pretokenized(
    source: str, shards: int = 0, *, name: str | None = None, data_dir: str | Path = "data",
    progress: Progress = lambda done, total, tokens: None,
) -> Manifest:  # fmt: skip
    """The validation shards and the first `shards` training shards (0: all) of GPT-2 tokens, into `data_dir/NAME`.

    source: a catalogue name that has them, or hf:owner/name[@revision]. Each file is checked: size, sha256, header. A
    download that ended early continues with what is missing. progress(bytes, total, tokens). DataError, ConfigError.
    """
    known = known_name(source)
    spec = SPEC.fullmatch(f"hf:{CATALOGUE[known].shards}" if known else source)
    if spec is None:
        ready = ", ".join(n for n, entry in CATALOGUE.items() if entry.shards)
        raise ConfigError(f"there are no ready-made shards of {source!r}; there are of {ready}, or give hf:owner/name.")
    name, origin = name or known or spec["repo"].partition("/")[2], f"hf:{spec['repo']}"
    tokenizer = get_tokenizer("gpt2")
    final = place(data_dir, name, origin, tokenizer)
    commit, licence, files = hub_files(spec, [(".bin",)])
    train = [file for file in files if "train" in file.name][: shards or None]
    val = [file for file in files if "val" in file.name and "train" not in file.name]
    if not (train and val):
        raise DataError(f"{origin} has no *train*.bin and *val*.bin token shards.")
    wanted = [(split, f"{name}_{split}_{i:06d}.bin", file)
              for split, found in (("train", train), ("val", val)) for i, file in enumerate(found)]  # fmt: skip
    total, done, identity = sum(file.size for file in train + val), 0, [spec["repo"], commit, name]
    with explained(DataError, f"preparing {name!r} failed"), workspace(final, identity) as (folder, journal):
        if journal is None:
            _write_journal(folder, {"identity": identity})
        left = sum(remote.size for _, file, remote in wanted if not (folder / file).exists())
        free = shutil.disk_usage(folder).free
        log.info("%s: %d shards, %.1f GB to download, %.1f GB are free", name, len(wanted), left / 1e9, free / 1e9)
        if left > free:
            raise DataError(f"{name} needs {left / 1e9:.1f} GB, {free / 1e9:.1f} are free; ask for fewer shards.")
        splits = {split: _Split(name, folder, 0, 0) for split in SPLITS}
        for split, record, counts in ahead(partial(_ready_made, folder), wanted, PARALLEL, 2 * PARALLEL):
            splits[split].shards.append(record)
            splits[split].counts.update(counts)
            done += record.size
            progress(done, total, sum(part.counts["tokens"] for part in splits.values()))
        train_record, val_record = (splits[key].record() for key in SPLITS)
        return finish(folder, name, tokenizer, origin, commit, licence, train_record, val_record)


def _ready_made(folder: Path, wanted: tuple[str, str, Remote]) -> tuple[str, ShardRecord, Counter[str]]:
    """Split, record and counts of a shard of GPT-2 tokens, which is downloaded unless it is in the folder."""
    split, file, remote = wanted
    path, tokenizer = folder / file, get_tokenizer("gpt2")
    if not path.exists():
        download(remote, folder / "download").replace(path)
    try:
        info = read_header(path)
    except DataError:
        path.unlink()  # so that the next attempt does not trust it
        raise
    ids = token_counts([info], tokenizer.V)
    size = int(ids @ tokenizer.lengths(tokenizer.V))
    counts = Counter(tokens=info.tokens, documents=int(ids[tokenizer.eot]), bytes=size)
    return split, ShardRecord.of(info), counts
