"""Fits on a second kind of device: no mix with the CPU, no float64 where there is none, and the CPU's parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mtl.weighting import MGDA, GradDrop, GradNorm
from tests.contract import label, reach
from tests.contract_rows import MAKES
from tests.devices import faults, fits, ranks
from tests.devices.conftest import Run

pytestmark = pytest.mark.slow
EVERY = [pytest.param(index, id=label(make)) for index, make in enumerate(MAKES)]
# Of those that reach the gradients alike one is enough where the way to the gradients is what is tried.
ONE_OF_EACH = list({reach(make()): EVERY[index] for index, make in reversed(list(enumerate(MAKES)))}.values())


def test_the_device_refuses_what_a_gpu_refuses(machine: Run) -> None:
    machine(faults.mixtures_are_seen)


@pytest.mark.parametrize("index", EVERY)
def test_parameters_and_figures_are_the_cpus(machine: Run, index: int) -> None:
    machine(fits.method, index)


@pytest.mark.parametrize("index", ONE_OF_EACH)
def test_accumulated_with_a_scaler_and_clipping(machine: Run, index: int) -> None:
    machine(fits.accumulated, index)


@pytest.mark.parametrize("name", fits.BESIDE)
def test_monitors_and_learning_rates(machine: Run, name: str) -> None:
    machine(fits.beside, name)


@pytest.mark.parametrize("name", fits.TRUNKS)
def test_architectures(machine: Run, name: str) -> None:
    machine(fits.architecture, name)


@pytest.mark.parametrize("name", [*fits.COUNTED, *fits.BESIDE, "SoftSharing"])
def test_nothing_is_float64_where_the_device_has_none(machine: Run, name: str) -> None:
    machine(fits.without_float64, name)


def test_a_loss_that_is_a_number_of_the_cpu(machine: Run) -> None:
    machine(faults.constant_losses)


@pytest.mark.parametrize("weighting", [MGDA, GradNorm, GradDrop])
def test_parameters_on_several_devices(machine: Run, weighting: type) -> None:
    machine(faults.several_devices, weighting)


def test_rows_on_several_devices(machine: Run) -> None:
    machine(faults.rows_over_devices)


def test_the_random_state_is_that_of_the_modules_device(machine: Run) -> None:
    assert machine(faults.random_states) == ["mirror:1"]


def test_a_monitor_is_not_judged_by_what_the_device_had_queued(machine: Run) -> None:
    machine(faults.queued_work_is_no_monitors)


@pytest.mark.parametrize("name", ranks.CASES)
def test_every_collective_takes_the_devices_tensors(machine: Run, name: str, tmp_path: Path) -> None:
    assert "No backend" in machine(ranks.refuses_the_host)
    machine(ranks.collectives, name, str(tmp_path))
