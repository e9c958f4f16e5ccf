"""The samples that a run generates: the same prompts each time, so that samples show what it has learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from daybreak.data.chat import Template
from daybreak.data.packing import read_examples
from daybreak.data.pictures import Pictures
from daybreak.data.shards import open_shard
from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import DataError
from daybreak.generate import Sampling, open_document, sample_text
from daybreak.images.codec import Codec
from daybreak.images.draw import draw, head
from daybreak.images.png import write_png
from daybreak.training.setup import Setup

SAMPLE_SEED = 1337
HELD_OUT, SEARCHED = 2, 100  # examples that a run on packed rows answers, and among which they are found
DRAWN = 8  # pictures that a run on pictures draws
IMAGES = "images"  # of a run's folder


@dataclass(frozen=True)
class Sampled:
    """Samples of a run: texts after prompts, or pictures of captions. tokens: how many at most. tokenizer: the run's,
    whose texts end at the end of a turn too if a chat template has one."""

    setup: Setup
    tokenizer: Tokenizer
    how: Sampling
    pictures: Pictures | None
    prompts: Sequence[tuple[str, Sequence[int]]]  # what is shown before the text, ids of the prompt
    tokens: int

    def text(self, engine: Engine, check: Callable[[], None], stopped: Callable[[], bool]) -> str:
        """The texts, one below the other. `check` runs before each token; they end early if `stopped`."""
        texts = []
        for shown, prompt in self.prompts:
            pieces = sample_text(engine, self.tokenizer, prompt, self.how, check)
            texts.append(shown + "".join(takewhile(lambda _: not stopped(), pieces)))
        return "\n\n".join(texts)

    def draw(self, engine: Engine, step: int, check: Callable[[], None]) -> list[tuple[str, str]]:
        """Draw the pictures into the run's folder, if the disk lets us: the caption and the file of each. `check` runs
        before each token."""
        drawn, captions = list[tuple[str, str]](), [caption for caption, _ in self.prompts]
        codes = draw(engine, self.tokenizer, captions, self.how, check=check)
        with self.setup.run.folder.writing(IMAGES) as folder:
            folder.mkdir(exist_ok=True)
            for i, picture in enumerate(Codec.load(folder.parent, self.tokenizer).decode(codes)):
                write_png(folder / (name := f"step-{step:08d}-{i}.png"), picture)
                drawn.append((captions[i], f"{IMAGES}/{name}"))
        return drawn


def sampled(setup: Setup) -> Sampled:
    """The samples of a run, by its data and eval.*. Raises DataError if a chat template refuses the prompt, and
    ConfigError if a picture has no room for it."""
    e, tokenizer, pictures = setup.config.eval, setup.tokenizer, setup.tokenizer.pictures
    how = Sampling(e.sample_tokens, e.temperature, e.top_k, seed=SAMPLE_SEED)
    if pictures:
        shown = [(c, head(tokenizer, pictures, c)) for c in ([e.prompt] if e.prompt else _held_out(setup, pictures))]
        return Sampled(setup, tokenizer, how, pictures, shown, len(shown) * pictures.N)
    prompts, template = sample_prompts(setup), Template.load(setup.run.path, tokenizer)
    if template is not None and setup.config.data.packed:
        tokenizer = template.ending(tokenizer)
    return Sampled(setup, tokenizer, how, None, prompts, e.sample_tokens * len(prompts))


def _held_out(setup: Setup, pictures: Pictures) -> list[str]:
    """The captions of the first pictures for validation."""
    tokenizer, found = setup.tokenizer, list[str]()
    for shard in setup.dataset.val:
        ids = open_shard(shard)
        for end in np.flatnonzero(ids[: 8 * DRAWN * pictures.D] == pictures.boi):
            caption = ids[end - pictures.room - 1 : end]
            found.append(tokenizer.decode(int(i) for i in caption if i != tokenizer.eot))
        if len(found) >= DRAWN:
            break
    return list(dict.fromkeys(found))[:DRAWN]


def sample_prompts(setup: Setup) -> list[tuple[str, Sequence[int]]]:
    """(what is shown before the text, ids of the prompt) of each.

    A run on text continues eval.prompt. One on packed rows answers it as a message of a user; without one it answers
    the first held-out examples, each with another question, from where their first answers begin. Raises DataError if
    the template refuses it.
    """
    prompt, tokenizer = setup.config.eval.prompt, setup.tokenizer
    if not setup.config.data.packed:
        return [(prompt, open_document(tokenizer, prompt))]
    if not prompt:
        asked = dict.fromkeys(tuple(one[0][0].tolist()) for one in read_examples(setup.dataset.val, SEARCHED))
        return [(tokenizer.decode(ids), ids) for ids in [*asked][:HELD_OUT]]
    template = Template.load(setup.run.path, tokenizer)
    if template is None:  # prompts and answers without one
        before = tokenizer.around[0] if tokenizer.source else [tokenizer.eot]
        return [(prompt, [*before, *tokenizer.encode(prompt).tolist()])]
    try:
        text = template.prompt([{"role": "user", "content": prompt}])
    except ValueError as error:
        raise DataError(f"eval.prompt {error}; give another one.") from None
    return [(text, tokenizer.encode_special(text)[0])]
