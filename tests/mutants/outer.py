"""Slips in loaders, transfer reports, fine-tuning and searches."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

LOADERS = "tests/loaders"
FINETUNING = "tests/finetuning"
TUNING = "tests/tuning"

OUTER = (
    Mutation(
        "a resumed loader begins anew",
        "data/loaders.py",
        "stream.load_state_dict(found[task])",
        "pass",
        f"{LOADERS}/test_resume.py",
        "every_mode",
    ),
    Mutation(
        "every pass over the samples has the same order",
        "data/order.py",
        'generator_for(self.seed, "order", self.name, position.passes)',
        'generator_for(self.seed, "order", self.name)',
        f"{LOADERS}/test_order.py",
    ),
    Mutation(
        "tasks come in the same order in every epoch",
        "data/loaders.py",
        'generator_for(self.seed, "mixing", epoch)',
        'generator_for(self.seed, "mixing", 0)',
        f"{LOADERS}/test_order.py",
        "another_order",
    ),
    Mutation(
        "a loader's epoch is one off",
        "data/loaders.py",
        "self._epoch = epoch\n",
        "self._epoch = epoch + 1\n",
        f"{LOADERS}/test_training.py",
        "takes_its_turns",
    ),
    Mutation(
        "both ranks see the same samples",
        "data/order.py",
        "range(min(position.samples + self.shard.rank, end)",
        "range(min(position.samples, end)",
        f"{LOADERS}/test_order.py",
    ),
    Mutation(
        "workers that share samples shuffle them each in its own way",
        "data/iterables.py",
        "torch.manual_seed(seed)",
        "pass",
        f"{LOADERS}/test_division.py",
        "two_workers",
    ),
    Mutation(
        "the batches of workers are counted as one reader's",
        "data/opening.py",
        "readers, batch_size = shard.ranks * workers",
        "readers, batch_size = shard.ranks",
        f"{LOADERS}/test_division.py",
        "lengths",
    ),
    Mutation(
        "every rank takes all batches of a loader",
        "data/passing.py",
        "if number % self._shard.ranks == self._shard.rank:",
        "if number >= 0:",
        f"{LOADERS}/test_division.py",
        "two_ranks",
    ),
    Mutation(
        "a high temperature favors large data sets",
        "data/mixing.py",
        "float(size) ** (1 / self.temperature)",
        "float(size) ** self.temperature",
        f"{LOADERS}/test_mixing.py",
    ),
    Mutation(
        "layers are unfrozen one epoch late",
        "finetuning/unfreezing.py",
        "self._stages[self.unfrozen].epoch <= epoch",
        "self._stages[self.unfrozen].epoch < epoch",
        f"{FINETUNING}/test_unfreezing.py",
    ),
    Mutation(
        "a resumed training begins frozen",
        "finetuning/unfreezing.py",
        'while self.unfrozen < state["unfrozen"]:',
        "while False:",
        f"{FINETUNING}/test_unfreezing_resume.py",
    ),
    Mutation(
        "load_trunk takes a head that has the trunk's form",
        "finetuning/places.py",
        "[place for place in places if place.is_trunk] or places",
        "places",
        f"{FINETUNING}/test_places.py",
    ),
    Mutation(
        "a value in between may have an output's name in an ONNX file",
        "finetuning/onnx_files.py",
        "if value not in ends and",
        "if False and",
        f"{FINETUNING}/test_export.py",
        "dicts_and_tuples",
    ),
    Mutation(
        "load_trunk passes over parameters of another shape",
        "finetuning/checkpoints.py",
        '("of another shape", shapes))',
        '("of another shape", []))',
        f"{FINETUNING}/test_checkpoints.py",
        "strictness",
    ),
    Mutation(
        "a search goes beyond the bound",
        "tuning/space.py",
        "trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log)",
        "trial.suggest_float(name, allowed.low, 2 * allowed.high, log=allowed.log)",
        f"{TUNING}/test_space.py",
        "range_says",
    ),
    Mutation(
        "a search minimizes what is better when higher",
        "tuning/goals.py",
        '"maximize" if task.higher_is_better(parts[1]) else "minimize"',
        '"minimize" if task.higher_is_better(parts[1]) else "maximize"',
        f"{TUNING}/test_space.py",
        "directions",
    ),
    Mutation(
        "helped is what was hurt",
        "transfer/comparison.py",
        "self.gain(run, task).high < 0",
        "self.gain(run, task).low > 0",
        "tests/transfer/test_comparison.py",
        "hurts",
    ),
)
