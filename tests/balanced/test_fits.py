"""Whole fits of modules without a trunk: windows, absent tasks, resuming, evaluation, data of several loaders."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_mtl import BalancedModule, Task, TaskOutput
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.monitors import TaskAffinity
from lightning_mtl.weighting import FAMO, MGDA, ExcessMTL, UncertaintyWeighting
from tests.balanced import oracle
from tests.balanced.models import SGD, Forces, made, mlp, points
from tests.balanced.test_steps import Shared, weights_of
from tests.training import Steps, fit, flat_parameters, loader

METHODS: dict[str, Any] = {"gramian": MGDA, "known beforehand": Shared, "losses": UncertaintyWeighting}


class Turns(BalancedModule):
    """Batches ``{task: inputs}`` of some tasks; one of them can take a path of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["a", "b", "c"], optimizer=functools.partial(torch.optim.SGD, lr=0.1), **arguments)
        self.body, self.detour = mlp(3, 4, 4), nn.Linear(4, 4)
        self.tops: Any = nn.ModuleDict({task: nn.Linear(4, 1) for task in self.tasks})

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        losses = {}
        for task, x in batch.items():
            z = self.body(x)
            z = self.detour(z) if task == "a" or x.shape[0] == 7 else z
            losses[task] = (self.tops[task](z) - 1).square().mean()
        return losses


def turns() -> Turns:
    torch.manual_seed(4)
    return Turns().double()


def inputs(tasks: str, number: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.rand(number, 3, dtype=torch.float64, generator=generator) for task in tasks}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", ["abc abc", "a bc", "a b", "ab c abc"])
def test_a_window_of_several_batches(method: str, split: str) -> None:
    # A parameter may become shared in a window's last batch: what earlier ones have measured counts all the same.
    batches = [inputs(tasks, seed=seed) for seed, tasks in enumerate(split.split())]
    module, weighting, steps = turns(), METHODS[method](), Steps()
    module.accumulate_grad_batches = len(batches)
    found: oracle.Gradients = {}
    present = [task for task in module.tasks if any(task in batch for batch in batches)]
    for task in present:
        parts = [oracle.gradients(module, batch, [task])[task] for batch in batches if task in batch]
        # Weights that are known are not waited for: micro-batches add up as without a weighting.
        number = len(parts) if method == "gramian" else len(batches)
        found[task] = {n: sum(part[n] for part in parts) / number for n in parts[0]}  # type: ignore[misc]
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, loader(*batches), callbacks=[weighting, steps], precision=64)
    weights = weights_of(module, steps)
    names = oracle.shared(found)
    heads = weights if weighting.weighs_heads else dict.fromkeys(weights, 1.0)
    expected = oracle.update(found, names, weights, heads)
    for n, parameter in module.named_parameters():
        change = (before[n] - parameter.detach()) / 0.1
        torch.testing.assert_close(change, expected.get(n, torch.zeros_like(change)), rtol=1e-9, atol=1e-12)


def test_tasks_that_come_one_by_one_and_a_path_that_is_taken_later() -> None:
    module, steps = turns(), Steps()
    batches = [inputs("a"), inputs("b"), inputs("c"), inputs("abc"), inputs("b", 7), inputs("abc")]
    known: list[set[str]] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            shared = {id(p) for p in module.shared_parameters()}
            known.append({n.split(".")[0] for n, p in module.named_parameters() if id(p) in shared})

    fit(module, loader(*batches), callbacks=[MGDA(), steps, Looks()], precision=64)
    assert known == [set(), {"body"}, {"body"}, {"body"}, {"body", "detour"}, {"body", "detour"}]
    # Nothing to balance in the first step: its task has weight 1.
    assert weights_of(module, steps, 0) == {"a": 1.0}


@pytest.mark.parametrize("method", ["gramian", "known beforehand"])
def test_resuming_knows_what_is_shared(method: str, tmp_path: Path) -> None:
    # An epoch whose steps have one task each: a run that resumed without the knowledge would share nothing at first.
    batches = [inputs(task, seed=seed) for seed, task in enumerate("abca")]

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Tensor, Any]:
        module, methods = turns(), [METHODS[method](importance={"a": 3.0})]  # for what is shared alone
        trainer = fit(module, loader(*batches), callbacks=methods, precision=64, max_epochs=epochs, ckpt_path=ckpt_path)
        assert module.sharing is not None
        return trainer, flat_parameters(module), module.sharing.state(module, list(module.tasks))

    _, whole, known = run(3)
    trainer, _, _ = run(1)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    _, resumed, again = run(3, tmp_path / "stop.ckpt")
    assert torch.equal(whole, resumed)
    assert known == again


def test_another_fit_knows_nothing_of_the_first() -> None:
    module = turns()
    fit(module, loader(inputs("abc")), callbacks=[MGDA()], precision=64)
    fit(module, loader(inputs("a")), callbacks=[MGDA()], precision=64)
    assert module.shared_parameters() == []


# A plain LightningModule, and the same one converted


