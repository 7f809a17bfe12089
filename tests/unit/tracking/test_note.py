"""A run's name and description, as a person reads them."""

from __future__ import annotations

from onward.tracking.note import describe, run_name, size


def test_the_name_of_a_run():
    assert run_name("forward_forward", "mlp", "digits", 0) == "forward_forward · mlp · digits · s0"


def test_the_outcome_comes_first_then_cost_then_what_it_was():
    tags = {"algo": "forward_forward", "model": "mlp", "data": "digits", "seed": "0", "hardware": "cpu",
            "readout": "goodness", "tier": "block-local", "command": "python train.py algo=forward_forward"}
    latest = {"test/accuracy": 0.9583, "test/loss": 0.2, "best/val/accuracy": 0.9712, "seconds": 12.34,
              "cost/flops": 3.1e9, "cost/peak_bytes": 4.5 * 2**20, "memory/peak_rss_bytes": 400 * 2**20}
    assert describe(tags, {"parameters": "907810"}, latest, "FINISHED").splitlines() == [
        "| | |",
        "|---|---|",
        "| test accuracy | **95.83 %** (readout: goodness) |",
        "| validation accuracy | 97.12 % |",
        "| training | 12.3 s, without evaluation |",
        "| peak memory | 4.5 MiB live in one update beside the parameters, 400.0 MiB of the process |",
        "| FLOPs | 3.1e+09 per update |",
        "| rule | `forward_forward` (block-local) |",
        "| model | `mlp` |",
        "| data | `digits`, seed 0 |",
        "| hardware | `cpu` |",
        "| parameters | 907,810 |",
        "", "Again:", "", "```", "python train.py algo=forward_forward", "```",
    ]


def test_a_failure_says_why_in_one_cell():
    lines = describe({"algo": "pepita"}, {}, {}, "FAILED", "a | b\nc").splitlines()
    assert lines[2] == "| status | **FAILED**: a \\| b c |"


def test_sizes():
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20, 3.25 * 2**30)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.2 GiB"]
