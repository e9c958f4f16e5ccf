"""OpenAI's images: from a request's JSON to pictures that a model draws, and from these to its JSON. Knows no network.

https://platform.openai.com/docs/api-reference/images/create. It also understands `seed` and the fields of sampling. A
picture is a sequence like a text, of the codes of pictures alone, so it is drawn beside texts and other pictures.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from daybreak.data.formats import without_surrogates
from daybreak.data.pictures import Pictures
from daybreak.errors import ConfigError
from daybreak.generate import Sampling, Text
from daybreak.images.codec import Codec
from daybreak.images.draw import head
from daybreak.images.png import png
from daybreak.interop import Model
from daybreak.serve.completions import Answer, Completion, Prompt, Refused, check_fields, check_model, number, short
from daybreak.serve.writer import News

MOST_PICTURES = 16  # of a request
FRACTIONS = {"temperature": (1.0, 0, 100), "top_p": (1.0, 0, 1), "min_p": (0.0, 0, 1)}  # default, least, most
# Fields that have one value here; null and "auto" stand for it too.
ONLY: dict[str, Any] = {"response_format": "b64_json", "output_format": "png", "background": "opaque", "stream": False}
OTHERS = ("quality", "style", "moderation", "output_compression", "partial_images")  # null or "auto"
FIELDS = ("model", "prompt", "n", "size", "seed", "user", "top_k", *FRACTIONS, *ONLY, *OTHERS)


@dataclass(frozen=True)
class Drawing(Completion):
    """A request for pictures that can be served: n of one prompt."""

    pictures: Pictures
    codec: Codec

    def texts(self, adapter: str) -> list[Text]:
        """The sequences to generate, picture i with seed + i."""
        (prompt,), codes = self.prompts, range(self.pictures.first, self.pictures.boi)
        hows = [replace(self.how, seed=self.how.seed + i) for i in range(self.n)]
        return [Text(prompt.ids, how, None, adapter, codes) for how in hows]


def parse_drawing(body: Any, name: str, model: Model, codec: Codec | None) -> Drawing:
    """The request in a JSON value, for a model and the codec of its pictures. Raises Refused."""
    check_fields(body, FIELDS)
    check_model(body, name)
    pictures = model.tokenizer.pictures
    if pictures is None or codec is None:
        said = f"{name!r} has learned text only, and draws no pictures; use /v1/completions."
        raise Refused(400, said, "model")
    for field in (*ONLY, *OTHERS):
        if body.get(field) not in (None, "auto", ONLY.get(field)):
            rule = f"must be {str(ONLY[field]).lower()}" if field in ONLY else "is not supported; leave it out"
            raise Refused(400, f"{field} = {short(body[field])} {rule}.", field)
    if body.get("size") not in (None, "auto", size := f"{codec.grid.px}x{codec.grid.px}"):
        raise Refused(400, f"size = {short(body['size'])} must be {size}, which {name!r} draws.", "size")
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise Refused(400, "prompt must be a text; an empty one asks for a picture of any kind.", "prompt")
    if len(prompt) > pictures.room * int(model.tokenizer.lengths(model.tokenizer.V).max()):
        said = f"a prompt of {len(prompt)} characters does not fit into the {pictures.room} tokens before a picture"
        raise Refused(400, f"{said}; shorten it.", "prompt", "context_length_exceeded")
    try:
        ids = head(model.tokenizer, pictures, without_surrogates(prompt))
        heat, top_p, min_p = (number(body, field, *limits, whole=False) for field, limits in FRACTIONS.items())
        top_k, seed = int(number(body, "top_k", 0, 0)), int(number(body, "seed", secrets.randbits(31), 0))
        how = Sampling(pictures.N, temperature=heat, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        how.check()
    except ConfigError as error:
        raise Refused(400, str(error)) from None
    n = int(number(body, "n", 1, 1, MOST_PICTURES))
    return Drawing([Prompt(ids, 0, prompt)], how, n, False, False, False, model.tokenizer, pictures, codec)


class DrawingAnswer(Answer):
    """The answer to a request for pictures."""

    request: Drawing

    def chunk(self, news: News) -> dict[str, Any]:
        """Keep the codes of a picture, which come when it is complete."""
        self.choices.setdefault(news.choice, {"codes": []})["codes"] += [token.id for token in news.tokens]
        return {}

    def whole(self) -> dict[str, Any]:
        """The pictures as PNG files in base64, in the order of their seeds."""
        asked = self.request
        ids = np.array([self.choices[i]["codes"] for i in sorted(self.choices)], np.int64) - asked.pictures.first
        files = [base64.b64encode(png(pixels)).decode() for pixels in asked.codec.decode(ids)]
        return {"created": self.head["created"], "data": [{"b64_json": file} for file in files]}
