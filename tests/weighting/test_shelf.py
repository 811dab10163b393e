"""Methods of later years beside their formulas, in states and fits that the contract's rows do not reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError, MetricCollection

from lightning_mtl import MultiTaskModule, Signals, Task, Weighting
from lightning_mtl.metrics import delta_m
from lightning_mtl.weighting import (
    DBMTL,
    FAMO,
    IGB,
    MGDA,
    PIVRG,
    ExcessMTL,
    FairGrad,
    Frozen,
    GradNorm,
    NashMTL,
    SDMGrad,
)
from lightning_mtl.weighting.sdmgrad import sdmgrad_weights
from tests.contract import ask, course, names, run, signals
from tests.small import batch, batches, heads, small, trunk
from tests.training import Steps, fit, flat_parameters, loader


@pytest.mark.parametrize("alpha", [None, 0.5, 2.0])
def test_preferences_of_a_bargain(alpha: float | None) -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = torch.tensor([1.0, 5.0, 1.0, 0.5], dtype=torch.float64) * 4 / 7.5

    def weights(preference: dict[str, float]) -> Tensor:
        weighting = (
            NashMTL(preference=preference) if alpha is None else FairGrad(alpha, max_norm=1e9, preference=preference)
        )
        return weighting.weigh(signals(torch.ones(4), rows))

    found = weights({"b": 5.0, "d": 0.5})
    torch.testing.assert_close(rows @ (found @ rows), (factors / found) ** (1 / (alpha or 1.0)))
    torch.testing.assert_close(weights(dict.fromkeys("abcd", 3.0)), weights({}))
    if alpha is None:
        assert float((found @ rows).norm()) == pytest.approx(2.0)


def test_sdmgrad_takes_a_gradient_that_cancels_but_for_rounding() -> None:
    preference = torch.full((2,), 0.5, dtype=torch.float64)
    for numerator in range(1, 200):  # the first one shifted is 0; some of its squares come out a little below
        g = torch.tensor([[numerator / 7], [-3 * numerator / 7]], dtype=torch.float64)
        torch.testing.assert_close(sdmgrad_weights(g @ g.T, preference, lam=1.0).sum(), preference.sum())


def test_sdmgrad_lies_between_mgda_and_the_mean() -> None:
    given = course(5)[0]
    torch.testing.assert_close(SDMGrad(0.0).weigh(given), MGDA().weigh(given))
    torch.testing.assert_close(SDMGrad(1e9).weigh(given), torch.full((5,), 0.2, dtype=torch.float64))
    preferring = SDMGrad(1e9, preference={"b": 6.0}).weigh(given)
    torch.testing.assert_close(preferring, torch.tensor([1, 6, 1, 1, 1], dtype=torch.float64) / 10)


def test_igb_knows_each_tasks_first_epoch() -> None:
    weighting, given = IGB(), course(3, steps=6)
    weighting.reset(names(3))
    ask(weighting, given[0].cut([0, 2]))
    for one in given[1:4]:
        ask(weighting, one)
    a, b, c = (torch.stack([given[step].losses[task] for step in (0, 1)]).mean() for task in range(3))
    b = given[1].losses[1]  # its first epoch has one step for it
    ratios = given[4].losses / torch.stack([a, b, c])
    torch.testing.assert_close(ask(weighting, given[4]), 3 * ratios.softmax(0) / given[4].losses)


def rowwise(weighting: Weighting, given: list[Signals], rows: list[Tensor]) -> list[Any]:
    """Ask a method of whole gradients, with two matrices and a gradient scaler's factor that changes."""
    found = []
    for step, (one, matrix) in enumerate(zip(given, rows, strict=True)):
        scale = 2.0 ** (9 - step)
        present = [weighting.tasks.index(task) for task in one.tasks]
        parts = [matrix[:, :4] * scale, matrix[:, 4:].double() * scale]
        decision = weighting.decide(one, present, measured=True, rows=parts)
        if decision.directions is not None:
            assert [part.dtype for part in decision.directions] == [torch.float32, torch.float64]
            decision.directions = [torch.cat([part.double() for part in decision.directions]) / scale]
        found.append(decision)
        weighting.observe(one, present)
    return found


