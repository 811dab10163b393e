"""The examples of physics: their equations beside known solutions, their data, and their programs in short."""

from __future__ import annotations

import gzip
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equations
import forces
import physics
import potentials


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs set these for their whole process, which here is the tests'."""
    monkeypatch.setenv("COLUMNS", "120")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


class Known(nn.Module):
    """A solution in closed form, as a network would give it."""

    def __init__(self, equation: equations.Equation) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, points: Tensor) -> Tensor:
        x, y = points[..., 0], points[..., 1]
        if isinstance(self.equation, equations.Helmholtz):
            return (torch.sin(math.pi * x) * torch.sin(2 * math.pi * y))[..., None]
        return (x / (1 + y))[..., None]  # of other initial values than the example's


def test_helmholtz() -> None:
    equation = equations.Helmholtz()
    net, points = Known(equation), equation.draw(torch.Generator().manual_seed(0))
    for residual in equation.residuals(net, points).values():
        torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=2e-4)
    assert (points["boundary"].abs().max(1).values == 1).all()
    assert {(int(x), int(y)) for x, y in points["boundary"].tolist()} >= {(1, 0), (-1, 0), (0, 1), (0, -1)}
    grid, found = equation.reference()
    torch.testing.assert_close(found, net(grid)[..., 0], rtol=0, atol=1e-5)


def test_burgers() -> None:
    """The reference solves the equation itself: by differences on its grid."""
    equation = equations.Burgers(nu=0.1)
    grid, u = equation.reference((201, 201), quadrature=60)
    dx, dt = float(grid[1, 0, 0] - grid[0, 0, 0]), float(grid[0, 1, 1] - grid[0, 0, 1])
    u, inner = u.double(), slice(1, -1)
    in_time = (u[inner, 2:] - u[inner, :-2]) / (2 * dt)
    first = (u[2:, inner] - u[:-2, inner]) / (2 * dx)
    second = (u[2:, inner] - 2 * u[inner, inner] + u[:-2, inner]) / dx**2
    assert float((in_time + u[inner, inner] * first - 0.1 * second).abs()[:, 10:].max()) < 0.02
    torch.testing.assert_close(u[:, 0], -torch.sin(math.pi * grid[:, 0, 0]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(u[[0, -1]], torch.zeros_like(u[[0, -1]]), rtol=0, atol=1e-5)
    points = equation.draw(torch.Generator().manual_seed(0))
    residuals = equation.residuals(Known(equation), points)
    start = points["initial"][:, 0]
    torch.testing.assert_close(residuals["initial"], start + torch.sin(math.pi * start))
    torch.testing.assert_close(residuals["residual"], torch.zeros(128), rtol=0, atol=1e-6)
    assert points["boundary"][:, 0].abs().eq(1).all()


@pytest.mark.parametrize("equation", [pytest.param("helmholtz", marks=pytest.mark.slow), "burgers"])
def test_physics_from_end_to_end(equation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["--equation", equation, "--weighting", "GradNorm", "--steps", "40", "--picture", str(picture)]
    found = physics.main([*arguments, "--scale", "10"])
    assert found.keys() == {"equal weights", "GradNorm"}
    assert all(0 < error < 50 for error in found.values())
    said = capsys.readouterr().out
    for word in ("Relative L2 error", f"{found['GradNorm']:.4f}", "boundary", str(picture)):
        assert word in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weighting", "Nothing"], "--weighting Nothing cannot be taken"),
        (["--weighting", "DTP"], "--weighting DTP cannot be taken"),
        (["--scale", "0"], "--scale 0.0 must be above 0"),
        (["--steps", "5"], "--steps 5 must be at least 20"),
    ],
)
def test_physics_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        physics.parse(arguments)
    assert message in capsys.readouterr().err


def test_morse_atoms() -> None:
    pair = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 1.5, 0.0]]])
    expected = [-1.0, (1 - math.exp(-0.75)) ** 2 - 1]
    torch.testing.assert_close(potentials.morse_energies(pair), torch.tensor(expected))
    data = potentials.morse_cluster(3, seed=1)
    step = 1e-3 * torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0))
    both = [potentials.morse_energies((data.positions + sign * step).double()) for sign in (1, -1)]
    slope = -(data.forces * 2 * step).sum((1, 2))
    torch.testing.assert_close((both[0] - both[1]).float(), slope, rtol=1e-2, atol=1e-6)


