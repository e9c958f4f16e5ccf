"""`prepare --train-tokenizer V`: a byte-level BPE of V ids, made from the text that is prepared, by `tokenizers`.

Text is split as by GPT-4's pattern, but digits go in groups of at most two, as nanochat has it: few ids are then spent
on numbers. `<|endoftext|>` is one of the V ids. All 256 bytes are too, so every text has an encoding.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from daybreak.data.formats import extra, without_surrogates
from daybreak.data.sources import SPLITS, STDIN, TextSource
from daybreak.data.tokenizer import EOT_TEXT, Tokenizer, tokenizer_of
from daybreak.errors import ConfigError

log = logging.getLogger("daybreak")
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
CHARACTERS = 2_000_000_000  # that it learns from, at most, from the text's beginning
LEAST = 257  # ids: all bytes, and the end of a text


def trained(texts: Iterable[str], V: int) -> str:
    """The text of the tokenizer.json that has V ids and fits these texts. The same texts give the same file.

    Raises ConfigError without the library, for a V below LEAST, and for texts too short for so many."""
    if V < LEAST:
        raise ConfigError(f"--train-tokenizer {V} must be {LEAST} at least: every byte, and the end of a text.")
    library = extra("tokenizers", "data", "prepare --train-tokenizer")
    split, byte_level = library.pre_tokenizers.Split, library.pre_tokenizers.ByteLevel
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
        [split(library.Regex(PATTERN), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = library.decoders.ByteLevel()
    alphabet = sorted(byte_level.alphabet())
    trainer = library.trainers.BpeTrainer(
        vocab_size=V, special_tokens=[EOT_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_first(texts), trainer)
    if (size := made.get_vocab_size()) < V:
        raise ConfigError(f"--train-tokenizer {V}: the text has pairs for {size} ids only; use {size} or more text.")
    return str(made.to_str())


def _first(texts: Iterable[str]) -> Iterator[str]:
    """The first CHARACTERS of the texts, or a little more."""
    before = 0
    for text in texts:
        if before >= CHARACTERS:
            log.info("the tokenizer is made from the first %.3g characters", before)
            return
        before += len(text)
        yield without_surrogates(text)


def made_for(source: TextSource, V: int, alone: bool) -> Tokenizer:
    """A tokenizer of V ids for the training text of a source, which is read once for it. alone: the source is text, and
    no other tokenizer was named. ConfigError, DataError."""
    if not alone:
        raise ConfigError(
            "--train-tokenizer is for text, and takes the place of --tokenizer; leave one of the two out."
        )
    if source.origin == STDIN:
        said = f"--train-tokenizer {V} reads the text twice, and {STDIN} can be read once"
        raise ConfigError(f"{said}; write the text to a file, and prepare that.")
    log.info("%s: making a tokenizer of %d ids; then the text is read again", source.name, V)
    with tempfile.TemporaryDirectory() as folder:
        pieces = source.pieces(0, 0, Path(folder))
        text = trained((piece.text for piece in pieces if piece.split == SPLITS[0]), V)
    source.faults.counts.clear()
    return tokenizer_of(text, "the tokenizer that was made")
