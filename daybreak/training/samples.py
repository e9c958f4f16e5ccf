"""What a run continues when it samples: the same prompts each time, so that their texts show what it has learned."""

from __future__ import annotations

from collections.abc import Sequence

from daybreak.data.chat import Template
from daybreak.data.packing import read_examples
from daybreak.errors import DataError
from daybreak.generate import open_document
from daybreak.training.setup import Setup

HELD_OUT = 2  # examples that a run on packed rows answers


def sample_prompts(setup: Setup) -> list[tuple[str, Sequence[int]]]:
    """(what is shown before the text, ids of the prompt) of each.

    A run on text continues eval.prompt. One on packed rows answers it as a message of a user; without one it answers
    the first held-out examples, from where their first answers begin. Raises DataError if the template refuses it.
    """
    prompt, tokenizer = setup.config.eval.prompt, setup.tokenizer
    if not setup.config.data.packed:
        return [(prompt, open_document(tokenizer, prompt))]
    if not prompt:
        asked = [example[0][0].tolist() for example in read_examples(setup.dataset.val, HELD_OUT)]
        return [(tokenizer.decode(ids), ids) for ids in asked]
    template = Template.load(setup.run.path, tokenizer)
    if template is None:  # prompts and answers without one
        before = tokenizer.around[0] if tokenizer.source else [tokenizer.eot]
        return [(prompt, [*before, *tokenizer.encode(prompt).tolist()])]
    try:
        text = template.prompt([{"role": "user", "content": prompt}])
    except ValueError as error:
        raise DataError(f"eval.prompt {error}; give another one.") from None
    return [(text, tokenizer.encode_special(text)[0])]
