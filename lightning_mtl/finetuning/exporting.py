"""Exports a model's predictions to a file that needs neither this package nor Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_mtl.module import MultiTaskModule, call_trunk
from lightning_mtl.trunk import TrunkParts

Format = Literal["torch.export", "onnx"]
SUFFIXES = {"torch.export": ".pt2", "onnx": ".onnx"}
ONNX = ("onnx", "onnxscript", "onnxruntime")


class Predictor(nn.Module):
    """Predicts with a copy of the trunk and of some heads, without losses, metrics and Lightning.

    Args:
        module: The model; its parts are copied, compiled ones without their compilation.
        tasks: The tasks to predict.

    Example:
        >>> from lightning_mtl import Task
        >>> model = MultiTaskModule(nn.Linear(4, 8), {"age": nn.Linear(8, 1)}, {"age": Task(nn.L1Loss())})
        >>> Predictor(model, ["age"])(torch.zeros(2, 4))["age"].shape
        torch.Size([2, 1])
    """

    def __init__(self, module: MultiTaskModule, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(_uncompiled(module.trunk))
        self.parts = TrunkParts(self.trunk, module.tasks)
        self.heads = nn.ModuleDict({task: copy.deepcopy(_uncompiled(module.heads[task])) for task in tasks})
        # What a trunk's dict has to hold to count as features for each head, as in MultiTaskModule.
        self.needed = set(tasks) if self.parts.per_task else set(module.heads.keys())
        self.requires_grad_(False).eval()

    def forward(self, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401 - whatever the trunk takes
        """Predict ``{task: head(trunk(inputs))}``."""
        features = call_trunk(self.parts, inputs, list(self.heads))
        split = isinstance(features, Mapping) and features.keys() >= self.needed
        return {task: head(features[task] if split else features) for task, head in self.heads.items()}


def export(
    module: MultiTaskModule,
    example_inputs: Any,  # noqa: ANN401 - whatever the trunk takes
    path: str | Path,
    *,
    tasks: Iterable[str] | None = None,
    format: Format = "torch.export",  # noqa: A002 - what it is called everywhere
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Path:
    r"""Write the trunk and all heads, or some, to a file for inference, and check that it predicts the same.

    The file is read back and asked for predictions of the example, and of its first half where the batch is dynamic;
    they have to be within ``tolerance`` of the model's, in evaluation mode: :math:`|y - y'| \le t (1 + |y|)`.

    Args:
        module: The model, which stays as it is.
        example_inputs: Inputs as in a batch: a tensor, a tuple of the trunk's positional arguments, or a dict of its
            keyword arguments, with the samples along the first dimension of each tensor.
        path: The file, ``.pt2`` for ``torch.export`` and ``.onnx`` for ONNX.
        tasks: The tasks to predict; None for all.
        format: ``"torch.export"``, for torch from Python or C++, or ``"onnx"``, which asks for the extra ``onnx``.
        dynamic_batch: Let the file take any number of samples, not just the example's.
        tolerance: t above.

    Returns:
        The path. ``torch.export.load(path).module()`` takes one argument, the inputs, in the form of the example, and
        returns ``{task: prediction}``. An ONNX file's outputs are named as the tasks, its inputs ``input``
        (``input_0``, ... for a tuple) or as the dict's keys.

    Raises:
        ImportError: For ONNX without its packages.
        ValueError: If a task or the format is unknown, if the module has a ``forward`` of its own, which the file would
            not follow, if the model cannot be traced, or if the file predicts something else; no file is left then.

    Example:
        >>> import tempfile
        >>> from lightning_mtl import Task
        >>> model = MultiTaskModule(nn.Linear(4, 8), {"age": nn.Linear(8, 1)}, {"age": Task(nn.L1Loss())})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export(model, torch.zeros(2, 4), f"{folder}/age.pt2")
        ...     predict = torch.export.load(file).module()
        >>> predict(torch.zeros(7, 4))["age"].shape
        torch.Size([7, 1])
    """
    wanted = list(module.tasks) if tasks is None else list(tasks)
    path = Path(path)
    _check_predictions(module, wanted, path, format)
    predictor = Predictor(module, wanted)
    examples = [example_inputs]
    if dynamic_batch:
        # Tracing takes a dimension of 1 for a constant, so that there are two samples at least in either check.
        whole = _samples(example_inputs, lambda x: torch.cat([x] * 4))
        examples = [whole, _samples(whole, lambda x: x[: len(x) // 2])]
    partial = path.with_name(f".partial-{path.name}")
    try:
        with torch.no_grad():
            if format == "onnx":
                _write_onnx(predictor, examples[0], partial, dynamic_batch=dynamic_batch)
            else:
                torch.export.save(_trace(predictor, examples[0], dynamic_batch=dynamic_batch), partial)
            for given in examples:
                found = _run_onnx(partial, wanted, given) if format == "onnx" else _run_exported(partial, given)
                _compare(predictor(given), found, path, tolerance)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _check_predictions(module: MultiTaskModule, tasks: Sequence[str], path: Path, format: str) -> None:  # noqa: A002
    if format not in SUFFIXES:
        raise ValueError(f"export(format={format!r}) must be one of {list(SUFFIXES)}.")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"export(path={str(path)!r}) must end in {SUFFIXES[format]!r} for format={format!r}.")
    if unknown := [task for task in tasks if task not in module.tasks]:
        raise ValueError(f"export(tasks=...) names {unknown}, but the tasks are {list(module.tasks)}.")
    if not tasks:
        raise ValueError(f"export(tasks=[]) leaves nothing to predict; the tasks are {list(module.tasks)}.")
    if type(module).forward is not MultiTaskModule.forward:
        raise ValueError(
            f"{type(module).__name__} has a forward of its own, and export writes the trunk and the heads; move what "
            "forward adds into them, or call torch.export.export(module, ...) by hand."
        )
    if format == "onnx" and (lacking := [name for name in ONNX if find_spec(name) is None]):
        raise ImportError(f"export(format='onnx') needs {' and '.join(lacking)}; pip install 'lightning-mtl[onnx]'.")


def _uncompiled(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _samples(example: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """The example with its samples changed; numbers, and tensors without a dimension, stay as they are."""

    def changed(x: Tensor) -> Tensor:
        return change(x) if x.ndim else x

    return pytree.tree_map_only(Tensor, changed, example)


def _trace(predictor: Predictor, example: Any, *, dynamic_batch: bool) -> torch.export.ExportedProgram:  # noqa: ANN401
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        of_each = pytree.tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.ndim else None, example)
        shapes = {"inputs": of_each}
    try:
        # Not strict, as is the default from torch 2.7 on: the strict tracer fails at some of this package's code.
        return torch.export.export(predictor, (example,), dynamic_shapes=shapes, strict=False)
    # The tracer raises RuntimeErrors; before torch 2.7, AssertionErrors for a number of samples built in.
    except (RuntimeError, ValueError, AssertionError) as error:
        fixed = ", or has a number of samples built in (dynamic_batch=False keeps the example's)" if shapes else ""
        raise ValueError(
            f"torch.export cannot trace the trunk and the heads of {list(predictor.heads)}: {_first_line(error)} A "
            f"forward that branches on values{fixed}, has to be rewritten."
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _write_onnx(predictor: Predictor, example: Any, path: Path, *, dynamic_batch: bool) -> None:  # noqa: ANN401
    program = _trace(predictor, example, dynamic_batch=dynamic_batch)
    torch.onnx.export(
        program,
        f=path,
        input_names=_input_names(example),
        output_names=list(predictor.heads),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _input_names(example: Any) -> list[str]:  # noqa: ANN401
    if isinstance(example, Mapping):
        return list(example)
    number = len(example) if isinstance(example, tuple | list) else 1
    return ["input"] if number == 1 else [f"input_{index}" for index in range(number)]


def _run_exported(path: Path, example: Any) -> dict[str, Tensor]:  # noqa: ANN401
    found: dict[str, Tensor] = torch.export.load(path).module()(example)
    return found


def _run_onnx(path: Path, tasks: Sequence[str], example: Any) -> dict[str, Tensor]:  # noqa: ANN401
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    values = [value.cpu().numpy() for value in pytree.tree_leaves(example) if isinstance(value, Tensor)]
    names = [given.name for given in session.get_inputs()]
    found = session.run(list(tasks), dict(zip(names, values, strict=True)))
    return {task: torch.from_numpy(value) for task, value in zip(tasks, found, strict=True)}


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, tolerance: float) -> None:
    for task, value in expected.items():
        other = found[task].to(value.device)
        if other.shape != value.shape or not torch.allclose(other, value, rtol=tolerance, atol=tolerance):
            far = "" if other.shape != value.shape else f", at most {(other - value).abs().max():.2g} apart"
            raise ValueError(
                f"The file predicts something else for {task!r} than the model: shape {list(other.shape)} for "
                f"{list(value.shape)}{far}. {path} was not written. A forward that draws random numbers in evaluation "
                "mode, or branches on values, cannot be exported; raise tolerance for low precision."
            )
