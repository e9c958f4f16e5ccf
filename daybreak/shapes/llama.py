"""The shapes of the decoder family: Llama, SmolLM, Qwen, Mistral, Gemma 3; and the names of published ones.

One block with a few flags covers them all (docs/families.md). The values are those of the published config.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from daybreak.checked import Rule
from daybreak.config_keys import POSITIVE, at_least, key, one_of, within
from daybreak.errors import ConfigError
from daybreak.shapes.shape import Shape

ROPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class LlamaConfig(Shape):
    """Llama, SmolLM, Qwen 2 and 3, Mistral, Gemma 3: RMSNorm, rotary positions, shared keys and values, a gated MLP."""

    arch: str = key("llama", "family of models")
    NKV: int = key(4, "heads of keys and values; groups of NH / NKV heads of queries share one", at_least(1))
    HS: int = key(64, "size of a head; NH * HS need not be C", within(8, 256))
    F: int = key(2048, "width of the MLP", within(8, 1 << 20))
    eps: float = key(1e-5, "what RMSNorm adds to the mean square", POSITIVE)
    tied: bool = key(True, "the embedding makes the logits; false = a weight of its own does")
    qkv_bias: bool = key(False, "queries, keys and values have a bias")
    attproj_bias: bool = key(False, "the projection after attention has a bias")
    mlp_bias: bool = key(False, "the MLP's two linear layers have a bias")
    qk_norm: bool = key(False, "each head of queries and keys goes through RMSNorm")
    layers: str = key(
        "f", "kinds of layers, repeated: f sees all keys, w a window, n all keys without their positions",
        Rule("must be one or more of the letters f, w and n", lambda s: bool(re.fullmatch("[fwn]+", s))),
    )  # fmt: skip
    window: int = key(0, "keys that a query sees in layers of kind w, its own among them; 0 = none", at_least(0))
    theta: float = key(10000.0, "base of the rotary angles", Rule("must be greater than 1", lambda x: bool(x > 1)))
    rope: str = key("default", "how the angles are scaled for longer sequences", one_of(*ROPES))
    rope_factor: float = key(1.0, "how many times longer, unless rope is default", at_least(1))
    rope_original: int = key(0, "longest sequence before it was scaled, in tokens; 0 = model.max_T", at_least(0))
    rope_low: float = key(1.0, "llama3: low_freq_factor; yarn: beta_slow", POSITIVE)
    rope_high: float = key(0.0, "llama3: high_freq_factor, 0 = 4; yarn: beta_fast, 0 = 32", at_least(0))
    rope_attention: float = key(0.0, "yarn, longrope: factor of cosines and sines; 0 = by its formula", at_least(0))
    rope_factors: str = key("", "longrope: a divisor for each of the HS / 2 angles, with commas between")
    window_theta: float = key(0.0, "theta of layers of kind w, whose angles are not scaled; 0 = as others", at_least(0))
    act: str = key("silu", "what the MLP's gate goes through; gelu in its tanh form", one_of("silu", "gelu"))
    query_scalar: int = key(0, "scores are divided by its root; 0 = HS", at_least(0))
    post_norms: bool = key(False, "outputs of attention and the MLP go through RMSNorm before they are added")
    norm_plus_one: bool = key(False, "RMSNorm multiplies by 1 + its weight, which starts at 0")
    embed_scale: bool = key(False, "the embedding is multiplied by the root of C")

    def kind(self, layer: int) -> str:
        """The letter of a layer: f, w or n."""
        return self.layers[layer % len(self.layers)]

    def check(self) -> None:
        super().check()
        self.check_multiple("NH", "NKV")
        for name in ("C", "HS", "F"):
            self.check_multiple(name, 8)
        if ("w" in self.layers) != (self.window > 0):
            raise ConfigError(
                f'model.window = {self.window} does not fit model.layers = "{self.layers}"; '
                "layers of kind w need a window of at least 1, and other kinds have none."
            )
        if self.window_theta and not (self.window and self.window_theta > 1):
            raise ConfigError(f"model.window_theta = {self.window_theta} must be 0, or above 1 with layers of kind w.")
        if self.rope == "default" and self.rope_factor != 1:
            raise ConfigError(f'model.rope_factor = {self.rope_factor} needs another model.rope than "default".')
        if self.rope_high and self.rope_high <= self.rope_low:
            raise ConfigError(
                f"model.rope_high = {self.rope_high} must be greater than model.rope_low = {self.rope_low}."
            )
        self._check_factors()

    def _check_factors(self) -> None:
        count = self.HS // 2 if self.rope == "longrope" else 0
        try:
            right = len(self.divisors) == count and all(0 < x < float("inf") for x in self.divisors)
        except ValueError:
            right = False
        if not right:
            wanted = f"{count} positive numbers with commas between" if count else 'empty unless rope = "longrope"'
            raise ConfigError(f'model.rope_factors = "{self.rope_factors}" must be {wanted}.')

    @property
    def divisors(self) -> list[float]:
        """rope_factors as numbers."""
        return [float(x) for x in self.rope_factors.split(",")] if self.rope_factors else []


def _llama(L: int, C: int, NH: int, NKV: int, HS: int, F: int, V: int, max_T: int, **more: object) -> LlamaConfig:
    return LlamaConfig(L=L, C=C, NH=NH, NKV=NKV, HS=HS, F=F, V=V, max_T=max_T, **more)  # type: ignore[arg-type]


_LLAMA3 = {"theta": 5e5, "rope": "llama3", "rope_original": 8192}
_QWEN2 = {"theta": 1e6, "eps": 1e-6, "qkv_bias": True}
_QWEN3 = {"theta": 1e6, "eps": 1e-6, "qk_norm": True}
_GEMMA3 = {**_QWEN3, "layers": "wwwwwf", "window": 512, "window_theta": 1e4, "act": "gelu",
           "post_norms": True, "norm_plus_one": True, "embed_scale": True}  # fmt: skip
SHAPES = {
    "smollm2-135m": _llama(30, 576, 9, 3, 64, 1536, 49152, 8192, theta=1e5),
    "smollm2-360m": _llama(32, 960, 15, 5, 64, 2560, 49152, 8192, theta=1e5),
    "smollm2-1.7b": _llama(24, 2048, 32, 32, 64, 8192, 49152, 8192, theta=1.3e5),
    "smollm3-3b": _llama(36, 2048, 16, 4, 128, 11008, 128256, 65536, theta=5e6, eps=1e-6, layers="fffn"),
    "llama2-7b": _llama(32, 4096, 32, 32, 128, 11008, 32000, 4096, tied=False),
    "llama3-8b": _llama(32, 4096, 32, 8, 128, 14336, 128256, 8192, tied=False, theta=5e5),
    "llama3.1-8b": _llama(32, 4096, 32, 8, 128, 14336, 128256, 131072, tied=False, rope_factor=8.0, **_LLAMA3),
    "llama3.2-1b": _llama(16, 2048, 32, 8, 64, 8192, 128256, 131072, rope_factor=32.0, **_LLAMA3),
    "llama3.2-3b": _llama(28, 3072, 24, 8, 128, 8192, 128256, 131072, rope_factor=32.0, **_LLAMA3),
    "qwen2.5-0.5b": _llama(24, 896, 14, 2, 64, 4864, 151936, 32768, **_QWEN2),
    "qwen2.5-1.5b": _llama(28, 1536, 12, 2, 128, 8960, 151936, 131072, **_QWEN2),
    "qwen2.5-7b": _llama(28, 3584, 28, 4, 128, 18944, 152064, 131072, tied=False, **_QWEN2),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 128, 3072, 151936, 40960, **_QWEN3),
    "qwen3-1.7b": _llama(28, 2048, 16, 8, 128, 6144, 151936, 40960, **_QWEN3),
    "qwen3-4b": _llama(36, 2560, 32, 8, 128, 9728, 151936, 40960, **_QWEN3),
    "qwen3-8b": _llama(36, 4096, 32, 8, 128, 12288, 151936, 40960, tied=False, **_QWEN3),
    "gemma3-270m": _llama(18, 640, 4, 1, 256, 2048, 262144, 32768, **_GEMMA3),
    "gemma3-1b": _llama(26, 1152, 4, 1, 256, 6912, 262144, 32768, **_GEMMA3),
    "mistral-7b": _llama(32, 4096, 32, 8, 128, 14336, 32000, 32768, tied=False, layers="w", window=4096),
}
