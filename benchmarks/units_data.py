"""Public data in natural units for ``units.py``: river flow, London schools, small molecules."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

RIVERS, SCHOOLS = "rf1/rf1.arff.gz", "school/school.mat"
STRIDE = 14  # one molecule in so many
MOST_ATOMS = 29
CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
# The eleven targets that Navon et al. (2022, arXiv:2202.01017) learn, and the columns they are in: debye, bohr³,
# hartree, bohr², cal/(mol K).
TARGETS = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "U0": "InternalEnergy_0K_au",
    "U": "InternalEnergy_298K_au",
    "H": "Enthalphy_298K_au",
    "G": "GibbsFreeEnergy_298K_au",
    "Cv": "Heatcapacity_Cv_cal_mol_K",
}


@dataclass(frozen=True)
class Table(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Inputs ``[n, d]`` and the targets of regressions, ``[n, 1]`` each."""

    inputs: Tensor
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inputs[rows], {task: target[rows] for task, target in self.targets.items()}


def find(folder: Path | None, name: str) -> Path:
    """A file of the data folder.

    Raises:
        FileNotFoundError: If there is no folder, or no such file in it.
    """
    if folder is None or not (folder / name).is_file():
        where = "no --data-dir was given" if folder is None else f"{folder} has no such file"
        raise FileNotFoundError(f"{name} is needed, and {where}; give --data-dir FOLDER with the public file in it.")
    return folder / name


def rivers(folder: Path | None) -> Table:
    """RF1 (Spyromitros-Xioufis et al., 2016): flow of eight rivers in 48 hours; missing inputs are the mean."""
    with gzip.open(find(folder, RIVERS), "rt") as file:
        lines = [line.strip() for line in file]
    names = [line.split()[1].strip("'") for line in lines if line.lower().startswith("@attribute")]
    rows = lines[[line.lower() for line in lines].index("@data") + 1 :]
    values = np.array([[np.nan if entry == "?" else float(entry) for entry in row.split(",")] for row in rows if row])
    inputs = values[:, :-8]
    inputs = np.where(np.isnan(inputs), np.nanmean(inputs, axis=0), inputs)
    kept = ~np.isnan(values[:, -8:]).any(axis=1)
    targets = torch.as_tensor(values[kept, -8:], dtype=torch.float32)
    tasks = [name.partition("_")[0] for name in names[-8:]]
    return Table(
        torch.as_tensor(inputs[kept], dtype=torch.float32), dict(zip(tasks, targets.split(1, dim=1), strict=True))
    )


def schools(folder: Path | None) -> list[tuple[Tensor, Tensor]]:
    """Examinations of 15,362 pupils: for each of 139 schools, inputs ``[n, 28]`` and marks ``[n]``."""
    from scipy.io import loadmat  # here, since it takes half a second

    held = loadmat(find(folder, SCHOOLS))
    pairs = zip(held["X"].ravel(), held["Y"].ravel(), strict=True)
    return [(torch.as_tensor(x.astype(np.float32)), torch.as_tensor(y.astype(np.float32)).flatten()) for x, y in pairs]


def molecules(folder: Path | None) -> Table:
    """QM9 (Ramakrishnan et al., 2014): eleven properties of small molecules, of which one in 14 is taken.

    The files are those of the package ``qm9pack``, installed (``pip install --no-deps qm9pack``; it is not imported),
    or in the folder ``qm9`` of the data folder. The inputs are computed from the atoms' places: how many there are of
    each element, the sorted eigenvalues of the Coulomb matrix (Rupp et al., 2012), and the radius of gyration.
    """
    inputs, targets = [], []
    for row in itertools.islice(_rows(_qm9(folder)), 0, None, STRIDE):
        inputs.append(describe(row["Elements"], row["XYZ_Ang"]))
        targets.append([float(row[column]) for column in TARGETS.values()])
    found = torch.tensor(targets, dtype=torch.float32)
    return Table(
        torch.as_tensor(np.array(inputs), dtype=torch.float32),
        dict(zip(TARGETS, found.split(1, dim=1), strict=True)),
    )


def _qm9(folder: Path | None) -> list[Path]:
    names = [f"qm9_part{number}.csv" for number in (1, 2, 3)]
    found = importlib.util.find_spec("qm9pack")
    if found is not None and found.origin is not None:
        return [Path(found.origin).parent / "data" / name for name in names]
    return [find(folder, f"qm9/{name}") for name in names]


def _rows(paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    for path in paths:
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def describe(elements: str, places: str) -> np.ndarray:
    """The inputs of a molecule, from its elements and places as the files have them."""
    symbols = json.loads(elements.replace("'", '"'))
    at = np.array([[float(number) for number in one.split(",")] for one in places.strip("[]").split("],[")])
    charges = np.array([CHARGES[symbol] for symbol in symbols], dtype=float)
    distances = np.linalg.norm(at[:, None] - at[None], axis=-1)
    np.fill_diagonal(distances, 1.0)
    coulomb = np.outer(charges, charges) / distances
    np.fill_diagonal(coulomb, 0.5 * charges**2.4)
    eigenvalues = np.zeros(MOST_ATOMS)
    eigenvalues[: len(charges)] = np.sort(np.linalg.eigvalsh(coulomb))[::-1]
    counts = [symbols.count(symbol) for symbol in CHARGES]
    gyration = np.sqrt(((at - at.mean(0)) ** 2).sum(1).mean())
    return np.concatenate([counts, eigenvalues, [gyration]])
