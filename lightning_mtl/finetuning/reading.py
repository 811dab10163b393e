"""Weights are read here from files and folders, as tensors alone and nothing that could run code."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MOST_LISTED = 6  # names in an error message
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
_EXPORTED = {"archive_format", "serialized_exported_program.json"}  # of torch 2.8 and later, and before
# What a folder is looked through for, the first that is there. Other *.bin files are no weights.
_WEIGHTS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "pytorch_model*.bin", "*.ckpt", "*.pt*")


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint, a state dict, safetensors, an index of shards, or the one of these that a folder holds.

    Raises:
        FileNotFoundError: If there is no such file, or a shard is missing.
        ImportError: For safetensors without the package.
        ValueError: If it is damaged or of another kind, or a folder holds several.
    """
    if path.is_dir():
        files = _in_folder(path)
        return read_weights(files[0]) if len(files) == 1 else _read_shards(files)
    if not path.is_file():
        raise FileNotFoundError(f"load_trunk found no file {path}.")
    if path.name.endswith(".index.json"):
        return _read_index(path)
    if path.name.startswith("adapter_model."):
        raise ValueError(
            f"{path} holds an adapter of peft, not a trunk's weights; load the base model's weights first, then "
            "PeftModel.from_pretrained(trunk, folder)."
        )
    shard = _SHARD.search(path.name)
    if shard is not None and int(shard[2]) > 1:
        raise ValueError(
            f"{path} is one of {int(shard[2])} shards of a model; give load_trunk their folder, or their .index.json."
        )
    return _read_file(path)


def _in_folder(folder: Path) -> list[Path]:
    """The file that a folder is read by, or all shards of one model."""
    if (folder / ".metadata").is_file():
        by = f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE"
        if (folder / "meta.pt").is_file():  # Lightning's own, of a sharded strategy
            by = f"lightning.pytorch.utilities.consolidate_checkpoint {folder} --output_file FILE"
        raise ValueError(
            f"{folder} is a distributed checkpoint, whose index is pickled and could run code; where you trust it, "
            f"python -m {by} makes a file of it that load_trunk reads."
        )
    for pattern in _WEIGHTS:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) == 1 or _are_complete(found):
            return found
        if found:
            raise ValueError(
                f"{folder} holds {len(found)} files that may be meant, and are not all shards of one model: "
                f"{some(path.name for path in found)}; give load_trunk one of them."
            )
    raise ValueError(
        f"{folder} is a folder without weights that load_trunk knows by name ({', '.join(_WEIGHTS)}); give it a file."
    )


def _are_complete(files: Sequence[Path]) -> bool:
    matches = [_SHARD.search(file.name) for file in files]
    numbers = [(file.name[: match.start()], int(match[1])) for file, match in zip(files, matches, strict=True) if match]
    totals = {int(match[2]) for match in matches if match}
    return totals == {len(files)} and numbers == [(numbers[0][0], number + 1) for number in range(len(files))]


def _read_index(index: Path) -> dict[str, Any]:
    """Read the shards that an index of Hugging Face's names, which have to hold what it says."""
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(named.values()))
        apart = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index} is damaged or no index of shards, {{"weight_map": {{key: file}}}}.') from error
    if apart or not files:
        raise ValueError(f"{index} names {some(apart) or 'no file'}; an index and its shards share a folder.")
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise FileNotFoundError(f"{index} names {some(missing)}, which is not there; fetch all {len(files)} shards.")
    tensors = _read_shards([index.parent / file for file in files])
    if lacking := [key for key in named if key not in tensors]:
        raise ValueError(f"{index} promises {some(lacking)}, which no shard holds; the shards are of another model.")
    return tensors


def _read_shards(files: Iterable[Path]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in files:
        found = _read_file(file)
        if twice := [key for key in found if key in tensors]:
            raise ValueError(f"{file} holds {some(twice)} a second time; its shards are not of one model.")
        tensors.update(found)
    return tensors


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        program = _check_archive(path)
        read = None if program else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file makes the unpickler stumble anywhere: it raises whatever Python can raise.
        raise ValueError(
            f"{path} cannot be read as tensors alone: {_reason(error)}. It is damaged or no checkpoint; or it holds "
            "objects, and where you trust it, load_trunk takes what torch.load(path, weights_only=False) returns, or "
            "its state_dict()."
        ) from error
    if program:
        raise ValueError(f"{path} is {program}; load_trunk takes those, too, in place of the file.")
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} holds a {type(read).__name__}; a checkpoint or a state dict is needed.")
    return read


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} is a safetensors file; pip install safetensors to read it.") from error
    try:
        tensors: Mapping[str, Any] = load_file(path)
    except Exception as error:  # its own error, torch's for a wrong dtype or shape, the system's
        raise ValueError(f"{path} is damaged or no safetensors file: {_reason(error)}.") from error
    return tensors


def _check_archive(path: Path) -> str | None:
    """Compare each part of torch's archive with its checksum, which ``torch.load`` does not; tell programs apart."""
    if not zipfile.is_zipfile(path):  # torch's older format has no checksums
        return None
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
        parts = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in parts:
        return "a TorchScript program, whose weights are torch.jit.load(path).state_dict()"
    return "an exported program, whose weights are torch.export.load(path).state_dict" if _EXPORTED & parts else None


def _reason(error: Exception) -> str:
    unknown = re.search(r"GLOBAL (\S+)", str(error))  # torch names it in the midst of advice
    if unknown is not None:
        return f"it holds an object, {unknown[1]}"
    lines = str(error).splitlines()
    return lines[0].rstrip(". ") if lines and lines[0].strip() else type(error).__name__


def some(names: Iterable[str], between: str = ", ") -> str:
    """List the first few names.

    Example:
        >>> some("abcdefgh")
        'a, b, c, d, e, f and 2 more'
    """
    listed = list(names)
    more = f" and {len(listed) - MOST_LISTED} more" if len(listed) > MOST_LISTED else ""
    return between.join(listed[:MOST_LISTED]) + more
