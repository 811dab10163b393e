"""Everything that wants a GPU, in one run: the methods trained on it and on the CPU, and the time of their steps.

    python -m benchmarks.on_gpu --json benchmarks/results/gpu.json     # ends with an error where there is no CUDA
    python -m benchmarks.on_gpu --device cpu --quick                   # the same code on the CPU, to try the script

1. Every row of the contract's table, six steps of three small tasks: float64 and float32 on the device against float64
   on the CPU, and float16 with a gradient scaler.
2. A step with each way of weighting over plain Lightning or the cost of rows, in bfloat16, as ``step_time.py`` does.
3. K gradients of a trunk by ``is_grads_batched`` over K passes one by one.
4. A step beside TorchJD's, where that is installed, as ``against_torchjd.py`` does.
5. DDP over NCCL with one process, whose collectives take nothing from the host, and its validation without a label.
6. How often the host waits for the device in one step, by CUDA's own count, beside ``tests/devices/test_waits.py``.

Times are the wall's, each after the device has finished.
"""

from __future__ import annotations

from benchmarks.step_time import environment, evaluate, rows, run, show

# isort: split

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from benchmarks.step_cases import TRUNKS, WARM_UP, Case, Device, Precision, clock
from benchmarks.trunks import PEER_TRUNKS
from lightning_mtl import Weighting
from lightning_mtl.weighting import MGDA, GradNorm, UncertaintyWeighting
from tests.contract_rows import ROWS
from tests.small import batch, binary
from tests.training import fit, flat_parameters, loader

TASKS = ("a", "b", "c")
COMPARED: tuple[Precision, ...] = ("64-true", "32-true")
CLOSE_64, CLOSE_32 = 1e-9, 1e-3  # of parameters, after steps that move them by tenths
MODELS = {"conv": TRUNKS["conv"], **PEER_TRUNKS}


def trained(make: Callable[[], Weighting], device: Device, precision: Precision) -> Tensor:
    """The parameters after two epochs of three batches."""
    batches = [batch(8, seed, TASKS) for seed in range(3)]
    module = binary(tasks=TASKS)
    fit(
        module,
        loader(*batches),
        loader(*batches),
        accelerator=device,
        devices=1,
        precision=precision,
        max_epochs=2,
        callbacks=[make()],
    )
    return flat_parameters(module).double().cpu()


def contract(device: Device) -> Iterator[dict[str, Any]]:
    # Without aggregators: GradDrop's random numbers are drawn on the device, where they are others.
    named = [(row.label, row.make) for row in ROWS]
    before = flat_parameters(binary(tasks=TASKS)).double()
    for name, make in named:
        expected = trained(make, "cpu", "64-true")
        # Where a method has thresholds, float32 leaves float64 on any device.
        usual = (trained(make, "cpu", "32-true") - expected).abs().max().item()
        found = {precision: trained(make, device, precision) for precision in COMPARED}
        apart = {precision: (value - expected).abs().max().item() for precision, value in found.items()}
        half = trained(make, device, "16-mixed")
        close = apart["64-true"] <= CLOSE_64 and apart["32-true"] <= max(CLOSE_32, 10 * usual)
        result = {
            "row": name,
            "largest_difference": apart,
            "float32_on_the_cpu": usual,
            "float16_step_over_float64_step": ((half - before).norm() / (expected - before).norm()).item(),
            "met": close and bool(half.isfinite().all()),
        }
        differences = "  ".join(f"{precision} {value:.1e}" for precision, value in apart.items())
        moved = result["float16_step_over_float64_step"]
        print(f"{name:60} {differences}  16-mixed x {moved:.3f}  {'met' if result['met'] else 'MISSED'}", flush=True)
        yield result


def step_times(device: Device, cases: Sequence[tuple[str, int]], rounds: int, log_dir: str) -> Iterator[dict[str, Any]]:
    for trunk, num_tasks in cases:
        steps, size = (20, 256) if device == "cuda" else (3, 8)
        case = Case(trunk, num_tasks, steps, log_dir, MODELS, size, device, "bf16-mixed")
        # The ratios to reach are those of one core.
        wanted = [replace(row, target=None) for row in rows("conv", num_tasks) if row.over == "plain"]
        run(case, wanted, rounds)
        for row in wanted:
            result = {**evaluate(case, row), "batch": size, "precision": case.precision}
            show(case, row, result)
            yield result


def batched_over_loop(device: Device, cases: Sequence[tuple[str, int]], rounds: int) -> Iterator[dict[str, Any]]:
    for name, num_tasks in cases:
        torch.manual_seed(0)
        size, *shape = MODELS[name].inputs
        trunk = MODELS[name].make().to(device)
        features = trunk(torch.randn(size, *shape, device=device))
        cotangents = torch.randn(num_tasks, *features.shape, device=device)
        parameters = list(trunk.parameters())

        def loop(z: Tensor = features, c: Tensor = cotangents, p: list[Tensor] = parameters) -> None:  # type: ignore[assignment]
            for one in c:
                torch.autograd.grad(z, p, one, retain_graph=True)

        def at_once(z: Tensor = features, c: Tensor = cotangents, p: list[Tensor] = parameters) -> None:  # type: ignore[assignment]
            torch.autograd.grad(z, p, c, retain_graph=True, is_grads_batched=True)

        ratios, seconds = [], []
        for round_number in range(WARM_UP + rounds):
            first, second = timed(at_once, device), timed(loop, device)
            if round_number >= WARM_UP:
                ratios.append(first / second)
                seconds.append(second)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ms = statistics.median(seconds) * 1e3
        spread = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{name:11} K={num_tasks:<2} is_grads_batched / one by one {spread}, one by one {ms:.2f} ms", flush=True)
        yield {"trunk": name, "num_tasks": num_tasks, "ratio": middle, "quartiles": [low, high], "loop_ms": ms}


