"""A process of its own with the second device, in which tests run: once a device is there, it stays.

The functions of this module are called in that process. Its device takes part in autograd from then on, so that no
process could be forked from it that trains.
"""

from __future__ import annotations

import logging
import types
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.amp import GradScaler

from lightning_mtl.gradients import trunk_gramian
from tests.devices.build import NAME, library
from tests.training import quiet_trainer

KINDS = ("cpu", NAME)


def begin() -> None:
    """Load the device, and be as quiet as the tests are."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.ops.load_library(library())
    torch.utils.rename_privateuse1_backend(NAME)  # type: ignore[attr-defined]
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available, module.is_initialized, module._is_in_bad_fork = (lambda: True), (lambda: True), (lambda: False)
    module.device_count, module.current_device = (lambda: 2), (lambda: 0)
    module.manual_seed_all = module.manual_seed = lambda seed: None
    # Random numbers are the CPU's own, which are kept and put back by themselves.
    module.asked_states = []
    module.get_rng_state = lambda device=None: module.asked_states.append(device) or torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    trunk_gramian._FACTORIZING[NAME] = trunk_gramian._FACTORIZING["cpu"]  # so that both choose the same way


class Mirror(Accelerator):
    """What Lightning asks about the device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


class ScalerAlone(MixedPrecision):
    """A gradient scaler without autocast, which the CPU has and this device has not."""

    def __init__(self, kind: str) -> None:
        super().__init__("16-mixed", kind, scaler=GradScaler(kind, init_scale=2.0**10))

    def autocast_context_manager(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        return nullcontext()


def trainer_on(kind: str, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer on a device of this kind."""
    if kind == "cpu":
        return quiet_trainer(**arguments)
    strategy = SingleDeviceStrategy(device=torch.device(kind, 0), accelerator=Mirror())
    return quiet_trainer(accelerator="auto", strategy=strategy, **arguments)
