"""A stub of a second rank whose collectives take tensors of the device alone, as NCCL's do; it adds nothing to sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mtl import MultiTaskModule
from lightning_mtl.learning_rates import Relatedness, TaskLearningRate
from lightning_mtl.monitors import GateUsage, GradientConflict, TaskAffinity
from lightning_mtl.weighting import MGDA, GradNorm
from tests.devices.build import NAME
from tests.devices.fits import TASKS, TRUNKS, batches
from tests.devices.machine import Mirror
from tests.small import binary
from tests.training import loader, quiet_trainer


class Alone(LightningEnvironment):
    """The first of two processes, the second of which is made up."""

    def __init__(self) -> None:
        super().__init__()
        self._world_size, self._global_rank = 2, 0

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return 0


class ByHost(TorchCheckpointIO):
    """Saves by way of the host, for torch does not know how to write this device's memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(apply_to_collection(checkpoint, torch.Tensor, torch.Tensor.cpu), path, storage_options)


class Stub(DDPStrategy):
    def determine_ddp_device_ids(self) -> None:
        return None  # with an index Lightning makes streams of CUDA

    def _register_ddp_hooks(self) -> None:
        """Leave gradients as they are: the made-up group promises no result."""

        def keep(_, bucket):  # type: ignore[no-untyped-def]  # torch checks annotations, if they are types
            assert bucket.buffer().device.type == NAME
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        self.model.register_comm_hook(None, keep)  # type: ignore[union-attr, operator]


def _begin() -> None:
    def create(store: Any, rank: int, size: int, timeout: Any) -> Any:
        kind: Any = torch._C._distributed_c10d.FakeProcessGroup
        return getattr(kind, "_create_internal", kind)(rank, size)  # before torch 2.9 a plain constructor

    if not dist.is_initialized():
        dist.Backend.register_backend("near", create, devices=[NAME])
        dist.init_process_group(f"{NAME}:near", rank=0, world_size=2, store=FakeStore())


CASES: dict[str, Any] = {
    "no labels": (list, "absent"),
    "MGDA": (lambda: [MGDA(), GradientConflict(1, at="features", figure=False)], "some"),
    "features": (lambda: [MGDA(at="features"), TaskAffinity(2, exact=True, lr=0.1, figure=False)], "some"),
    "last layer": (lambda: [GradNorm(), TaskLearningRate(Relatedness("target_correlation", samples=20))], "some"),
    "gates": (lambda: [MGDA(), GateUsage()], "some"),
}


def collectives(name: str, tmp: str) -> None:
    """Train, validate without a label, test and go on from a checkpoint, all sums on the device."""
    _begin()
    make, labels = CASES[name]

    def module() -> MultiTaskModule:
        found = binary(tasks=TASKS)
        if name == "gates":
            found.trunk = TRUNKS["MMoE"]()
        return found

    def trainer(epochs: int) -> Any:
        devices = [torch.device(NAME, 0), torch.device(NAME, 1)]
        strategy = Stub(Mirror(), devices, Alone(), checkpoint_io=ByHost())
        return quiet_trainer(accelerator="auto", strategy=strategy, callbacks=make(), max_epochs=epochs)

    train = loader(*batches(absent=True))
    unlabeled = loader(*[(inputs, {}) for inputs, _ in batches(absent=False)])
    first = trainer(1)
    first.fit(module(), unlabeled if labels == "absent" else train, unlabeled)
    first.save_checkpoint(f"{tmp}/{name}.ckpt")
    again = trainer(2)
    again.fit(module(), unlabeled, unlabeled, ckpt_path=f"{tmp}/{name}.ckpt")
    again.test(module(), unlabeled, verbose=False)


def refuses_the_host() -> str:
    """What the stub says to a tensor of the CPU."""
    _begin()
    try:
        dist.all_reduce(torch.ones(1))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"
