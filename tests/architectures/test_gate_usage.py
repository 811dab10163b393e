"""What the monitor shows of gates, masks and branches, and that the training does not notice it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_mtl.monitors import GateUsage
from lightning_mtl.monitors.gates import GateTable
from tests.architectures.models import TASKS, TRUNKS, WIDTH, batch, build, expert, module
from tests.training import fit, flat_parameters, loader


def watched(module: nn.Module) -> list[Tensor]:
    """What a module returns from now on."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    return seen


@pytest.mark.parametrize("kind", TRUNKS)
def test_the_training_is_the_same_to_the_bit(kind: str) -> None:
    batches = [batch(seed=seed) for seed in range(4)]
    trained = []
    for callbacks in ([], [GateUsage()]):
        model = build(kind)
        fit(model, loader(*batches), loader(*batches), max_epochs=2, callbacks=callbacks)
        trained.append(flat_parameters(model))
    assert trained[0].equal(trained[1])


def test_usage_is_the_mean_of_the_gates_over_the_training_samples_of_the_epoch() -> None:
    model, usage = build("PLE"), GateUsage(every_n_epochs=2)
    gates = {
        (level, stream): watched(gate)
        for level, extraction in enumerate(model.trunk.levels)  # type: ignore[arg-type]
        for stream, gate in extraction.gates.items()
    }
    # Batches of unlike size, three epochs of which the second is shown, and a validation that does not count.
    batches = [batch(4, seed=1), batch(7, seed=2)]
    fit(model, loader(*batches), loader(batch(9)), max_epochs=3, callbacks=[usage])
    assert list(usage.latest) == ["gates_1", "gates_2"]
    for level, rows in enumerate([(*TASKS, "shared"), TASKS]):
        table = usage.latest[f"gates_{level + 1}"]
        assert table.rows == rows
        assert table.columns == ("a 0", "a 1", "b 0", "b 1", "c 0", "c 1", "shared 0", "shared 1")
        for row, stream in enumerate(rows):
            seen = gates[level, stream]
            expected = torch.cat(seen[3:5]).softmax(1).mean(0)  # an epoch is two batches and a validation
            found = table.values[row]
            torch.testing.assert_close(found[~found.isnan()], expected, rtol=0, atol=1e-6)
            if stream != "shared":
                own = [column for column, name in enumerate(table.columns) if name.split()[0] in (stream, "shared")]
                assert (~found.isnan()).nonzero().flatten().tolist() == own
    assert not model.trunk.gate_meter.gathering  # type: ignore[union-attr]


def test_attention_and_its_sparsity() -> None:
    model, usage = build("MTAN"), GateUsage()
    masks = {
        (task, stage): watched(model.trunk.get_submodule(f"attention.{task}.{stage}"))
        for task in TASKS
        for stage in (0, 1)
    }
    trainer = fit(model, loader(batch(seed=1), batch(seed=2)), callbacks=[usage])
    table = usage.latest["attention"]
    assert (table.rows, table.columns) == (TASKS, ("stage 0", "stage 1"))
    for row, task in enumerate(TASKS):
        seen = [torch.cat(masks[task, stage]) for stage in (0, 1)]
        torch.testing.assert_close(table.values[row], torch.stack([mask.mean() for mask in seen]), rtol=0, atol=1e-6)
        closed = torch.stack([(mask < 0.1).float().mean() for mask in seen]).mean()
        torch.testing.assert_close(trainer.callback_metrics[f"attention_sparsity/{task}"], closed, rtol=0, atol=1e-6)


class Branches(nn.Module):
    """Says something about itself without a meter, as any module may."""

    def __init__(self) -> None:
        super().__init__()
        self.body = expert()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y

    def gate_statistics(self) -> dict[str, Tensor | GateTable]:
        return {"branches": torch.eye(3)[:, :2], "temperature": torch.tensor(0.5), "depth": torch.arange(3.0)}


def test_everything_is_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    usage = GateUsage()
    fit(module(nn.Sequential(Branches())), loader(batch()), max_epochs=2, callbacks=[usage], logger=logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert len(events.Images("0/branches")) == 2
    assert [event.value for event in events.Scalars("0/temperature")] == [0.5, 0.5]
    assert [events.Scalars(f"0/depth/{task}")[0].value for task in TASKS] == [0, 1, 2]
    assert usage.latest["0/branches"].rows == TASKS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateUsage(every_n_epochs=0), "every_n_epochs=0"),
        (lambda: fit(module(nn.Linear(5, WIDTH)), loader(batch()), callbacks=[GateUsage()]), "found nothing to show"),
    ],
)
def test_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
