"""The overlaid digits: their data, its program from end to end, and what it says when something is wrong."""

from __future__ import annotations

import gzip
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import multi_digits
import two_digits
from lightning_mtl import Weighting


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def few_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_digits, "MULTI_DIGITS", multi_digits.Overlay(offset=2, canvas=10, size=10, rounds=1))


def write_idx(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, stem: str, n: int, *, seed: int = 0, suffix: str = ".gz") -> None:
    """Digits of n different, constant gray values that are their labels' tens."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).permutation(n).astype(np.uint8) + 1
    write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", np.broadcast_to(values[:, None, None], (n, 28, 28)).copy())
    write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", values // 10 % 10)


# The data


def parts_of(splits: multi_digits.Splits) -> list[multi_digits.DigitPairs]:
    return [splits.train, splits.val, splits.test]


def assert_disjoint(splits: multi_digits.Splits) -> None:
    train, val, test = (set(pairs.digits.flatten().tolist()) for pairs in parts_of(splits))
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("seed", [0, 1])
def test_no_scan_is_in_two_splits_and_every_scan_is_in_one(seed: int) -> None:
    splits = multi_digits.load_splits(seed=seed)
    assert_disjoint(splits)
    assert torch.cat([pairs.digits.flatten() for pairs in parts_of(splits)]).unique().tolist() == list(range(1797))


def test_multi_digits_holds_two_real_scans_and_the_brighter_pixel_where_they_overlap() -> None:
    scans = load_digits()
    pairs = multi_digits.load_splits(seed=3).test
    for index in (0, len(pairs) - 1):
        left, right = pairs.digits[index].tolist()
        expected = np.zeros((10, 10))
        expected[:8, :8] = scans.images[left] / 16
        expected[2:, 2:] = np.maximum(expected[2:, 2:], scans.images[right] / 16)
        image, labels = pairs[index]
        torch.testing.assert_close(image, torch.tensor(expected, dtype=torch.float32))
        assert {task: int(label) for task, label in labels.items()} == {
            "left": scans.target[left],
            "right": scans.target[right],
        }


def test_every_scan_is_left_as_often_as_right_and_never_meets_itself() -> None:
    for pairs in parts_of(multi_digits.load_splits()):
        left, right = pairs.digits.T
        assert bool((left != right).all())
        assert left.sort().values.equal(right.sort().values)


def test_the_seed_decides_the_splits() -> None:
    first, again, other = (multi_digits.load_splits(seed=seed).test for seed in (0, 0, 1))
    assert first.images.equal(again.images)
    assert not first.digits.equal(other.digits)


def test_a_loader_yields_batches_of_the_chosen_tasks() -> None:
    test = multi_digits.load_splits().test
    images, targets = next(iter(test.only(["right"]).loader(7, shuffle=True)))
    assert images.shape == (7, 10, 10)
    assert {task: tuple(labels.shape) for task, labels in targets.items()} == {"right": (7,)}
    assert sum(len(images) for images, _ in test.loader(1000)) == len(test)


# MultiMNIST


@pytest.mark.parametrize(("stem", "suffix"), [("train", ".gz"), ("train10k", ".gz"), ("train", "")])
def test_multimnist_splits_training_files_that_come_alone(tmp_path: Path, stem: str, suffix: str) -> None:
    write_mnist(tmp_path, stem, 80, suffix=suffix)
    splits = multi_digits.load_splits(tmp_path)
    assert_disjoint(splits)
    assert [len(pairs) for pairs in parts_of(splits)] == [56, 8, 16]


def test_multimnist_keeps_the_separate_test_files_for_testing(tmp_path: Path) -> None:
    write_mnist(tmp_path / "raw", "train", 80)
    write_mnist(tmp_path / "raw", "t10k", 20, seed=1)
    splits = multi_digits.load_splits(tmp_path)
    assert_disjoint(splits)
    assert sorted(splits.test.digits[:, 0].tolist()) == list(range(80, 100))
    assert len(splits.train) + len(splits.val) == 80


def test_multimnist_is_built_as_its_authors_do(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 80)
    digits, _ = multi_digits.read_digits(tmp_path / "train-images-idx3-ubyte.gz")
    pairs = multi_digits.load_splits(tmp_path).train
    canvas = torch.zeros(36, 36)
    left, right = digits[pairs.digits[0]]
    canvas[:28, :28] = left
    canvas[6:34, 6:34] = torch.maximum(canvas[6:34, 6:34], right)
    resized = torch.nn.functional.interpolate(canvas[None, None], size=(28, 28), mode="nearest-exact")[0, 0]
    assert pairs.images[0].equal(resized)
    labels = (pairs.images[0].max() * 255).round() // 10 % 10
    assert labels in pairs.labels[0]


def test_a_folder_that_does_not_exist_is_named_with_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*train-images-idx3-ubyte\.gz"):
        multi_digits.load_splits(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no MNIST images.*train-images-idx3-ubyte\.gz"):
        multi_digits.load_splits(tmp_path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 80)
    labels, images = tmp_path / "train-labels-idx1-ubyte.gz", tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(labels, np.zeros(79, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"holds shape \[80, 28, 28\] and train-labels.* \[79\]"):
        multi_digits.load_splits(tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte\.gz is missing"):
        multi_digits.load_splits(tmp_path)
    whole = images.read_bytes()
    for content in (whole[:100], b"no gzip at all", gzip.compress(b"\0\0\x0d\3" + bytes(12)), gzip.compress(b"")):
        images.write_bytes(content)
        with pytest.raises(ValueError, match="is not an IDX file of bytes"):
            multi_digits.read_idx(images)


def test_too_few_digits_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 5)
    with pytest.raises(ValueError, match="5 digits are too few"):
        multi_digits.load_splits(tmp_path)


# The program


def scalars(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder)).Reload()
    return set(events.Tags()["scalars"])


def test_the_program_trains_compares_and_says_how_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_scans(monkeypatch)
    logs = tmp_path / "logs"
    two_digits.main(["--epochs", "1", "--repeats", "2", "--logdir", str(logs)])
    printed, complaints = capsys.readouterr()
    assert complaints == ""
    assert "Tip" not in printed
    for expected in ("accuracy %", "loss", "final weight", "Δm %", "GradNorm", "equal weights", "single-task"):
        assert expected in printed
    assert printed.count("(95 % interval over 2 seeds): within noise") + printed.count("beyond noise") == 2
    assert f"tensorboard --logdir {logs}/MultiDigits-0" in printed
    folder = logs / "MultiDigits-0"
    assert {path.name for path in folder.iterdir()} == {"GradNorm", "equal", "single-left", "single-right"}
    assert scalars(folder / "GradNorm") >= {"loss/left", "weight/left", "weight/right", "val/accuracy/right"}
    assert scalars(folder / "single-left") & {"loss/left", "loss/right"} == {"loss/left"}


def test_a_second_start_keeps_the_first_ones_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_scans(monkeypatch)
    (tmp_path / "MultiDigits-0").mkdir()
    two_digits.main(["--weighting", "MGDA", "--epochs", "1", "--repeats", "1", "--logdir", str(tmp_path)])
    assert "one seed cannot tell that from noise" in capsys.readouterr().out
    assert (tmp_path / "MultiDigits-1" / "MGDA").is_dir()


def test_multimnist_trains_from_the_folder_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path / "mnist", "train10k", 200)
    monkeypatch.setenv("LIGHTNING_MTL_DATA", str(tmp_path))
    two_digits.main(["--epochs", "1", "--logdir", str(tmp_path / "logs")])
    assert "MultiMNIST: 140 train, 20 val, 40 test pairs" in capsys.readouterr().out


@pytest.mark.parametrize("name", two_digits.CHOICES)
def test_every_method_can_be_chosen(name: str) -> None:
    (made,) = two_digits.Run(name, method=two_digits.parse(["--weighting", name]).weighting).weighting()
    assert isinstance(made, Weighting)
    assert type(made).__name__ == name


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--weighting", "Gradnorm"], "invalid choice: 'Gradnorm' (choose from"),
        (["--epochs", "0"], "'0' must be a whole number of at least 1"),
    ],
)
def test_wrong_options_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        two_digits.main(argv)
    assert says in capsys.readouterr().err


def test_a_missing_data_folder_takes_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^two_digits\.py: the data folder .*nowhere does not exist; .*$") as refused:
        two_digits.main(["--data-dir", str(tmp_path / "nowhere")])
    assert "\n" not in str(refused.value)


def test_noise_is_called_noise() -> None:
    def scores(*accuracies: float) -> list[two_digits.Scores]:
        return [{task: two_digits.Score(value, 0.0, 1.0) for task in multi_digits.TASKS} for value in accuracies]

    before = scores(90.0, 91.0, 92.0)
    assert "+0.0 points of accuracy ± 0.0" in two_digits.compare("A", before, "B", before)
    assert two_digits.compare("A", scores(91.0, 90.5, 92.3), "B", before).endswith("within noise.")
    assert two_digits.compare("A", scores(93.0, 94.1, 94.9), "B", before).endswith("beyond noise.")
    assert "--repeats 3" in two_digits.compare("A", before[:1], "B", before[:1])
