"""Files for inference: what they predict, for whom, and what cannot become one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lightning_mtl import MultiTaskModule
from lightning_mtl.architectures import MMoE
from lightning_mtl.finetuning import export, load_trunk
from tests.finetuning.test_checkpoints import same
from tests.small import TASKS, batch, heads, regressions, small, trunk

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


class Head(nn.Module):
    """Returns what it is told to make of one layer's output."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 2), form

    def forward(self, features: Tensor) -> Any:
        return self.form(self.layer(features))


def named(tree: Any, name: str) -> dict[str, Tensor]:
    """Names by hand, beside those of the package."""
    if isinstance(tree, Tensor):
        return {name: tree}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: value for part, below in parts for key, value in named(below, f"{name}.{part}").items()}


HEADS: dict[str, nn.Module] = {
    "boxes": Head(lambda y: {"size": y.exp(), "class": (y.argmax(-1), [y, y])}),
    # Names of the graph's own values, and of inputs.
    "linear": Head(lambda y: y),
    "x": Head(lambda y: (y, y > 0)),
    "scale": nn.Identity(),
}


def with_forms() -> MultiTaskModule:
    torch.manual_seed(0)

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    return MultiTaskModule(Scaled(3, 4), HEADS, regressions(HEADS)).eval()


# What torch's exporter says of itself on the way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", ["onnx", "torch.export"])
def test_heads_with_dicts_and_tuples_and_inputs_named_like_tasks(way: Any, tmp_path: Path) -> None:
    model = with_forms()
    example, inputs = ({"x": batch(number)[0], "scale": torch.rand(number, 1)} for number in (2, 7))
    tasks, path = list(HEADS)[::-1], tmp_path / ("model.onnx" if way == "onnx" else "model.pt2")
    assert export(model, example, path, format=way, tasks=tasks) == path
    expected = {key: value for task in tasks for key, value in named(model(inputs)[task], task).items()}
    if way == "torch.export":
        found = {key: value for task, tree in load(path)(inputs).items() for key, value in named(tree, task).items()}
    else:
        session = onnxruntime.InferenceSession(path)
        assert [value.name for value in session.get_inputs()] == ["x", "scale.input"]
        given = {"x": inputs["x"].numpy(), "scale.input": inputs["scale"].numpy()}
        names = [value.name for value in session.get_outputs()]
        found = {name: torch.from_numpy(v) for name, v in zip(names, session.run(names, given), strict=True)}
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 4), nn.Embedding(16, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedded = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        result: Tensor = self.layer(embedded, src_key_padding_mask=mask == 0)
        return result


def texts(number: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(20, (number, length), generator=torch.Generator().manual_seed(number))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"ids": ids, "mask": mask}


@pytest.mark.slow  # each traces a transformer
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dims", [[1], {"ids": [1], "mask": [1]}])
def test_batch_and_length_may_change(dims: Any, tmp_path: Path) -> None:
    model = with_trunk(Sequences()).eval()
    path = export(model, texts(2, 8), tmp_path / "model.onnx", format="onnx", dynamic_dims=dims)
    predict = load(export(model, texts(2, 8), tmp_path / "model.pt2", dynamic_dims=dims))
    session = onnxruntime.InferenceSession(path)
    for number, length in ((1, 2), (3, 13), (5, 5)):
        inputs = texts(number, length)
        found = session.run(["a"], {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found[0]), model(inputs)["a"].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predict(inputs)["a"], model(inputs)["a"].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_encoder_of_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    pretrained = BertForSequenceClassification(config)
    pretrained.save_pretrained(tmp_path / "hub", max_shard_size="1KB")

    class Tagger(nn.Linear):
        def forward(self, output: Any) -> Any:
            return {"tags": super().forward(output.last_hidden_state), "text": super().forward(output.pooler_output)}

    model = MultiTaskModule(BertModel(config), {"a": Tagger(4, 3)}, regressions("a")).eval()
    assert load_trunk(model, tmp_path / "hub").prefix == "bert."
    assert same(model.trunk, dict(pretrained.bert.state_dict()))
    inputs = [{"input_ids": of["ids"], "attention_mask": of["mask"]} for of in (texts(2, 8), texts(3, 13))]
    path = export(model, inputs[0], tmp_path / "model.onnx", format="onnx", dynamic_dims=[1])
    given = {name: value.numpy() for name, value in inputs[1].items()}
    found = onnxruntime.InferenceSession(path).run(["a.tags", "a.text"], given)
    for value, expected in zip(found, model(inputs[1])["a"].values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), expected.detach(), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mtl.finetuning.onnx_files.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"onnx and onnxscript and onnxruntime; pip install onnx onnxscript onnxruntime\."
    ):
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


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def returning(form: Callable[[Tensor], Any]) -> MultiTaskModule:
    return MultiTaskModule(trunk(), {"a": Head(form)}, regressions("a"))


class Own(MultiTaskModule):
    def forward(self, inputs: Any) -> dict[str, Tensor]:
        return {task: value * 2 for task, value in super().forward(inputs).items()}


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (with_trunk(Noisy(3, 4)), {}, r"predicts something else for 'a'.*was not written"),
        (with_trunk(Branching(3, 4)), {}, "cannot trace the trunk .* branches on values"),
        (with_trunk(FourSamples(3, 4)), {}, r"cannot trace .* \(dynamic_batch=False keeps"),
        (small(), {"dynamic_dims": [1]}, r"needs an example of 4 or more .* input \[16, 3\]"),
        (small(), {"dynamic_dims": {"y": [1]}}, r"names y, which the example's inputs do not .* \{'input': \[16, 3\]"),
        (small(), {"dynamic_dims": [0]}, "names 0, which .* dimensions count from 1 on"),
        (returning(lambda y: {"n": 3, "y": y}), {}, r"return a\.n \(int\)"),
        (returning(lambda y: {0: y, "0": y}), {}, r"two tensors 'a\.0'"),
        (returning(lambda y: Pair(y, y)), {}, "cannot write what a head returns"),
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
