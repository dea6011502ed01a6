"""Which cases of a table run in `make quick`, and which only with THOROUGH=1.

`THOROUGH=1 make test`, before a release, runs whole tables, and draws several times as many random cases.
"""

import os
from collections.abc import Iterable
from typing import Any

import pytest

THOROUGH = os.environ.get("THOROUGH") == "1"


def slow_but(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: all of them, each marked slow unless it is among `quick`.

    Raises:
        ValueError: a quick case is not among the cases, so that a renamed case does not silently become slow.
    """
    cases, quick = list(cases), list(quick)
    if unknown := [case for case in quick if case not in cases]:
        raise ValueError(f"{unknown} are not among the cases {cases}")
    return [case if case in quick else slow(case) for case in cases]


def thinned(cases: Iterable[Any], thorough: Iterable[Any]) -> list[Any]:
    """The cases of a table without those in `thorough`, whose settings other cases or tests have too; all of them with
    THOROUGH=1.

    Raises:
        ValueError: a thorough case is not among the cases.
    """
    cases, thorough = list(cases), list(thorough)
    if unknown := [case for case in thorough if case not in cases]:
        raise ValueError(f"{unknown} are not among the cases {cases}")
    return cases if THOROUGH else [case for case in cases if case not in thorough]


def slow(case: Any) -> Any:
    """One case for `pytest.mark.parametrize` that `make quick` leaves out; a tuple has one value per argument."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
