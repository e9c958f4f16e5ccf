"""One thread that owns the engine and writes every request's texts, as many at a time as the cache has rows.

Texts join and leave between any two tokens. A free row goes to the requests in turn, one text each, so a request for
a hundred texts does not keep one for a single text waiting.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from daybreak.engine import Engine
from daybreak.generate import Batch, Text, Token, score

MAX_REQUESTS = 64  # under way or waiting; more are refused, unless the writer is told another number
log = logging.getLogger("daybreak")


class News(NamedTuple):
    """What is new of a request's text: certain text, the tokens that it begins with, where they begin, and the end.

    prompt: the prompt's tokens from the second on, scored, in a text's first news if the request wants them.
    """

    choice: int
    text: str = ""
    tokens: Sequence[Token] = ()
    starts: Sequence[int] = ()
    done: str = ""  # stop, length, or error
    prompt: Sequence[Token] = ()


class Job:
    """One request. `tell` is called from the writer's thread. `score`: whether prompts are scored too."""

    def __init__(self, texts: Sequence[Text], tell: Callable[[News], None], score: bool = False) -> None:
        self.texts, self.tell, self.score = texts, tell, score
        self.waiting, self.cancelled = deque(range(len(texts))), False
        self._sent = [(0, 0)] * len(texts)  # characters, tokens
        self.open = set(range(len(texts)))

    @property
    def over(self) -> bool:
        """Whether everything is told, or nobody listens any more."""
        return self.cancelled or not self.open

    def report(self, index: int, prompt: Sequence[Token] = ()) -> None:
        """Tell what is new of a text. A token is told once its text has begun: it may still be cut off by a stop."""
        text, (chars, told) = self.texts[index], self._sent[index]
        known = len(text.made) if text.done == "length" else sum(at < len(text.text) for at in text.starts)
        if text.done:
            self.open.discard(index)
        if text.done or prompt or (chars, told) != (len(text.text), known):
            part = slice(told, known)
            self.tell(News(index, text.text[chars:], text.made[part], text.starts[part], text.done, prompt))
            self._sent[index] = len(text.text), known

    def fail(self) -> None:
        """Tell that no text goes on."""
        for index in sorted(self.open):
            self.tell(News(index, done="error"))
        self.open.clear()


class Writer(threading.Thread):
    """Writes the texts of all jobs until it is stopped."""

    def __init__(self, engine: Engine, most: int = MAX_REQUESTS) -> None:
        super().__init__(name="writer", daemon=True)
        self.engine, self.batch, self.most = engine, Batch(engine), most
        self._jobs: deque[Job] = deque()
        self._changed, self._stopping = threading.Condition(), False

    @property
    def full(self) -> bool:
        """Whether no further job is taken."""
        return sum(not job.over for job in tuple(self._jobs)) >= self.most

    def submit(self, job: Job) -> bool:
        """Queue a job; False if there are too many."""
        with self._changed:
            if self.full:
                return False
            self._jobs.append(job)
            self._changed.notify()
        return True

    def stop(self) -> None:
        """End after the token under way, and wait for that."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        """The thread's body."""
        while (joining := self._next()) is not None:
            try:
                self._write(joining)
            except Exception:
                log.exception("writing failed; the requests under way get an error.")
                self.batch = Batch(self.engine)
                with self._changed:
                    for job in self._jobs:
                        job.fail()

    def _next(self) -> list[tuple[Job, int]] | None:
        """The texts that join now, waiting for work; None at the end."""
        with self._changed:
            while True:
                self.batch.drop([text for job in self._jobs if job.cancelled for text in job.texts])
                self._jobs = deque(job for job in self._jobs if not job.over)
                if self._stopping:
                    return None
                if self._jobs:
                    break
                self._changed.wait()
            joining: list[tuple[Job, int]] = []
            while len(joining) < self.batch.room and any(job.waiting for job in self._jobs):
                self._jobs.rotate(-1)
                if self._jobs[-1].waiting:
                    joining.append((self._jobs[-1], self._jobs[-1].waiting.popleft()))
            return joining

    def _write(self, joining: list[tuple[Job, int]]) -> None:
        self.batch.step()
        for job, index in joining:
            text = job.texts[index]
            if job.score:
                job.report(index, score(self.engine, text.ids, text.how.logprobs))
        self.batch.add([job.texts[index] for job, index in joining])
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            for index in sorted(job.open.difference(job.waiting)):
                job.report(index)
