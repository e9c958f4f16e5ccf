"""The shapes of the original, by their names."""

from __future__ import annotations

import pytest

from daybreak.engine.params import ParamTable
from daybreak.errors import ConfigError
from daybreak.models.registry import build_model
from daybreak.shapes import SHAPES, LlamaConfig, model_config, parse_shape

# The spec's table of descriptors: L, C, NH, max_T, parameters with the padded vocabulary. Written down by hand.
DESCRIPTORS = {
    "d6": (6, 384, 6, 1024, 30_357_504),
    "d12": (12, 768, 12, 1024, 124_475_904),
    "d24": (24, 1024, 16, 1024, 354_871_296),
    "d36": (36, 1280, 20, 1024, 774_090_240),
    "d48": (48, 1600, 25, 1024, 1_557_686_400),
    "d60": (60, 1920, 30, 1024, 2_754_259_200),
    "d72": (72, 2880, 30, 1024, 7_316_887_680),
    "d84": (84, 3456, 36, 1024, 12_220_657_920),
    "gpt3:c384": (6, 384, 6, 2048, 30_750_720),
    "gpt3:c768": (12, 768, 12, 2048, 125_262_336),
    "gpt3:c1024": (24, 1024, 16, 2048, 355_919_872),
    "gpt3:c1536": (24, 1536, 16, 2048, 760_372_224),
    "gpt3:c2048": (24, 2048, 16, 2048, 1_315_819_520),
    "gpt3:c2560": (32, 2560, 32, 2048, 2_651_673_600),
    "gpt3:c4096": (32, 4096, 32, 2048, 6_658_596_864),
    "gpt3:c5140": (40, 5120, 40, 2048, 50304 * 5120 + 2048 * 5120 + 40 * (12 * 5120**2 + 13 * 5120) + 2 * 5120),
    "gpt3:c12288": (96, 12288, 96, 2048, 174_604_836_864),
    "gpt2-124M": (12, 768, 12, 1024, 124_475_904),
    "gpt2-350M": (24, 1024, 16, 1024, 354_871_296),
    "gpt2-774M": (36, 1280, 20, 1024, 774_090_240),
    "gpt2-1558M": (48, 1600, 25, 1024, 1_557_686_400),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_descriptors(name: str) -> None:
    shape = parse_shape(name)
    parameters = ParamTable(build_model(shape).rows()).num_parameters
    assert (shape.L, shape.C, shape.NH, shape.max_T, parameters) == DESCRIPTORS[name]
    assert (shape.V, shape.Vp) == (50257, 50304)
    if name.startswith("d"):
        assert parse_shape(f"gpt2:{name}") == shape


def test_every_descriptor_is_in_the_table() -> None:
    gpt2 = {name for name, shape in SHAPES.items() if shape.arch == "gpt2"}
    assert {name for name, shape in SHAPES.items() if shape.arch == "nanochat"} == NANOCHAT  # see test_nanochat.py
    assert {*gpt2, "gpt3:c5140"} == {*DESCRIPTORS, "gpt3:c5120"}
    assert {*SHAPES} - gpt2 - NANOCHAT == {*DECODERS}


NANOCHAT = {"nanochat:d4", "nanochat:d12", "nanochat:d24"}

# Of the published files' config.json: L, C, NH, NKV, HS, F, V, max_T, theta, eps. Written down by hand.
DECODERS = {
    "smollm2-135m": (30, 576, 9, 3, 64, 1536, 49152, 8192, 1e5, 1e-5),
    "smollm2-360m": (32, 960, 15, 5, 64, 2560, 49152, 8192, 1e5, 1e-5),
    "smollm2-1.7b": (24, 2048, 32, 32, 64, 8192, 49152, 8192, 130000, 1e-5),
    "smollm3-3b": (36, 2048, 16, 4, 128, 11008, 128256, 65536, 5e6, 1e-6),
    "llama2-7b": (32, 4096, 32, 32, 128, 11008, 32000, 4096, 1e4, 1e-5),
    "llama3-8b": (32, 4096, 32, 8, 128, 14336, 128256, 8192, 5e5, 1e-5),
    "llama3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5, 1e-5),
    "llama3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256, 131072, 5e5, 1e-5),
    "llama3.2-3b": (28, 3072, 24, 8, 128, 8192, 128256, 131072, 5e5, 1e-5),
    "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151936, 32768, 1e6, 1e-6),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960, 151936, 131072, 1e6, 1e-6),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18944, 152064, 131072, 1e6, 1e-6),
    "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, 1e-6),
    "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, 151936, 40960, 1e6, 1e-6),
    "qwen3-4b": (36, 2560, 32, 8, 128, 9728, 151936, 40960, 1e6, 1e-6),
    "qwen3-8b": (36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e6, 1e-6),
    "mistral-7b": (32, 4096, 32, 8, 128, 14336, 32000, 32768, 1e4, 1e-5),
    "gemma3-270m": (18, 640, 4, 1, 256, 2048, 262144, 32768, 1e6, 1e-6),
    "gemma3-1b": (26, 1152, 4, 1, 256, 6912, 262144, 32768, 1e6, 1e-6),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    s = parse_shape(name)
    assert isinstance(s, LlamaConfig)
    s.check()
    assert (s.L, s.C, s.NH, s.NKV, s.HS, s.F, s.V, s.max_T, s.theta, s.eps) == DECODERS[name]


@pytest.mark.parametrize(("values", "said"), [
    ({"NH": 6}, "model.NH = 6 must be a multiple of model.NKV = 4."),
    ({"HS": 20}, "model.HS = 20 must be a multiple of 8."),
    ({"HS": 512}, "model.HS = 512 must be from 8 to 256; the default is 64."),
    ({"layers": "fg"}, 'model.layers = "fg" must be one or more of the letters f, w and n; the default is "f".'),
    ({"layers": "fw"}, 'model.window = 0 does not fit model.layers = "fw"; layers of kind w need a window of at least '
                       "1, and other kinds have none."),
    ({"window": 8}, 'model.window = 8 does not fit model.layers = "f"; layers of kind w need a window of at least 1, '
                    "and other kinds have none."),
    ({"window_theta": 1e4}, "model.window_theta = 10000.0 must be 0, or above 1 with layers of kind w."),
    ({"window_theta": 1.0, "layers": "w", "window": 8}, "model.window_theta = 1.0 must be 0, or above 1 with layers of "
                                                        "kind w."),
    ({"act": "relu"}, 'model.act = "relu" must be silu or gelu; the default is "silu".'),
    ({"rope_factor": 8.0}, 'model.rope_factor = 8.0 needs another model.rope than "default".'),
    ({"rope_high": 1.0}, "model.rope_high = 1.0 must be greater than model.rope_low = 1.0."),
    ({"rope": "dynamic"}, 'model.rope = "dynamic" must be default or linear or llama3 or yarn or longrope; the default '
                          'is "default".'),
    ({"rope": "longrope", "HS": 8, "rope_factors": "1,2,nan,3"},
     'model.rope_factors = "1,2,nan,3" must be 4 positive numbers with commas between.'),
    ({"rope_factors": "1,x"}, 'model.rope_factors = "1,x" must be empty unless rope = "longrope".'),
])  # fmt: skip
def test_rules_of_decoders(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        model_config({"arch": "llama", **values}).check()
    assert str(e.value) == said
