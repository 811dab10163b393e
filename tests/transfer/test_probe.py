"""A new head on a frozen trunk: the trunk stays, the samples are the same for both, and a trunk that knows helps."""

from __future__ import annotations

import csv
import functools
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanAbsoluteError

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.transfer import ProbeResult, probe_transfer
from tests.small import regressions, small
from tests.training import flat_parameters, loader, quiet_trainer

HIDDEN = torch.tensor([[1.0, -2.0, 0.5, 0.0, 1.0, -1.0], [0.5, 0.5, -1.0, 2.0, -0.5, 1.0]])


def samples(number: int, seed: int) -> TensorDataset:
    """Targets that depend on two directions of six alone."""
    x = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x @ HIDDEN.T).sum(1, keepdim=True))


class Record(Dataset[Any]):
    """Keeps which samples were asked for."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.data[index]


def knowing(trunk: nn.Module | None = None) -> MultiTaskModule:
    """A module whose trunk knows the two directions."""
    directions = nn.Linear(6, 2, bias=False)
    directions.weight = nn.Parameter(HIDDEN.clone())
    return MultiTaskModule(
        trunk or nn.Sequential(directions, nn.BatchNorm1d(2), nn.Dropout(0.2)),
        {task: nn.Linear(2, 1) for task in "ab"},
        regressions(),
    )


def head() -> nn.Module:
    return nn.Linear(2, 1)


def probe(module: MultiTaskModule, data: Any = None, **changed: Any) -> ProbeResult:
    arguments: dict[str, Any] = {
        "task": {"new": Task(mse_loss, MeanAbsoluteError())},
        "head": head,
        "trainer_factory": functools.partial(quiet_trainer, max_epochs=-1, max_steps=4),
        "num_samples": [4, 40],
        "seeds": (0, 1),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.05),
    } | changed
    evaluation = DataLoader(samples(50, seed=1), batch_size=50)
    return probe_transfer(module, datamodule=(data or samples(50, seed=0), evaluation), **arguments)


def test_a_trunk_that_knows_the_directions_beats_one_from_scratch() -> None:
    module = knowing().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = Record(samples(50, seed=0))
    trainer = functools.partial(quiet_trainer, max_epochs=-1, max_steps=60)
    result = probe(module, data, metric="loss", num_samples=[8], trainer_factory=trainer)
    assert (result.task, result.metric, result.higher_is_better) == ("new", "loss", False)
    assert [len(scores) for scores in (*result.frozen, *result.scratch)] == [2, 2]
    assert max(result.frozen[0]) < min(result.scratch[0])
    assert result.advantage(8).low > 0
    after = module.state_dict()
    assert all(value.equal(before[name]) for name, value in after.items())
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    # 8 samples of each seed, the same for both trunks.
    assert len(set(data.asked)) <= 16
    first, second = ({*torch.randperm(50, generator=torch.Generator().manual_seed(s))[:8].tolist()} for s in (0, 1))
    assert set(data.asked) == first | second


def test_the_frozen_trunk_is_the_module_s_in_evaluation_mode() -> None:
    module = knowing()
    norm = module.trunk[1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.running_mean = torch.tensor([3.0, -1.0])
    result = probe(module, metric="loss", num_samples=[50], seeds=(0,), optimizer=still)
    torch.manual_seed(0)
    fresh = head()
    x, target = samples(50, seed=1).tensors
    expected = mse_loss(fresh(module.eval().trunk(x)), target).item()
    assert result.frozen[0][0] == pytest.approx(expected, rel=1e-5)


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_both_begin_with_the_same_head_and_scratch_with_a_fresh_trunk() -> None:
    heads: list[Tensor] = []
    trunks: list[Tensor] = []

    def noted_head() -> nn.Module:
        made = head()
        heads.append(flat_parameters(made))
        return made

    def noted_trunk() -> nn.Module:
        made = nn.Linear(6, 2)
        trunks.append(flat_parameters(made))
        return made

    probe(knowing(), head=noted_head, trunk=noted_trunk)
    assert len(heads) == 2 * len(trunks) == 8
    assert heads[0].equal(heads[1])
    assert heads[0].equal(heads[4])
    assert not heads[0].equal(heads[2])
    assert trunks[0].equal(trunks[2])
    assert not trunks[0].equal(trunks[1])


def test_batches_may_name_the_target_and_training_is_repeatable() -> None:
    x, target = samples(50, seed=0).tensors
    named: Any = [(row, {"new": y}) for row, y in zip(x, target, strict=True)]
    assert probe(knowing(), named) == probe(knowing())


def test_the_first_metric_is_compared() -> None:
    result = probe(knowing(), num_samples=[6])
    assert result.metric == "MeanAbsoluteError"
    assert not result.higher_is_better


def test_a_trunk_that_cannot_be_reset_asks_for_a_function() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.token

    def trunk() -> nn.Module:
        return nn.Sequential(Token(), nn.Linear(6, 2))

    with pytest.raises(ValueError, match=r"Token '0' of the trunk has \['token'\] and no reset_parameters\(\)"):
        probe(knowing(trunk()))
    assert probe(knowing(trunk()), trunk=trunk, num_samples=[6], seeds=(0,)).scratch


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": [0, 51]}, r"num_samples=\[0, 51\]\) must be numbers from 1 to 50"),
        ({"num_samples": []}, r"num_samples=\[\]"),
        ({"task": Task(mse_loss)}, "must be one named task"),
        ({"seeds": ()}, r"seeds=\(\)"),
        ({"metric": "accuracy"}, "has none of task 'new'"),
        ({"data": loader(1)}, "a data set with a length"),
    ],
)
def test_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    if "data" in changed:
        with pytest.raises(ValueError, match=message):
            probe_transfer(small(), {"new": Task(mse_loss)}, head, 1, pl.Trainer, num_samples=[1])  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=message):
        probe(knowing(), **changed)


def test_a_result_is_shown_as_table_picture_and_csv(tmp_path: Path) -> None:
    result = ProbeResult("age", "accuracy", True, [10, 50], [[0.5, 0.75], [0.75, 0.75]], [[0.25, 0.25], [0.75, 1.0]])
    assert result.advantage(10) == pytest.approx((0.375, 0.25, 0.5))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table())
    shown = console.export_text()
    for expected in ("age: accuracy, higher is better", "0.625", "+0.375", "[+0.250, +0.500]", "-0.125"):
        assert expected in shown
    axes: Any = result.figure().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["frozen trunk", "from scratch"]
    result.to_csv(tmp_path / "probe.csv")
    with (tmp_path / "probe.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[1] == {"samples": "10", "trunk": "frozen", "seed": "1", "accuracy": "0.75"}


def test_a_seed_that_diverged_is_left_out_of_the_pairs_and_marked() -> None:
    nan = float("nan")
    scores = [[1.0, 2.0, 4.0], [nan, nan, 1.0]], [[3.0, nan, 7.0], [1.0, 2.0, nan]]
    result = ProbeResult("age", "loss", False, [10, 50], *scores)
    assert result.advantage(10).mean == 2.5
    assert np.isnan(result.advantage(50)).all()
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(result.table())
    lines = console.export_text().splitlines()
    (first,) = (line for line in lines if " 10 " in line)
    (second,) = (line for line in lines if " 50 " in line)
    assert ("2.500" in first, "5.000 (2 of 3 seeds)" in first, "+2.500" in first) == (True, True, True)
    assert ("– (1 of 3 seeds)" in second, "– (2 of 3 seeds)" in second) == (True, True)
    axes: Any = result.figure().axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["frozen trunk (4 of 6 runs)", "from scratch (4 of 6 runs)"]
