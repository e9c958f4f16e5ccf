"""Checkpoints: written so that a listed one is complete, read so that a damaged one is never used.

    step-00001000/model.safetensors                    canonical names, whole tensors
                  base.safetensors                     the same of what does not learn, in a run with adapters
                  optimizer-00000-of-00001.safetensors  a rank's ranges of the flat buffers (where: in its metadata),
                                                        in the dtype that training keeps them in
                  manifest.json                         written last: everything else, and every file's size and sha256

The base never changes. So it is written once, and later checkpoints of the run have a hard link to it: each is
complete, can be copied and removed alone, and takes little space. Where a disk has no links it is written each time.

The publishing step is a rename. Beside the published directories there may be, after a crash,
`.tmp-step-N-PID` (half written, ignored) and `.old-step-N-PID` (complete, on its way to being replaced; it counts while
`step-N` is missing). Only JSON and safetensors are read, so loading never executes code.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from daybreak import manifest as manifests
from daybreak.checked import WHOLE, misfit
from daybreak.config import Config, saved_config
from daybreak.config_keys import LoraConfig
from daybreak.errors import CheckpointError, Error, explained
from daybreak.files import alive, free_bytes, fsync_folder, lock, remove, sha256_of, write_atomic
from daybreak.formatting import disk
from daybreak.kernels.held import SUFFIXES, assembled, dense, parts_of, plain_name
from daybreak.manifest import BASE, MANIFEST, MODEL, kept_files, refuse
from daybreak.models.registry import build_model
from daybreak.parallel import ALONE, Group
from daybreak.shapes import Shape
from daybreak.state.safetensors_io import SafetensorsFile, create_safetensors, fill_safetensors, write_safetensors

log = logging.getLogger("daybreak")

RESERVED = ("format", "step", "world", "flat_numel", "layout", "files", "checksum")  # manifest keys of our own
SLACK = 1 << 20  # bytes of a checkpoint beside its tensors
SAMPLE = 64  # values that are compared at a place

Verify = Literal["full", "size", "off"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint. The tensors are not copied: they must not change until the save returns.

    optimizer: key ("m", "v") -> this rank's ranges of that flat buffer as (first element, contiguous 1-D tensor). What
    belongs to a whole parameter is a buffer of its own, "KEY.PARAMETER".
    flat_numel: elements of a whole flat buffer. layout: (name, first element, shape) of each tensor in it.
    extra: small tensors kept by rank 0. manifest: JSON-able, keys other than RESERVED, no non-finite floats.
    parts: gives this rank's parts of a model tensor, (first element, contiguous 1-D tensor) in order, when they are
    written; of `model` only shapes and dtypes are read. frozen: names of those that never change in a run.
    """

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, list[tuple[int, torch.Tensor]]]
    flat_numel: int
    layout: list[tuple[str, int, tuple[int, ...]]]
    extra: Mapping[str, torch.Tensor]
    manifest: Mapping[str, Any]
    parts: Callable[[str], Iterable[tuple[int, torch.Tensor]]]
    frozen: Collection[str] = ()

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """The weights that do not learn."""
        return {name: self.model[name] for name in self.frozen}

    def nbytes(self, group: Group = ALONE) -> int:
        """Bytes of all tensors, those of the other ranks too. Collective."""
        optimizer = group.numbers([sum(t.nbytes for ranges in self.optimizer.values() for _, t in ranges)])
        return int(optimizer[0]) + sum(t.nbytes for t in (*self.model.values(), *self.extra.values()))


# ---- saving


def save_checkpoint(root: Path, snap: Snapshot, group: Group = ALONE) -> Path:
    """Write `root/step-%08d`, durably, and return it; an existing one of this step is replaced.

    Collective: every rank writes its slices at the same time, and rank 0 publishes when all have. At every instant
    either the old or the new one is complete on disk. Raises Error, on all ranks, when a disk refuses.
    """
    final = root / manifests.directory(snap.step)
    temporary = root / f".tmp-{final.name}-{group.first(os.getpid)}"
    optimizer = manifests.optimizer_file(group.rank, group.world)

    need, base, linked = snap.nbytes(group) + SLACK, snap.base, dict[str, Json]()
    model = {name: tensor for name, tensor in snap.model.items() if name not in base}
    way_out = "free space on its disk, lower checkpoint.keep, or move the run"
    sentence = explained(Error, f"checkpoint {final} could not be written", way_out)

    @sentence
    def begin() -> None:
        if not root.exists():
            root.mkdir(parents=True)
            fsync_folder(root.parent)
        remove(temporary)
        temporary.mkdir()
        linked.update(_link_base(root, temporary, snap) if base else {})
        _check_space(root, need - (sum(t.nbytes for t in base.values()) if linked else 0), final)
        if group.world > 1:
            create_safetensors(temporary / MODEL, model)

    @sentence
    def write() -> dict[str, Json]:
        made = dict(linked)
        if base and not made and not group.rank:
            made[BASE] = write_safetensors(temporary / BASE, base, parts=snap.parts)
        if group.world > 1:
            fill_safetensors(temporary / MODEL, {name: snap.parts(name) for name in model})
        else:
            made[MODEL] = write_safetensors(temporary / MODEL, model, parts=snap.parts)
        return {**made, optimizer: _write_optimizer(temporary / optimizer, snap, group.rank)}

    @sentence
    def publish() -> None:
        if group.world > 1:
            path = temporary / MODEL
            files[MODEL] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        _write_manifest(temporary / MANIFEST, snap, group.world, files)
        fsync_folder(temporary)
        _publish(temporary, final)

    try:
        group.first(begin)
        files = {name: written for found in group.everywhere(write) for name, written in found.items()}
        group.first(publish)
    finally:
        if group.rank == 0:
            remove(temporary)
    return final


