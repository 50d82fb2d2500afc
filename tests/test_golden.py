"""The values of a short run of each script are those of tests/golden.json."""

import json

import pytest

from golden import VALUES, compute


def flat(values, where: str = "") -> dict:
    """Nested dicts and lists as one dict; a key is the path to the value."""
    if not isinstance(values, (dict, list)):
        return {where: values}
    parts = values.items() if isinstance(values, dict) else enumerate(values)
    return {path: value for name, part in parts for path, value in flat(part, f"{where}/{name}").items()}


def test_short_runs_give_the_golden_values(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-extra.txt")
    found, expected = flat(json.loads(json.dumps(compute(tmp_path)))), flat(json.loads(VALUES.read_text()))
    assert found.keys() == expected.keys()
    for path, value in expected.items():  # floats to a relative 1e-4, which another order of sums needs
        wanted = pytest.approx(value, rel=1e-4, abs=2e-6) if isinstance(value, float) else value
        assert found[path] == wanted, path
