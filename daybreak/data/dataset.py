"""A prepared dataset on disk: its manifest, and how a name, a folder or globs become checked shards."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daybreak.checked import FILE_NAME, TEXT, TOKENIZER, WHOLE, misfit, read_json
from daybreak.data.catalogue import CATALOGUE
from daybreak.data.formats import fits_name
from daybreak.data.pictures import CODEC_FILE, CODEC_PICTURE, text_name
from daybreak.data.shards import ShardInfo, open_shard, read_header, resolve_shards
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.errors import ConfigError, DataError
from daybreak.files import sha256_of
from daybreak.formatting import quoted
from daybreak.manifest import KEPT

log = logging.getLogger("daybreak")

FORMAT = 1
MANIFEST = "manifest.json"
# The keys of manifest.json, and of each split and shard in it: those of the records below, in their order.
SHARD = {"file": FILE_NAME, "tokens": WHOLE, "size": WHOLE, "sha256": TEXT, "marks?": TEXT}
SPLIT = {"tokens": WHOLE, "documents": WHOLE, "bytes": WHOLE, "shards": [SHARD]}
SPEC = {
    "name": TEXT, "tokenizer": TOKENIZER, "tokenizer_fingerprint": TEXT, "source": TEXT, "revision": TEXT,
    "licence": TEXT, "train": SPLIT, "val": SPLIT, "rows?": WHOLE,
}  # fmt: skip
_COUNT_BLOCK = 1 << 22  # tokens


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's entry of one shard: file name, tokens, size in bytes, sha256 (hex) of the whole file, and that
    of its marks, if it holds packed rows."""

    file: str
    tokens: int
    size: int
    sha256: str
    marks: str = ""

    @classmethod
    def of(cls, shard: ShardInfo, marks: str = "") -> ShardRecord:
        """The entry of a shard, whose file is read once for its sha256. marks: that of its marks."""
        return cls(shard.path.name, shard.tokens, shard.size, sha256_of(shard.path), marks)


