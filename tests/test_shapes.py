"""The shapes of the original, by their names."""

from __future__ import annotations

import pytest

from daybreak.engine.params import ParamTable
from daybreak.models.registry import build_model
from daybreak.shapes import SHAPES, parse_shape

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
    assert {*SHAPES, "gpt3:c5140"} == {*DESCRIPTORS, "gpt3:c5120"}
