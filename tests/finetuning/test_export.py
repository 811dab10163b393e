"""Files for inference: what they predict, for whom, and what cannot become one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.architectures import MMoE
from lightning_mtl.finetuning import export
from tests.small import TASKS, batch, heads, regressions, small

# torch.export's own, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def with_trunk(trunk: nn.Module) -> MultiTaskModule:
    torch.manual_seed(0)
    return MultiTaskModule(trunk, heads(), regressions())


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"a": self.layer(x) * scale, "b": self.layer(x)}


def load(path: Path) -> Callable[..., Any]:
    return torch.export.load(path).module()


@pytest.mark.parametrize("tasks", [None, ["b"], ["b", "a"]])
def test_predictions_of_any_number_of_samples(tasks: list[str] | None, tmp_path: Path) -> None:
    model = with_trunk(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    model(batch(16)[0])  # statistics to export
    predict = load(export(model, batch(1)[0], tmp_path / "model.pt2", tasks=tasks))
    assert model.training
    model.eval()
    for number in (1, 2, 7):
        inputs = batch(number)[0]
        found, expected = predict(inputs), model(inputs)
        assert list(found) == (tasks or list(TASKS))
        for task, value in found.items():
            torch.testing.assert_close(value, expected[task])
            assert not value.requires_grad
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt2"]


@pytest.mark.parametrize("form", [dict, lambda given: tuple(given.values())], ids=["keywords", "positions"])
def test_inputs_and_features_of_any_form(form: Any, tmp_path: Path) -> None:
    model = with_trunk(Keywords())
    inputs = form({"x": batch(4)[0], "scale": torch.rand(4, 1)})
    predict = load(export(model, inputs, tmp_path / "model.pt2", tasks=["a"]))
    torch.testing.assert_close(predict(inputs)["a"], model(inputs)["a"])


def test_experts_and_compiled_parts(tmp_path: Path) -> None:
    model = with_trunk(MMoE([nn.Linear(3, 4), nn.Linear(3, 4)], TASKS, 3))
    inputs = batch(4)[0]
    predict = load(export(model, inputs, tmp_path / "experts.pt2", tasks=["b"]))
    torch.testing.assert_close(predict(inputs)["b"], model(inputs)["b"])
    compiled = small()
    compiled.trunk = torch.compile(compiled.trunk, backend="eager")  # type: ignore[assignment]
    predict = load(export(compiled, inputs, tmp_path / "compiled.pt2"))
    torch.testing.assert_close(predict(inputs)["b"], small()(inputs)["b"])


# What torch's exporter says of itself on the way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx(tmp_path: Path) -> None:
    model = with_trunk(Keywords())
    example = {"x": batch(4)[0], "scale": torch.rand(4, 1)}
    path = export(model, example, tmp_path / "model.onnx", format="onnx", tasks=["b", "a"])
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_outputs()] == ["b", "a"]
    inputs = {"x": batch(9)[0], "scale": torch.rand(9, 1)}
    found = session.run(["a"], {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found[0]), model(inputs)["a"].detach())


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mtl.finetuning.exporting.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript and onnxruntime; pip install 'lightning-mtl\[onnx\]'"):
        export(small(), batch(2)[0], tmp_path / "model.onnx", format="onnx")


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(4)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class FourSamples(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, 3))


class Own(MultiTaskModule):
    def forward(self, inputs: Any) -> dict[str, Tensor]:
        return {task: value * 2 for task, value in super().forward(inputs).items()}


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (with_trunk(Noisy(3, 4)), {}, r"predicts something else for 'a'.*was not written"),
        (with_trunk(Branching(3, 4)), {}, "cannot trace the trunk .* branches on values"),
        (with_trunk(FourSamples(3, 4)), {}, r"cannot trace .* \(dynamic_batch=False keeps"),
        (small(cls=Own), {}, "Own has a forward of its own"),
        (small(), {"tasks": ["c"]}, r"names \['c'\], but the tasks are \['a', 'b'\]"),
        (small(), {"tasks": []}, "nothing to predict"),
        (small(), {"format": "pickle"}, "must be one of"),
        (small(), {"format": "onnx"}, r"must end in '\.onnx'"),
    ],
)
def test_what_cannot_be_exported(model: Any, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("an older file")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export(model, batch(4)[0], tmp_path / "model.pt2", **arguments)
    assert (tmp_path / "model.pt2").read_text() == "an older file"
    assert len(list(tmp_path.iterdir())) == 1
    if isinstance(model.trunk, FourSamples):
        export(model, batch(4)[0], tmp_path / "model.pt2", dynamic_batch=False)