def test_forces_are_minus_the_derivative_of_the_energy_and_do_not_depend_on_where_the_atoms_are() -> None:
    torch.manual_seed(0)
    data = potentials.morse_cluster(5, seed=1)
    module = potentials.Potential(data, steps=10).double()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    positions = data.positions.double()
    energies, found = module(positions)
    turned, turned_forces = module(positions @ turn + 2.0)
    torch.testing.assert_close(turned, energies)
    torch.testing.assert_close(turned_forces, found @ turn)
    step = 1e-5 * torch.randn_like(positions)
    difference = module(positions + step)[0] - module(positions - step)[0]
    torch.testing.assert_close(difference, -2 * (found * step).sum((1, 2)), rtol=1e-4, atol=1e-10)


def frame(energy: float, shift: float, species: str = "CH") -> str:
    rows = [f"{name}  {i + shift:.4f} 0.5 0.25  {shift:.3f} {-i:.1f} 2.0" for i, name in enumerate(species)]
    header = f'Lattice="9.0 0.0" Properties=species:S:1:pos:R:3:forces:R:3 name=x energy={energy} pbc="F F F"'
    return "\n".join([str(len(rows)), header, *rows]) + "\n"


@pytest.mark.parametrize("packed", [False, True])
def test_extended_xyz(packed: bool, tmp_path: Path) -> None:
    text = (frame(-4000.125, 0.1) + frame(-4000.5, 0.2)).encode()
    path = tmp_path / ("two.xyz.gz" if packed else "two.xyz")
    path.write_bytes(gzip.compress(text) if packed else text)
    data = potentials.read_extended_xyz(path)
    assert data.species == ("C", "H")
    np.testing.assert_allclose(data.energies, [0.1875, -0.1875])
    torch.testing.assert_close(data.positions[1], torch.tensor([[0.2, 0.5, 0.25], [1.2, 0.5, 0.25]]))
    torch.testing.assert_close(data.forces[0], torch.tensor([[0.1, 0.0, 2.0], [0.1, -1.0, 2.0]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no frame"),
        (frame(1.0, 0.0) + frame(1.0, 0.0, "HC"), "frame 1 has other atoms"),
        (frame(1.0, 0.0).replace("forces", "speeds"), "frame 0 is not a number of atoms, .*forces"),
        (frame(1.0, 0.0) + "2\n", "frame 1 is not a number of atoms"),
        (frame(1.0, 0.0).rsplit("H", 1)[0], "frame 0 .*atoms or numbers are missing"),
    ],
)
def test_a_file_of_another_form(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.xyz").write_text(text)
    with pytest.raises(SystemExit, match=r"forces.py: .*data.xyz.*"):
        forces.main(["--data", str(tmp_path / "data.xyz")])
    with pytest.raises(ValueError, match=message):
        potentials.read_extended_xyz(tmp_path / "data.xyz")


def test_forces_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forces, "RATIOS", (0.01, 100.0))
    picture = tmp_path / "picture.png"
    found = forces.main(["--train", "20", "--steps", "30", "--picture", str(picture)])
    assert found.keys() == {"0.01 : 1", "100 : 1", *forces.METHODS}
    assert all(0 < error < 10 for errors in found.values() for error in errors.values())
    said = capsys.readouterr().out
    for word in ("forces, D/r0", "NashMTL", f"{found['NashMTL']['energy']:.4g}", str(picture)):
        assert word in said
    assert picture.read_bytes().startswith(b"\x89PNG")
