"""daybreak: train and finetune GPT-2 and Llama-type language models; backward is written by hand.

The public API is what `__all__` lists; torch is imported when `train`, `load` or `Run` is first touched.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daybreak.errors import Error

if TYPE_CHECKING:
    from daybreak.config import Config as Config
    from daybreak.report.plan import plan as plan
    from daybreak.state.run import Run as Run
    from daybreak.training.loop import train as train

__version__ = "0.12.0"
__all__ = ["Config", "Error", "Run", "__version__", "load", "plan", "train"]

_HOME = {
    "Config": "daybreak.config",
    "Run": "daybreak.state.run",
    "plan": "daybreak.report.plan",
    "train": "daybreak.training.loop",
}


def load(path: Path | str) -> Run:
    """The existing run in folder `path`. Raises ConfigError if there is none."""
    from daybreak.state import run

    return run.Run(path)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'daybreak' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
