"""Writes tests/golden/sentencepiece.json, vocabularies and ids of SentencePiece's own library. Nothing is daybreak's.

    pip install sentencepiece==0.2.3 protobuf
    python tests/made_sentencepiece.py

Three vocabularies: as Llama's, with a space before a text; without one; and one whose runs of spaces all have the
same lowest score, as those of Llama 2 have.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden") / "sentencepiece.json"
PROSE = [
    "the quick brown fox jumps over the lazy dog. It's 2024, don't worry; naïve café! Hello world, hello again. " * 3,
    "def f(x):\n    return x + 1\n\n\tindent  two spaces   three. " * 3 + "漢字かな 中文 한국어 Привет ελληνικά 🙂🙃",
]
TEXTS = [
    "Hello world, don't", "the  quick   brown\n\n\tfox ", " the", "  the", "     ", " ", "\n", "\n\n \n", "\t\t", "",
    "naïve café 漢字 🙂🏽 ελληνικά İ ß", "e\u0301 é \u200bzero\xa0nb\u2028x", "한국어 中文かな", "👩‍👩‍👧 ﬁ ½ ①",
    "<s>a</s> <unk> <0x0A>", "a<|endoftext|>b", "12345 67", "x" * 40, " " * 33 + "x" + " " * 18, "thethe worldworld",
    "def f(x):\n    return x\n", "THE QUICK \ufffd", "hello  hello   hello    hello     hello", "▁the ▁ x", "\x7f~",
]  # fmt: skip


def model(prefix: bool) -> Any:
    """A trained model, as its library's message."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in PROSE for line in text.splitlines()), model_writer=out, vocab_size=400,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
        character_coverage=0.99,
    )  # fmt: skip
    made = sentencepiece_model_pb2.ModelProto()
    made.ParseFromString(out.getvalue())
    return made


def with_runs(made: Any) -> Any:
    """The same, whose runs of up to seven spaces all have the score -1e9."""
    for piece in [piece for piece in made.pieces if set(piece.piece) == {"▁"}]:
        made.pieces.remove(piece)
    for n in range(1, 8):
        made.pieces.add(piece="▁" * n, score=-1e9)
    return made


def main() -> None:
    """Write the file."""
    import sentencepiece

    found = []
    for made in (model(True), model(False), with_runs(model(True))):
        library = sentencepiece.SentencePieceProcessor(model_proto=made.SerializeToString())
        found.append({
            "tokens": [piece.piece for piece in made.pieces], "scores": [piece.score for piece in made.pieces],
            "types": [piece.type for piece in made.pieces], "prefix": made.normalizer_spec.add_dummy_prefix,
            "ids": [library.encode(text) for text in TEXTS],
        })  # fmt: skip
    GOLDEN.write_text(json.dumps({"texts": TEXTS, "models": found}, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
