"""The kind of a file by its first bytes, for messages about files that are not what they were taken for."""

from __future__ import annotations

import re

import numpy as np

HEAD = 1024  # bytes that `identify` is given
_HEADER = "its ids need llm.c's header, which a few lines of Python in docs/data.md add"
_IMPORT = "`daybreak import` reads a model's Hugging Face folder"
_UTF16 = "UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8 OLD > NEW`"
_ZIP = "a zip or pickle (.pt, .npz), as PyTorch's ckpt.pt is; unpack a zip of texts first"
_OFFICE = "a document of an office program, or an e-book; save it as plain text (.txt) first"
_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
    (rb"\xff\xfe|\xfe\xff|(?:[\t-~]\0){32}|(?:\0[\t-~]){32}", _UTF16),
    (rb"\x93NUMPY", f"a NumPy array (.npy); {_HEADER}"),
    (rb"GGUF[\1-\x09]\0", f"a GGUF model for llama.cpp, which daybreak writes and does not read; {_IMPORT}"),
    (rb"PK\x03\x04.{26}(?:mimetype|\[Content_Types\]|_rels|docProps|word/)|\xd0\xcf\x11\xe0", _OFFICE),
    (rb"PK\x03\x04|\x80[\x02-\x05]", f"{_ZIP}; {_IMPORT}"),
    (rb".{6}\0\0\{", f"a safetensors file of weights; {_IMPORT}"),
    (rb"PAR1[^ -~]", "a Parquet table; name it .parquet and give it to `daybreak prepare`"),
    (rb"\xc6\xd7\x34\x01", "llm.c's model file, which `daybreak import` reads"),
    (rb"\x88\xd8\x34\x01|\xa1\xd9\x34\x01", "a token shard; train on it with --data.train or --data FOLDER"),
    (rb"[\xc7\xc8]\xd7\x34\x01|[\x8a\x8f]\xd8\x34\x01", "another of llm.c's files"),
    (rb"\x7fELF|\xca\xfe\xba\xbe|..\r\n[\0-\3]\0\0\0", "a compiled program; give its source, in a text file"),
    (rb"%PDF", "a PDF; extract its text first"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd", "a compressed file; unpack it first"),
    (rb"(?i)\s*<(?:!doctype|html|\?xml)", "a web page, often an error page in place of a download; download it again"),
)
_BINARY = len(_KINDS) - 2  # of these, those that a text is not read from


def identify(head: bytes, text: bool = False) -> str:
    """The kind of a file that begins so, and the way out; '' if it is none known. text: only what can't hold a text."""
    if found := next((said for kind, said in _KINDS[: _BINARY if text else None] if re.match(kind, head, re.S)), ""):
        return found
    if text or not head.strip(b"\0"):
        return ""
    if b"\0" not in head and re.fullmatch(rb"(?:[\t-~]|[\xc2-\xf4][\x80-\xbf]+)*[\xc2-\xf4]?", head):
        return "plain text; `daybreak prepare` makes token shards of it"
    ids = np.frombuffer(head[: len(head) // 2 * 2], "<u2")
    raw = 0 < int(ids.max(initial=0)) <= 50_256
    return f"a file of token ids without a header, as nanoGPT's train.bin; {_HEADER}" if raw else ""


def guess(head: bytes, *magic: int) -> str:
    """The end of a sentence about a file that does not begin with one of these int32: '; it is ...', or ''."""
    said = "" if int.from_bytes(head[:4], "little") in magic else identify(head[:HEAD])
    return f"; it is {said}" if said else ""
