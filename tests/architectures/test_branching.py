"""LTB against plain tensors, its noise, its tree, and the callback that schedules it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_mtl.architectures import LTB, Branching
from tests.architectures.trunks import TASKS, close, ltb, module_of, regression
from tests.training import fit, loader


def written_out(trunk: LTB, x: Tensor, temperature: float) -> dict[str, Tensor]:
    """Straight-through choices, one child and one parent at a time."""
    noise = trunk.noise.split([logits.numel() for logits in trunk.logits])
    values = [trunk.get_submodule(f"stages.0.{node}")(x) for node in range(3)]
    for depth, logits in enumerate(trunk.logits):
        read = []
        for child, scores in enumerate(logits + noise[depth].view_as(logits)):
            soft = torch.softmax(scores / temperature, 0)
            hard = torch.eye(len(scores), dtype=soft.dtype)[int(scores.argmax())]
            parts = [(h + s - s.detach()) * value for h, s, value in zip(hard, soft, values, strict=True)]
            read.append(torch.stack(parts).sum(0))
            assert len(read) == child + 1
        values = read
        if depth < len(trunk.stages) - 1:
            values = [trunk.get_submodule(f"stages.{depth + 1}.{node}")(v) for node, v in enumerate(read)]
    return dict(zip(trunk.tasks, values, strict=True))


def test_forward_and_gradient_as_written_out() -> None:
    torch.manual_seed(0)
    trunk = ltb().double()
    for logits in trunk.logits:
        nn.init.normal_(logits)
    x = torch.randn(5, 3, dtype=torch.float64)
    for step in range(5):
        trunk.sample(step, temperature=0.7)
        ours, theirs = trunk(x), written_out(trunk, x, 0.7)
        close(ours, theirs)
        weights = [torch.randn_like(value) for value in theirs.values()]
        found, expected = (
            torch.autograd.grad(list(features.values()), list(trunk.parameters()), weights, materialize_grads=True)
            for features in (ours, theirs)
        )
        close(found, expected)
        assert found[-1].any()  # the logits learn


def test_choices_follow_the_branching_probabilities() -> None:
    trunk = LTB([[nn.Identity(), nn.Identity(), nn.Identity()]], ["a"])
    trunk.logits[0].data[0] = torch.tensor([0.1, 0.6, 0.3]).log()
    counts = torch.zeros(3)
    for step in range(2000):
        trunk.sample(step, 1.0)
        counts[int((trunk.logits[0].detach() + trunk.noise).argmax())] += 1
    # Three standard deviations of a binomial count are 0.03 of 2000.
    torch.testing.assert_close(counts / 2000, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.035)


def test_noise_follows_from_seed_and_step() -> None:
    first, again, other = ltb(seed=1), ltb(seed=1), ltb(seed=2)
    for trunk in (first, again, other):
        trunk.sample(7, 1.0)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    again.sample(8, 1.0)
    assert not torch.equal(first.noise, again.noise)


def test_warm_up_leaves_the_logits_alone() -> None:
    trunk = ltb()
    trunk.sample(0, 1.0, learns=False)
    features = trunk(torch.randn(4, 3))
    sum(value.square().sum() for value in features.values()).backward()
    assert all(logits.grad is not None and not logits.grad.any() for logits in trunk.logits)
    assert any(p.grad.any() for p in trunk.stages.parameters() if p.grad is not None)


def test_hardened_is_evaluated_and_prunes() -> None:
    torch.manual_seed(0)
    trunk, x = ltb(), torch.randn(4, 3)
    trunk.logits[0].data[:] = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    trunk.logits[1].data[:] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    evaluated = trunk.eval()(x)
    trunk.train().harden()
    assert trunk.tree == [[1, 0, 2], [0, 1]]
    ran: list[str] = []
    for path, node in trunk.named_modules():
        if re.fullmatch(r"stages\.\d\.\d", path):
            node.register_forward_hook(lambda *_, path=path: ran.append(path))
    hardened = trunk(x)
    assert ran == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    ran.clear()
    assert torch.equal(trunk(x, tasks=["b"])["b"], hardened["b"])
    assert ran == ["stages.0.0", "stages.1.1"]
    for task in TASKS:
        close(hardened[task], evaluated[task])
        close(trunk.single_task(task)(x), hardened[task])
    other = ltb()
    other.load_state_dict(trunk.state_dict())
    assert other.hardened
    close(other(x), hardened)
    assert [p.tolist() for p in other.probabilities()] == [[[0, 1, 0], [1, 0, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]]]


def test_training_hardens_at_its_epoch_and_shows_its_choices(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    module = module_of(ltb())
    fit(
        module,
        loader(regression()),
        max_epochs=4,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[Branching(warmup_epochs=1, harden_epoch=3)],
    )
    assert isinstance(module.trunk, LTB)
    assert module.trunk.hardened
    assert module.trunk.logits[1].any()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["images"]) == {"branching/trunk/stage 0", "branching/trunk/stage 1"}
    assert len(events.Images("branching/trunk/stage 0")) == 4


def test_temperature() -> None:
    schedule = Branching(warmup_epochs=2, temperature=6.0, heatmaps=False)
    assert [schedule.temperature_in(epoch) for epoch in (0, 2, 5)] == [6.0, 6.0, 3.0]
    assert Branching(temperature=lambda epoch: 0.5**epoch, heatmaps=False).temperature_in(3) == 0.125


def test_training_without_noise_says_what_to_do() -> None:
    trunk = LTB([[nn.Linear(3, 4)] * 1], TASKS)
    with pytest.raises(RuntimeError, match=r"Branching\(\)"):
        trunk(torch.zeros(1, 3))
    trunk.eval()(torch.zeros(1, 3))


NODE = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"stages": []}, "each needs one"),
        ({"stages": [[NODE], []]}, "[1, 0] nodes"),
        ({"stages": [[NODE, NODE]]}, "same module object"),
        ({"stages": [[NODE]], "tasks": []}, "tasks=[]"),
        ({"stages": [[NODE]], "tasks": ["a", "a"]}, "twice"),
        ({"stages": [[NODE]], "tasks": ["a.b"]}, "cannot name a task"),
    ],
)
def test_what_a_trunk_refuses(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        LTB(**({"tasks": ["a"]} | arguments))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"harden_epoch": 0}, "harden_epoch=0"),
        ({"harden_epoch": 2, "warmup_epochs": 3}, "harden_epoch=2"),
    ],
)
def test_what_the_schedule_refuses(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Branching(**arguments)


def test_further_refusals() -> None:
    with pytest.raises(TypeError, match="found a int"):
        LTB([[3]], ["a"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="temperature=0"):
        ltb().sample(0, 0.0)
    trunk = LTB([[nn.Linear(3, 4), nn.Linear(3, 5)]], ["a"]).eval()
    with pytest.raises(ValueError, match=re.escape("after stage 0, node 1 has shape [2, 5] and node 0 [2, 4]")):
        trunk(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="holds none"):
        fit(module_of(nn.Linear(3, 4)), loader(regression()), callbacks=[Branching(heatmaps=False)])
