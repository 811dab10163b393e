"""Exports a model's predictions to a file that needs neither this package nor Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_mtl.finetuning import onnx_files
from lightning_mtl.module import MultiTaskModule, call_trunk, check_parts
from lightning_mtl.trunk import TrunkParts

Format = Literal["torch.export", "onnx"]
SUFFIXES = {"torch.export": ".pt2", "onnx": ".onnx"}
SHORTEST = 4  # of a dynamic dimension in the example, whose half is tried, too; tracing takes 1 for a constant


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

    def forward(self, inputs: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever the trunk takes
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
    dynamic_dims: Collection[int] | Mapping[str, Collection[int]] = (),
    tolerance: float = 1e-4,
) -> Path:
    r"""Write the trunk and all heads, or some, to a file for inference, and check that it predicts the same.

    The file is read back and asked for predictions of the example, and of half of it along each dynamic dimension;
    they have to be within ``tolerance`` of the model's, in evaluation mode: :math:`|y - y'| \le t (1 + |y|)`.

    Args:
        module: The model, which stays as it is.
        example_inputs: Inputs as in a batch: a tensor, a tuple of the trunk's positional arguments, or a dict of its
            keyword arguments, with the samples along the first dimension of each tensor.
        path: The file, ``.pt2`` for ``torch.export`` and ``.onnx`` for ONNX.
        tasks: The tasks to predict; None for all.
        format: ``"torch.export"``, for torch from Python or C++, or ``"onnx"``, which asks for the extra ``onnx``.
        dynamic_batch: Let the file take any number of samples, not just the example's.
        dynamic_dims: Dimensions of the inputs, from 1 on, that may have other sizes than the example's, such as
            ``[1]`` for the length of sequences, or ``[2, 3]`` for images of any size: of all tensors that have them, or
            ``{"input_ids": [1]}`` of some, named as an ONNX file's inputs.
        tolerance: t above.

    Returns:
        The path. ``torch.export.load(path).module()`` takes one argument, the inputs, in the form of the example, and
        returns ``{task: prediction}``, a head's dicts and tuples included. An ONNX file's outputs are named as the
        tasks, ``<task>.<key>`` or ``<task>.<index>`` where a head returns several; its inputs ``input`` (``input_0``,
        ... for a tuple) or as the dict's keys, ``<key>.input`` where an output has that name.

    Raises:
        ImportError: For ONNX without its packages.
        ValueError: If a task or the format is unknown, if the module has a ``forward`` of its own, which the file would
            not follow, if a head returns what is no tensor, if the model cannot be traced, or if the file predicts
            something else; no file is left then.

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
    check_parts(module, "export")
    if isinstance(example_inputs, Mapping):  # a tokenizer's mapping is no dict, and tracing looks into dicts
        example_inputs = dict(example_inputs)
    wanted = list(module.tasks) if tasks is None else list(tasks)
    path = Path(path)
    _check_predictions(module, wanted, path, format)
    predictor = Predictor(module, wanted)
    # Tracing takes a dimension of 1 for a constant, so that there are two samples at least in either check.
    whole = _resized(example_inputs, lambda _, x: torch.cat([x] * 4)) if dynamic_batch else example_inputs
    dims = _dims_of(whole, dynamic_dims)
    examples = [whole]
    if dynamic_batch:
        examples.append(_resized(whole, lambda _, x: x[: len(x) // 2]))
    if any(dims.values()):
        examples.append(_resized(whole, lambda name, x: _halved(x, dims[name])))
    partial = path.with_name(f".partial-{path.name}")
    try:
        with torch.no_grad():
            outputs = _outputs(predictor, example_inputs)
            if format == "onnx":
                program = _trace(onnx_files.Flat(predictor), whole, dims, wanted, dynamic_batch=dynamic_batch)
                onnx_files.write(program, partial, list(onnx_files.input_names(whole, outputs)), list(outputs))
            else:
                _save(_trace(predictor, whole, dims, wanted, dynamic_batch=dynamic_batch), partial)
            for given in examples:
                if format == "onnx":
                    found = onnx_files.run(partial, given, list(outputs))
                else:
                    found = _outputs(torch.export.load(partial).module(), given)
                _compare(_outputs(predictor, given), found, path, tolerance)
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
    if format == "onnx":
        onnx_files.check_packages()


def _uncompiled(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _resized(example: Any, change: Callable[[str, Tensor], Tensor]) -> Any:  # noqa: ANN401
    """The example with its tensors changed; numbers, and tensors without a dimension, stay as they are."""
    names = iter(onnx_files.input_names(example))

    def changed(x: Tensor) -> Tensor:
        name = next(names)
        return change(name, x) if x.ndim else x

    return pytree.tree_map_only(Tensor, changed, example)


def _dims_of(example: Any, dims: Collection[int] | Mapping[str, Collection[int]]) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    """The dynamic dimensions of each of the example's tensors, beside that of the samples."""
    inputs = onnx_files.input_names(example)
    if isinstance(dims, Mapping):
        asked = {name: tuple(dims.get(name, ())) for name in inputs}
        wrong = [name for name in dims if name not in inputs]
        wrong += [name for name, own in asked.items() if not all(0 < dim < inputs[name].ndim for dim in own)]
    else:
        asked = {name: tuple(dim for dim in dims if dim < value.ndim) for name, value in inputs.items()}
        wrong = [str(dim) for dim in dims if dim < 1 or all(dim not in own for own in asked.values())]
    if wrong:
        raise ValueError(
            f"export(dynamic_dims={dims}) names {', '.join(wrong)}, which the example's inputs do not have, "
            f"{ {name: list(value.shape) for name, value in inputs.items()} }; dimensions count from 1 on, 0 being "
            "dynamic_batch's."
        )
    short = [
        f"{name} {list(inputs[name].shape)}"
        for name, own in asked.items()
        for dim in own
        if inputs[name].shape[dim] < SHORTEST
    ]
    if short:
        raise ValueError(
            f"export(dynamic_dims={dims}) needs an example of {SHORTEST} or more along each of them, found "
            f"{', '.join(short)}."
        )
    return asked


def _halved(x: Tensor, dims: Iterable[int]) -> Tensor:
    for dim in dims:
        x = x.narrow(dim, 0, x.shape[dim] // 2)
    return x


def _outputs(predict: Callable[[Any], Mapping[str, Any]], example: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Predict, each tensor by its name.

    Raises:
        ValueError: If something else is predicted.
    """
    found = {
        name: leaf
        for task, tree in predict(example).items()
        for name, leaf in onnx_files.named_leaves(tree, task).items()
    }
    if others := [f"{name} ({type(leaf).__name__})" for name, leaf in found.items() if not isinstance(leaf, Tensor)]:
        raise ValueError(
            f"export writes tensors, and dicts, lists and tuples of them, and the heads return {', '.join(others)}; "
            "have them return the others apart from forward."
        )
    return found


def _trace(
    predictor: nn.Module,
    example: Any,  # noqa: ANN401
    dims: Mapping[str, Iterable[int]],
    tasks: Sequence[str],
    *,
    dynamic_batch: bool,
) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic_batch or any(dims.values()):
        names = iter(dims)
        batch = {0: torch.export.Dim("batch")} if dynamic_batch else {}

        def shape(x: Any) -> dict[int, Any] | None:  # noqa: ANN401
            if not isinstance(x, Tensor):
                return None
            # Which sizes are the same, and how large they may be, the tracer finds out by itself.
            others = dict.fromkeys(dims[next(names)], torch.export.Dim.DYNAMIC)
            return batch | others if x.ndim else None

        shapes = {"inputs": pytree.tree_map(shape, example)}
    try:
        # Not strict, as is the default from torch 2.7 on: the strict tracer fails at some of this package's code.
        return torch.export.export(predictor, (example,), dynamic_shapes=shapes, strict=False)
    # The tracer raises RuntimeErrors; before torch 2.7, AssertionErrors for a number of samples built in.
    except (RuntimeError, ValueError, AssertionError) as error:
        fixed = ", or has a size built in (dynamic_batch=False keeps the example's samples)" if shapes else ""
        raise ValueError(
            f"torch.export cannot trace the trunk and the heads of {list(tasks)}: {_first_line(error)} A "
            f"forward that branches on values{fixed}, has to be rewritten."
        ) from error


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        torch.export.save(program, path)
    except NotImplementedError as error:  # a named tuple, for instance
        raise ValueError(
            f"torch.export cannot write what a head returns: {_first_line(error)} Return a dict, a list or a tuple, or "
            "export to ONNX."
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, tolerance: float) -> None:
    for name, value in expected.items():
        other = found[name].to(value.device)
        alike = other.shape == value.shape
        if not alike or not _is_close(other, value, tolerance):
            far = f", at most {(other.double() - value.double()).abs().max():.2g} apart" if alike else ""
            raise ValueError(
                f"The file predicts something else for {name!r} than the model: shape {list(other.shape)} for "
                f"{list(value.shape)}{far}. {path} was not written. A forward that draws random numbers in evaluation "
                "mode, or branches on values, cannot be exported; raise tolerance for low precision."
            )


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.is_floating_point() and not expected.is_complex():
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
