"""Trunks from checkpoints of every kind: prefixes, strictness, and nothing half loaded."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.architectures import LTB
from lightning_mtl.finetuning import load_trunk
from lightning_mtl.weighting import UncertaintyWeighting
from tests.small import batch, heads, regressions, small, trunk
from tests.training import fit, loader


def state(seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(trunk().state_dict())


def same(module: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "trunk.", "module.trunk.", "model.encoder.layers.", "0."])
def test_prefixes_are_found(prefix: str) -> None:
    model = small()
    others = {"heads.a.weight": torch.zeros(1, 4), "other.0.weight": torch.zeros(3, 3)} if prefix else {}
    report = load_trunk(model, under(prefix, state()) | others)
    assert same(model.trunk, state())
    assert report.prefix == prefix
    assert len(report.loaded) == 4
    assert report.ignored == len(others)


def test_compiled_models_on_either_side() -> None:
    source = {"trunk._orig_mod." + key: value for key, value in state().items()}
    for target in (trunk(), torch.compile(trunk(), backend="eager")):
        assert isinstance(target, nn.Module)
        assert load_trunk(target, source).prefix == "trunk."
        original = getattr(target, "_orig_mod", target)
        assert same(original, state())


def test_a_lightning_checkpoint_of_other_tasks(tmp_path: Path) -> None:
    pretrained = small(tasks=("x", "y", "z"))
    weighting: Weighting = UncertaintyWeighting()
    trainer = fit(pretrained, loader(batch(8, tasks="xyz")), callbacks=[weighting])
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    model = small()
    before = {name: p.clone() for name, p in model.heads.named_parameters()}
    report = load_trunk(model, tmp_path / "three.ckpt")
    assert same(model.trunk, dict(pretrained.trunk.state_dict()))
    assert all(torch.equal(p, before[name]) for name, p in model.heads.named_parameters())
    assert str(report) == (
        "4 tensors loaded from keys 'trunk.*' of 'state_dict', 0 missing, 0 unexpected, 0 of another shape, 6 ignored"
    )


def test_a_checkpoint_of_a_single_task_module(tmp_path: Path) -> None:
    class Single(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = trunk(), nn.Linear(4, 2)

    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    single = Single()
    trainer.strategy.connect(single)
    trainer.save_checkpoint(tmp_path / "single.ckpt", weights_only=True)
    model = small()
    assert load_trunk(model, tmp_path / "single.ckpt").prefix == "backbone."
    assert same(model.trunk, dict(single.backbone.state_dict()))


@pytest.mark.parametrize("nest", [None, "state_dict", "net", "teacher"])
def test_state_dicts_that_torch_saved(nest: str | None, tmp_path: Path) -> None:
    tensors: Any = state() if nest is None else {nest: state(), "epoch": 3}
    torch.save(tensors, tmp_path / "saved.pth")
    target = trunk()
    load_trunk(target, str(tmp_path / "saved.pth"))
    assert same(target, state())


def test_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file(under("model.", state()), tmp_path / "saved.safetensors")
    target = trunk()
    assert load_trunk(target, tmp_path / "saved.safetensors").prefix == "model."
    assert same(target, state())


def test_safetensors_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    (tmp_path / "saved.safetensors").touch()
    with pytest.raises(ImportError, match=r"pip install safetensors"):
        load_trunk(trunk(), tmp_path / "saved.safetensors")


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state().items() if name != key}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (without("2.bias"), r"missing: 2\.bias\. .*strict=False"),
        (state() | {"fc.weight": torch.zeros(2)}, r"unexpected: fc\.weight"),
        (state() | {"2.weight": torch.zeros(5, 4)}, r"of another shape: 2\.weight \[5, 4\] for \[4, 4\]"),
    ],
)
def test_strictness(source: dict[str, Tensor], message: str) -> None:
    target = trunk()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_trunk(target, source)
    assert same(target, before)
    report = load_trunk(target, source, strict=False)
    for key, value in target.state_dict().items():
        assert torch.equal(value, state()[key] if key in report.loaded else before[key])
    assert len(report.missing) + len(report.unexpected) + len(report.mismatched) == 1
    assert len(report.loaded) == 4 - len(report.missing) - len(report.mismatched)


@pytest.mark.parametrize("strict", [True, False])
def test_what_has_nothing_of_the_trunk(strict: bool) -> None:
    with pytest.raises(ValueError, match=r"the trunk has 0\.weight, .* the source conv\.kernel"):
        load_trunk(trunk(), {"conv.kernel": torch.zeros(3)}, strict=strict)
    with pytest.raises(ValueError, match="Nothing fits"):
        load_trunk(trunk(), {"0.weight": torch.zeros(9)}, strict=strict)
    with pytest.raises(ValueError, match="no tensors"):
        load_trunk(trunk(), {"epoch": 3}, strict=strict)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_trunk(trunk(), tmp_path / "nowhere.pt")
    torch.save(small(), tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_trunk(trunk(), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_trunk(trunk(), tmp_path / "list.pt")


def save(path: Path, kind: str) -> None:
    if kind == "safetensors":
        safetensors.torch.save_file(state(), path)
    else:
        torch.save({"state_dict": state(), "epoch": 3}, path, _use_new_zipfile_serialization=kind == "archive")


@pytest.mark.parametrize("kind", ["archive", "legacy", "safetensors"])
@pytest.mark.parametrize("damage", ["truncation", "bit flip"])
def test_a_damaged_file_is_refused_in_one_line(kind: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / ("saved.safetensors" if kind == "safetensors" else "saved.pt")
    save(path, kind)
    whole, random = path.read_bytes(), Random(0)
    for _ in range(30):
        place = random.randrange(len(whole))
        changed = bytes([whole[place] ^ 1 << random.randrange(8)])
        path.write_bytes(whole[:place] if damage == "truncation" else whole[:place] + changed + whole[place + 1 :])
        target = trunk()
        before = {key: value.clone() for key, value in target.state_dict().items()}
        try:
            load_trunk(target, path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - not every flip is an error
            assert "\n" not in str(error)  # noqa: PT017
            assert same(target, before)
        else:
            # Between an archive's parts nothing is lost; the other formats have no checksums of their numbers.
            assert damage == "bit flip"
            assert same(target, state()) or kind != "archive"


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_what_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (b"", b"some text\n", b"PK\x03\x04", b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} [^\n]*$"):
            load_trunk(trunk(), path)


@pytest.mark.parametrize("strict", [True, False])
def test_what_a_dtype_cannot_hold_is_refused(strict: bool) -> None:
    complex_state = {key: value.to(torch.complex64) for key, value in state().items()}
    target = trunk()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.weight torch\.complex64 for torch\.float32"):
        load_trunk(target, complex_state, strict=strict)
    assert same(target, before)
    counter = nn.BatchNorm1d(2)
    fraction = counter.state_dict() | {"num_batches_tracked": torch.tensor(1.5)}
    with pytest.raises(ValueError, match=r"torch\.float32 for torch\.int64"):
        load_trunk(counter, fraction, strict=strict)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_rounded_to_the_trunks(dtype: torch.dtype) -> None:
    source = {key: value.to(dtype) for key, value in state().items()}
    target = trunk()
    load_trunk(target, source)
    assert same(target, {key: value.float() for key, value in source.items()})
    widened = trunk().to(torch.complex64)
    load_trunk(widened, state())
    assert same(widened, {key: value.to(torch.complex64) for key, value in state().items()})


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_trunks_take_the_sources_shapes() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(4), nn.Tanh())
    module = MultiTaskModule(lazy, heads(), regressions())
    assert len(load_trunk(module, under("encoder.", state())).loaded) == 4
    assert same(lazy, state())
    expected = trunk()
    expected.load_state_dict(state())
    torch.testing.assert_close(lazy(batch()[0]), expected(batch()[0]))
    with pytest.raises(ValueError, match=r"lazy layers in part: bias would be left"):
        load_trunk(nn.LazyLinear(4), {"weight": torch.zeros(4, 3)}, strict=False)
    part = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4))
    load_trunk(part, {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4)}, strict=False)
    assert part(torch.zeros(2, 3)).shape == (2, 4)


def hardened(tasks: str = "ab") -> LTB:
    branching = LTB([[nn.Linear(3, 4) for _ in range(2)], [nn.Linear(4, 4) for _ in range(2)]], list(tasks))
    branching.logits[0].data.normal_()
    branching.harden()
    return branching


def test_extra_state_is_loaded_all_or_nothing(tmp_path: Path) -> None:
    source = hardened()
    torch.save({"state_dict": under("trunk.", dict(source.state_dict()))}, tmp_path / "tree.pt")
    target = LTB([[nn.Linear(3, 4) for _ in range(2)], [nn.Linear(4, 4) for _ in range(2)]], ["a", "b"])
    report = load_trunk(target, tmp_path / "tree.pt")
    assert target.tree == source.tree
    assert report.state == ("_extra_state",)
    assert str(report).startswith("10 tensors and the extra state of 1 modules loaded")
    torch.testing.assert_close(target(batch()[0])["b"], source(batch()[0])["b"])
    before = {key: copy.deepcopy(value) for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"extra state _extra_state: .* \[2, 3\] children .* \[2, 2\]"):
        load_trunk(target, dict(hardened("abc").state_dict()), strict=False)
    assert {k: v for k, v in before.items() if k == "_extra_state"} == {"_extra_state": target.get_extra_state()}
    assert all(torch.equal(value, before[key]) for key, value in target.named_parameters())


def test_tied_parameters_are_there_by_any_name() -> None:
    tied = trunk()
    tied[2].weight = tied[0].weight = nn.Parameter(torch.zeros(4, 3))
    report = load_trunk(tied, {"net": under("encoder.", without("2.weight"))})
    assert report.missing == ()
    assert torch.equal(tied[2].weight, state()["0.weight"])


def test_a_trunk_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meta device, 0\.weight, .*to_empty"):
        load_trunk(trunk().to("meta"), state())
