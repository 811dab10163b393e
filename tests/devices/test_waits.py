"""How often the host waits for the device in one optimizer step, held to a table; a count, no time."""

from __future__ import annotations

import pytest

from tests.contract import label
from tests.contract_rows import MAKES
from tests.devices import fits
from tests.devices.conftest import Run

# Three tasks, all with labels. Of each step: whether it may be taken, and the losses with it; of a step that measures
# gradients: their norms or products.
TABLE = {
    "no weighting": 1,
    "UncertaintyWeighting": 1,
    "UncertaintyWeighting with importance": 1,
    "DWA": 1,
    "RLW": 1,
    "FAMO": 1,
    "GradDrop": 1,
    "clipping": 1,
    "two micro-batches": 1,
    "rates": 1,
    "GradNorm": 2,
    "GradNorm at the features": 2,
    "GradNorm at the trunk": 2,
    "MGDA": 2,
    "MGDA-normalize=l2-at=features": 2,
    "GradVac": 2,
    "wide trunk, MGDA": 2,
    "IMTL": 2,
    "two micro-batches, MGDA": 2,
    "GradientConflict beside": 2,
    "scaler and clipping, MGDA": 3,  # the scaler looks for itself
    "MGDA-normalize=loss": 3,  # normalize="loss" reads the losses before the gradients are combined
    "labels missing as NaN": 4,  # and how many labels each task has
}
MORE = {"norms": 2, "gramian": 2, "losses": 1, "rows": 2}
OTHERWISE = {
    "Frozen": 1,  # its weights are constant by then
    "ExcessMTL": 3,  # whether the rows that it remembers have a scaler's factor
}


@pytest.mark.slow
def test_the_counter_sees_what_waits(machine_if_built: Run) -> None:
    found = dict(machine_if_built(fits.waits_of_each_kind))
    quiet = {"to, not blocking", "torch.full", "arithmetic", "an index there"}
    assert found == {name: int(name not in quiet) for name in found}


def test_a_step_waits_as_often_as_the_table_says(machine_if_built: Run) -> None:
    found = machine_if_built(fits.counts, list(TABLE))
    assert {name: counts.total() for name, counts in found.items()} == TABLE, found


def test_logging_and_absent_tasks_add_one_wait_at_most(machine_if_built: Run) -> None:
    names = ["no weighting", "GradNorm", "MGDA"]
    logged = machine_if_built(fits.counts, names, False, True)
    assert {name: counts.total() - TABLE[name] for name, counts in logged.items()} == dict.fromkeys(names, 1), logged
    names.append("UncertaintyWeighting")
    absent = machine_if_built(fits.counts, names, True)
    assert {name: counts.total() for name, counts in absent.items()} == {name: TABLE[name] for name in names}, absent


@pytest.mark.slow
def test_every_method_waits_once_for_the_step_and_once_for_what_it_measures(machine: Run) -> None:
    methods = {label(make): make() for make in reversed(MAKES)}
    found = machine(fits.counts, list(methods))
    for name, weighting in methods.items():
        expected = MORE[weighting.measures] if weighting.measures_in(4) else 1
        expected += getattr(weighting, "normalize", "") in ("loss", "loss+")
        expected -= getattr(weighting, "takes_any_rows", False)
        assert found[name].total() == OTHERWISE.get(type(weighting).__name__, expected), (name, found[name])


@pytest.mark.slow
def test_the_table_where_the_device_is_built_here(machine: Run) -> None:
    test_the_counter_sees_what_waits(machine)
    test_a_step_waits_as_often_as_the_table_says(machine)