class Parts(pl.LightningModule):
    def build(self) -> None:
        self.encoder, self.left, self.right = mlp(3, 8), nn.Linear(8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.encoder(x)
        return result

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self(x)
        return self.left(z).square().mean(), (self.right(z) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Before(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.build()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        left, right = self.both(batch)
        return left + right


class After(Parts, BalancedModule):
    def __init__(self, **arguments: Any) -> None:
        BalancedModule.__init__(self, ["left_loss", "right_loss"], **arguments)
        self.build()

    def task_losses(self, batch: Tensor) -> Mapping[str, Tensor]:
        left, right = self.both(batch)
        return {"left_loss": left, "right_loss": right}


@pytest.mark.parametrize("automatic", [False, True])
def test_a_converted_module_trains_like_the_plain_one_to_the_bit(automatic: bool) -> None:
    batches = [torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    torch.manual_seed(7)
    plain = Before()
    fit(plain, loader(*batches), max_epochs=2, **settings)
    torch.manual_seed(7)
    converted = After(**({} if automatic else settings))
    converted.automatic_optimization = automatic
    fit(converted, loader(*batches), max_epochs=2, **(settings if automatic else {}))
    assert torch.equal(flat_parameters(plain), flat_parameters(converted))


# Evaluation, with derivatives


def test_validation_differentiates_where_it_is_asked_to() -> None:
    module = Forces().double()
    module.evaluate_with_gradients = True
    before = flat_parameters(module)
    trainer = fit(module, loader(points("Forces")), loader(points("Forces", seed=9)), limit_train_batches=0)
    trainer.validate(module, loader(points("Forces", seed=9)), verbose=False)
    expected = {task: loss.item() for task, loss in module.task_losses(points("Forces", seed=9)).items()}
    found = {task: trainer.callback_metrics[f"val/loss/{task}"].item() for task in module.tasks}
    assert found == pytest.approx(expected)
    assert torch.equal(before, flat_parameters(module))
    trainer.test(module, loader(points("Forces", seed=9)), verbose=False)
    assert trainer.callback_metrics["test/loss/forces"].item() == pytest.approx(expected["forces"])


def test_validation_that_cannot_differentiate_names_the_fix() -> None:
    with pytest.raises(RuntimeError, match="evaluate_with_gradients = True"):
        fit(Forces().double(), loader(points("Forces")), loader(points("Forces")))


def test_losses_that_differentiate_are_computed_again_beside_a_step() -> None:
    module, batch = made("Forces"), points("Forces")
    famo, affinity = FAMO(), TaskAffinity(every_n_steps=1, exact=True)
    fit(module, loader(batch, batch), callbacks=[famo, affinity], precision=64)
    assert not affinity.off
    assert famo.last.isfinite().all()


def test_metrics_of_what_task_losses_returns() -> None:
    from torchmetrics import MeanAbsoluteError

    class Measured(After):
        def __init__(self) -> None:
            BalancedModule.__init__(self, {"l": Task(nn.functional.mse_loss, MeanAbsoluteError()), "r": Task(max)})
            self.build()

        def task_losses(self, batch: Tensor) -> Mapping[str, Tensor | TaskOutput]:  # type: ignore[override]
            z = self(batch)
            return {"l": self.task_output("l", self.left(z), batch[:, :1]), "r": self.right(z).mean()}

    module, batch = Measured(), torch.rand(4, 3)
    trainer = fit(module, loader(batch), loader(batch), max_epochs=1)
    expected = (module.left(module(batch)) - batch[:, :1]).abs().mean().item()
    assert trainer.callback_metrics["val/MeanAbsoluteError/l"].item() == pytest.approx(expected)
    assert {"val/loss/r", "val/loss/total", "loss/l", "weight/r", "loss_epoch/l"} <= trainer.callback_metrics.keys()


# Data


def test_losses_by_name_from_several_loaders() -> None:
    class Named(BalancedModule):
        def __init__(self) -> None:
            super().__init__(["residual", "edge", "smooth"], optimizer=SGD)
            self.net = mlp(2, 4, 1)
            self.seen: list[list[str]] = []

        def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
            self.seen.append(sorted(batch))
            (inside,), (x, y) = batch["points"], batch["boundary"]
            u = self.net(inside)
            edge = (self.net(x) - y).square().mean()
            return {"residual": u.square().mean(), "edge": edge, "smooth": u.diff(dim=0).abs().mean()}

    data = {"points": TensorDataset(torch.rand(8, 2)), "boundary": TensorDataset(torch.rand(4, 2), torch.rand(4, 1))}
    module = Named()
    data_module = MultiTaskDataModule(data, val=data, batch_size={"points": 4, "boundary": 2})
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MGDA()],
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data_module)
    assert module.seen == [["boundary", "points"]] * 4
    assert "val/loss/smooth" in trainer.callback_metrics


@pytest.mark.parametrize("together", [False, True])
def test_validation_of_several_loaders_by_name(together: bool) -> None:
    module = turns().float()
    parts = {task: loader(inputs(task)[task].float()) for task in "abc"}
    trainer = fit(module, loader({"a": torch.rand(2, 3)}), CombinedLoader(parts, "max_size") if together else parts)
    with torch.no_grad():
        expected = {task: module.task_losses({task: inputs(task)[task].float()})[task].item() for task in "abc"}
    assert {task: trainer.callback_metrics[f"val/loss/{task}"].item() for task in "abc"} == pytest.approx(expected)


def test_a_method_with_a_number_a_parameter_refuses_a_set_that_grows() -> None:
    batches = [inputs("a"), inputs("b"), inputs("abc"), inputs("b", 7)]
    with pytest.raises(ValueError, match=r"name them by shared_parameters\(\)"):
        fit(turns(), loader(*batches), callbacks=[ExcessMTL()], precision=64)
