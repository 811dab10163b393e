"""webdataset, Hugging Face datasets and torchdata: their iterables and loaders, with workers and on two ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl.data import MultiTaskDataModule
from tests.distributed.pairs import Pair
from tests.loaders import dividing
from tests.loaders.samples import numbers, sample

wds = pytest.importorskip("webdataset")
hf = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.slow,  # both import for seconds
    # torchdata's loader calls what torch has deprecated: nothing of ours.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # webdataset leaves its files to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZE, SHARDS = 22, 3


def write_shards(folder: Path) -> str:
    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for number in range(shard, SIZE, SHARDS):
                inputs, target = sample(number)
                tar.write({"__key__": f"{number:03}", "x.pth": inputs, "y.pth": target})
    return str(folder / f"{{0..{SHARDS - 1}}}.tar")


def web(shards: str, **arguments: Any) -> Any:
    # Fewer shards than workers are no mistake here.
    return (
        wds.WebDataset(shards, shardshuffle=False, empty_check=False, **arguments).decode().to_tuple("x.pth", "y.pth")
    )


def streamed(*, split: bool = False) -> Any:
    from datasets.distributed import split_dataset_by_node

    dataset = hf.Dataset.from_dict({"number": list(range(SIZE))}).to_iterable_dataset(num_shards=SHARDS)
    return split_dataset_by_node(dataset, dist.get_rank(), dist.get_world_size()) if split else dataset


def collate(rows: list[dict[str, int]]) -> list[torch.Tensor]:
    return [torch.stack(part) for part in zip(*(sample(row["number"]) for row in rows), strict=True)]


ANYWHERE: dict[str, Callable[[str, int], Any]] = {
    "WebDataset": lambda shards, workers: DataLoader(web(shards, nodesplitter=None), batch_size=4, num_workers=workers),
    "batched": lambda shards, workers: DataLoader(
        web(shards, nodesplitter=wds.split_by_node).batched(4), batch_size=None, num_workers=workers
    ),
    "WebLoader": lambda shards, workers: wds.WebLoader(
        web(shards, nodesplitter=wds.split_by_node).batched(4), batch_size=None, num_workers=workers
    ),
    "WebLoader, batched anew": lambda shards, workers: (
        wds.WebLoader(web(shards, nodesplitter=None).batched(4), batch_size=None, num_workers=workers)
        .unbatched()
        .batched(3)
    ),
    "datasets": lambda _, workers: DataLoader(streamed(), batch_size=4, collate_fn=collate, num_workers=workers),
    "datasets, stateful": lambda _, workers: StatefulDataLoader(
        streamed(), batch_size=4, collate_fn=collate, num_workers=workers
    ),
}
ON_RANKS: dict[str, Callable[[str, int], Any]] = {
    **ANYWHERE,
    "datasets, split": lambda _, workers: DataLoader(
        streamed(split=True), batch_size=4, collate_fn=collate, num_workers=workers
    ),
    "datasets, split and stateful": lambda _, workers: StatefulDataLoader(
        streamed(split=True), 4, collate_fn=collate, num_workers=workers
    ),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ANYWHERE)
def test_each_sample_is_read_once(name: str, workers: int, tmp_path: Path) -> None:
    for answer in (None, True, False):  # what is known needs none
        data = ANYWHERE[name](write_shards(tmp_path), workers)
        loader = MultiTaskDataModule(val={"a": data}, shard_iterables=answer).val_dataloader()
        found = itertools.chain(*(numbers(batch["a"][0]) for batch in loader))
        assert Counter(found) == Counter(range(SIZE))


def test_what_webdataset_says_of_itself_is_heard(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with pytest.raises(ValueError, match=r"val\['a'\] makes batches itself \(WebDataset.batched\)"):
        MultiTaskDataModule(val={"a": web(shards).batched(4)})
    resampled = MultiTaskDataModule(val={"a": wds.WebDataset(shards, resampled=True, shardshuffle=False)})
    with pytest.raises(ValueError, match="draws shards at random; evaluation takes each sample once"):
        resampled.val_dataloader()


def evaluate(shards: str, rank: int, ranks: int) -> dict[str, list[int]]:
    val = {f"{name} {workers}": make(shards, workers) for workers in (0, 2) for name, make in ON_RANKS.items()}
    return dividing.see(MultiTaskDataModule(val=val), list(val), ranks)


def test_two_ranks_read_each_sample_once(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.run(evaluate, write_shards(tmp_path), seconds=300)
    for name in first:
        assert Counter([*first[name], *second[name]]) == Counter(range(SIZE)), name
