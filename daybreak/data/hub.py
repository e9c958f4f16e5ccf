"""Text from the network, a file at a time: data sets of the Hugging Face Hub, and plain URLs.

Files are downloaded two ahead of the reader into the workspace, checked (size, sha256 where the Hub tells it, no error
page in place of data) and deleted once they are read, so the whole set is never on the disk. huggingface_hub resumes
dropped connections and waits out 429s; what it gives up on is tried again here. A server that cannot be reached at the
start is not tried again. HF_ENDPOINT and HF_TOKEN are respected.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from daybreak.data.formats import KINDS, SUFFIXES, Faults, extra, first_bytes
from daybreak.data.loader import ahead
from daybreak.data.sources import Part, Piece, TextSource, split_of, split_parts, text_size
from daybreak.errors import DataError, Error
from daybreak.files import sha256_of

log = logging.getLogger("daybreak")
SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:#]+))?(?::(?P<config>[^#]+))?(?:#(?P<column>.+))?")
ATTEMPTS, WAIT, AHEAD = 5, 1.0, 2  # tries a file, seconds after the first (doubled each time), files before the reader
LONGEST_GLOB = 1000  # characters
CONNECT = 30.0  # seconds to connect to a server
NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled"}  # exceptions of the libraries
CARDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of the Hub's library


class Remote(NamedTuple):
    """A file to download: its name, size in bytes (-1 unknown), sha256 ('' unknown), split, and how to get it.

    `get(local_dir=folder, force_download=force)` downloads into the folder and returns the path; `force` starts afresh.
    """

    name: str
    size: int
    sha256: str
    split: str
    get: Callable[..., str | Path]


def unreachable(url: str) -> str:
    """Why a URL's server cannot be connected to, by the Hub's library and its settings; "" if it can. One try, which
    waits CONNECT seconds for each address of the server. It is no matter what the server answers, or how slowly."""
    try:
        extra("huggingface_hub", "data", url).get_session().head(url, timeout=CONNECT)
    except Error:
        raise
    except Exception as error:  # of httpx or httpx2
        if NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
            return str(error).partition("\n")[0] or type(error).__name__
    return ""


def _quiet() -> None:
    """Of what is tried again, each attempt is told here in one line, in place of the library's ten."""
    if not os.environ.get("HF_HUB_VERBOSITY"):
        extra("huggingface_hub.utils", "data", "downloading").logging.set_verbosity_error()


def download(remote: Remote, folder: Path) -> Path:
    """The checked file in `folder`, after up to ATTEMPTS tries. DataError says what was wrong the last time."""
    reason = ""
    _quiet()
    for attempt in range(ATTEMPTS):
        if attempt:
            log.warning("%s: %s; trying again.", remote.name, reason)
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            path = Path(remote.get(local_dir=folder, force_download=attempt > 0))
            reason = _defect(path, remote)
            if not reason:
                return path
            path.unlink()
        except Error:  # such as a package that is missing: another try would end in the same way
            raise
        except Exception as error:  # the library's many kinds
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    said = f"{remote.name} could not be downloaded in {ATTEMPTS} attempts ({reason})"
    raise DataError(f"{said}; run the same command again to continue.")


def _defect(path: Path, remote: Remote) -> str:
    size = path.stat().st_size
    if remote.size not in (-1, size):
        return f"{size} bytes came instead of {remote.size}"
    if re.match(rb"\s*<(!doctype|html|\?xml)", first_bytes(path), re.I):
        return "the server sent a web page instead of the file"
    if remote.sha256 and sha256_of(path) != remote.sha256:
        return "its sha256 is not the one that the Hub lists"
    return ""


