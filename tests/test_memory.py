"""The memory of a training step, measured as the benchmark does: in processes of their own."""

import json

from benchmarks import memory


def test_a_step_needs_much_less_than_the_plain_loop(capsys):
    flags = ["--backbone", "small", "--classes", "171", "--batch-size", "2", "--input-size", "256", "--json"]
    assert memory.main(flags) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] == figures["ours"] / figures["plain"] < 0.4
    assert figures["plain"] > 2 * 4 * 171 * 256**2 * 4  # logits and softmax of four pictures
