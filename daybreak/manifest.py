"""Checkpoints as they lie in a run's folder, and what the manifest of each says. Without torch: `plan` and `--help` are
quick, and read the configuration of a run from here."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from daybreak.checked import ANY, TEXT, TOKENIZER, WHOLE, misfit, read_bytes, read_json
from daybreak.errors import CheckpointError

FORMAT = 2  # written where there is a BASE, else 1
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
BASE = "base.safetensors"  # the tensors that do not learn
# Of an imported model, and of chats prepared for it: at which ids generation stops, how a tokenizer is used, how chats
# are written.
KEPT = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Format 1. Keys that `checkpoint.save_checkpoint` adds, then those of the run.
SPEC: dict[str, Any] = {
    "step": WHOLE, "world": WHOLE, "flat_numel": WHOLE, "layout": [(TEXT, WHOLE, [WHOLE])],
    "files": {str: {"size": WHOLE, "sha256": TEXT}},
    "config": {str: ANY}, "run?": TEXT, "samples": WHOLE, "skips_in_a_row": WHOLE, "compute": TEXT,
    "tokenizer": {"name": TOKENIZER, "fingerprint": TEXT}, "data": {"fingerprint": TEXT, "val?": TEXT},
    "kernels": {str: TEXT},
}  # fmt: skip


class NewerFormat(CheckpointError):
    """Written by a newer daybreak. Falling back to an older checkpoint would discard good work, so nothing does."""


def directory(step: int) -> str:
    return f"step-{step:08d}"


def optimizer_file(rank: int, world: int) -> str:
    return f"optimizer-{rank:05d}-of-{world:05d}.safetensors"


def published(root: Path) -> list[Path]:
    """Directories that should hold a checkpoint, complete or damaged, newest step first."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:  # '.old-' sorts before 'step-', which so wins
        match = re.fullmatch(r"step-(\d{8,})|\.old-step-(\d{8,})-\d+", path.name)
        if match and path.is_dir():
            found[int(match[1] or match[2])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def checkpoint_step(path: Path) -> int:
    """The step of a directory that `list_checkpoints` gave (its name may be the one of a crashed replacement)."""
    return int(path.name.removeprefix(".old-").split("-")[1])


def run_id(path: Path) -> str:
    """The id of the run that a checkpoint is of; "" for a damaged one, and one of daybreak 0.1: any run may have it."""
    try:
        return str(read_manifest(path).get("run", ""))
    except CheckpointError:
        return ""


def foreign(path: Path, run: str) -> bool:
    """Whether a checkpoint is of another run than the one with this id. "": of a run without."""
    return bool(run) and run_id(path) not in ("", run)


def list_checkpoints(root: Path, run: str = "") -> list[Path]:
    """The complete checkpoints below `root` (none if it does not exist) that may be of this run, newest step first."""
    return [path for path in published(root) if (path / MANIFEST).is_file() and not foreign(path, run)]


def newest_manifest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run whose manifest is intact, with the manifest. None: there is no such checkpoint."""
    own = read_id(run)
    for path in published(run / "checkpoints"):
        with suppress(CheckpointError):  # whoever loads it is told
            manifest = read_manifest(path)
            if own in ("", manifest.get("run") or own):
                return path, manifest
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has the configuration of one."""
    return (folder / "config.toml").is_file()


def read_id(run: Path) -> str:
    """The mark that tells a run from others of the same name; its checkpoints carry it. "": daybreak 0.1 made it."""
    try:
        return read_bytes(run / "run-id").decode().strip()
    except (OSError, ValueError):
        return ""


def refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} {reason}; {_way_out(path.parent)}.")


def _way_out(checkpoint: Path) -> str:
    return f"restore it, or remove {checkpoint.name} to use an older checkpoint"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder, every key of `SPEC` checked. Raises CheckpointError, NewerFormat."""
    file = path / MANIFEST
    found: dict[str, Any] = read_json(file, {"format": WHOLE}, CheckpointError, _way_out(path))
    if (version := found["format"]) > FORMAT:
        raise NewerFormat(f"{path} was written by a newer daybreak (format {version}, known: {FORMAT}); upgrade.")
    if said := misfit(found, SPEC):
        refuse(file, f"is not a manifest of daybreak: {said}")
    files, world = found["files"], found["world"]
    odd = (files.keys() - {BASE}) ^ {MODEL, *(optimizer_file(rank, world) for rank in range(min(world, len(files))))}
    if odd or not world:
        refuse(file, f"lists files that are not those of world = {world}: {min(odd, default='')!r} first")
    if found.get("checksum") != checksum(found):
        refuse(file, "was altered (its checksum does not match)")
    return found


def checksum(manifest: dict[str, Any]) -> str:
    """The manifest vouches for the other files; this is what vouches for it. "": it is nested too deeply."""
    try:
        text = json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True)
    except RecursionError:
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def kept_files(folder: Path) -> dict[str, str]:
    """The texts of those of the files KEPT that are in a folder, by name. Raises CheckpointError."""
    kept = {}
    for path in (folder / name for name in KEPT if (folder / name).is_file()):
        if path.suffix == ".json":
            read_json(path, {}, CheckpointError, "copy it again")
        try:
            kept[path.name] = read_bytes(path).decode()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy it again.") from None
    return kept
