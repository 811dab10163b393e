"""Weightings around other weightings: CRMOGM, and FromTorchJD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation

from lightning_mtl import Weighting
from lightning_mtl.weighting import (
    CRMOGM,
    DTP,
    FAMO,
    IMTL,
    IMTLG,
    MGDA,
    AlignedMTL,
    FromTorchJD,
    GradDrop,
    GradNorm,
    NashMTL,
    PCGrad,
    StaticWeights,
)
from tests.contract import ask, course, names, run, signals
from tests.small import batch, batches, binary, small
from tests.training import Steps, fit, loader


def test_the_running_mean() -> None:
    steps = course(3, steps=10)
    plain = run(MGDA(), steps, names(3))
    smooth = run(CRMOGM(MGDA(), alpha=0.7), steps, names(3))
    expected = [plain[0]]
    for newest in plain[1:]:
        expected.append(0.7 * expected[-1] + 0.3 * newest)
    torch.testing.assert_close(smooth, torch.stack(expected))


def test_alpha_0_changes_nothing() -> None:
    steps = course(3, steps=5)
    torch.testing.assert_close(run(CRMOGM(GradNorm(), alpha=0.0), steps, names(3)), run(GradNorm(), steps, names(3)))


def test_a_task_begins_with_its_first_weight() -> None:
    class Counting(StaticWeights):
        calls = 0.0

        def weigh(self, signals: Any) -> Tensor:
            self.calls += 1
            return torch.full((signals.num_tasks,), self.calls)

    weighting = CRMOGM(Counting(), alpha=0.5)
    weighting.reset(["a", "b"])
    assert ask(weighting, signals(torch.ones(1), tasks=["a"])).tolist() == [1.0]
    assert ask(weighting, signals(torch.ones(2), step=1)).tolist() == [1.5, 2.0]


def test_it_measures_what_the_wrapped_method_measures() -> None:
    weighting = CRMOGM(NashMTL(at="features", every_n_steps=3))
    assert (weighting.measures, weighting.weighs_heads, weighting.at, weighting.every_n_steps) == (
        "gramian",
        True,
        "features",
        3,
    )
    assert CRMOGM(DTP("accuracy", stage="train")).step_metric == "accuracy"
    assert CRMOGM(FAMO()).wants_losses_after
    assert CRMOGM(FAMO()).takes_logarithms
    assert (Weighting.measures, CRMOGM.measures) == ("losses", "losses")


def test_the_wrapped_state_is_cut_to_the_present_tasks() -> None:
    inner = GradNorm()
    weighting = CRMOGM(inner)
    weighting.reset(["a", "b"])
    assert ask(weighting, signals(torch.ones(1), torch.ones(1, 2), tasks=["b"])).tolist() == [1.0]
    assert inner.steps.tolist() == [0.0, 1.0]


def test_the_mean_rests_between_measurements() -> None:
    weighting, steps = CRMOGM(MGDA(every_n_steps=2), alpha=0.5), course(3, steps=3)
    weighting.reset(["a", "b", "c"])
    first, _, third = (ask(weighting, given) for given in steps)
    alone = run(MGDA(), steps, names(3))
    torch.testing.assert_close(torch.stack([first, third]), torch.stack([alone[0], (alone[0] + alone[2]) / 2]))


def test_the_wrapped_state_is_saved_and_restored_with_it() -> None:
    weighting = CRMOGM(GradNorm())
    run(weighting, course(3), names(3))
    other = CRMOGM(GradNorm())
    other.reset(["a", "b", "c"])
    other.load_state_dict(weighting.state_dict())
    assert isinstance(other.weighting, GradNorm)
    assert isinstance(weighting.weighting, GradNorm)
    assert torch.equal(other.weighting.weights, weighting.weighting.weights)
    stranger = CRMOGM(MGDA())
    stranger.reset(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"The checkpoint's CRMOGM held \['GradNorm'\], this one holds \['MGDA'\]"):
        stranger.load_state_dict(weighting.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "make", [lambda: CRMOGM(IMTL()), lambda: CRMOGM(PCGrad(at="features")), lambda: CRMOGM(GradNorm())]
)
def test_crmogm_in_a_fit(make: Any, accumulate: int) -> None:
    steps = Steps()
    module = small(accumulate_grad_batches=accumulate)
    fit(module, loader(*batches(4, 4, 4, 4)), callbacks=[make(), steps], max_epochs=2)
    assert len(steps.weights) == 8 // accumulate
    assert all(weights is not None and weights.isfinite().all() for weights in steps.weights)


def test_hooks_reach_the_wrapped_method() -> None:
    inner = DTP("accuracy")
    fit(binary(), loader(*batches(4, 4)), loader(batch(8)), callbacks=[CRMOGM(inner)])
    assert not inner.performance.isnan().any()
    with pytest.raises(ValueError, match=r"DTP\(metric='accuracy'\) is not among the metrics of task 'a'"):
        fit(small(), loader(batch()), loader(batch()), callbacks=[CRMOGM(DTP("accuracy"))])
    with pytest.raises(ValueError, match=r"DTP\(stage='val'\) needs a validation loader"):
        fit(binary(), loader(batch()), callbacks=[CRMOGM(DTP("accuracy"))])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CRMOGM(GradDrop()), TypeError, "takes the weights of a Weighting that .* found GradDrop"),
        (lambda: CRMOGM("MGDA"), TypeError, "found str"),  # type: ignore[arg-type]
        (lambda: CRMOGM(MGDA(), alpha=1.0), ValueError, r"CRMOGM\(alpha=1.0\) must be at least 0 and below 1"),
        (lambda: CRMOGM(MGDA(importance={"a": 2.0})), ValueError, "pass them to CRMOGM"),
        (lambda: CRMOGM(MGDA(start_step=1)), ValueError, "pass them to CRMOGM"),
        (lambda: CRMOGM(MGDA(total=1.0)), ValueError, "pass them to CRMOGM"),
        (lambda: FromTorchJD(3), TypeError, r"takes an instance of a TorchJD weighting .* found int"),  # type: ignore[arg-type]
        (lambda: FromTorchJD(MGDA), TypeError, r"pip install torchjd"),  # type: ignore[arg-type]
    ],
)
def test_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def drawing(gramian: Tensor) -> Tensor:
    return torch.rand(len(gramian), dtype=gramian.dtype)


def test_random_numbers_come_from_the_callbacks_generator() -> None:
    weighting, twin = FromTorchJD(drawing), FromTorchJD(drawing)
    before = torch.get_rng_state()
    first = run(weighting, course(3), names(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(run(twin, course(3), names(3)), first)
    assert len(first.unique(dim=0)) == len(first)


def test_torchjd() -> None:
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    for weighting in (aggregation.AlignedMTLWeighting(), aggregation.AlignedMTL()):
        found = FromTorchJD(weighting).weigh(signals(torch.ones(2), rows))
        torch.testing.assert_close(found, AlignedMTL().weigh(signals(torch.ones(2), rows)))
    found = FromTorchJD(aggregation.IMTLGWeighting()).weigh(signals(torch.ones(2), rows))
    torch.testing.assert_close(found, IMTLG().weigh(signals(torch.ones(2), rows)))
    steps, random = course(3, steps=4), aggregation.PCGradWeighting
    assert torch.equal(run(FromTorchJD(random()), steps, names(3)), run(FromTorchJD(random()), steps, names(3)))
    fit(small(), loader(batch()), callbacks=[FromTorchJD(aggregation.MGDAWeighting(), at="features")])
    reading_rows = (aggregation.GradDrop(), aggregation.ExcessMTL(), aggregation.ExcessMTLWeighting())
    for unfit in (aggregation.WeightedAggregator(aggregation.SumWeighting()), *reading_rows):
        with pytest.raises(TypeError, match=f"found {type(unfit).__name__}"):
            FromTorchJD(unfit)