def test_excess_risks() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 7, generator=generator) * size for size in (1.0, 0.3, 2.0, 0.1)]
    given = [signals(torch.ones(3), matrix, step=step) for step, matrix in enumerate(rows)]
    # The second task is absent from the third step.
    rows[2], given[2] = rows[2][[0, 2]], given[2].cut([0, 2])
    weighting = ExcessMTL(step_size=0.3, importance={"c": 2.0})
    weighting.reset(names(3))
    found = rowwise(weighting, given, rows)
    squares, logits, first = torch.zeros(3, 7), torch.zeros(3), torch.full((3,), torch.nan)
    for step, matrix in enumerate(rows):
        tasks = [0, 2] if step == 2 else [0, 1, 2]
        squares[tasks] += matrix**2
        excess = (matrix**2 / (squares[tasks] + 1e-7).sqrt()).sum(1)
        if step:
            logits[tasks] += 0.3 * excess / first[tasks]
        first = excess if step == 0 else first
        expected = len(tasks) * logits[tasks].softmax(0) * torch.tensor([1.0, 1.0, 2.0])[tasks]
        torch.testing.assert_close(found[step].weights, expected)
        assert found[step].head_weights is None
    torch.testing.assert_close(weighting.memory.float(), squares)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_dbmtl_smooths_gradients_of_logarithms(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 7, generator=generator) for _ in range(4)]
    losses = [torch.rand(3, generator=generator) + 0.1 for _ in range(4)]
    given = [signals(loss, matrix, step=step) for step, (loss, matrix) in enumerate(zip(losses, rows, strict=True))]
    weighting = DBMTL(0.7, decay=decay)
    weighting.reset(names(3))
    mean = torch.zeros(3, 7)
    for step, decision in enumerate(rowwise(weighting, given, rows)):
        share = 0.7 / (step + 1) ** decay
        mean = share * mean + (1 - share) * rows[step] / losses[step][:, None]
        lengths = mean.norm(dim=1)
        torch.testing.assert_close(decision.directions[0].float(), (lengths.max() / lengths) @ mean)
        torch.testing.assert_close(decision.head_weights, 1 / losses[step])


def test_a_memory_of_rows_resumes_to_the_bit(tmp_path: Path) -> None:
    make = functools.partial(DBMTL, 0.5)

    def module() -> MultiTaskModule:
        return small(optimizer=functools.partial(torch.optim.Adam, lr=0.05), accumulate_grad_batches=2)

    data, steps = loader(*batches(4, 4, 4, 3)), Steps()
    whole, first, second = module(), module(), module()
    fit(whole, data, callbacks=[make(), steps], max_epochs=4)
    fit(first, data, callbacks=[make()], max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, data, callbacks=[make()], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(flat_parameters(whole), flat_parameters(second))
    assert not torch.equal(flat_parameters(whole), flat_parameters(first))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DBMTL(1.0), r"DBMTL\(beta=1.0\) must be at least 0 and below 1"),
        (lambda: DBMTL(0.5, at="features"), r"DBMTL\(at='features'\) keeps a number for each task and shared param"),
        (lambda: DBMTL(0.5, every_n_steps=2), r"DBMTL\(every_n_steps=2\) adds each step's gradients"),
        (lambda: DBMTL(0.5, total=1.0), r"DBMTL\(beta=0.5, total=1.0\) has no weights to rescale"),
        (lambda: ExcessMTL(at="features"), r"ExcessMTL\(at='features'\) keeps a number .* Use at='trunk'"),  # type: ignore[arg-type]
        (lambda: ExcessMTL(0.0), r"ExcessMTL\(step_size=0.0\) must be above 0"),
        (lambda: SDMGrad(-1.0), r"SDMGrad\(lam=-1.0\) must be at least 0"),
        (lambda: Frozen(MGDA(), steps=0), r"Frozen\(steps=0\) must be at least 1"),
        (lambda: NashMTL(preference={"a": 0.0}), r"NashMTL\(preference=...\) gives task 'a' 0.0"),
    ],
)
def test_arguments(make: Callable[[], Weighting], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_memory_of_other_parameters_is_refused() -> None:
    weighting = ExcessMTL()
    weighting.reset(names(3))
    given = signals(torch.ones(3), torch.eye(3))
    weighting.decide(given, range(3), measured=True, rows=[torch.eye(3)])
    with pytest.raises(ValueError, match="of which there were 3 and are 4 at step 0; have the same ones train"):
        weighting.decide(given, range(3), measured=True, rows=[torch.ones(3, 4)])
    with pytest.raises(TypeError, match=r"Frozen\(weighting=...\) takes the weights of .* found ExcessMTL"):
        Frozen(ExcessMTL())


@pytest.mark.parametrize("make", [lambda: MGDA(every_n_steps=2), GradNorm, FAMO])
def test_frozen_keeps_the_mean_and_measures_no_more(make: Callable[[], Weighting]) -> None:
    given, steps = loader(*batches(4, 4, 4, 4, 4)), Steps()
    weighting = Frozen(make(), steps=3, start_step=1)
    followed, alone = Steps(), make()
    alone.start_step = 1
    fit(small(), given, callbacks=[alone, followed], max_epochs=2)
    fit(small(), given, callbacks=[weighting, steps], max_epochs=2)
    looked = [step for step in (1, 2, 3) if alone.measures_in(step)]
    followed_weights = [weights for weights in followed.weights[:4] if weights is not None]
    mean = torch.stack([followed_weights[step] for step in looked]).mean(0)
    for step, weights in enumerate(steps.weights):
        assert weights is not None
        torch.testing.assert_close(weights, followed_weights[step] if step < 4 else mean)
    assert len(steps.weights) == 10
    assert all(one.gramian is None and one.norms is None for one in steps.signals[4:])
    assert not weighting.wants_losses_after


def test_a_frozen_method_gives_a_new_task_the_others_mean() -> None:
    weighting, given = Frozen(MGDA(), steps=2, total=6.0), course(3, steps=4)
    weighting.reset(names(3))
    for one in given[:2]:
        ask(weighting, one.cut([0, 2]))
    kept = run(MGDA(), [one.cut([0, 2]) for one in given[:2]], ["a", "c"]).mean(0)
    expected = torch.stack([kept[0], kept.mean(), kept[1]])
    torch.testing.assert_close(ask(weighting, given[2]), 6 * expected / expected.sum())
    torch.testing.assert_close(weighting.weigh(given[3]).float(), expected)


def compared(baselines: dict[str, dict[str, float] | None]) -> MultiTaskModule:
    torch.manual_seed(2)
    metrics = MetricCollection({"error": MeanAbsoluteError()})
    tasks = {task: Task(mse_loss, metrics, baseline) for task, baseline in baselines.items()}
    return MultiTaskModule(trunk(), heads(baselines), tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.1))


