"""The mutations of ``make mutants`` fit the package as it is; whether they are noticed, only running them says."""

from __future__ import annotations

from lightning_mtl import weighting
from tests.mutants.methods import METHODS
from tests.mutants.table import MUTATIONS


def test_every_mutation_can_be_applied_and_its_tests_exist() -> None:
    assert [complaint for mutation in MUTATIONS for complaint in mutation.complaints()] == []


def test_no_slip_is_there_twice() -> None:
    assert len({mutation.slip for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_every_method_has_a_mutation() -> None:
    assert {mutation.slip.partition(":")[0] for mutation in METHODS} >= set(weighting.__all__)
