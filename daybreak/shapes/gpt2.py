"""GPT-2's and GPT-3's shapes, and the names people use for the published ones."""

from __future__ import annotations

from dataclasses import dataclass

from daybreak.config_keys import key
from daybreak.shapes.shape import Shape


@dataclass(frozen=True)
class GPT2Config(Shape):
    """GPT-2, or GPT-3 with dense attention."""

    arch: str = key("gpt2", "family of models")

    def check(self) -> None:
        super().check()
        self.check_multiple("C", "NH")
        self.check_multiple("C", 8)


# The published GPT-2 family by depth (llm.c's `-e dN`): depth -> (C, NH).
DEPTHS = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25), 60: (1920, 30),
          72: (2880, 30), 84: (3456, 36)}  # fmt: skip
# The GPT-3 paper's table 2.1 by width (llm.c's `-e gpt3:cN`): C -> (L, NH). 5140 there is a typing error for 5120.
WIDTHS = {384: (6, 6), 768: (12, 12), 1024: (24, 16), 1536: (24, 16), 2048: (24, 16), 2560: (32, 32),
          4096: (32, 32), 5120: (40, 40), 12288: (96, 96)}  # fmt: skip
_BY_DEPTH = {f"d{L}": GPT2Config(L=L, C=C, NH=NH) for L, (C, NH) in DEPTHS.items()}
_BY_WIDTH = {f"gpt3:c{C}": GPT2Config(L=L, C=C, NH=NH, max_T=2048) for C, (L, NH) in WIDTHS.items()}
_NAMES = {"gpt2-124M": "d12", "gpt2-350M": "d24", "gpt2-774M": "d36", "gpt2-1558M": "d48"}

SHAPES = _BY_DEPTH | _BY_WIDTH | {name: _BY_DEPTH[depth] for name, depth in _NAMES.items()}
# Other spellings that are understood.
ALIASES = {f"gpt2:{name}": SHAPES[name] for name in (*_BY_DEPTH, *_NAMES)} | {"gpt3:c5140": SHAPES["gpt3:c5120"]}