@dataclass(frozen=True)
class SplitRecord:
    """One split. `bytes` counts the documents' UTF-8 text: bits per byte = loss * tokens / bytes / ln 2."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a dataset. `tokenizer_fingerprint`: see `Tokenizer.fingerprint`. rows: tokens of a packed row
    (data/packing.py), 0 for text."""

    name: str
    tokenizer: str
    tokenizer_fingerprint: str
    source: str
    revision: str
    licence: str
    train: SplitRecord
    val: SplitRecord
    rows: int = 0

    def files(self) -> set[str]:
        """The names of all files that the dataset's folder may hold."""
        codec = [CODEC_FILE, CODEC_PICTURE] if text_name(self.tokenizer) != self.tokenizer else []
        return {MANIFEST, TOKENIZER_FILE, *codec, *(KEPT if self.rows else ()), *self.sums()}

    def sums(self) -> dict[str, str]:
        """The sha256 (hex) of every shard and of its marks, by file name."""
        shards = [*self.train.shards, *self.val.shards]
        marks = {str(Path(s.file).with_suffix(".marks")): s.marks for s in shards if s.marks}
        return {s.file: s.sha256 for s in shards} | marks

    def to_json(self) -> str:
        """The file's text. Keys that only packed rows have are left out of others."""

        def given(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {key: value for key, value in pairs if value or key not in ("rows", "marks")}

        return json.dumps({"format": FORMAT, **asdict(self, dict_factory=given)}, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest. DataError if it is damaged or of a newer format."""
        fix = "delete the folder and prepare it again"
        values: dict[str, Any] = read_json(path, {"format": WHOLE}, DataError, fix)
        if (format_ := values["format"]) > FORMAT:
            raise DataError(f"{path} has format {format_}, newer than this daybreak reads ({FORMAT}); update daybreak.")
        if said := misfit(values, SPEC):
            raise DataError(f"{path} is not a dataset manifest: {said}; {fix}.")
        for split in ("train", "val"):
            tokens, documents, size, shards = (values[split][key] for key in SPLIT)
            records = tuple(
                ShardRecord(**{f.name: shard[f.name] for f in fields(ShardRecord) if f.name in shard})
                for shard in shards
            )
            values[split] = SplitRecord(tokens, documents, size, records)
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True)
class Dataset:
    """Checked shards of both splits. `manifest` is None for shards that other programs wrote."""

    name: str
    train: list[ShardInfo]
    val: list[ShardInfo]
    tokenizer_name: str
    manifest: Manifest | None
    folder: Path | None = field(default=None, compare=False)  # holds tokenizer.json where that is not one of ours
    val_bytes: int = field(default=0, compare=False)  # of the validation documents' text; 0: unknown


def dataset_name(name: str, tokenizer: str) -> str:
    """The folder of a dataset under the data directory: `NAME` for GPT-2's tokenizer, `NAME-TOKENIZER` for another."""
    return name if tokenizer in ("", "gpt2") else f"{name}-{tokenizer}"


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be a dataset's folder name."""
    if not (name[:1].isalnum() and all(map(fits_name, name))):
        rule = "must start with a letter or digit and hold only those, '.', '_' and '-'"
        raise ConfigError(f"dataset name {name!r} {rule}.")


def open_dataset(
    name: str, data_dir: str | Path = "data", train_glob: str = "", val_glob: str = "", tokenizer: str = "",
    prefer: str = "", give: str = "",
) -> Dataset:  # fmt: skip
    """Open prepared data, every shard's header and size checked.

    In this order: the two globs (files, folders or patterns), if given; `name` as a glob or a folder of shards, split
    by *train*.bin and *val*.bin in the file names (llm.c, modded-nanogpt) unless it has a manifest; `data_dir/NAME`,
    or `data_dir/NAME-TOKENIZER` (see `dataset_name`). `tokenizer`: "" = the manifest's, or gpt2 where there is none.
    `prefer`: the tokenizer to look for, without a `tokenizer` that the data must have; that of shards without a
    manifest. `give`: how `prepare` is given
    `tokenizer`, if a trained model has it, which cannot have another.
    Raises DataError: nothing of that name (nearest match, prepare command), a split missing, a damaged shard, or data
    that was made with another tokenizer.
    """
    if train_glob or val_glob:
        if not (train_glob and val_glob):
            raise ConfigError("data.train and data.val must be given together: a glob, folder or file for each split.")
        return _foreign(train_glob, resolve_shards(train_glob), resolve_shards(val_glob), tokenizer or prefer)
    path = Path(name)
    if any(c in name for c in "*?["):
        return _by_file_name(name, resolve_shards(name), tokenizer or prefer)
    if path.is_dir() and ((path / MANIFEST).is_file() or any(path.glob("*.bin"))):
        if any((Path(data_dir) / n / MANIFEST).is_file() for n in (name, dataset_name(name, tokenizer))):
            both = f"{name!r} is a folder of shards here and a dataset in {data_dir}; using the one here."
            _warn_once(path.resolve(), both)
        if not (path / MANIFEST).is_file():
            return _by_file_name(name, resolve_shards(path), tokenizer or prefer)
        return _with_manifest(path, tokenizer, give)
    return _with_manifest(_find(name, Path(data_dir), tokenizer or prefer, give), tokenizer, give)


@cache
def _warn_once(folder: Path, text: str) -> None:
    """Say which folder is used, the first time that this process opens it: a command opens its data several times."""
    log.warning("%s", text)


def _find(name: str, data_dir: Path, tokenizer: str, give: str = "") -> Path:
    folders = [data_dir / dataset_name(name, tokenizer), data_dir / name]
    if found := [folder for folder in folders if (folder / MANIFEST).is_file()]:
        if found[0].name != found[-1].name:
            _warn_once(found[0].resolve(), f"{found[-1]} exists too; using {found[0]}, which has this run's tokenizer.")
        return found[0]
    have = sorted(path.parent.name for path in data_dir.glob(f"[!.]*/{MANIFEST}"))
    other = rf"{re.escape(name)}-(bytes|gpt2-\d+|hf-\w+)"  # the same text in another tokenizer
    near = [h for h in have if re.fullmatch(other, h)] or difflib.get_close_matches(folders[0].name, have, 1)
    hint = f"; did you mean {near[0]!r}? If not," if near else f" (it has {', '.join(have) or 'none'});"
    made = name if Path(name).is_file() else f"FILE --name {name}"
    shards = part = ""
    for known, entry in CATALOGUE.items():
        if name == known or (name.startswith(f"{known}-") and not tokenizer):
            made, tokenizer, shards = known, tokenizer or name[len(known) + 1 :], entry.shards
            part = f" ({known} itself has many times the text that any recipe reads)" * bool(entry.part)
            made = f"{quoted(entry.part)} --name {name}" if part else made
    if shards and tokenizer in ("", "gpt2"):
        some = " N (as many shards, of 100 million tokens each, as the run needs)"
        made += " --pretokenized" + ("" if made.endswith("-10B") else some)
    elif own := re.fullmatch(r"bpe(\d+)", tokenizer):  # a recipe's name of a set with its own tokenizer
        made += f" --train-tokenizer {own[1]}" + f" --name {name}" * (not part)
    else:
        made += f" --tokenizer {give or given_as(tokenizer)}" if tokenizer else ""
    raise DataError(f"no dataset {name!r} in {data_dir.resolve()}{hint} make it with: daybreak prepare {made}{part}")


def given_as(tokenizer: str) -> str:
    """How `prepare` is given a tokenizer."""
    return f"MODEL/{TOKENIZER_FILE}" if tokenizer.startswith("hf-") else tokenizer


def check_tokenizer(dataset: Dataset, has: Tokenizer, trained: str, name: str) -> None:
    """Raise DataError if the data's tokenizer is not the one, called `name`, with which what is `trained` was. Text in
    the text's part of it will do."""
    if has.name not in (name, text_name(name)):
        said = f"{trained} was trained with tokenizer {name!r}, and data set {dataset.name!r} is made with {has.name!r}"
        raise DataError(f"{said}; choose --data that was prepared with --tokenizer {given_as(name)}.")


def _with_manifest(folder: Path, tokenizer: str, give: str = "") -> Dataset:
    manifest = Manifest.load(folder / MANIFEST)
    if tokenizer and tokenizer not in (manifest.tokenizer, text_name(manifest.tokenizer)):
        fix = f"prepare the text again under another --name with --tokenizer {give or given_as(tokenizer)}"
        if not (give or tokenizer.startswith("hf-")):  # a trained model cannot have another
            flags = f"--data.tokenizer {manifest.tokenizer} --model.V {get_tokenizer(manifest.tokenizer, folder).V}"
            fix = f"give {flags} to train a new model with that one, or {fix}"
        raise DataError(f"{folder} was made with tokenizer {manifest.tokenizer!r}, not {tokenizer!r}; {fix}.")
    if get_tokenizer(manifest.tokenizer, folder).fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(f"{folder} was made with another tokenizer called {manifest.tokenizer!r}; prepare it again.")
    train, val = ([_checked(folder, shard) for shard in split.shards] for split in (manifest.train, manifest.val))
    return Dataset(manifest.name, train, val, manifest.tokenizer, manifest, folder, manifest.val.bytes)


def _checked(folder: Path, shard: ShardRecord) -> ShardInfo:
    """The shard of a manifest, if it is in the folder itself, with its marks, and has the size that the manifest says.
    The loader checks the marks."""
    path = folder / shard.file
    if path.resolve().parent != folder.resolve():
        raise DataError(f"{path} is a link out of the dataset's folder; put the shard itself there.")
    info = read_header(path)
    if (info.tokens, info.size) != (shard.tokens, shard.size):
        said = f"has {info.tokens} tokens in {info.size} bytes, its manifest says {shard.tokens} in {shard.size}"
        raise DataError(f"{path} {said}; prepare the dataset again.")
    if shard.marks and not path.with_suffix(".marks").is_file():
        raise DataError(f"{path} has no .marks file beside it; prepare the dataset again.")
    return info


def _by_file_name(name: str, paths: Sequence[Path], tokenizer: str) -> Dataset:
    train = [path for path in paths if "train" in path.name]
    val = [path for path in paths if "val" in path.name and "train" not in path.name]
    for split, found in (("train", train), ("val", val)):
        if not found:
            raise DataError(f"{name} has no *{split}*.bin file; name both splits with data.train and data.val.")
    return _foreign(name, train, val, tokenizer)


def _foreign(name: str, train: Sequence[Path], val: Sequence[Path], tokenizer: str) -> Dataset:
    return Dataset(name, [read_header(p) for p in train], [read_header(p) for p in val], tokenizer or "gpt2", None)


def token_counts(shards: Sequence[ShardInfo], V: int) -> NDArray[np.int64]:
    """How often each of the V ids occurs in the shards. DataError for an id outside them."""
    counts = np.zeros(V, np.int64)
    for shard in shards:
        tokens = open_shard(shard)
        for start in range(0, shard.tokens, _COUNT_BLOCK):
            block = np.bincount(tokens[start : start + _COUNT_BLOCK], minlength=V)
            if block.size > V:
                raise DataError(f"{shard.path} has token {block.size - 1}, outside the tokenizer's {V} ids.")
            counts += block
    return counts


def text_bytes(dataset: Dataset, tokenizer: Tokenizer, V: int) -> NDArray[np.float64]:
    """UTF-8 bytes of text that each token id below V stands for, 0 for the end-of-text token.

    A foreign tokenizer may lose text: its tokens then share the documents' bytes in proportion to what they spell.
    """
    lengths = tokenizer.lengths(V).astype(np.float64)
    if tokenizer.source and dataset.val_bytes and (spelt := token_counts(dataset.val, V) @ lengths):
        lengths *= dataset.val_bytes / spelt
    return lengths


def unigram_entropy(dataset: Dataset) -> float:
    """Cross entropy, in nats per token, of the val split under the train split's token frequencies plus one.

    The loss of a model that ignores context: what training has to beat to have learnt more than how often tokens occur.
    """
    V = get_tokenizer(dataset.tokenizer_name, dataset.folder).V
    train, val = token_counts(dataset.train, V) + 1, token_counts(dataset.val, V)
    return float(-(val * np.log(train / train.sum())).sum() / val.sum())
