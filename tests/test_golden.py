"""The values of a short run of each script are those of tests/golden.json."""

import importlib.util
import json

import pytest

from golden import VALUES, compute

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="needs requirements-extra.txt"
)


def flat(values, where: str = "") -> dict:
    """Nested dicts and lists as one dict; a key is the path to the value."""
    if not isinstance(values, (dict, list)):
        return {where: values}
    parts = values.items() if isinstance(values, dict) else enumerate(values)
    return {path: value for name, part in parts for path, value in flat(part, f"{where}/{name}").items()}


@needs_package
def test_short_runs_give_the_golden_values(tmp_path):
    found = json.loads(json.dumps(compute(tmp_path)))
    # A relative 1e-4, which another order of sums needs.
    assert flat(found) == pytest.approx(flat(json.loads(VALUES.read_text())), rel=1e-4, abs=2e-6)
