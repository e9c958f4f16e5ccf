"""Chats to packed rows: `prepare --as chat`. The source's pieces are records; packing.py has the files that it writes.

    source -> pieces, one record each -> threads render and encode -> window of examples -> rows -> shards and marks

An example of which nothing is learned is left out, and one longer than a row is cut. Both are counted, and the first of
each is named. A record that is no chat stops `prepare`, or is counted with `--skip-bad`. Nothing is kept of an
unfinished preparation: it starts over.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from daybreak.data.catalogue import here
from daybreak.data.chat import ChatEncoder
from daybreak.data.dataset import SplitRecord
from daybreak.data.formats import first_record, format_of
from daybreak.data.loader import ahead
from daybreak.data.packing import Example, RowWriter
from daybreak.data.sources import SPLITS, Piece, TextSource
from daybreak.errors import DataError

log = logging.getLogger("daybreak")
UNIT = 64  # records that a worker encodes at a time


class Encoded(NamedTuple):
    """A record's split, its place in the files, and its example, or what is wrong with it. cut: see `ChatEncoder`."""

    split: str
    place: str
    example: Example | None
    wrong: str = ""
    cut: str = ""
    bare: bool = False  # an answer is empty


def kind_of(words: Sequence[str | Path], text_field: str) -> str:
    """Text or chat, by the first record of the files here; folders are searched. A record with a text is text. Chats
    are announced in a line."""
    record = first_record([path for word in words for path in here(word)])
    if not isinstance(record, dict) or isinstance(record.get(text_field), str) or not (found := format_of(record)):
        return "text"
    log.info("%s: chats, since its records have %s; --as text reads them as text", words[0], found)
    return "chat"


def _encoded(encoder: ChatEncoder, unit: Sequence[Piece]) -> tuple[int, list[Encoded]]:
    """The bytes of the records, and what became of each."""
    found = list[Encoded]()
    for piece in unit:
        place, record = json.loads(piece.text)
        try:
            example, cut = encoder(record)
            found.append(Encoded(piece.split, place, example, "", cut, not cut and encoder.empty_answer(example)))
        except ValueError as error:
            found.append(Encoded(piece.split, place, None, str(error)))
    return sum(len(piece.text.encode()) for piece in unit), found


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    pieces = iter(pieces)
    while unit := list(islice(pieces, UNIT)):
        yield unit


class _Notes:
    """Counts of what is told at the end, with the first place of each."""

    def __init__(self) -> None:
        self.counts, self.first = Counter[str](), dict[str, str]()

    def __call__(self, what: str, place: str) -> None:
        self.counts[what] += 1
        self.first.setdefault(what, place)

    def say(self, origin: str, encoder: ChatEncoder) -> None:
        """Log them. DataError if no example has anything to learn."""
        n, empty, first, T = self.counts["all"], self.counts["empty"], self.first, encoder.T
        full = 0 < encoder.longest <= T
        longer = "the model reads no more" if full else "--row-tokens N makes longer rows"
        lost = f"; the answers of {self.counts['lost']} lie beyond the {T} tokens of a row" * (self.counts["lost"] > 0)
        if n == empty:
            why = f"none of {n} examples has anything to learn (first: {first['empty']})" if n else "it has no examples"
            fix = longer + ", so shorten the questions" * full
            fix = fix if lost else "an answer is a message of the role assistant that is not empty"
            raise DataError(f"{origin}: {why}{lost}; {fix}.")
        if empty:
            log.warning("%d of %d examples have nothing to learn, and are left out (first: %s)%s", empty, n,
                        first["empty"], lost)  # fmt: skip
        if cut := self.counts["cut"]:
            log.warning("%d of %d examples have more than %d tokens, and are cut (first: %s); %s", cut, n, T,
                        first["cut"], longer)  # fmt: skip
        if bare := self.counts["bare"]:
            log.warning("%d of %d examples have an empty answer, from which a model learns to say nothing (first: %s); "
                        "mend or delete them", bare, n, first["bare"])  # fmt: skip
        if self.counts["open"]:
            log.warning("the answer of %s does not end with a special token: the model may not learn to stop. Mend the "
                        "chat template.", first["open"])  # fmt: skip


def write_rows(
    folder: Path, name: str, source: TextSource, encoder: ChatEncoder, shard_tokens: int, workers: int,
    progress: Callable[[int, int, int], None],
) -> tuple[SplitRecord, SplitRecord]:  # fmt: skip
    """Encode and pack all records of a source into shards in `folder`: the records of train and val.

    Raises DataError for a record that is no chat, and if one of the splits has nothing to learn."""
    T, width, pad = encoder.T, encoder.tokenizer.dtype.itemsize, encoder.tokenizer.eot
    writers = {s: RowWriter(folder, f"{name}_{s}", T, width, shard_tokens, pad) for s in SPLITS}
    note, done = _Notes(), 0
    fix = "" if source.faults.skip else "; mend or delete it, or add --skip-bad"
    try:
        units = _units(source.pieces(0, 0, folder))
        for nbytes, found in ahead(partial(_encoded, encoder), units, workers, 2 * workers):
            for split, place, example, wrong, cut, bare in found:
                if example is None:
                    source.faults("that are no chats", f"{place} {wrong}{fix}.")
                    note(split, place)
                    continue
                note("all", place)
                if cut:
                    note("cut", place)
                if not example.learned.any():
                    for what in ("empty", split, *["lost"] * (cut == "lost")):
                        note(what, place)
                    continue
                if bare:
                    note("bare", place)
                if not (cut or encoder.ends_turns(example)):
                    note("open", place)
                writers[split].add(example)
            done += nbytes
            progress(done, max(done, source.size), sum(writer.counts["used"] for writer in writers.values()))
        note.say(source.origin, encoder)
        if encoder.joined and encoder.template:
            log.warning("%s: two texts are joined without the chat template, and `daybreak chat` asks with it. For a "
                        "model that talks, call the fields instruction and output.", source.origin)  # fmt: skip
        train, val = (writers[split].finish() for split in SPLITS)
        if not (train.tokens and val.tokens):
            split, use = ("train", "training") if not train.tokens else ("val", "validation")
            said = "has too few examples to split into train and val"
            if n := note.counts[split]:
                said += f", since nothing is learned from the {n} for {use} (first: {note.first[split]}); mend or "
                said += "delete such ones, or"
            raise DataError(f"{source.origin} {said}{';' * (not n)} add more.")
    finally:
        for writer in writers.values():
            writer.close()
    sums = sum((writer.counts for writer in writers.values()), Counter[str]())
    progress(done, done, sums["used"])
    full, learned = (100 * sums[key] / (train.tokens + val.tokens) for key in ("used", "learned"))
    log.info("%s: %d rows of %d tokens, %.0f %% full; %.0f %% of their tokens are learned", name, sums["rows"], T, full,
             learned)  # fmt: skip
    return train, val
