"""The picture of the dashboards writes values as Grafana does. What it shows is drawn in test_watching.py."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "deploy"))
from picture import written


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00123, "s", "1.23 ms"),
        (2.5, "s", "2.5 s"),
        (5400, "s", "1.5 h"),
        (0.0125, "percentunit", "1.25 %"),
        (402_432, "decbytes", "402 kB"),
        (5_308_416, "decbytes", "5.31 MB"),
        (1234, "tokens/s", "1.23k"),
        (0, "s", "0"),
        (float("nan"), "reqps", "-"),
    ],
)
def test_values_are_written_in_the_unit_that_suits_them(value, unit, text):
    assert written(value, unit) == text
