"""The names that `prepare` knows, and how what a user typed becomes a source."""

from __future__ import annotations

import difflib
import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from daybreak.data.formats import Faults
from daybreak.data.hub import SPEC, remote_source
from daybreak.data.sources import TextSource, file_source, stdin_source, stdlib_source
from daybreak.errors import ConfigError, DataError

log = logging.getLogger("daybreak")


@dataclass(frozen=True)
class Known:
    """A catalogue entry: where its text is, validation fraction, a repository of its GPT-2 token shards. part: files of
    a set that is too large as a whole, as many as any of our recipes needs."""

    spec: str
    fraction: float | None = None
    shards: str = ""
    licence: str = ""  # where no data set card says it
    size: int = -1  # bytes of a URL's file, where they are known
    part: str = ""


_EDU, _WEB = "hf:HuggingFaceFW/fineweb-edu:sample-", "hf:HuggingFaceFW/fineweb:sample-"
_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_CLIMBMIX = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_{00000..00169}.parquet"
DRAWN = "shapes"  # the procedural set of pictures (images/scenes.py)
EMOJI = "emoji"  # the pictures of a colour font (images/emoji.py)
CATALOGUE: dict[str, Known] = {
    "stdlib": Known(""),
    DRAWN: Known(""),
    EMOJI: Known(""),
    "fineweb-edu-10B": Known(f"{_EDU}10BT", 0.01),
    "fineweb-edu-100B": Known(f"{_EDU}100BT", 0.001, "karpathy/fineweb-edu-100B-gpt2-token-shards"),
    "fineweb-edu-350B": Known(f"{_EDU}350BT", 0.0003),
    "fineweb-10B": Known(f"{_WEB}10BT", 0.01, "kjj0/fineweb10B-gpt2"),
    "fineweb-100B": Known(f"{_WEB}100BT", 0.001, "kjj0/fineweb100B-gpt2"),
    "fineweb-350B": Known(f"{_WEB}350BT", 0.0003),
    "climbmix": Known("hf:karpathy/climbmix-400b-shuffle", 0.0003, part=_CLIMBMIX),
    "tinystories": Known("hf:roneneldan/TinyStories"),
    "openwebtext": Known("hf:Skylion007/openwebtext", 0.001),
    "tinyshakespeare": Known(_SHAKESPEARE, licence="public domain", size=1_115_394),
}
ALIASES = {"fineweb-edu": "fineweb-edu-10B", "fineweb": "fineweb-10B"}


def known_name(name: str) -> str:
    """The catalogue's name that `name` stands for, or '' if none."""
    name = ALIASES.get(name, name)
    return name if name in CATALOGUE else ""


def is_drawn(words: Sequence[str | Path]) -> bool:
    """Whether this is a set of pictures that is made here, and no file or folder of its name."""
    return [str(word) for word in words] in ([DRAWN], [EMOJI]) and not Path(words[0]).exists()


def _known_source(name: str, field: str, fraction: float | None, faults: Faults) -> TextSource:
    entry = CATALOGUE[name]
    if name in (DRAWN, EMOJI):
        raise ConfigError(f"{name} is a set of pictures; prepare it alone, and without --as text or chat.")
    if not entry.spec:
        return stdlib_source(fraction)
    source = remote_source([entry.spec], field, fraction or entry.fraction, faults, entry.licence, entry.size)
    return replace(source, name=name)


def resolve_source(
    names: Sequence[str | Path], field: str = "text", val_fraction: float | None = None, skip_bad: bool = False
) -> TextSource:
    """The source that `names` stand for: one catalogue name, one hf: data set, URLs, paths, or - for standard input.

    An existing path wins over a catalogue name and says so. Raises DataError, with the nearest match, for what is none
    of them; ConfigError for a val_fraction outside (0, 1).
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        fix = "to train on all of it, prepare a folder with all in a file named train and a part in one named val"
        raise ConfigError(f"val-fraction = {val_fraction} must be above 0 and below 1; {fix}.")
    known = ", ".join([*CATALOGUE, *ALIASES])
    if not names:
        raise ConfigError(f"nothing to prepare; give files, folders, URLs, hf:owner/name or a name ({known}).")
    words, faults = [str(name) for name in names], Faults(skip_bad)
    if words == ["-"]:
        return stdin_source(field, val_fraction, faults)
    hub = words[0].startswith("hf:")
    if hub and (len(words) > 1 or not SPEC.fullmatch(words[0])):
        raise ConfigError(f"{' '.join(words)!r} must be one hf:owner/name[@revision][:config][#column].")
    if hub or all(word.startswith(("http://", "https://")) for word in words):
        return remote_source(words, field, val_fraction, faults)
    paths = [Path(name) for name in names]
    if len(names) == 1 and (name := known_name(words[0])):
        if not paths[0].exists():
            return _known_source(name, field, val_fraction, faults)
        log.warning("%r is a file or folder here and a catalogue name; using the one here (%s).", names[0], paths[0])
    return file_source([one for path in paths for one in _matching(path, known)], field, val_fraction, faults)


def here(word: str | Path) -> list[Path]:
    """The files and folders here that a word stands for; none for a name of the catalogue, the Hub or the web."""
    path = Path(word)
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))


def _matching(path: Path, known: str) -> list[Path]:
    """The files and folders that a path or a pattern stands for. A folder is read whole, so nothing in it is named."""
    if found := here(path):
        folders = {one for one in found if one.is_dir()}
        return [one for one in found if folders.isdisjoint(one.parents)]
    if glob.has_magic(str(path)):
        raise DataError(f"no file or folder matches {str(path)!r}; ** stands for folders of any depth.")
    near_by = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    is_file = len(path.parts) > 1 or path.suffix  # and no misspelled name of the catalogue
    near = difflib.get_close_matches(str(path), near_by if is_file else [*CATALOGUE, *ALIASES, *near_by], 1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    said = " give one that exists." if is_file else f" names of the catalogue: {known}."
    raise DataError(f"{str(path)!r} is neither a file nor a folder;{hint}{said}")