def _matches(glob: str, path: str) -> bool:
    """Whether a path matches a glob as the Hub's dataset cards use them: * stays within a folder, ** does not.

    The places of the path that the glob's beginning can reach are followed, so the time is bounded by both lengths.
    """
    reached = {0}
    for word in re.split(r"(\*\*/|\*\*|\*|\?)", glob):
        if word.startswith("*"):
            wide = set(reached)
            for i, letter in enumerate(path):
                wide |= {i + 1} if i in wide and (letter != "/" or word != "*") else set()
            reached |= {i for i in wide if path[i - 1] == "/"} if word == "**/" else wide
        elif word == "?":
            reached = {i + 1 for i in reached if path[i : i + 1] not in ("", "/")}
        else:
            reached = {i + len(word) for i in reached if path.startswith(word, i)}
    return len(path) in reached


def _patterns(card: dict[str, Any], config: str) -> list[tuple[str, str]]:
    """(glob, split) of the files of a configuration, '' where the card does not say; a config may be a glob itself."""
    configs = {c["config_name"]: c for c in card.get("configs") or [] if isinstance(c, dict) and "config_name" in c}
    if any(c in config for c in "*?"):
        return [(config, "")]
    if not configs or (config and config not in configs):
        if config and configs:
            raise DataError(f"there is no configuration {config!r}; it has: {', '.join(configs)}.")
        return [(f"{config}/**" if config else "**", "")]
    standard = next((c for c in configs.values() if c.get("default")), None)
    chosen = configs[config] if config else standard or configs.get("default") or next(iter(configs.values()))
    files = chosen.get("data_files") or "**"
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    found = []
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (entry.get("split", ""), entry["path"]) if isinstance(entry, dict) else ("", entry)
        folder = f"{chosen['data_dir'].strip('/')}/" if chosen.get("data_dir") else ""
        found += [(folder + path, split) for path in (paths if isinstance(paths, list) else [paths])]
    return found


def hub_files(spec: re.Match[str], kinds: Sequence[tuple[str, ...]] = KINDS) -> tuple[str, str, list[Remote]]:
    """(commit, licence, files) of a data set on the Hub: those of the first of `kinds` (suffixes) that it has.

    spec: what SPEC matched. Test splits are left out. DataError, in one sentence.
    """
    repo, config = spec["repo"], spec["config"] or ""
    hub, endpoint = extra("huggingface_hub", "data", "downloading"), os.environ.get("HF_ENDPOINT") or None
    extra("huggingface_hub.utils", "data", "downloading").disable_progress_bars()
    api = hub.HfApi(endpoint=endpoint)
    try:
        info = api.dataset_info(repo, revision=spec["revision"], timeout=30)
        card = dict(info.card_data.to_dict()) if info.card_data else {}
        patterns = _patterns(card if kinds is KINDS else {}, config)
        if bad := next((glob for glob, _ in patterns if not isinstance(glob, str) or len(glob) > LONGEST_GLOB), None):
            raise DataError(f"the card's file pattern {str(bad)[:40]!r}... is not a text of at most {LONGEST_GLOB}.")
        fixed = [re.split(r"[*?]", glob)[0] for glob, _ in patterns]
        prefix = os.path.commonprefix(fixed).rpartition("/")[0]  # noqa: RUF071  # cut at a folder
        tree = api.list_repo_tree(repo, prefix or None, recursive=True, revision=info.sha, repo_type="dataset")
        entries = sorted((entry for entry in tree if hasattr(entry, "size")), key=lambda e: str(e.path))  # no folders
    except DataError as error:
        raise DataError(f"hf:{repo}: {error}") from None
    except Exception as error:
        reason, where = str(error).strip().partition("\n")[0], endpoint or "https://huggingface.co"
        said = f"hf:{repo} cannot be listed at {where} ({type(error).__name__}: {reason})"
        raise DataError(f"{said}; check the name, the network and, for a gated set, HF_TOKEN.") from None

    get = partial(hub.hf_hub_download, repo, repo_type="dataset", revision=info.sha, endpoint=endpoint)
    files = []
    for entry in entries:
        split = next((s for glob, s in patterns if _matches(glob, entry.path)), "test")
        split = {"validation": "val", "valid": "val"}.get(split, split) or split_of(entry.path)
        if split != "test" and entry.path.rpartition("/")[2] not in CARDS:
            sha256 = entry.lfs.sha256 if entry.lfs else ""
            files.append(Remote(entry.path, entry.size, sha256, split, partial(get, entry.path)))
    found = next((some for kind in kinds if (some := [f for f in files if f.name.endswith(kind)])), [])
    if not found:
        known, globs = ", ".join(kind[0] for kind in kinds), ", ".join(glob for glob, _ in patterns)
        raise DataError(f"hf:{repo} has no {known} file among {globs}.")
    licence = card.get("license", "unknown")
    return info.sha, licence if isinstance(licence, str) else " ".join(licence), found


