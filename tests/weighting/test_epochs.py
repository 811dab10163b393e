"""DWA, LBTW and DTP: weights from what epochs, first losses and validations say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule
from lightning_mtl.weighting import DTP, DWA, LBTW
from lightning_mtl.weighting.dtp import dtp_weights
from tests.contract import ask, signals
from tests.small import batch, batches, binary, small
from tests.training import Steps, fit, loader

# Losses by epoch, and the weights that follow.
DWA_LOSSES = [[1.0, 2.0, 3.0], [0.9, 1.0, 2.9], [0.8, 0.9, 2.0]]
DWA_WEIGHTS = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0516626225452177, 0.8610285309404115, 1.0873088465143708]]


@pytest.mark.parametrize("steps_an_epoch", [1, 3])
def test_dwa_golden(steps_an_epoch: int) -> None:
    weighting, spread = DWA(), torch.linspace(-0.3, 0.3, steps_an_epoch) if steps_an_epoch > 1 else torch.zeros(1)
    weighting.reset(["a", "b", "c"])
    for epoch, (losses, expected) in enumerate(zip(DWA_LOSSES, DWA_WEIGHTS, strict=True)):
        for offset in spread:  # the mean over the epoch counts
            weights = ask(weighting, signals(torch.tensor(losses) + offset, epoch=epoch))
            torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_dwa_in_a_fit() -> None:
    class Scripted(MultiTaskModule):
        def task_losses(self, given: Any) -> Any:
            anchor = 0 * self.heads["a"](self.trunk(given[0])).sum()
            return {k: anchor + DWA_LOSSES[self.current_epoch][i] for i, k in enumerate(self.tasks)}

    steps = Steps()
    fit(small(("a", "b", "c"), cls=Scripted), loader(*batches(2, 2)), max_epochs=3, callbacks=[DWA(), steps])
    expected = [weights for weights in DWA_WEIGHTS for _ in range(2)]
    for found, weights in zip(steps.weights, expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(weights), rtol=1e-5, atol=1e-6)


def test_dwas_temperature() -> None:
    weighting = DWA(temperature=0.5)
    weighting.reset(["a", "b"])
    for epoch, losses in enumerate(([2.0, 4.0], [1.0, 1.0], [5.0, 5.0])):
        weights = ask(weighting, signals(torch.tensor(losses), epoch=epoch))
    torch.testing.assert_close(weights, 2 * torch.softmax(torch.tensor([1.0, 0.5]), 0))


def test_an_epoch_whose_steps_were_all_skipped_is_none_of_dwas() -> None:
    weighting, ones = DWA(temperature=1.0), torch.ones(2)
    weighting.reset(["a", "b"])
    for epoch, losses in enumerate(([2.0, 4.0], [1.0, 1.0])):
        ask(weighting, signals(torch.tensor(losses), epoch=epoch))
    weighting.current_weights(signals(ones, epoch=2), [0, 1], measured=True)  # asked, and never told of a step
    weights = ask(weighting, signals(ones, epoch=3))
    torch.testing.assert_close(weights, 2 * torch.softmax(torch.tensor([0.5, 0.25]), 0))


@pytest.mark.parametrize("reference", ["epoch", "training"])
def test_lbtw(reference: Any) -> None:
    losses = [[1.0, 4.0], [0.25, 2.0], [0.09, 1.0], [0.04, 9.0]]
    weighting = LBTW(0.5, reference=reference)
    weighting.reset(["a", "b"])
    found = [ask(weighting, signals(torch.tensor(one), step=i, epoch=i // 2)) for i, one in enumerate(losses)]
    first = [0, 0, 2, 2] if reference == "epoch" else [0] * 4
    for i, weights in enumerate(found):
        expected = [(loss / start) ** 0.5 for loss, start in zip(losses[i], losses[first[i]], strict=True)]
        assert weights.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reference", ["epoch", "training"])
def test_lbtw_in_a_fit(reference: Any) -> None:
    steps = Steps()
    module = small(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    fit(module, loader(*batches(4, 4, 4)), max_epochs=2, callbacks=[LBTW(0.5, reference=reference), steps])
    for i, (given, weights) in enumerate(zip(steps.signals, steps.weights, strict=True)):
        first = steps.signals[3 * (i // 3) if reference == "epoch" else 0].losses
        torch.testing.assert_close(weights, (given.losses / first) ** 0.5)


def test_dtps_formula() -> None:
    kappa = torch.tensor([0.2, 0.5, 1.0, 0.0, torch.nan])
    found = dtp_weights(kappa, gamma=2.0)
    expected = [0.64 * 1.6094379, 0.25 * 0.6931472, 0.0, 13.815483, 1.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


class Scripted(MultiTaskModule):
    """Its validations score what the script says: a share of right predictions for each task."""

    scores: list[dict[str, float]]
    seen = 0

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.seen += 1

    def task_losses(self, given: Any) -> Any:
        outputs: Any = super().task_losses(given)
        if not self.training:
            script = self.scores[min(self.seen, len(self.scores)) - 1]
            for task, output in outputs.items():
                right = torch.arange(4)[:, None] < round(4 * script[task])
                output.target = torch.ones(4, 1)
                output.prediction = right.float()
        return outputs


def scripted(scores: list[dict[str, float]]) -> Scripted:
    module = binary(cls=Scripted)
    assert isinstance(module, Scripted)
    module.scores = scores
    return module


def test_dtp_moves_at_the_end_of_each_validation_and_not_in_the_sanity_check() -> None:
    script = [{"a": 0.25, "b": 0.5}, {"a": 0.75, "b": 1.0}, {"a": 0.5, "b": 0.25}]
    weighting, steps = DTP("accuracy", gamma=1.0, alpha=0.25), Steps()
    module = scripted(script)
    fit(
        module,
        loader(*batches(4, 4)),
        loader(batch(), batch()),
        callbacks=[weighting, steps],
        max_epochs=2,
        val_check_interval=1,
        num_sanity_val_steps=2,
    )
    kappa: list[Tensor] = [torch.full((2,), torch.nan)]
    for one in script:
        newest = torch.tensor([one["a"], one["b"]])
        kappa.append(newest if kappa[-1].isnan().all() else 0.25 * newest + 0.75 * kappa[-1])
    for found, performance in zip(steps.weights, kappa, strict=True):
        torch.testing.assert_close(found, dtp_weights(performance, 1.0))
    assert steps.weights[0] is not None
    assert steps.weights[0].tolist() == [1.0, 1.0]


def test_dtp_takes_no_notice_of_a_validation_outside_of_training() -> None:
    weighting = DTP("accuracy")
    module = scripted([{"a": 0.25, "b": 0.5}])
    trainer = fit(module, loader(batch()), loader(batch()), callbacks=[weighting])
    before = weighting.performance.clone()
    module.scores = [{"a": 1.0, "b": 1.0}]
    trainer.validate(module, loader(batch()), verbose=False)
    assert before.tolist() == weighting.performance.tolist() == [0.25, 0.5]


def test_dtp_from_training_batches() -> None:
    module, given, steps = binary(), batches(8, 8, 8), Steps()
    weighting = DTP("accuracy", gamma=2.0, alpha=0.4, stage="train")
    expected, kappa = [], torch.full((2,), torch.nan)
    for one in given:
        expected.append(dtp_weights(kappa, 2.0))
        scores = [BinaryAccuracy()(module(one[0])[task], one[1][task].int()) for task in ("a", "b")]
        newest = torch.stack(scores)
        kappa = newest if kappa.isnan().all() else 0.4 * newest + 0.6 * kappa
    # Nothing is learned, so that the scores can be computed beforehand.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    trainer = fit(module, loader(*given), callbacks=[weighting, steps])
    for found, weights in zip(steps.weights, expected, strict=True):
        torch.testing.assert_close(found, weights)
    whole = BinaryAccuracy()(torch.cat([module(x)["a"] for x, _ in given]), torch.cat([y["a"].int() for _, y in given]))
    assert float(trainer.callback_metrics["train/accuracy/a"]) == pytest.approx(float(whole))
