"""The values of a short run of each script are those of tests/golden.json."""

import importlib.util
import json

import pytest

from golden import VALUES, compute

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="needs requirements-extra.txt"
)


def assert_alike(found, expected, where=""):
    """The same structure, texts and integers; floats to a relative 1e-4, which another order of sums needs."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for n, (one, other) in enumerate(zip(found, expected)):
            assert_alike(one, other, f"{where}/{n}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6), where
    else:
        assert found == expected, where


@needs_package
def test_short_runs_give_the_golden_values(tmp_path):
    found = json.loads(json.dumps(compute(tmp_path)))
    assert_alike(found, json.loads(VALUES.read_text()))
