"""Tokenizers against published ids, a naive byte-pair merger and the raw vocabulary file."""

from __future__ import annotations

import base64
import hashlib
import itertools
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from daybreak.data.tokenizer import GPT2_PATTERN, RANKS_FILE, Tokenizer, get_tokenizer, load_ranks
from daybreak.errors import ConfigError, DataError

NAMES = ["gpt2", "bytes", "gpt2-256", "gpt2-300", "gpt2-1024", "gpt2-50256"]
LINES = RANKS_FILE.read_bytes().split(b"\n")
RANKS = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in LINES if line}

# Published: OpenAI's GPT-2 encoder; Hugging Face's documentation of GPT2Tokenizer; the seven tokens of a quoted EOT.
GOLDEN = {
    "Hello world": [15496, 995],
    " Hello world": [18435, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "": [],
}


def random_text(rng: random.Random, length: int) -> str:
    kinds = [
        "abcdefgh",
        "ABC' dstmlrve",
        "0123456789",
        " \n\t\r",
        "!?-_.,()",
        "äßéøçñ",
        "中文日本語",
        "🙂👩‍👩‍👧\u200d",
        "\x1c\x85\u2028\xa0",
    ]
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(length))


def merge_naively(piece: bytes, N: int) -> list[int]:
    """Byte-pair encoding by its definition: join the adjacent pair of lowest rank until none has a rank below N."""
    parts = [bytes([value]) for value in piece]
    while True:
        pairs = [(RANKS.get(a + b, N), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        if not pairs or min(pairs)[0] >= N:
            return [RANKS[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", GOLDEN)
def test_gpt2_published_ids(text: str) -> None:
    ids = get_tokenizer("gpt2").encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == GOLDEN[text]


@pytest.mark.parametrize(
    ("name", "eot"), [("gpt2", 50256), ("bytes", 256), ("gpt2-256", 256), ("gpt2-1024", 1024), ("gpt2-50256", 50256)]
)
def test_eot_is_the_last_id_and_never_encoded(name: str, eot: int) -> None:
    tokenizer = get_tokenizer(name)
    assert (tokenizer.eot, tokenizer.V) == (eot, eot + 1)
    assert tokenizer.decode([eot]) == "<|endoftext|>"
    assert tokenizer.token_bytes(eot) == b"<|endoftext|>"
    assert eot not in tokenizer.encode("a<|endoftext|>b")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_any_text(name: str) -> None:
    rng = random.Random(1)
    tokenizer = get_tokenizer(name)
    for _ in range(100):
        text = random_text(rng, rng.randrange(60))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert (ids < tokenizer.eot).all()
        assert b"".join(tokenizer.token_bytes(i) for i in ids.tolist()) == text.encode()


@pytest.mark.parametrize("N", [256, 300, 1024, 50256])
def test_truncated_bpe_equals_naive_merging(N: int) -> None:
    tokenizer = get_tokenizer(f"gpt2-{N}")
    for word in ("internationalization", " underneath", " the", "aaaaaaaaaaaaa", "!!!!!!!!", "日本語", " Größenwahn"):
        assert tokenizer.encode(word).tolist() == merge_naively(word.encode(), N)


def test_bytes_are_their_values() -> None:
    assert get_tokenizer("bytes").encode("aé\n").tolist() == [0x61, 0xC3, 0xA9, 0x0A]
    assert get_tokenizer("bytes").decode([0x61, 0xC3, 0xA9, 0x0A]) == "aé\n"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_bad_bytes_and_bad_ids(name: str) -> None:
    tokenizer = get_tokenizer(name)
    half = [next(i for i in range(256) if tokenizer.token_bytes(i) == b"\xc3")]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    for bad in (tokenizer.V, -1):
        with pytest.raises(DataError, match=f"token id {bad} is outside the {tokenizer.V} ids"):
            tokenizer.decode([0, bad])


def test_fingerprint_is_of_the_content() -> None:
    digest = hashlib.sha256()
    vocabulary = sorted(RANKS, key=RANKS.__getitem__)
    for data in (GPT2_PATTERN.encode(), *vocabulary):
        digest.update(struct.pack("<I", len(data)) + data)
    digest.update(struct.pack("<I", 50256))
    assert get_tokenizer("gpt2").fingerprint == get_tokenizer("gpt2-50256").fingerprint == digest.hexdigest()
    assert len({get_tokenizer(name).fingerprint for name in NAMES}) == len(NAMES) - 1
    swapped = [vocabulary[1], vocabulary[0], *vocabulary[2:]]
    assert Tokenizer("gpt2", swapped, GPT2_PATTERN).fingerprint != digest.hexdigest()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gtp2", "'gpt2'"), ("byte", "'bytes'"), ("gpt2-255", "from 256 to 50256"), ("gpt2-50257", "from 256 to 50256")],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        get_tokenizer(name)


def test_a_run_with_a_tokenizer_of_ours_has_no_file_of_it() -> None:
    said = r"'runs/tiny/tokenizer.json': there is no such file; .* give that name, such as gpt2-1024 \(for chats: "
    with pytest.raises(ConfigError, match=said):
        get_tokenizer("runs/tiny/tokenizer.json")


def test_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    good = RANKS_FILE.read_bytes()
    copy = tmp_path / "gpt2.tiktoken"
    copy.write_bytes(good)
    assert load_ranks(copy) == sorted(RANKS, key=RANKS.__getitem__)
    flipped = bytearray(good)
    flipped[400_000] ^= 1
    for bad in (bytes(flipped), good[:-1], good + b"\n", b""):
        copy.write_bytes(bad)
        with pytest.raises(DataError, match=r"gpt2\.tiktoken is damaged: sha256 .* instead of 306cd27f"):
            load_ranks(copy)
    with pytest.raises(DataError, match="cannot read the GPT-2 vocabulary"):
        load_ranks(tmp_path / "missing")


def test_the_data_room_does_not_import_torch() -> None:
    code = "import sys, daybreak.data.prepare, daybreak.data.loader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_fast_splitting_gives_the_tokens_of_the_published_pattern() -> None:
    rng = random.Random(5)
    kinds = [
        "abc",
        "A's'tll",
        "01",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t\v\f",
        "!?",
        "é日🙂",
        "\x1c\x1f",
        "\x85\xa0\u2028\u3000\u200b",
    ]
    kinds += ["\0", "'s", "\u180e", "<|endoftext|>"]
    plain = [kind for kind in kinds if "\0" not in kind and "\xa0" not in kind]
    tokenizer = get_tokenizer("gpt2")
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.eot)}
    published = tiktoken.Encoding("published", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for i in range(20_000):
        some = kinds if i % 4 == 0 else plain  # the rare characters take another way
        text = "".join(rng.choice([k := rng.choice(some), rng.choice(k)]) for _ in range(rng.randrange(40)))
        assert tokenizer.encode(text).tolist() == published.encode_ordinary(text), repr(text)


def test_long_runs_of_white_space_beside_rare_characters() -> None:
    """Cut where the published pattern cuts them: the same tokens as far as that one can go, and no limit beyond."""
    tokenizer, rng = get_tokenizer("gpt2"), random.Random(3)
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.eot)}
    published = tiktoken.Encoding("published", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    rare = ["\0", "\xa0", "\u2028", "\x85", "\u3000"]
    for _ in range(60):
        parts = [rng.choice([" ", "\n", "\r\n", "\xa0", *rare]) * rng.choice([1, 4095, 4096, 5000]) for _ in range(3)]
        text = rng.choice(rare).join([*parts, rng.choice(["", "x", "\x1cy"]), *parts[:1], rng.choice(["", "!"])])
        assert tokenizer.encode(text).tolist() == published.encode_ordinary(text)
    for text in (" " * 1_000_000 + "\xa0x", "\xa0" + "\n" * 1_000_000 + "end", "\0" + "\u2003" * 1_000_000 + "\0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