def timed(work: Callable[[], None], device: Device) -> float:
    begun = clock(device)
    work()
    return clock(device) - begun


def beside_torchjd(
    device: Device, cases: Sequence[tuple[str, int]], rounds: int, log_dir: str
) -> Iterator[dict[str, Any]]:
    from benchmarks.against_torchjd import Cell, measure
    from benchmarks.against_torchjd import show as show_cell

    for trunk, num_tasks in cases:
        cell = Cell(trunk, num_tasks, 256 if device == "cuda" else 8, "MGDA")
        result = measure(cell, rounds, log_dir, device)
        show_cell(cell, result)
        yield result


def one_process(device: Device) -> Iterator[dict[str, Any]]:
    backend = "nccl" if device == "cuda" else "gloo"
    batches = [batch(8, seed, TASKS) for seed in range(3)]
    unlabeled: list[Any] = [(inputs, {}) for inputs, _ in batches]
    for make in (UncertaintyWeighting, GradNorm, MGDA):
        module = binary(tasks=TASKS)
        fit(
            module,
            loader(*batches),
            loader(*unlabeled),
            accelerator=device,
            devices=1,
            strategy=DDPStrategy(process_group_backend=backend),
            max_epochs=2,
            callbacks=[make()],
        )
        apart = (flat_parameters(module).double().cpu() - trained(make, device, "32-true")).abs().max().item()
        print(f"{make.__name__:24} {backend} with one process, largest difference {apart:.1e}", flush=True)
        yield {"row": make.__name__, "backend": backend, "largest_difference": apart}
    torch.distributed.destroy_process_group()


class Synchronizations(pl.Callback):
    """Counts what CUDA says makes the host wait, in the fifth batch."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._open = ExitStack()

    def on_train_batch_start(self, *arguments: object) -> None:
        if arguments[-1] == 4:
            self._heard = self._open.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *arguments: object) -> None:
        if arguments[-1] == 4:
            torch.cuda.set_sync_debug_mode("default")
            self.found = [str(one.message) for one in self._heard if "synchronizing" in str(one.message)]
            self._open.close()


def host_waits(device: Device) -> Iterator[dict[str, Any]]:
    if device != "cuda":
        return
    batches = [batch(8, seed, TASKS) for seed in range(6)]
    for name, weightings, expected in (
        ("no weighting", [], 1),
        ("UncertaintyWeighting", [UncertaintyWeighting()], 1),
        ("GradNorm", [GradNorm()], 2),
        ("MGDA", [MGDA()], 2),
    ):
        module, counter = binary(tasks=TASKS), Synchronizations()
        module.train_task_metrics.clear()
        fit(module, loader(*batches), accelerator=device, devices=1, callbacks=[counter, *weightings])
        print(f"{name:24} {len(counter.found)} waits of the host in a step, {expected} expected", flush=True)
        yield {"row": name, "waits": len(counter.found), "expected": expected}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying the script")
    parser.add_argument("--quick", action="store_true", help="K = 2 alone, few rounds")
    parser.add_argument("--rounds", type=int, help="how often the variants take turns; 9, or 2 with --quick")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu tries the script without one, and measures nothing.")
    rounds = options.rounds or (2 if options.quick else 9)
    if rounds < 2:
        parser.error("--rounds must be at least 2, for a spread.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about = {**environment(), "seed": 0, "rounds": rounds, "device": options.device}
    if options.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print(", ".join(f"{name} {about[name]}" for name in ("gpu", "device", "cuda", "date") if name in about))
    numbers = (2,) if options.quick else (2, 8, 40)
    device: Device = options.device
    measured: dict[str, list[dict[str, Any]]] = {"contract": list(contract(device))}
    measured |= {"one_process": list(one_process(device)), "host_waits": list(host_waits(device))}
    with tempfile.TemporaryDirectory() as log_dir:
        times = [(trunk, k) for trunk in ("conv", "transformer") for k in numbers]
        measured["step_time"] = list(step_times(device, times, rounds, log_dir))
        every = [(trunk, k) for trunk in PEER_TRUNKS for k in numbers]
        measured["is_grads_batched"] = list(batched_over_loop(device, every, rounds))
        if importlib.util.find_spec("torchjd") is None:
            print("TorchJD is not installed (pip install torchjd[full]): no steps beside its.")
        else:
            about["versions"]["torchjd"] = importlib.metadata.version("torchjd")
            measured["against_torchjd"] = list(beside_torchjd(device, every, rounds, log_dir))
    print(f"contract: {sum(row['met'] for row in measured['contract'])} of {len(measured['contract'])} rows met")
    if options.json:
        options.json.write_text(json.dumps({**about, **measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
