"""Loads a trunk's weights from a checkpoint, a state dict, or what Hugging Face writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mtl.finetuning.places import EXTRA_STATE, entries, find_place, fits, unwrapped
from lightning_mtl.finetuning.reading import read_weights, some
from lightning_mtl.module import MultiTaskModule


@dataclass(frozen=True)
class LoadReport:
    """Reports what became of each key when a trunk was loaded, by the trunk's names, but for ``unexpected``.

    Attributes:
        prefix: What the trunk's keys begin with in the source.
        loaded: Keys that were loaded.
        missing: Keys of the trunk that the source does not have.
        unexpected: Keys of the source, below the prefix, that the trunk does not have.
        mismatched: ``{key: (shape in the source, shape in the trunk)}``.
        ignored: How many other keys the source has: heads, other parts.
        key: The path of the state dict in the source, ``""`` where the source is one.
        state: Keys of ``loaded`` that are extra state, such as the tree of a hardened trunk.

    Example:
        >>> report = LoadReport(
        ...     "model.trunk.", loaded=("weight",), missing=("bias",), unexpected=(), mismatched={}, ignored=4
        ... )
        >>> print(report)
        1 tensors loaded from keys 'model.trunk.*', 1 missing, 0 unexpected, 0 of another shape, 4 ignored
    """

    prefix: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    ignored: int
    key: str = ""
    state: tuple[str, ...] = ()

    def __str__(self) -> str:
        extra = f" and the extra state of {len(self.state)} modules" if self.state else ""
        where = f" of {self.key!r}" if self.key else ""
        return (
            f"{len(self.loaded) - len(self.state)} tensors{extra} loaded from keys {self.prefix + '*'!r}{where}, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape, "
            f"{self.ignored} ignored"
        )


def load_trunk(
    target: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    prefix: str | None = None,
    key: str | None = None,
) -> LoadReport:
    """Load a trunk's weights, and nothing else, from a checkpoint of this or of another model.

    The source is a checkpoint of Lightning's, of a multi-task or of any other module, a state dict that torch saved,
    safetensors, their ``.index.json`` where they come in shards, or a folder with one of these, as Hugging Face's
    ``save_pretrained`` writes it.

    The trunk is looked for in every state dict of it, below every prefix such as ``module.backbone.``. What is called
    ``trunk.`` is meant before all else. Otherwise it is the one place that has all of the trunk, or nothing else than
    parts of it, or at least some of it; several are an error that lists them. A checkpoint of Lightning's is read by
    its ``state_dict`` unless ``key`` says otherwise. What ``torch.compile``, FSDP, activation checkpointing and peft
    add to keys is ignored, on both sides; a tied parameter is loaded by any of its names.

    Tensors take the trunk's dtype: other floating-point types are rounded, integers and real numbers fit into floating
    point and complex parameters. Complex numbers do not fit into real ones, nor fractions into integers. Lazy
    parameters take the source's shapes. Extra state, which no tensor holds, is loaded, too: a hardened
    :class:`~lightning_mtl.architectures.LTB` stays so.

    The parts of a file that ``torch.save`` wrote are compared with their checksums. The format of torch before 1.6 and
    safetensors have none: of changed numbers in an intact structure nobody can know.

    Args:
        target: A :class:`~lightning_mtl.MultiTaskModule`, whose trunk is loaded, or the trunk itself.
        source: The path of the file or folder, or what it holds. Files are read with torch's ``weights_only=True``:
            they cannot run code.
        strict: Ask that the trunk's keys and those below the prefix are the same, with the same shapes. Otherwise
            what fits in name and shape is loaded and the rest is reported: the way to take a backbone's weights without
            its classifier, or to add parts to it.
        prefix: The prefix, if it is not to be found; ``""`` is none.
        key: The state dict in the source, if there are several: ``"state_dict_ema"``, ``"teacher"``, ``"ema.model"``.

    Returns:
        What was loaded, and what was not.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: For a safetensors file without the package safetensors.
        ValueError: If the file is damaged or no such source, if nothing of it fits, if a dtype does not fit, if several
            places may be meant, or, with ``strict``, if anything is missing, left over or of another shape. The trunk
            is as it was then.

    Example:
        >>> trunk = nn.Linear(2, 3)
        >>> weights = {"model.trunk.weight": torch.ones(3, 2), "model.trunk.bias": torch.zeros(3)}
        >>> print(load_trunk(trunk, {"net": weights, "epoch": 3}))
        2 tensors loaded from keys 'model.trunk.*' of 'net', 0 missing, 0 unexpected, 0 of another shape, 0 ignored
    """
    trunk = target.trunk if isinstance(target, MultiTaskModule) else target
    name = "the mapping" if isinstance(source, Mapping) else f"{source}"
    held = source if isinstance(source, Mapping) else read_weights(Path(source))
    found = entries(held, name)
    if key is None and "pytorch-lightning_version" in held and "state_dict" in found:
        key = "state_dict"  # a callback's averages and copies lie beside it
    names = {unwrapped(key): key for key in trunk.state_dict(keep_vars=True)}
    own = {unwrapped(key): value for key, value in trunk.state_dict(keep_vars=True).items()}
    _check_memory(own)
    place = find_place(found, own, key=key, prefix=prefix, name=name)
    tensors = found[place.entry]
    below = {key.removeprefix(place.prefix): value for key, value in tensors.items() if key.startswith(place.prefix)}
    loaded = tuple(key for key, value in own.items() if key in below and fits(below[key], value))
    tied = {id(own[key]) for key in loaded}
    report = LoadReport(
        prefix=place.prefix,
        loaded=loaded,
        missing=tuple(key for key, value in own.items() if key not in below and id(value) not in tied),
        unexpected=tuple(place.prefix + key for key in below if key not in own),
        mismatched={
            key: (_shape(below[key]), _shape(value)) for key, value in own.items() if key in below and key not in loaded
        },
        ignored=len(tensors) - len(below),
        key=place.entry,
        state=tuple(key for key in loaded if not isinstance(own[key], Tensor)),
    )
    _check_report(report, name, strict=strict)
    _check_dtypes({key: (below[key].dtype, own[key].dtype) for key in loaded if key not in report.state}, name)
    _check_lazy(own, report)
    _load_state(trunk, {names[key]: below[key] for key in report.state}, name)
    trunk.load_state_dict({names[key]: below[key] for key in loaded if key not in report.state}, strict=False)
    return report


class LoadTrunk(Callback):
    """Load the trunk's weights before a training begins, by :func:`load_trunk`; for YAML and the command line.

    It logs what it has loaded. A training that is resumed goes on with its own weights, and does not need the file any
    more. Callbacks that copy the model at setup, as weight averaging does, come after this one in the Trainer's list.

    Args:
        path: The file or folder.
        strict: As for :func:`load_trunk`.
        prefix: As for :func:`load_trunk`.
        key: As for :func:`load_trunk`.

    Raises:
        TypeError: At setup, if the module is no :class:`~lightning_mtl.MultiTaskModule`.

    Attributes:
        report: What the last loading did.

    Example:
        >>> callback = LoadTrunk("pretrained.ckpt")

        On the command line: ``--trainer.callbacks+=LoadTrunk --trainer.callbacks.path=pretrained.ckpt``.
    """

    def __init__(
        self, path: str | Path, *, strict: bool = True, prefix: str | None = None, key: str | None = None
    ) -> None:
        self.path, self.strict, self.prefix, self.key = path, strict, prefix, key
        self.report: LoadReport | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the weights; a checkpoint that the fit resumes from, unknown yet, replaces them afterwards."""
        if not isinstance(pl_module, MultiTaskModule):
            raise TypeError(
                f"LoadTrunk loads the trunk of a lightning_mtl.MultiTaskModule, found {type(pl_module).__name__}."
            )
        self.report = None
        if stage == "fit" and trainer.global_step == 0 and Path(self.path).exists():
            self._load(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the weights if they were not, unless the training is resumed; a missing file is an error now."""
        if self.report is None and trainer.global_step == 0 and trainer.ckpt_path is None:
            self._load(pl_module)

    def _load(self, module: nn.Module) -> None:
        self.report = load_trunk(module, self.path, strict=self.strict, prefix=self.prefix, key=self.key)
        rank_zero_info(f"LoadTrunk: {'; '.join([f'{self.report} from {self.path}', *_problems(self.report)])}.")


def _shape(value: Any) -> tuple[int, ...]:  # noqa: ANN401 - extra state has none
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _problems(report: LoadReport) -> list[str]:
    shapes = [f"{key} {list(theirs)} for {list(own)}" for key, (theirs, own) in report.mismatched.items()]
    named = (("missing", report.missing), ("unexpected", report.unexpected), ("of another shape", shapes))
    return [f"{what}: {some(keys)}" for what, keys in named if keys]


def _check_report(report: LoadReport, name: str, *, strict: bool) -> None:
    problems = _problems(report)
    if report.loaded and not (strict and problems):
        return
    raise ValueError(
        f"load_trunk cannot load the trunk from {name}, prefix {report.prefix!r}; {'; '.join(problems)}. "
        + (
            "Build the trunk as it was when it was saved, or load what fits with strict=False."
            if report.loaded
            else "Nothing fits; build the trunk as it was when it was saved, or give another prefix."
        )
    )


def _check_memory(own: Mapping[str, Any]) -> None:
    """Refuse a trunk that has no memory to load into, which torch passes over in silence."""
    if empty := [key for key, value in own.items() if isinstance(value, Tensor) and value.is_meta]:
        raise ValueError(
            f"load_trunk cannot load into parameters on the meta device, {some(empty)}; call trunk.to_empty("
            "device='cpu') first."
        )


def _check_lazy(own: Mapping[str, Any], report: LoadReport) -> None:
    """Refuse to fill lazy layers in part: the first forward pass would ask for shapes that are there already."""
    lazy = [key for key, value in own.items() if isinstance(value, Tensor) and is_lazy(value)]
    filled = {key.rpartition(".")[0] for key in lazy if key in report.loaded}
    if left := [key for key in lazy if key not in report.loaded and key.rpartition(".")[0] in filled]:
        raise ValueError(
            f"load_trunk would fill lazy layers in part: {some(left)} would be left without a shape. Build the trunk "
            "as it was when it was saved, or call it once on a batch before."
        )


def _load_state(trunk: nn.Module, state: dict[str, Any], name: str) -> None:
    """Load extra state, all or nothing: a module may refuse its own."""
    before = {key: copy.deepcopy(value) for key, value in trunk.state_dict().items() if key in state}
    try:
        trunk.load_state_dict(state, strict=False)
    except Exception as error:  # whatever a module's set_extra_state raises
        trunk.load_state_dict(before, strict=False)
        raise ValueError(
            f"load_trunk cannot load from {name} the extra state {some(state)}: {error} Build the trunk as it was "
            f"when it was saved, or leave the keys that end in {EXTRA_STATE!r} out of the source."
        ) from error


def _check_dtypes(dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]], name: str) -> None:
    lossy = [f"{key} {theirs} for {own}" for key, (theirs, own) in dtypes.items() if not torch.can_cast(theirs, own)]
    if lossy:
        raise ValueError(
            f"load_trunk cannot load from {name} what would lose its imaginary or fractional part: {some(lossy)}. "
            "Build the trunk with the dtypes that were saved, or convert the weights yourself."
        )