def test_pivrg_prefers_who_validates_below_its_baseline(tmp_path: Path) -> None:
    baselines: dict[str, dict[str, float] | None] = {"a": {"error": 0.2, "loss": 0.5}, "b": {"error": 0.4}}
    data, val = loader(*batches(4, 4)), loader(batch(8))
    weighting, steps = PIVRG(max_norm=1.0), Steps()
    trainer = fit(compared(baselines), data, val, callbacks=[weighting, steps], max_epochs=2)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    a = delta_m([found["val/error/a"], found["val/loss/a"]], [0.2, 0.5], [False, False])
    b = delta_m([found["val/error/b"]], [0.4], [False])
    torch.testing.assert_close(weighting.drops, torch.tensor([a, b]))
    torch.testing.assert_close(steps.weights[0], FairGrad(2.0, max_norm=1.0).weigh(steps.signals[0]).float())
    resumed, rest = PIVRG(max_norm=1.0), Steps()
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(compared(baselines), data, val, callbacks=[resumed, rest], max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
    drops = torch.tensor([a, b], dtype=torch.float64)
    temperature = max(abs(a - b) / 0.6931471805599453, 10.0)
    c = 2 * (drops / temperature).softmax(0)
    G, w = rest.signals[0].gramian, rest.weights[0]
    assert G is not None
    assert w is not None
    ratio = (G @ w.double()) / (c / w.double()).sqrt()
    torch.testing.assert_close(ratio, ratio.mean().expand(2), rtol=1e-4, atol=0.0)


def test_pivrg_needs_baselines_and_validation() -> None:
    whole: dict[str, dict[str, float] | None] = {"a": {"error": 0.2}, "b": {"error": 0.4}}
    with pytest.raises(ValueError, match="PIVRG compares each task's validation with a baseline, and task 'b' has non"):
        fit(compared(whole | {"b": None}), loader(batch()), loader(batch()), callbacks=[PIVRG()])
    with pytest.raises(ValueError, match="PIVRG needs a validation loader, and the Trainer has none; pass one"):
        fit(compared(whole), loader(batch()), callbacks=[PIVRG()])
    unknown = run(PIVRG(), course(3), names(3))
    torch.testing.assert_close(unknown, run(FairGrad(2.0), course(3), names(3)))
