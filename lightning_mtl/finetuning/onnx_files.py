"""ONNX files: how inputs and outputs are named in them, writing and running."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Refuse ONNX without its packages.

    Raises:
        ImportError: Saying what to install.
    """
    if lacking := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ImportError(f"export(format='onnx') needs {' and '.join(lacking)}; pip install {' '.join(lacking)}.")


class Flat(nn.Module):
    """A predictor whose outputs are a tuple of tensors: ONNX knows no dicts."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, inputs: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - whatever the trunk takes
        """Predict all outputs, in the order of their names."""
        # A copy, so that one tensor may be two outputs, or an input be an output: each needs a name of its own.
        return tuple(value.clone() for value in pytree.tree_leaves(self.predictor(inputs)) if value is not None)


def named_leaves(tree: Any, name: str) -> dict[str, Any]:  # noqa: ANN401 - any nested structure
    """Name each leaf that is not None by its path: ``name``, ``name.key``, ``name.0``.

    Example:
        >>> named_leaves({"boxes": (1, 2), "none": None}, "det")
        {'det.boxes.0': 1, 'det.boxes.1': 2}
    """
    found: dict[str, Any] = {}
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path]
        whole = ".".join([name, *parts])
        if leaf is None:
            continue
        if whole in found:
            raise ValueError(f"export would name two tensors {whole!r}; give their keys other names.")
        found[whole] = leaf
    return found


def input_names(example: Any, outputs: Iterable[str] = ()) -> dict[str, Tensor]:  # noqa: ANN401 - whatever the trunk takes
    """Name the inputs' tensors: ``input``, ``input_0``, ... or as a dict's keys; none as an output.

    Example:
        >>> x = torch.zeros(2)
        >>> list(input_names((x, {"mask": x}))), list(input_names({"depth": x, "rgb": x}, ["depth"]))
        (['input_0', 'input_1.mask'], ['depth.input', 'rgb'])
    """
    if isinstance(example, dict):
        parts = example
    elif isinstance(example, tuple | list) and len(example) > 1:
        parts = {f"input_{index}": part for index, part in enumerate(example)}
    else:
        parts = {"input": example[0] if isinstance(example, tuple | list) else example}
    leaves = {name: leaf for key, part in parts.items() for name, leaf in named_leaves(part, str(key)).items()}
    taken = set(outputs)
    return {
        f"{name}.input" if name in taken else name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)
    }


def write(program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Write a traced :class:`Flat` as an ONNX file."""
    written = torch.onnx.export(
        program, input_names=list(inputs), output_names=list(outputs), dynamo=True, verbose=False
    )
    if written is None:  # for the type checker: it is returned where no file is named
        raise RuntimeError("torch.onnx.export returned nothing.")
    ends = {*written.model.graph.inputs, *written.model.graph.outputs}
    for node in written.model.graph:
        for value in node.outputs:
            # A value in between that is called as a task, such as "linear", would be defined twice.
            if value not in ends and value.name in {*inputs, *outputs}:
                value.name = f"{value.name}.value"
    written.save(str(path), external_data=False)


def run(path: Path, example: Any, outputs: Sequence[str]) -> dict[str, Tensor]:  # noqa: ANN401
    """Run a file on the CPU, its inputs given by their names."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    given = {name: value.cpu().numpy() for name, value in input_names(example, outputs).items()}
    found = session.run(list(outputs), given)
    return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}
