"""The set of operations as a whole."""

from __future__ import annotations

import re
from pathlib import Path

from daybreak.kernels import all_ops


def test_every_operation_is_tested():
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_kernel_*.py"))
    assert set(re.findall(r'run\(\s*"(\w+)"', tests)) == set(all_ops())
