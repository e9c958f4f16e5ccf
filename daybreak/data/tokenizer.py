"""Tokenizers: GPT-2's byte-pair encoding from the ranks shipped with the package, its truncations, and plain bytes.

A tokenizer is a list of byte strings (token id = position), a splitting pattern and one end-of-text id after the last
of them. Text is always encoded as ordinary text: `<|endoftext|>` inside a document does not become the EOT token.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from daybreak.checked import ANY, read_json
from daybreak.data.formats import extra, without_surrogates
from daybreak.data.pictures import CODEC_FILE, MARK, Pictures, codec_digest, read_metadata
from daybreak.errors import ConfigError, DataError, explained
from daybreak.formatting import meant

RANKS_FILE = Path(__file__).with_name("gpt2.tiktoken")
# The hash that tiktoken pins for r50k_base.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
RANKS = 50256
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The same pieces without the look-ahead, for which tiktoken's regex engine is twice as fast. The look-ahead leaves the
# last space of a run to the word behind it; here a NUL, which is a token of its own, is put before that last space.
_FAST_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x00]+|\s+|\x00"""
_SPACE = np.isin(np.arange(256), [*b"\t\n\v\f\r "])
# Other space, and NUL itself: a text with one of these is left to GPT2_PATTERN.
_OTHER_SPACE = re.compile("[\x00\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
# A run of white space longer than this overflows the published pattern's stack. It is cut where the pattern cuts it:
# before its last character.
_LONG_RUN = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{4096,}")
# A repeated group that holds a repetition without bounds takes time exponential in the text.
_REPEATED = r"(?:[*+]|\{\d*,\})(?!\+)"
EOT_TEXT = "<|endoftext|>"
_SPECIAL = re.compile(f"({re.escape(EOT_TEXT)})")
TOKENIZER_FILE = "tokenizer.json"
# Another's tokenizer: the first of these in its vocabulary starts a document, and the first of those ends it.
EOT_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|bos|>", "<s>", "<bos>", "</s>", "<eos>",
             "[BOS]", "[CLS]", "[EOS]", "[SEP]", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")  # fmt: skip
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer:
    """Text <-> token ids. `V` ids, the last of which, `eot`, starts every document and is never produced by `encode`.

    `pattern` splits text before byte-pair merging, which follows the order of `vocabulary`; an empty pattern means
    one token per byte. Instances are immutable and may be shared between threads. `source` is the text of the file that
    defines a tokenizer which is not one of ours (see HFTokenizer), to be kept beside what was made with it. `ends`: the
    ids that end a document, of which others are told the first. `around`: the ids that other programs put before and
    after a text; `encode` does not. `pictures`: where pictures are among the ids, if there are any.
    """

    source = ""
    pictures: Pictures | None = None
    around: tuple[list[int], list[int]] = ([], [])

    def __init__(self, name: str, vocabulary: Sequence[bytes], pattern: str) -> None:
        self.name = name
        self.eot = len(vocabulary)
        self.V = self.eot + 1
        self.ends: tuple[int, ...] = (self.eot,)
        self._bytes = [*vocabulary, EOT_TEXT.encode()]
        self._fast: tiktoken.Encoding | None = None
        if pattern:
            ranks = {token: rank for rank, token in enumerate(vocabulary)}
            # With no special token at all, tiktoken looks for one at every character.
            special, self._nul = {EOT_TEXT: self.eot}, ranks[b"\0"]
            encoding = partial(tiktoken.Encoding, name, mergeable_ranks=ranks, special_tokens=special)
            self._whole, self._fast = encoding(pat_str=pattern), encoding(pat_str=_FAST_PATTERN)
            assert pattern == GPT2_PATTERN, "no other splitting has a fast form here"
        digest = hashlib.sha256()
        for token in (pattern.encode(), *vocabulary):
            digest.update(struct.pack("<I", len(token)) + token)
        digest.update(struct.pack("<I", self.eot))
        self.fingerprint = digest.hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, V={self.V})"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids, in memory and in shards: uint16 where they fit, else uint32."""
        return np.dtype(np.uint16 if self.V <= 1 << 16 else np.uint32)

    @property
    def text_V(self) -> int:
        """The ids below this stand for text. The others, if there are any, are for pictures."""
        return self.pictures.first if self.pictures else self.V

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids of `text`, shape (n,). Special tokens in it are plain text; a lone surrogate becomes U+FFFD."""
        try:
            data = np.frombuffer(text.encode(), np.uint8)
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text))
        if self._fast is None:
            return data.astype(np.uint16)
        # Not encode_ordinary: building its list holds the GIL.
        if "\0" in text or (not text.isascii() and _OTHER_SPACE.search(text)):
            cuts = [0, *(run.end() - 1 for run in _LONG_RUN.finditer(text) if run.end() < len(text)), len(text)]
            parts = [self._whole.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in pairwise(cuts)]
            return np.concatenate(parts).astype(np.uint16)
        space = _SPACE[data]
        last = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
        text = np.insert(data, last, 0).tobytes().decode() if last.size else text
        ids = self._fast.encode_to_numpy(text, disallowed_special=())
        return np.asarray(ids[ids != self._nul] if last.size else ids, np.uint16)

    @property
    def special(self) -> frozenset[int]:
        """The ids that `encode` never gives: of these `encode_special` finds the names in a text."""
        return frozenset((self.eot,))

    def encode_special(self, text: str) -> tuple[list[int], Callable[[int], int | None]]:
        """Token ids of a text in which the names of special tokens are those tokens, and which token has a character
        of the text (None: none)."""
        text = without_surrogates(text)
        parts = [[self.eot] if part == EOT_TEXT else self.encode(part).tolist() for part in re.split(_SPECIAL, text)]
        ids = [i for part in parts for i in part]
        ends = np.cumsum([len(self._bytes[i]) for i in ids])
        at = np.cumsum([0, *(len(c.encode()) for c in text)])  # where each character begins
        return ids, lambda i: int(np.searchsorted(ends, at[i], "right"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. DataError for an id outside [0, V)."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; EOT is spelled `<|endoftext|>`. DataError for an id outside [0, V)."""
        if not 0 <= token < self.V:
            raise DataError(f"token id {token} is outside the {self.V} ids of tokenizer {self.name!r}.")
        return self._bytes[token]

    def ending(self, ends: Iterable[int]) -> Tokenizer:
        """The same, of which these ids end a document, and `eot`, which begins the next. None given: as it is."""
        known = tuple(dict.fromkeys((*(i for i in ends if i < self.V), self.eot)))
        if known in (self.ends, (self.eot,)):
            return self
        made = copy.copy(self)
        made.ends = known
        return made

    def with_pictures(self, digest: str, K: int, N: int, D: int) -> Tokenizer:
        """The same for text, and behind it the ids of a codec whose file has this sha256 (data/pictures.py)."""
        made = copy.copy(self)
        made.pictures = Pictures(self.V, K, N, D)
        made.name, made.V = f"{self.name}{MARK}{digest[:12]}", self.V + K + 2
        made.fingerprint = hashlib.sha256(f"{self.fingerprint} {digest}".encode()).hexdigest()
        made._bytes = [*self._bytes, *(b"<|img:%d|>" % code for code in range(K)), b"<|image|>", b"<|/image|>"]
        return made

    def lengths(self, V: int) -> NDArray[np.int64]:
        """UTF-8 bytes of text of each token id below V; 0 for the end-of-text token, those of pictures and ids beyond
        the tokenizer's."""
        own = [0 if token == self.eot else len(data) for token, data in enumerate(self._bytes[: self.text_V])]
        return np.array(own + [0] * (V - self.text_V), np.int64)

    def to_json(self) -> str:
        """A tokenizer.json for Hugging Face's library that gives the same ids."""
        if self.source:
            return self.source
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        unset = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        vocabulary = {text: i for i, text in enumerate([*self._spelled(), EOT_TEXT])}
        end = {"id": self.eot, "content": EOT_TEXT, "special": True}
        spec = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
            "normalizer": None, "pre_tokenizer": level, "decoder": level,
            "post_processor": {**level, "trim_offsets": False},
            "model": {"type": "BPE", **dict.fromkeys(unset), "vocab": vocabulary, "merges": self._merges()},
        }  # fmt: skip
        return json.dumps(spec, indent=2, ensure_ascii=False) + "\n"

    def _spelled(self) -> list[str]:
        """Every token but end of text, in order of id, spelled with `byte_letters`."""
        letters = byte_letters()
        return ["".join(letters[b] for b in token) for token in self._bytes[: self.eot]]

    def _merges(self) -> list[tuple[str, str]]:
        """The byte-pair merges that the order of the vocabulary implies: each token's last two parts, in order."""
        ranks, text = {word: rank for rank, word in enumerate(self._bytes)}, self._spelled()
        found = []
        for rank, word in enumerate(self._bytes[: self.eot]):
            parts = [word[i : i + 1] for i in range(len(word))]
            while len(parts) > 2:
                at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            if len(parts) == 2:
                found.append((text[ranks[parts[0]]], text[ranks[parts[1]]]))
        return found


def byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte value: itself where it is printable, else a letter from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def _exponential(pattern: str) -> bool:
    """Whether a regular expression repeats a group in which something is repeated without bounds."""
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.S)
    while group := re.search(rf"\((\?>)?([^()]*)\)({_REPEATED})?", plain):
        inner = not group[1] and re.search(_REPEATED, group[2])
        if inner and group[3]:
            return True
        plain = plain[: group.start()] + ("x+" if inner else "x") + plain[group.end() :]
    return False


def _patterns(spec: Any) -> Iterator[str]:
    """Every regular expression in a tokenizer.json."""
    for key, value in spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ():
        if key == "Regex" and isinstance(value, str):
            yield value
        yield from _patterns(value)


@contextmanager
def _refusals(said: str) -> Iterator[None]:
    """DataError for whatever the `tokenizers` library raises in the block; its panics are no Exceptions."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{said} ({error}).") from None


def _library_tokenizer(source: str, where: str) -> Any:
    """The tokenizer that the text of a tokenizer.json describes, but that it neither cuts nor pads texts. DataError."""
    library = extra("tokenizers", "data", where)
    with _refusals(f"{where} is not a Hugging Face tokenizer"):
        found = library.Tokenizer.from_str(source)
    found.no_truncation()
    found.no_padding()
    return found


class HFTokenizer(Tokenizer):
    """Bring your own: a Hugging Face tokenizer.json, through the `tokenizers` library (extra `data`).

    `V` is its largest id + 1; `eot` its first token of EOT_NAMES (not V - 1 as elsewhere).
    """

    def __init__(self, source: str, where: str) -> None:
        self._hf = _library_tokenizer(source, where)
        vocabulary: dict[str, int] = self._hf.get_vocab(with_added_tokens=True)
        eot, end = (next((vocabulary[n] for n in names if n in vocabulary), -1) for names in (EOT_NAMES, END_NAMES))
        if eot < 0:
            raise ConfigError(f"{where} has no token that could start a document ({', '.join(EOT_NAMES)}); add one.")
        self.source, self.fingerprint = source, hashlib.sha256(source.encode()).hexdigest()
        self.name, self.eot, self.V = f"hf-{self.fingerprint[:12]}", eot, max(vocabulary.values()) + 1
        self.ends = tuple(dict.fromkeys(i for i in (end, eot) if i >= 0))
        spec = json.loads(source)
        if dropout := spec["model"].get("dropout"):
            raise ConfigError(f"{where} has model.dropout = {dropout}, which encodes at random; set it to null.")
        steps = {k: v for k, v in spec.items() if k not in ("model", "added_tokens")}
        for pattern in _patterns(steps):
            if _exponential(pattern):
                slow = "which repeats a repetition and can take for ever on some texts"
                raise DataError(f"{where} has the pattern {pattern[:80]!r}, {slow}; write it without one of the two.")
        if (most := 4 * len(vocabulary) + (1 << 16)) < self.V:  # gaps exist, but each id takes memory everywhere
            raise DataError(f"{where} has ids up to {self.V - 1} for {len(vocabulary)} tokens; the most is {most}.")
        self._byte_level = '"ByteLevel"' in json.dumps(steps)
        self._bytes = [b""] * self.V if self._byte_level else self._between_letters(vocabulary)
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        added = {t["content"] for t in spec.get("added_tokens") or []}
        for token, i in vocabulary.items():
            if self._byte_level:
                whole = token in added or not set(token) <= letters.keys()
                self._bytes[i] = token.encode() if whole else bytes(letters[c] for c in token)
            elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):  # SentencePiece's byte fallback
                self._bytes[i] = bytes([int(match[1], 16)])
        bare, whole = (self._hf.encode("a", None, False, special).ids for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.around = whole[:at], whole[at + len(bare) :]
        # Text is ordinary text: its "<|endoftext|>" must not become the token.
        self._hf.encode_special_tokens = True

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of the tokens that were added to the vocabulary."""
        return frozenset(token["id"] for token in json.loads(self.source).get("added_tokens") or [])

    @cached_property
    def _chats(self) -> Any:
        """The library's tokenizer, which finds special tokens in a text."""
        return _library_tokenizer(self.source, self.name)

    def encode_special(self, text: str) -> tuple[list[int], Callable[[int], int | None]]:
        """As for ours, by the library."""
        with _refusals(f"tokenizer {self.name} cannot encode {text[:40]!r}..."):
            found = self._chats.encode(without_surrogates(text), None, False, False)
        return found.ids, found.char_to_token

    def _between_letters(self, vocabulary: dict[str, int]) -> list[bytes]:
        """The characters that each id adds to a text in its middle, asked of the library: between two letters."""
        a = min((i for token, i in vocabulary.items() if len(token) == 1 and token.isalpha()), default=self.eot)
        first, both = (self._hf.decode([a] * n, skip_special_tokens=False) for n in (1, 2))
        texts = self._hf.decode_batch([[a, i, a] for i in range(self.V)], skip_special_tokens=False)
        return [text[len(first) : len(text) - len(both) + len(first)].encode() for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` as the library puts it together. DataError for an id outside [0, V)."""
        text = super().decode(ids := list(ids))
        return text if self._byte_level else str(self._hf.decode(ids, skip_special_tokens=False))

    def encode(self, text: str) -> NDArray[np.integer]:
        """Token ids of `text`, shape (n,), without what the file's post-processor would add around it."""
        with _refusals(f"tokenizer {self.name} cannot encode {text[:40]!r}..."):
            return np.array(self._hf.encode(without_surrogates(text), None, False, False).ids, self.dtype)


def load_ranks(path: Path = RANKS_FILE) -> list[bytes]:
    """GPT-2's 50,256 byte strings by rank from a tiktoken file, whose sha256 is checked (DataError)."""
    with explained(DataError, f"cannot read the GPT-2 vocabulary {path}", "reinstall daybreak"):
        data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != RANKS_SHA256:
        raise DataError(f"{path} is damaged: sha256 {digest} instead of {RANKS_SHA256}; reinstall daybreak.")
    return [base64.b64decode(line.split()[0]) for line in data.splitlines()]  # the file is sorted by rank


def get_tokenizer(name: str, folder: Path | None = None) -> Tokenizer:
    """The tokenizer called `name`: `gpt2`; `bytes` (256 byte values); or `gpt2-N`, GPT-2's N lowest ranks.

    A name that ends in .json is a Hugging Face tokenizer's file. If it is none of ours, data and checkpoints call it
    `hf-` and the start of the file's sha256, and that name is looked up in `folder`/tokenizer.json. A model's folder
    may also say which ids end a text (see listed_ends). `+img-` and the start of a codec's sha256 behind the name stand
    for the same with pictures (data/pictures.py); the codec is looked up in `folder`.

    A truncation is a valid BPE because every merge has a higher rank than its parts. Its ids below N are GPT-2's,
    EOT = N and V = N + 1, with N from 256 (bytes in GPT-2's order) to 50256 (GPT-2 itself).
    Raises ConfigError for another name, with the nearest match.
    """
    if MARK in name and not name.endswith(".json"):
        path = (folder or Path()) / CODEC_FILE
        digest, numbers = codec_digest(path, name), read_metadata(path)
        base = get_tokenizer(name.partition(MARK)[0], folder)
        return base.with_pictures(digest, numbers["K"], numbers["N"], numbers["D"])
    own = not name.endswith(".json") and not re.fullmatch(r"hf-[0-9a-f]{12}", name)
    tokenizer = _own_tokenizer(name) if own else _hf_tokenizer(name, folder)
    return tokenizer.ending(listed_ends(folder)) if folder else tokenizer


def listed_ends(folder: Path) -> list[int]:
    """The ids at which generation stops, as the files of a model in `folder` list them; [] if none does. DataError."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            said = read_json(folder / name, {"eos_token_id?": ANY}, DataError, "copy it again").get("eos_token_id")
            if ids := [i for i in (said if isinstance(said, list) else [said]) if type(i) is int and i >= 0]:
                return ids
    return []


@cache
def _own_tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return Tokenizer(name, [bytes([value]) for value in range(256)], "")
    if name == "gpt2":
        return Tokenizer(name, load_ranks(), GPT2_PATTERN)
    if match := re.fullmatch(r"gpt2-([0-9]+)", name):
        if not 256 <= (N := int(match[1])) <= RANKS:
            raise ConfigError(f"tokenizer {name!r}: N of gpt2-N must be from 256 to {RANKS}.")
        return Tokenizer(name, load_ranks()[:N], GPT2_PATTERN)
    if os.path.isfile(file := f"{name}/{TOKENIZER_FILE}"):
        raise ConfigError(f"tokenizer {name!r} is a folder; give its file, {file}.")
    hint = meant(name, ["gpt2", "bytes", "gpt2-1024"], "none has this name.")
    known = "gpt2, bytes, gpt2-N (N lowest ranks), FILE.json (Hugging Face)"
    raise ConfigError(f"unknown tokenizer {name!r}; {hint} Known: {known}.")


def _hf_tokenizer(name: str, folder: Path | None) -> Tokenizer:
    """The tokenizer of a .json file, or the one called hf-... in `folder`. ConfigError, DataError."""
    by_path = name.endswith(".json")
    path = Path(name) if by_path else (folder or Path()) / TOKENIZER_FILE
    if not path.exists():
        fix = "runs with tokenizer gpt2, gpt2-N or bytes have none: give that name, such as gpt2-1024 (for chats: the "
        fix += "file that daybreak export --to hf makes)"
        fix = fix if by_path else "copy the file there, from the data or the run that has this tokenizer"
        raise ConfigError(f"tokenizer {name!r}: there is no {'such file' if by_path else path}; {fix}.")
    try:
        source = path.read_text("utf-8")
        tokenizer = tokenizer_of(source, str(path)) if by_path else HFTokenizer(source, str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r}: cannot read {path} ({error}).") from None
    if not by_path and name != tokenizer.name:
        raise DataError(f"{path} is tokenizer {tokenizer.name}, not {name}; bring the old file back.")
    return tokenizer


def tokenizer_of(source: str, where: str) -> Tokenizer:
    """The tokenizer that the text of a tokenizer.json, from `where`, describes: one of ours, or Hugging Face's.
    ConfigError, DataError."""
    return _own_of_json(source) or HFTokenizer(source, where)


def own_tokenizers(V: int) -> list[Tokenizer]:
    """Ours that have V ids."""
    names = ["gpt2"] if V == RANKS + 1 else [*(["bytes"] if V == 257 else []), f"gpt2-{V - 1}"]
    return [get_tokenizer(name) for name in names if 257 <= V <= RANKS + 1]


def _own_of_json(source: str) -> Tokenizer | None:
    """Which of our tokenizers a tokenizer.json describes, by everything in it that decides on ids; None if none."""
    try:
        theirs = _deciding(json.loads(source))
        known = own_tokenizers(len(theirs["vocab"]))
        return next((t for t in known if _deciding(json.loads(t.to_json())) == theirs), None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # HFTokenizer says what is wrong
        return None


def _deciding(spec: Any) -> dict[str, Any]:
    """The parts of a byte-level tokenizer.json that decide on its ids, in one spelling."""
    model, split, added = spec["model"], spec["pre_tokenizer"], {t["content"]: t["id"] for t in spec["added_tokens"]}
    changing = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return {
        "kind": (model["type"], split["type"], split["add_prefix_space"], split.get("use_regex", True)),
        "changes": [spec["normalizer"], *(model.get(key) or None for key in changing)],
        "vocab": {**model["vocab"], **added}, "added": added,
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]],
    }  # fmt: skip
