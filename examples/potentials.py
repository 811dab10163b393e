"""A descriptor-based potential for forces.py, and its data: a cluster of Morse atoms, or an extended XYZ file."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mtl import BalancedModule, Task, TaskOutput

FIELD = re.compile(r'(\w+)=(?:"([^"]*)"|(\S+))')


@dataclass(frozen=True)
class Structures:
    """Geometries of the same atoms.

    Attributes:
        species: One symbol an atom, N of them.
        positions: ``[n, N, 3]``.
        energies: ``[n]``.
        forces: ``[n, N, 3]``, minus the derivative of the energy by the positions.
        units: Of energy and length.
    """

    species: tuple[str, ...]
    positions: Tensor
    energies: Tensor
    forces: Tensor
    units: tuple[str, str]

    def __len__(self) -> int:
        return len(self.energies)

    def of(self, chosen: Tensor) -> Structures:
        """Some of the geometries."""
        return Structures(self.species, self.positions[chosen], self.energies[chosen], self.forces[chosen], self.units)


def morse_energies(positions: Tensor, depth: float = 1.0, steepness: float = 1.5) -> Tensor:
    r"""The energy :math:`\sum_{i<j} D \big( (1 - e^{-a (r_{ij} - 1)})^2 - 1 \big)`, ``[n]``, of ``[n, N, 3]``."""
    first, second = torch.triu_indices(positions.shape[1], positions.shape[1], offset=1)
    distances = (positions[:, first] - positions[:, second]).norm(dim=-1)
    return (depth * ((1 - torch.exp(-steepness * (distances - 1))).square() - 1)).sum(1)


def morse_cluster(number: int, seed: int, spread: float = 0.08) -> Structures:
    """Six Morse atoms, shaken about the corners of an octahedron."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.cat([torch.eye(3), -torch.eye(3)]) * 0.68
    shaken = corners + spread * torch.randn(number, 6, 3, generator=generator)
    positions = shaken.requires_grad_()
    energies = morse_energies(positions)
    (slope,) = torch.autograd.grad(energies.sum(), positions)
    return Structures(("X",) * 6, positions.detach(), energies.detach(), -slope, ("D", "r0"))


def read_extended_xyz(path: Path) -> Structures:
    """Read an extended XYZ file, gzipped or not: the same atoms in each frame, ``energy=`` and a column ``forces``.

    Raises:
        ValueError: Naming the frame that is otherwise.
    """
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()
    frames: list[Frame] = []
    while lines:
        frames.append(_frame(lines, f"{path}: frame {len(frames)}"))
        del lines[: len(frames[0].species) + 2]
        if frames[-1].species != frames[0].species:
            raise ValueError(f"{path}: frame {len(frames) - 1} has other atoms, or an other order, than the first.")
    if not frames:
        raise ValueError(f"{path} holds no frame.")
    energies = torch.tensor([frame.energy for frame in frames], dtype=torch.float64)
    # Differences of large energies are what counts: taken before they are rounded to single precision.
    energies = (energies - energies.mean()).float()
    positions, forces = (torch.tensor([getattr(frame, name) for frame in frames]) for name in ("positions", "forces"))
    return Structures(frames[0].species, positions, energies, forces, ("eV", "Å"))


class Frame(NamedTuple):
    """One geometry of a file."""

    species: tuple[str, ...]
    positions: list[list[float]]
    forces: list[list[float]]
    energy: float


def _frame(lines: Sequence[str], place: str) -> Frame:
    """The frame that lines begin with."""
    try:
        atoms = [line.split() for line in lines[2 : 2 + int(lines[0])]]
        fields = {name: quoted or plain for name, quoted, plain in FIELD.findall(lines[1])}
        columns, names, end = dict[str, slice](), fields["Properties"].split(":"), 0
        for name, width in zip(names[::3], map(int, names[2::3]), strict=True):
            columns[name] = slice(end, end + width)
            end += width
        positions, forces = ([[float(x) for x in atom[columns[name]]] for atom in atoms] for name in ("pos", "forces"))
        if len(atoms) < int(lines[0]) or any(len(vector) != 3 for vector in [*positions, *forces]):
            raise ValueError("atoms or numbers are missing")
        species = tuple(atom[columns["species"]][0] for atom in atoms)
        return Frame(species, positions, forces, float(fields["energy"]))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"{place} is not a number of atoms, a line with Properties=species:S:1:pos:R:3:forces:R:3 and energy=, and "
            f"a line for each atom ({error})."
        ) from error


class Potential(BalancedModule):
    """Energies as a network's function of all inverse distances, forces as its derivative.

    Inverse distances change neither as the whole turns nor as it moves, and forces that are a derivative do no work on
    a closed way. The network takes its atoms in one order.

    Args:
        data: The training set, whose means and standard deviations scale inputs and energies.
        steps: The length of the training, over which the learning rate falls to a hundredth.
        lr: Where it begins.
    """

    def __init__(self, data: Structures, steps: int, lr: float = 3e-3) -> None:
        super().__init__({"energy": Task(nn.functional.mse_loss), "forces": Task(nn.functional.mse_loss)})
        self.first, self.second = torch.triu_indices(len(data.species), len(data.species), offset=1)
        descriptors = self.descriptors(data.positions)
        # Constants of the data, which a checkpoint holds.
        self.register_buffer("mean", descriptors.mean(0))
        self.register_buffer("std", descriptors.std(0))
        self.register_buffer("center", data.energies.mean())
        self.register_buffer("unit", data.energies.std())
        self.net = nn.Sequential(
            nn.Linear(len(self.first), 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )
        self.steps, self.lr = steps, lr

    def descriptors(self, positions: Tensor) -> Tensor:
        """All inverse distances, ``[n, N (N - 1) / 2]``."""
        return 1 / (positions[:, self.first] - positions[:, self.second]).norm(dim=-1)  # type: ignore[no-any-return]

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energies, ``[n]``, and forces, ``[n, N, 3]``."""
        with torch.enable_grad():
            positions = positions.clone().requires_grad_()
            inputs = (self.descriptors(positions) - self.mean) / self.std  # type: ignore[operator]
            energies = self.net(inputs)[:, 0] * self.unit + self.center
            (slope,) = torch.autograd.grad(energies.sum(), positions, create_graph=self.training)
        return energies, -slope

    def task_losses(self, batch: Sequence[Tensor]) -> dict[str, TaskOutput]:
        positions, energies, forces = batch
        found = self(positions)
        residuals = {"energy": found[0] - energies, "forces": found[1] - forces}
        return {task: TaskOutput(r.square().mean(), residuals=r) for task, r in residuals.items()}

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's dictionary
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def errors(self, data: Structures) -> dict[str, float]:
        """Mean absolute errors: of the energies, and of the forces' components."""
        self.eval()
        energies, forces = (found.detach() for found in self(data.positions))
        return {
            "energy": float((energies - data.energies).abs().mean()),
            "forces": float((forces - data.forces).abs().mean()),
        }
