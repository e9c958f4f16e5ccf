"""Ready-made token shards from the Hub: downloaded in parallel, checked, and given a manifest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from daybreak.data.catalogue import CATALOGUE, known_name
from daybreak.data.dataset import Manifest, ShardRecord, SplitRecord, check_name, token_counts
from daybreak.data.hub import SPEC, Remote, download, hub_files, sha256_of
from daybreak.data.prepare import JOURNAL, check_replaceable, finish, workspace, write_file
from daybreak.data.shards import read_header
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, DataError

log = logging.getLogger("daybreak")
PARALLEL = 4  # files at once


def pretokenized(
    source: str, shards: int = 0, *, name: str | None = None, data_dir: str | Path = "data",
    progress: Callable[[int, int, int], None] | None = None,
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
    try:
        with workspace(final, [spec["repo"], commit, name]) as (folder, journal):
            if journal is None:
                write_file(folder / JOURNAL, f'{{"identity": ["{spec["repo"]}", "{commit}", "{name}"]}}')
            left = total - sum(path.stat().st_size for path in folder.glob("*.bin") if path.name in wanted)
            free = shutil.disk_usage(folder).free
            log.info("%s: %d shards, %.1f GB to download, %.1f GB are free", name, len(wanted), left / 1e9, free / 1e9)
            if left > free:
                raise DataError(f"{name} needs {left / 1e9:.1f} GB, {free / 1e9:.1f} are free; ask for fewer shards.")
            records = {}
            with ThreadPoolExecutor(PARALLEL, "download") as pool:
                fetched = pool.map(lambda item: _shard(folder, *item), wanted.items())
                for file, record in zip(wanted, fetched, strict=True):
                    records[file] = record
                    done, tokens = done + record.size, tokens + record.tokens
                    if progress is not None:
                        progress(done, total, tokens)
            for path in folder.glob("*.bin"):  # of an earlier attempt at more shards
                if path.name not in records:
                    path.unlink()
            lengths = np.array([0 if i == tokenizer.eot else len(tokenizer.token_bytes(i)) for i in range(tokenizer.V)])
            splits = []
            for split in ("train", "val"):
                these = tuple(r for file, r in records.items() if file.startswith(f"{name}_{split}_"))
                counts = token_counts([read_header(folder / r.file) for r in these], tokenizer.V)
                splits.append(SplitRecord(int(counts.sum()), int(counts[tokenizer.eot]), int(counts @ lengths), these))
            manifest = Manifest(
                name, tokenizer.name, tokenizer.fingerprint, f"hf:{spec['repo']}", commit, licence, *splits
            )
            finish(folder, manifest, tokenizer)
            return manifest
    except OSError as error:
        raise DataError(f"preparing {name!r} failed: {error}.") from error


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
