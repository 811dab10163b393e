"""Where a trunk is looked for: state dicts in a checkpoint, prefixes of keys, shards and folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_mtl.finetuning import load_trunk
from tests.finetuning.test_checkpoints import same, state, under, without
from tests.small import small, trunk

DEEP, SHALLOW = state(1), {key: value for key, value in state(2).items() if key.startswith("0.")}
OTHER = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}  # of another form
MORE = {"z": torch.zeros(1)}


def loaded(source: Any, **arguments: Any) -> tuple[str, str]:
    report = load_trunk(trunk(), source, **arguments)
    return report.key, report.prefix


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["trunk", "model.trunk", "trunk.module"])
def test_what_is_called_a_trunk_is_meant(name: str, strict: bool) -> None:
    # A head has exactly the form of the new trunk, which is deeper than the one that was saved.
    for source in (under(f"{name}.", SHALLOW) | under("heads.a.", DEEP), {name: SHALLOW, "heads": {"a": DEEP}}):
        target = trunk()
        if strict:
            with pytest.raises(ValueError, match=r"missing: 2\.weight, 2\.bias"):
                load_trunk(target, source)
        else:
            report = load_trunk(target, source, strict=False)
            assert set(report.loaded) == set(SHALLOW)
            assert torch.equal(target[0].weight, SHALLOW["0.weight"])  # type: ignore[arg-type]


AMBIGUOUS: dict[str, tuple[Mapping[str, Any], str]] = {
    "two networks": (under("student.", DEEP) | under("teacher.", state(3)), "prefix='student.'"),
    "two state dicts": ({"state_dict": DEEP, "state_dict_ema": state(3), "epoch": 1}, "key='state_dict'"),
    "deep": ({"ema": {"model": DEEP}, "net": under("module.", state(3))}, "key='ema.model'"),
    "a shallower one and a head": (under("encoder.", SHALLOW) | under("head.", DEEP), "prefix='encoder.'"),
    "two trunks": (under("a.trunk.", DEEP) | under("b.trunk.", DEEP) | under("c.", DEEP), "prefix='a.trunk.'"),
    "parts of two": (under("a.", without("2.bias") | MORE) | under("b.", SHALLOW | MORE), "prefix='a.'"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_several_places_are_listed(case: str) -> None:
    source, first = AMBIGUOUS[case]
    target = trunk()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    places = r"2 places of the mapping: .*\(\d of the trunk's 4 tensors\); .*\. Say which one, as in "
    with pytest.raises(ValueError, match=places) as refused:
        load_trunk(target, source, strict=False)
    assert same(target, before)
    assert first in str(refused.value)
    # What it proposes works.
    proposed = str(refused.value).rpartition("load_trunk(..., ")[2].removesuffix(").")
    arguments = dict(part.split("=") for part in proposed.split(", "))
    load_trunk(target, source, strict=False, **{name: value.strip("'") for name, value in arguments.items()})


def test_one_place_among_others_that_do_not_fit() -> None:
    assert loaded(under("encoder.", DEEP) | under("decoder.", OTHER)) == ("", "encoder.")
    assert loaded({"net": DEEP, "optimizer": {"state": {0: {"exp_avg": DEEP["0.weight"]}}}}) == ("net", "")
    assert loaded({"model": nn.ModuleDict({"encoder": trunk()})}) == ("model", "encoder.")
    # Lightning's weight averaging keeps the average in "state_dict", which is what Lightning loads.
    averaged = {"pytorch-lightning_version": "2.6", "state_dict": DEEP, "current_model_state": state(3)}
    assert loaded(averaged) == ("state_dict", "")
    assert loaded(averaged, key="current_model_state") == ("current_model_state", "")
    with pytest.raises(ValueError, match=r"key='ema'\) is no state dict of the mapping; it holds \['state_dict', 'cur"):
        load_trunk(trunk(), averaged, key="ema")


def test_what_wrappers_add_to_keys() -> None:
    whole = nn.Sequential(trunk()).state_dict()
    for inside in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model."):
        assert loaded({key.replace("0.", f"0.{inside}", 1): value for key, value in whole.items()})[1] == "0."
    layers = {key.replace(".weight", ".base_layer.weight"): value for key, value in DEEP.items()}
    assert loaded(layers | {"0.lora_A.default.weight": torch.zeros(1)}, strict=False) == ("", "")
    own = nn.ModuleDict({"base_layer": trunk()})  # a name that is the model's own
    assert len(load_trunk(own, under("trunk.", dict(own.state_dict()))).loaded) == 4


# Files


def shards(folder: Path, *, index: bool = True) -> Path:
    names: dict[str, str] = {}
    for number, part in enumerate(("0.", "2."), 1):
        tensors = under("bert.", {key: value for key, value in DEEP.items() if key.startswith(part)})
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file(tensors, folder / file)
        names |= dict.fromkeys(tensors, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_shards(index: bool, tmp_path: Path) -> None:
    shards(tmp_path, index=index)
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    for source in (tmp_path, str(tmp_path / "model.safetensors.index.json"))[: 1 + index]:
        target = trunk()
        assert load_trunk(target, source).prefix == "bert."
        assert same(target, DEEP)
    with pytest.raises(ValueError, match="is one of 2 shards"):
        load_trunk(trunk(), tmp_path / "model-00001-of-00002.safetensors", strict=False)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    error, message = (FileNotFoundError, "fetch all 2 shards") if index else (ValueError, "is one of 2 shards")
    with pytest.raises(error, match=message):
        load_trunk(trunk(), tmp_path, strict=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged or no index"),
        ("[]", "is damaged or no index"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names \.\./x\.safetensors; an index and its shards share"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "promises a, which no shard holds"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(content: str, message: str, tmp_path: Path) -> None:
    (shards(tmp_path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_trunk(trunk(), tmp_path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder without weights"):
        load_trunk(trunk(), tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        torch.save(DEEP, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 files .*: best\.ckpt, last\.ckpt; give"):
        load_trunk(trunk(), tmp_path)
    torch.save(under("net.", DEEP), tmp_path / "pytorch_model.bin")
    assert loaded(tmp_path) == ("", "net.")
    safetensors.torch.save_file(DEEP, tmp_path / "model.safetensors")
    assert loaded(tmp_path) == ("", "")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds an adapter of peft"):
        load_trunk(trunk(), tmp_path / "adapter_model.safetensors")


@pytest.mark.slow  # traces and exports
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_and_distributed_checkpoints_say_how_they_become_weights(tmp_path: Path) -> None:
    torch.jit.trace(trunk(), torch.zeros(1, 3)).save(tmp_path / "script.pt")
    with pytest.raises(
        ValueError, match=r"is a TorchScript program, .* torch\.jit\.load\(path\)\.state_dict\(\); load"
    ):
        load_trunk(trunk(), tmp_path / "script.pt")
    program = torch.export.export(trunk(), (torch.zeros(1, 3),))
    torch.export.save(program, tmp_path / "program.pt2")
    with pytest.raises(ValueError, match=r"is an exported program, .* torch\.export\.load\(path\)\.state_dict; load"):
        load_trunk(trunk(), tmp_path / "program.pt2")
    weights: dict[str, Tensor] = torch.export.load(tmp_path / "program.pt2").state_dict
    assert len(load_trunk(trunk(), weights).loaded) == 4
    save({"model": small().state_dict()}, checkpoint_id=tmp_path / "sharded")
    with pytest.raises(ValueError, match=r"run code; .*python -m (torch\.\S+) dcp_to_torch \S+ FILE makes a file"):
        load_trunk(trunk(), tmp_path / "sharded")
    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "whole.pt")
    assert loaded(tmp_path / "whole.pt") == ("model", "trunk.")
    (tmp_path / "sharded" / "meta.pt").touch()
    with pytest.raises(ValueError, match=r"python -m lightning\.pytorch\.utilities\.consolidate_checkpoint"):
        load_trunk(trunk(), tmp_path / "sharded")