def _url_file(url: str, size: int = -1) -> Remote:
    name = url.partition("?")[0].rpartition("/")[2]
    if not name.lower().endswith(SUFFIXES):
        raise DataError(f"{url}: cannot read files of this kind; it must end in {', '.join(SUFFIXES)}.")

    def get(local_dir: Path, force_download: bool) -> Path:
        path = local_dir / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
        partial = path.with_name(path.name + ".part")
        http_get = extra("huggingface_hub.file_download", "data", url).http_get
        with partial.open("wb" if force_download else "ab") as file:
            http_get(url, file, resume_size=file.tell(), headers={"Accept-Encoding": "identity"})
        return partial.rename(path)

    return Remote(url, size, "", "", get)


def _expand(url: str) -> list[str]:
    """The URLs that one with a range, as in part-{000..099}.parquet, stands for."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", url):
        first, last = match.groups()
        if int(first) > int(last):
            raise DataError(f"{url}: {match[0]} counts down; write the smaller number first.")
        numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        return [u for n in numbers for u in _expand(url[: match.start()] + n + url[match.end() :])]
    return [url]


def _opened(remotes: Sequence[Remote], first: int, folder: Path) -> Iterator[tuple[int, Path]]:
    """(index, local path) of each file from `first` on, downloaded ahead and deleted when the next is asked for."""
    folder.mkdir(exist_ok=True)
    with closing(ahead(lambda remote: download(remote, folder), remotes[first:], AHEAD, AHEAD)) as paths:
        for i, path in enumerate(paths, first):
            yield i, path
            path.unlink()


def remote_source(
    names: Sequence[str], field: str, fraction: float | None, faults: Faults, licence: str = "", size: int = -1
) -> TextSource:
    """`hf:owner/name[@revision][:config][#column]`, or URLs, as a source. DataError for what cannot be listed."""
    if match := SPEC.fullmatch(names[0]):
        field = match["column"] or field
        revision, found, remotes = hub_files(match)
        licence = licence or found
        plain = re.sub(r"[*?/]+", "-", match["config"] or "").strip("-")
        name = match["repo"].partition("/")[2] + (f"-{plain}" if plain else "")
    else:
        remotes = [_url_file(url, size) for name in names for url in _expand(name)]
        if why := unreachable(remotes[0].name):
            fix = "check the address and the network, or download the file elsewhere and give its name here"
            raise DataError(f"the server of {remotes[0].name} cannot be reached ({why}); {fix}.")
        # Nothing tells whether what a URL gives changed: an unfinished preparation trusts that it did not.
        revision, name = "as downloaded", remotes[0].name.rpartition("/")[2].partition(".")[0]
    parts = [Part(remote.name, Path(), remote.split) for remote in remotes]
    size = sum(text_size(remote.name, max(remote.size, 0)) for remote in remotes)
    faults.harmless = ("empty",) if len(parts) > 1 else ()

    def pieces(first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]:
        assert work is not None, "a remote source needs a folder for its downloads"
        return split_parts(parts, field, fraction, _opened(remotes, first, work / "download"), before, size, faults)

    state = [[r.name, r.size, r.sha256] for r in remotes] + ["cut by position"] * (len(remotes) == 1)
    return TextSource(name, " ".join(names), revision, licence or "unknown", size, pieces, state, faults)
