"""Slips in the engine: ``gradients/``, the window, the objectives and the optimization."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

ABSENT = "tests/test_absent_tasks.py"
ACCUMULATION = "tests/test_accumulation.py"
ENGINE_TESTS = "tests/gradients/test_engine.py"
PARTIAL = "tests/distributed/test_partial_labels.py"
PRECISION = "tests/test_precision.py"
DDP = "tests/distributed/test_ddp.py"

ENGINE = (
    # What the ranks have to add up.
    Mutation(
        "rows are not summed over the ranks",
        "gradients/rows.py",
        "self._travelling += [ranks.begin_sum(matrix[row]) for matrix in self._matrices]",
        "pass",
        PARTIAL,
    ),
    Mutation(
        "rows at a layer are not summed over the ranks",
        "gradients/rows.py",
        "ranks.sum(matrix).div_(ranks.size)",
        "matrix.div_(ranks.size)",
        PARTIAL,
    ),
    Mutation(
        "the heads' gradients beside rows are not summed over the ranks",
        "gradients/row_update.py",
        "above = _sum_over_ranks(above, reached, batch.ranks)",
        "pass",
        PARTIAL,
    ),
    Mutation(
        "the Gramian of features is not summed over the ranks",
        "gradients/inner_products.py",
        "ranks.size == 1 else ranks.sum(total) * share",
        "ranks.size == 1 else total * share",
        PARTIAL,
    ),
    Mutation(
        "the Gramian of features is not divided by the ranks",
        "gradients/feature_update.py",
        "gramian(rows, batch.ranks, share=1 / batch.ranks.size**2)",
        "gramian(rows, batch.ranks)",
        DDP,
        "default",
    ),
    Mutation(
        "the Gramian of shards is not summed over the ranks",
        "gradients/sharded_update.py",
        "gramian(self.rows.matrices(), batch.ranks)",
        "gramian(self.rows.matrices())",
        "tests/distributed/test_fsdp2.py",
    ),
    # The gradient scaler's factor.
    Mutation(
        "the scaler's factor goes into the Gramian once instead of out twice",
        "gradients/micro_batch.py",
        "products = products / scale.detach().cpu().double().square()",
        "products = products / scale.detach().cpu().double()",
        PRECISION,
        "float64",
    ),
    Mutation(
        "the scaler's factor stays in the norms",
        "gradients/micro_batch.py",
        "norms=norms if scale is None else norms / scale",
        "norms=norms",
        PRECISION,
        "norms",
    ),
    Mutation(
        "the scaler's factor stays in the gradients of features and rows",
        "gradients/micro_batch.py",
        "return outer if self.scale is None else outer / self.scale",
        "return outer",
        PRECISION,
        "scaler",
    ),
    # What is added up within a step.
    Mutation(
        "penalties are dropped where losses are weighed",
        "objectives.py",
        "objective = objective if batch.penalty is None else objective + batch.penalty",
        "objective = objective",
        ENGINE_TESTS,
        "without_a_weighting",
    ),
    Mutation(
        "penalties are dropped where features are weighed",
        "gradients/feature_update.py",
        "for penalty in penalty_heads:",
        "for penalty in penalty_heads[:0]:",
        ENGINE_TESTS,
        "weighted_sum and features and penalised",
    ),
    Mutation(
        "penalties are dropped where rows are weighed",
        "gradients/row_update.py",
        "add_gradients(above, self._penalty, list(self._penalty.values()))",
        "pass",
        ENGINE_TESTS,
        "weighted_sum and trunk and penalised",
    ),
    Mutation(
        "penalties are dropped where no task has a label",
        "objectives.py",
        "objective = batch.penalty\n",
        "objective = None\n",
        ABSENT,
        "penalties",
    ),
    Mutation(
        "heads are weighed where the method leaves them alone",
        "gradients/micro_batch.py",
        "return self.weights if weighs_heads and self.head_weights is None else",
        "return self.weights if self.head_weights is None else",
        ENGINE_TESTS,
        "weighted_sum and mlp",
    ),
    Mutation(
        "accumulated losses are not divided by the window",
        "objectives.py",
        "return objective / window.size if objective is not None and divides else objective",
        "return objective",
        ACCUMULATION,
    ),
    Mutation(
        "accumulated rows are not divided by the window",
        "objectives.py",
        "window.micro_batches / window.size / count",
        "1 / count",
        ACCUMULATION,
        "rows or automatic",
    ),
    Mutation(
        "a window's mean losses forget the number of samples",
        "window.py",
        "total.index_add_(0, index, losses * weight)",
        "total.index_add_(0, index, losses)",
        ACCUMULATION,
        "mean_losses",
    ),
    Mutation(
        "the weighting is asked in every micro-batch",
        "window.py",
        "self._weighed.update(names)",
        "pass",
        ACCUMULATION,
        "once_a_window",
    ),
    Mutation(
        "gradients of the last step stay",
        "optimization.py",
        "module.single_optimizer().zero_grad()\n        if window.way",
        "pass\n        if window.way",
        ACCUMULATION,
        "automatic",
    ),
    Mutation(
        "signals always come from the first epoch",
        "optimization.py",
        "step, epoch = trainer.global_step, trainer.current_epoch",
        "step, epoch = trainer.global_step, 0",
        "tests/weighting/test_epochs.py",
        "in_a_fit",
    ),
)
