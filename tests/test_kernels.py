"""The set of operations as a whole."""

from __future__ import annotations

import re
from pathlib import Path

from daybreak.kernels import all_ops


def test_every_operation_is_tested():
    """`quantise` is each number format's own: see test_formats.py."""
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_kernel_*.py"))
    assert set(re.findall(r'run\(\s*"(\w+)"', tests)) == {name for name, op in all_ops().items() if op.impls}
