"""The compiler's cause is kept, its noise is not."""

from __future__ import annotations

import pytest

from dynamictrl_edge.engines.cause import cause_of

DRIVER = "CUDA initialization failure with error: 35. cudaError 35"


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([], ""),
        (
            [
                "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for "
                "target(s) sm75, because the model contains HW-specific datatypes: b16. In compileGraph at /_src/x.cpp:77)"
            ],
            "Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm75, because the model "
            "contains HW-specific datatypes: b16.).",
        ),
        (["first", "first", "second."], "first. second."),
        (["Invalid profile", "no optimization profile has been defined", DRIVER], "Invalid profile."),
        ([DRIVER], f"{DRIVER}."),
        (["a\n  b\tc"], "a b c."),
    ],
)
def test_cause(messages: list[str], wanted: str) -> None:
    assert cause_of(messages) == wanted


def test_a_long_cause_is_cut() -> None:
    assert len(cause_of(["x" * 5000])) == 600
