"""Loads a trunk's weights from a checkpoint, a state dict or a safetensors file."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_mtl.module import MultiTaskModule

_NESTED = ("state_dict", "model_state_dict", "model")
_COMPILED = "_orig_mod."  # torch.compile's part of a key
MOST_LISTED = 6  # keys in an error message


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

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} tensors loaded from keys {self.prefix + '*'!r}, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape, {self.ignored} ignored"
        )


def load_trunk(
    target: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    prefix: str | None = None,
) -> LoadReport:
    """Load a trunk's weights, and nothing else, from a checkpoint of this or of another model.

    The source is a checkpoint of Lightning's, of a multi-task or of any other module, a state dict that torch saved,
    or a safetensors file. Its keys may have a prefix, such as ``model.trunk.`` or ``module.backbone.``. It is the one
    below which most of the trunk's keys are found with their shapes; of several, the one that ends in ``trunk.``. What
    ``torch.compile`` adds to keys is ignored, on both sides.

    Tensors take the trunk's dtype: other floating-point types are rounded, integers and real numbers fit into floating
    point and complex parameters. Complex numbers do not fit into real ones, nor fractions into integers.

    The parts of a file that ``torch.save`` wrote are compared with their checksums. The format of torch before 1.6 and
    safetensors have none: of changed numbers in an intact structure nobody can know.

    Args:
        target: A :class:`~lightning_mtl.MultiTaskModule`, whose trunk is loaded, or the trunk itself.
        source: The file's path, or what it holds. Files are read with torch's ``weights_only=True``: they cannot run
            code.
        strict: Ask that the trunk's keys and those below the prefix are the same, with the same shapes. Otherwise
            what fits in name and shape is loaded and the rest is reported: the way to take a backbone's weights without
            its classifier, or to add parts to it.
        prefix: The prefix, if it is not to be found; ``""`` is none.

    Returns:
        What was loaded, and what was not.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: For a safetensors file without the package safetensors.
        ValueError: If the file is damaged or no such source, if nothing of it fits, if a dtype does not fit, if several
            prefixes fit alike, or, with ``strict``, if anything is missing, left over or of another shape. The trunk
            is as it was then.

    Example:
        >>> trunk = nn.Linear(2, 3)
        >>> checkpoint = {"model.trunk.weight": torch.ones(3, 2), "model.trunk.bias": torch.zeros(3)}
        >>> print(load_trunk(trunk, checkpoint))
        2 tensors loaded from keys 'model.trunk.*', 0 missing, 0 unexpected, 0 of another shape, 0 ignored
    """
    trunk = target.trunk if isinstance(target, MultiTaskModule) else target
    name = "the mapping" if isinstance(source, Mapping) else f"{source}"
    found = _tensors(source if isinstance(source, Mapping) else _read(Path(source)), name)
    own = {key.replace(_COMPILED, ""): (key, value) for key, value in trunk.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, (_, value) in own.items() if isinstance(value, Tensor)}
    if prefix is None:
        prefix = _find_prefix(found, shapes, name)
    below = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    mismatched = {
        key: (tuple(below[key].shape), shape)
        for key, shape in shapes.items()
        if key in below and tuple(below[key].shape) != shape
    }
    report = LoadReport(
        prefix=prefix,
        loaded=tuple(key for key in shapes if key in below and key not in mismatched),
        missing=tuple(key for key in shapes if key not in below),
        unexpected=tuple(prefix + key for key in below if key not in shapes),
        mismatched=mismatched,
        ignored=len(found) - len(below),
    )
    _check_report(report, name, strict=strict)
    _check_dtypes({key: (below[key].dtype, own[key][1].dtype) for key in report.loaded}, name)
    trunk.load_state_dict({own[key][0]: below[key] for key in report.loaded}, strict=False)
    return report


class LoadTrunk(Callback):
    """Load the trunk's weights before a training begins, by :func:`load_trunk`; for YAML and the command line.

    A training that is resumed goes on with its own weights, and does not need the file any more. Callbacks that copy
    the model at setup, as weight averaging does, come after this one in the Trainer's list.

    Args:
        path: The file.
        strict: As for :func:`load_trunk`.
        prefix: As for :func:`load_trunk`.

    Raises:
        TypeError: At setup, if the module is no :class:`~lightning_mtl.MultiTaskModule`.

    Attributes:
        report: What the last loading did.

    Example:
        >>> callback = LoadTrunk("pretrained.ckpt")

        On the command line: ``--trainer.callbacks+=LoadTrunk --trainer.callbacks.path=pretrained.ckpt``.
    """

    def __init__(self, path: str | Path, *, strict: bool = True, prefix: str | None = None) -> None:
        self.path, self.strict, self.prefix = path, strict, prefix
        self.report: LoadReport | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the weights; a checkpoint that the fit resumes from, unknown yet, replaces them afterwards."""
        if not isinstance(pl_module, MultiTaskModule):
            raise TypeError(
                f"LoadTrunk loads the trunk of a lightning_mtl.MultiTaskModule, found {type(pl_module).__name__}."
            )
        self.report = None
        if stage == "fit" and trainer.global_step == 0 and Path(self.path).is_file():
            self._load(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the weights if they were not, unless the training is resumed; a missing file is an error now."""
        if self.report is None and trainer.global_step == 0 and trainer.ckpt_path is None:
            self._load(pl_module)

    def _load(self, module: nn.Module) -> None:
        self.report = load_trunk(module, self.path, strict=self.strict, prefix=self.prefix)


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give load_trunk a file.")
    if not path.is_file():
        raise FileNotFoundError(f"load_trunk found no file {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        _check_sums(path)
        read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file makes the unpickler stumble anywhere: it raises whatever Python can raise.
        raise ValueError(
            f"{path} cannot be read as tensors alone: {_reason(error)}. It is damaged or no checkpoint; or it holds "
            "objects, and where you trust it, torch.save(model.state_dict(), path) saves the weights by themselves."
        ) from error
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} holds a {type(read).__name__}; a checkpoint or a state dict is needed.")
    return read


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{path} is a safetensors file; pip install 'lightning-mtl[safetensors]' to read it."
        ) from error
    try:
        tensors: Mapping[str, Any] = load_file(path)
    except Exception as error:  # its own error, torch's for a wrong dtype or shape, the system's
        raise ValueError(f"{path} is damaged or no safetensors file: {_reason(error)}.") from error
    return tensors


def _check_sums(path: Path) -> None:
    """Compare each part of torch's archive with its checksum, which ``torch.load`` does not."""
    if not zipfile.is_zipfile(path):  # torch's older format has no checksums
        return
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(". ") if lines and lines[0].strip() else type(error).__name__


def _tensors(source: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of a state dict, however deep a checkpoint keeps it."""
    nested = next((source[key] for key in _NESTED if isinstance(source.get(key), Mapping)), source)
    found = {key.replace(_COMPILED, ""): value for key, value in nested.items() if _is_entry(key, value)}
    if not found:
        raise ValueError(f"load_trunk found no tensors in {name}; its keys are {_some(source)}.")
    return found


def _is_entry(key: Any, value: Any) -> bool:  # noqa: ANN401 - whatever a file holds
    return isinstance(key, str) and isinstance(value, Tensor)


def _find_prefix(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """The prefix below which most of the trunk's tensors lie; shapes decide, where names do not."""
    by_name: Counter[str] = Counter()
    by_shape: Counter[str] = Counter()
    for key, value in found.items():
        for start in [0, *(place + 1 for place, letter in enumerate(key) if letter == ".")]:
            shape = shapes.get(key[start:])
            if shape is not None:
                by_name[key[:start]] += 1
                by_shape[key[:start]] += shape == tuple(value.shape)
    if not by_name:
        raise ValueError(
            f"load_trunk found no key of the trunk in {name}, whatever the prefix: the trunk has {_some(shapes)}, the "
            f"source {_some(found)}. Build the trunk as it was when it was saved."
        )
    most = max((by_shape[p], by_name[p]) for p in by_name)
    best = [p for p in by_name if (by_shape[p], by_name[p]) == most]
    named = [p for p in best if p.split(".")[-2:-1] == ["trunk"]]
    if len(best) > 1 and len(named) != 1:
        raise ValueError(
            f"load_trunk found {most[0]} of the trunk's {len(shapes)} tensors below each of the prefixes {best} of "
            f"{name}; say which one is meant: prefix={best[0]!r}."
        )
    return named[0] if len(named) == 1 else best[0]


def _check_report(report: LoadReport, name: str, *, strict: bool) -> None:
    shapes = [f"{key} {list(theirs)} for {list(own)}" for key, (theirs, own) in report.mismatched.items()]
    if report.loaded and (not strict or not (report.missing or report.unexpected or shapes)):
        return
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (
            ("missing", report.missing),
            ("unexpected", report.unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    raise ValueError(
        f"load_trunk cannot load the trunk from {name}, prefix {report.prefix!r}; {'; '.join(problems)}. "
        + (
            "Build the trunk as it was when it was saved, or load what fits with strict=False."
            if report.loaded
            else "Nothing fits; build the trunk as it was when it was saved, or give another prefix."
        )
    )


def _check_dtypes(dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]], name: str) -> None:
    lossy = [f"{key} {theirs} for {own}" for key, (theirs, own) in dtypes.items() if not torch.can_cast(theirs, own)]
    if lossy:
        raise ValueError(
            f"load_trunk cannot load from {name} what would lose its imaginary or fractional part: {_some(lossy)}. "
            "Build the trunk with the dtypes that were saved, or convert the weights yourself."
        )


def _some(keys: Iterable[str]) -> str:
    listed = list(keys)
    more = f" and {len(listed) - MOST_LISTED} more" if len(listed) > MOST_LISTED else ""
    return ", ".join(listed[:MOST_LISTED]) + more