def _link_base(root: Path, temporary: Path, snap: Snapshot) -> dict[str, Json]:
    """Link the base of the run's newest checkpoint that has this one. Its entry in a manifest; empty if none has."""
    for path in manifests.list_checkpoints(root, snap.manifest.get("run", "")):
        with suppress(CheckpointError, OSError):
            entry = manifests.read_manifest(path)["files"].get(BASE)
            if entry and path.joinpath(BASE).stat().st_size == entry["size"] and _holds(path / BASE, snap):
                os.link(path / BASE, temporary / BASE)
                return {BASE: entry}
    return {}


def _holds(path: Path, snap: Snapshot) -> bool:
    """Whether a file has the base: names, shapes, dtypes, and values at the start, middle and end of each tensor."""
    file = SafetensorsFile(path)
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in snap.base.items()}
    if kinds != {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()}:
        return False
    for name in kinds:
        for first, value in snap.parts(name):
            for at in (0, value.numel() // 2, max(0, value.numel() - SAMPLE)):
                here = value[at : at + SAMPLE].cpu().contiguous()
                there = torch.empty_like(here)
                file.read(name, there, first + at)
                if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
                    return False
    return True


def _check_space(root: Path, need: int, final: Path) -> None:
    """Better no attempt than one that fills the disk for everybody. Only writing tells how much a quota allows."""
    if (free := free_bytes(root)) is not None and free < need:
        said = f"checkpoint {final} needs {disk(need)}, which is {disk(need - free)} more than its disk has free"
        raise Error(f"{said}: free space, lower checkpoint.keep, or move the run.")


def _write_optimizer(path: Path, snap: Snapshot, rank: int) -> Json:
    tensors: dict[str, torch.Tensor] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for key, owned in snap.optimizer.items():
        ranges[key] = []
        for start, tensor in owned:
            stop = start + tensor.numel()
            assert tensor.dim() == 1
            assert 0 <= start <= stop <= snap.flat_numel
            ranges[key].append((start, stop))
            tensors[_range_name(key, start, stop)] = tensor
    if rank == 0:
        tensors |= {_extra_name(name): tensor for name, tensor in snap.extra.items()}
    return write_safetensors(path, tensors, {"ranges": json.dumps(ranges)})


def _range_name(key: str, start: int, stop: int) -> str:
    return f"{key}[{start}:{stop}]"


def _extra_name(name: str) -> str:
    return f"extra.{name}"


def _write_manifest(path: Path, snap: Snapshot, world: int, files: Mapping[str, Json]) -> None:
    assert not set(RESERVED) & snap.manifest.keys()
    manifest = {
        "format": manifests.FORMAT if BASE in files else 1,
        "step": snap.step,
        **snap.manifest,
        "world": world,
        "flat_numel": snap.flat_numel,
        "layout": snap.layout,
        "files": files,
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader will see it: lists, string keys
    manifest["checksum"] = manifests.checksum(manifest)
    write_atomic(path, json.dumps(manifest, indent=1))


def _publish(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f".old-{final.name}-{os.getpid()}")
    if final.exists():
        remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    fsync_folder(final.parent)
    remove(replaced)


# ---- listing and retention


def prune_checkpoints(root: Path, keep: int, major: int, verify: Verify = "full", run: str = "") -> list[Path]:
    """Remove all but the `keep` newest (0: keep all) and those whose step is a multiple of `major` (0: none is).

    Whatever `keep` says, more stay: the newest that proves good when read back (when none does, nothing is removed),
    the one written last, which after a fall-back is not the newest, those that another process is reading now, and
    those of other runs than `run`. Files that dead saves left behind are deleted. Not to be called while this process
    is saving. Returns what was removed, oldest first.
    """
    assert keep >= 0
    assert major >= 0
    _clean(root)
    found = manifests.list_checkpoints(root, run)
    doomed = [path for path in found[keep:] if keep and not (major and manifests.checkpoint_step(path) % major == 0)]
    if not doomed:
        return []
    good = next((path for path in found if _is_good(path, verify)), None)
    if good is None:
        log.warning("No checkpoint below %s is intact, so none is removed.", root)
        return []
    last = max(found, key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
    doomed = [path for path in reversed(doomed) if path not in (good, last)]
    return [path for path in doomed if _retire(path)]


def _retire(path: Path) -> bool:
    """Remove a checkpoint, unless somebody is reading it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if not lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        leaving = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        remove(leaving)
        path.rename(leaving)
        remove(leaving)
        return True
    finally:
        os.close(fd)


def leftovers(root: Path) -> Iterator[tuple[Path, str, Path]]:
    """What saves that died left below `root`: the path, "tmp" or "old", and the path of the checkpoint itself."""
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = re.fullmatch(r"\.(tmp|old)-(step-\d{8,})-(\d{1,9})", path.name)
        if match and not alive(int(match[3])):
            yield path, match[1], root / match[2]


def _clean(root: Path) -> None:
    for path, kind, final in leftovers(root):
        if kind == "old" and not final.exists():
            path.rename(final)  # its replacement never arrived
        else:
            remove(path)


def _is_good(path: Path, verify: Verify) -> bool:
    try:
        load_checkpoint(path, verify)
    except CheckpointError as error:
        log.warning("Checkpoint %s is damaged: %s", path.name, error)
        return False
    return True


# ---- loading


class Checkpoint:
    """An opened checkpoint; made by `load_checkpoint`. Every read copies into a tensor of the caller's. As long as the
    object lives, no run removes the checkpoint."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.step: int = manifest["step"]
        self.passed_over: list[str] = []  # why `newest_good` did not take newer ones: a sentence each
        self.flat_numel: int = manifest["flat_numel"]
        self.layout = [(name, start, tuple(shape)) for name, start, shape in manifest["layout"]]
        self._model = SafetensorsFile(path / MODEL)
        base = SafetensorsFile(path / BASE) if BASE in manifest["files"] else None
        self._of = {name: file for file in (base, self._model) if file for name in file.entries}
        if odd := {name for name, _, _ in self.layout} - self._of.keys():  # frozen tensors have no layout
            refuse(path / MANIFEST, f"has {min(odd)!r} in its layout, and {MODEL} does not")
        world = manifest["world"]
        ranks = [SafetensorsFile(path / manifests.optimizer_file(rank, world)) for rank in range(world)]
        self._first_rank = ranks[0]
        self._ranges: dict[str, list[tuple[int, int, SafetensorsFile]]] = {}
        for file in ranks:
            for key, start, stop in _owned_ranges(file):
                self._ranges.setdefault(key, []).append((start, stop, file))
        for owned in self._ranges.values():
            owned.sort(key=lambda r: r[:2])

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @cached_property
    def config(self) -> Config:
        """The configuration that it was saved with. Raises CheckpointError if it is none."""
        return saved_config(self.path, self.manifest)

    @property
    def model(self) -> Shape:
        """The shape of the model."""
        return self.config.model

    @property
    def lora(self) -> LoraConfig:
        """Its adapters; rank 0: it has none."""
        return self.config.lora

    @property
    def kept(self) -> dict[str, str]:
        """The files that the run keeps of an imported model (see manifest.KEPT)."""
        return kept_files(self.path.parents[1])

    def names(self) -> list[str]:
        """Names of the model's tensors. One in NF4 is four in the file, and one in fp8 two."""
        return list(dict.fromkeys(plain_name(name) for name in self._of))

    def held(self, name: str) -> str:
        """How a tensor is held: nf4, fp8, or "" for a plain one."""
        return next((how for how, parts in SUFFIXES.items() if name + parts[0] in self._of), "")

    def read_model(self, name: str, out: torch.Tensor) -> None:
        """Copy a model tensor into contiguous `out` of the same shape, any float dtype, any device. NAME.nf4 and so on
        are the parts of one in NF4."""
        if not (how := self.held(name)):
            self._read(self._of.get(name, self._model), name, out)
            return
        rows, shape = self._parts[name], tuple(out.shape)
        parts = [torch.empty(size, dtype=dtype) for size, dtype in parts_of(how, name, shape, rows)]
        for suffix, part in zip(SUFFIXES[how], parts, strict=True):
            self._read(self._of[name + suffix], name + suffix, part)
        out.copy_(dense(assembled(how, shape, rows, parts), torch.empty(shape)))

    @cached_property
    def _parts(self) -> dict[str, tuple[int, ...]]:
        """The rows of each matrix in a packed one."""
        return {row.name: row.stacked or row.shape[:1] for row in build_model(self.model).rows()}

    def read_extra(self, name: str, out: torch.Tensor) -> None:
        """Copy an extra tensor into contiguous `out` of the same shape."""
        self._read(self._first_rank, _extra_name(name), out)

    @property
    def whole(self) -> set[str]:
        """Parameters that have optimizer state as a whole (optimizers)."""
        return {name for _, _, name in (key.partition(".") for key in self._ranges) if name}

    def read_optimizer(self, key: str, start: int, out: torch.Tensor) -> None:
        """Copy elements start .. start + out.numel() of a flat buffer into 1-D `out`, whichever ranks wrote them."""
        at, stop = start, start + out.numel()
        for begin, end, file in self._ranges.get(key, []):
            if begin <= at < end and at < stop:
                n = min(end, stop) - at
                file.read(_range_name(key, begin, end), out[at - start : at - start + n], at - begin)
                at += n
        if at < stop:
            raise CheckpointError(f"{self.path} holds no element {at} of optimizer buffer {key!r}.")

    def _read(self, file: SafetensorsFile, name: str, out: torch.Tensor) -> None:
        entry = file.entries.get(name)
        if entry is not None and entry.shape != tuple(out.shape):
            raise CheckpointError(f"{file.path}: {name!r} has shape {entry.shape}, not {tuple(out.shape)}.")
        file.read(name, out)


def _owned_ranges(file: SafetensorsFile) -> Iterator[tuple[str, int, int]]:
    try:
        ranges = json.loads(file.metadata["ranges"])
        if misfit(ranges, {str: [(WHOLE, WHOLE)]}):
            raise ValueError
        for key, spans in ranges.items():
            for start, stop in spans:
                if file.entries[_range_name(key, start, stop)].shape != (stop - start,):
                    raise ValueError
                yield key, start, stop
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(f"{file.path}: its 'ranges' do not match its tensors; restore or remove it.") from None


def load_checkpoint(path: Path, verify: Verify = "full", run: str = "") -> Checkpoint:
    """Open a checkpoint after checking it: manifest and headers always, every file's size, every file's sha256.

    run: the id of the run that it has to be of; "": of any. Raises CheckpointError naming the file and what is wrong
    with it.
    """
    with ExitStack() as held:
        try:
            fd = os.open(path, os.O_RDONLY)
            held.callback(os.close, fd)
            lock(fd, fcntl.LOCK_SH)  # waits while it is being removed; what follows then fails
            names = sorted(p.name for p in path.iterdir())
        except OSError as error:
            refuse(path / MANIFEST, f"cannot be read ({error.strerror})")
        manifest = manifests.read_manifest(path)
        if verify != "off":
            _verify_files(path, manifest["files"], verify)
        for name in names:
            if name not in manifest["files"] and name != MANIFEST:
                log.warning("%s is not part of the checkpoint; it is ignored.", path / name)
        found = Checkpoint(path, manifest)
        if manifests.foreign(path, run):
            raise CheckpointError(f"{path} belongs to another run; move it there, or remove it.")
        weakref.finalize(found, held.pop_all().close)
        return found


def _verify_files(path: Path, files: Mapping[str, Any], verify: Verify) -> None:
    try:
        for name, known in files.items():
            size = (path / name).stat().st_size
            if size != known["size"]:
                refuse(path / name, f"has {size} bytes instead of {known['size']}")
        for name, known in files.items() if verify == "full" else ():
            if sha256_of(path / name) != known["sha256"]:
                refuse(path / name, "is damaged (its sha256 does not match)")
    except OSError as error:
        refuse(path / name, f"cannot be read ({error.strerror})")


def newest_good(root: Path, run: str = "") -> Checkpoint | None:
    """The newest intact checkpoint below `root` that may be of this run; None when there is no checkpoint at all.

    Each one that is passed over is named in a warning, and in the result's `passed_over`. Raises CheckpointError when
    all are, or when a newer daybreak wrote one that would have to be passed over.
    """
    while candidates := manifests.published(root):
        passed_over: list[str] = []
        for path in candidates:
            try:
                found = load_checkpoint(path, run=run)
                found.passed_over = passed_over
                return found
            except manifests.NewerFormat:
                raise
            except CheckpointError as error:
                if not path.exists():  # a run in progress has just removed it: look again
                    break
                log.warning("Falling back to an older checkpoint: %s", str(error))  # it would hold on to `found`
                passed_over.append(str(error))
        else:
            said = f"none of the {len(candidates)} checkpoints below {root} is intact and of this run"
            raise CheckpointError(f"{said} (each is named above); restore one, or start anew under another --name.")
    return None
