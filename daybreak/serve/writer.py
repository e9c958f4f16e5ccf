"""One thread that owns the engine and generates the sequences of all requests, as many at a time as the cache has rows.

Sequences join and leave between any two tokens. Free rows go to the requests in turn, one sequence each, so a request
for a hundred sequences does not delay one for a single sequence:

    row 0    | request 1, choice 0                     | request 2, choice 0   |
    row 1    | request 1, choice 1         | request 1, choice 2                    |
    tokens   --------------------------------------------------------------------->
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from daybreak.engine import Engine
from daybreak.generate import Batch, Text, Token, score

MAX_REQUESTS = 64  # open ones; more are refused, unless the writer is given another number
log = logging.getLogger("daybreak")


class News(NamedTuple):
    """The new part of a request's sequence: text that is certain, the tokens that begin in it, and where they begin.

    done: the reason why it ended: stop, length, or error. prompt: the prompt's tokens from the second on, with
    log-probabilities, in a sequence's first news if the request asks for them.
    """

    choice: int
    text: str = ""
    tokens: Sequence[Token] = ()
    starts: Sequence[int] = ()
    done: str = ""
    prompt: Sequence[Token] = ()


class Job:
    """One request. `tell` is called from the writer's thread. score: whether prompts get log-probabilities too."""

    def __init__(self, texts: Sequence[Text], tell: Callable[[News], None], score: bool = False) -> None:
        self.texts, self.tell, self.score = texts, tell, score
        self.waiting, self.cancelled = deque(range(len(texts))), False
        self._sent = [(0, 0)] * len(texts)  # characters, tokens
        self.open = set(range(len(texts)))

    @property
    def over(self) -> bool:
        """Whether everything was told, or the client has left."""
        return self.cancelled or not self.open

    def report(self, index: int, prompt: Sequence[Token] = ()) -> None:
        """Tell the new part of a sequence. A token waits until its text begins, since a stop may still cut it off."""
        text, (chars, told) = self.texts[index], self._sent[index]
        known = len(text.made) if text.done == "length" else sum(at < len(text.text) for at in text.starts)
        if text.done:
            self.open.discard(index)
        if text.done or prompt or (chars, told) != (len(text.text), known):
            part = slice(told, known)
            self.tell(News(index, text.text[chars:], text.made[part], text.starts[part], text.done, prompt))
            self._sent[index] = len(text.text), known

    def fail(self) -> None:
        """Tell that no sequence continues."""
        for index in sorted(self.open):
            self.tell(News(index, done="error"))
        self.open.clear()


class Writer(threading.Thread):
    """Generates the sequences of all jobs until it is stopped."""

    def __init__(
        self, engine: Engine, most: int = MAX_REQUESTS, use: Callable[[str], None] = lambda adapter: None
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self.engine, self.batch, self.most = engine, Batch(engine, use), most
        self._jobs: deque[Job] = deque()
        self._changed, self._stopping = threading.Condition(), False

    @property
    def full(self) -> bool:
        """Whether it takes no further job."""
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
        """End after the current token, and wait for the end."""
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
                self.batch = Batch(self.engine, self.batch.use)
                with self._changed:
                    for job in self._jobs:
                        job.fail()

    def _next(self) -> list[tuple[Job, int]] | None:
        """The sequences that join now. Waits for work; None at the end."""
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
                self.batch.use(text.adapter)
                job.report(index, score(self.engine, text.ids, text.how.logprobs))
        self.batch.add([job.texts[index] for job, index in joining])
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            for index in sorted(job.open.difference(job.waiting)):
                job.report(index)
