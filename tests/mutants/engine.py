"""Slips in the engine: ``gradients/``, the window, the objectives and the optimization."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

ABSENT = "tests/test_absent_tasks.py"
ACCUMULATION = "tests/test_accumulation.py"
ENGINE_TESTS = "tests/gradients/test_engine.py"
PARTIAL = "tests/distributed/test_partial_labels.py"
PRECISION = "tests/test_precision.py"
DDP = "tests/distributed/test_ddp.py"
SITUATIONS = "tests/gradients/test_situations.py"
TURNS = "tests/gradients/test_turns.py"
WITHOUT_ROWS = "tests/gradients/test_trunk_gramian.py"

ENGINE = (
    # What the ranks have to add up.
    Mutation(
        "rows are not summed over the ranks",
        "gradients/rows.py",
        "self._traveling += [ranks.begin_sum(as_real(matrix[row])) for matrix in self._matrices]",
        "pass",
        PARTIAL,
    ),
    Mutation(
        "gradients of a layer are not summed over the ranks",
        "gradients/feature_measurement.py",
        "ranks.sum(block).div_(ranks.size)",
        "block.div_(ranks.size)",
        PARTIAL,
    ),
    Mutation(
        "the heads' gradients beside rows are this rank's share alone",
        "gradients/trunk.py",
        "(v * (outer * self.ranks.size)).unbind()",
        "(v * outer).unbind()",
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
        "the Gramian of a window's features is not summed over the ranks",
        "gradients/trunk.py",
        "products = self.ranks.sum(products.to(self._losses.device)).cpu()",
        "pass",
        DDP,
        "default and features and accumulated",
    ),
    Mutation(
        "the Gramian of features is not divided by the ranks",
        "gradients/feature_measurement.py",
        "self._feature_rows(), 1 / ranks.size**2",
        "self._feature_rows(), 1.0",
        DDP,
        "default",
    ),
    Mutation(
        "the Gramian of shards is not summed over the ranks",
        "gradients/sharded.py",
        "gramian(self.rows.matrices(), self._batch.ranks)",
        "gramian(self.rows.matrices())",
        "tests/distributed/test_fsdp2.py",
    ),
    Mutation(
        "what a rank's losses reach is not told the others",
        "gradients/rows.py",
        "flags = ranks.sum(flags)",
        "pass",
        DDP,
        "default",
    ),
    # The gradient scaler's factor.
    Mutation(
        "the scaler's factor goes into the Gramian once instead of out twice",
        "gradients/inner_products.py",
        "products if scale is None else products / scale.detach().cpu().double().square()",
        "products if scale is None else products / scale.detach().cpu().double()",
        PRECISION,
        "float64",
    ),
    Mutation(
        "the scaler's factor stays in the norms",
        "gradients/inner_products.py",
        "norms = norms if scale is None else norms / scale",
        "pass",
        PRECISION,
        "norms",
    ),
    Mutation(
        "the scaler's factor stays in the gradients of features",
        "gradients/micro_batch.py",
        "return outer if scale is None else outer / scale",
        "return outer",
        PRECISION,
        "scaler",
    ),
    Mutation(
        "the scaler's factor stays in the gradients of rows",
        "gradients/trunk.py",
        "outer = scaled if scale is None else scaled / scale",
        "outer = scaled",
        PRECISION,
    ),
    # Which way is taken.
    Mutation(
        "the engine is not asked whether a pass enters the trunk",
        "gradients/one_pass.py",
        "if not asked and will_execute(below):",
        "if False and will_execute(below):",
        SITUATIONS,
        "applied_twice or before_and_behind or applied",
    ),
    Mutation(
        "a trunk that reads its own output counts as plain",
        "gradients/features.py",
        "if directions is None and (not clean or nested or not separate):",
        "if directions is None and (not clean or not separate):",
        SITUATIONS,
        "applied or hidden",
    ),
    Mutation(
        "a parameter above and below the split counts as one above it",
        "gradients/features.py",
        "if directions is None and (not clean or nested or not separate):",
        "if directions is None and (not clean or nested):",
        SITUATIONS,
    ),
    Mutation(
        "parameters below the split that no task shares are weighed as shared",
        "gradients/features.py",
        "if any(p not in self._reached_above for p in others):",
        "if False:",
        SITUATIONS,
        "before_the_trunk or bias_not or layer",
    ),
    Mutation(
        "a shared parameter in a head is weighed as the head",
        "gradients/features.py",
        "tied = [{p: own.pop(p) for p in set(shared).intersection(own)} for own in self._own]",
        "tied = []",
        SITUATIONS,
        "head and among",
    ),
    Mutation(
        "gradient hooks of parameters act while gradients are measured",
        "gradients/torch_internals.py",
        "for hooks, _ in held:\n        hooks.clear()",
        "for hooks, _ in held:\n        pass",
        SITUATIONS,
        "hook",
    ),
    # What is added up within a step.
    Mutation(
        "penalties are dropped where losses are weighed",
        "gradients/micro_batch.py",
        "return self.with_penalty(self.weighted_sum(weights))",
        "return self.weighted_sum(weights)",
        ENGINE_TESTS,
        "without_a_weighting",
    ),
    Mutation(
        "penalties are dropped where features are weighed",
        "gradients/features.py",
        "return self.batch.with_penalty(loss)",
        "return loss",
        ENGINE_TESTS,
        "weighted_sum and features and penalized",
    ),
    Mutation(
        "penalties are dropped where rows are weighed",
        "gradients/trunk.py",
        "return loss if penalty is None else loss + penalty",
        "return loss",
        ENGINE_TESTS,
        "aggregator and trunk and penalized",
    ),
    Mutation(
        "penalties are dropped where no rows are kept",
        "gradients/trunk_gramian.py",
        "return loss if penalty is None else loss + penalty",
        "return loss",
        ENGINE_TESTS,
        "weighted_sum and trunk and penalized",
    ),
    Mutation(
        "penalties of a step's earlier micro-batches are dropped",
        "gradients/trunk.py",
        "add_gradients(total, weighted_sums([self._penalty], [outer]))",
        "pass",
        ACCUMULATION,
        "automatic",
    ),
    Mutation(
        "penalties are dropped where no task has a label",
        "training/step.py",
        "loss = engine.surrogate_loss(losses) if window.collects else batch.penalty",
        "return None",
        ABSENT,
        "penalties",
    ),
    Mutation(
        "heads are weighed where the method leaves them alone",
        "method/base.py",
        "return Decision(weights, self._heads if self.weighs_heads else torch.ones_like(weights))",
        "return Decision(weights)",
        ENGINE_TESTS,
        "weighted_sum and mlp",
    ),
    Mutation(
        "accumulated losses are not divided by the window",
        "training/step.py",
        "loss * window.size if window.collects else loss / window.size",
        "loss * window.size if window.collects else loss",
        ACCUMULATION,
    ),
    Mutation(
        "known weights pool the samples of a window that does not begin with all tasks",
        "training/window.py",
        "self.pools = not self.weighting.known_beforehand(self.step)",
        "known = self.weighting.known_beforehand(self.step)\n        self.pools = not known or not complete",
        "tests/test_accumulation.py",
    ),
    Mutation(
        "accumulated rows are not divided by the window",
        "training/window.py",
        "return self.of(self.micro_batches / self.size / count, self.positions(names))",
        "return self.of(1 / count, self.positions(names))",
        ACCUMULATION,
        "rows or automatic",
    ),
    Mutation(
        "a window's mean losses forget the number of samples",
        "training/window.py",
        "total.index_add_(0, index, value.to(like) * weight)",
        "total.index_add_(0, index, value.to(like))",
        ACCUMULATION,
        "mean_losses",
    ),
    Mutation(
        "a method that reads the step's losses is asked at its first micro-batch",
        "method/base.py",
        '(self.measures == "losses" and not self.reads_losses)',
        '(self.measures == "losses")',
        "tests/test_accumulation.py",
        "mean_losses",
    ),
    Mutation(
        "a window whose first micro-batch lacks tasks counts as complete",
        "training/window.py",
        "return self.pools or not complete",
        "return self.pools",
        TURNS,
    ),
    Mutation(
        "the weighting is asked in every micro-batch",
        "training/window.py",
        "self._weighed.update(names)",
        "pass",
        "tests/test_accumulation.py",
        "known_beforehand",
    ),
    Mutation(
        "gradients of the last step stay",
        "training/step.py",
        "self.zero_gradients(module, batch_idx)",
        "pass",
        ACCUMULATION,
        "automatic",
    ),
    Mutation(
        "signals always come from the first epoch",
        "training/step.py",
        "step, epoch = trainer.global_step, trainer.current_epoch",
        "step, epoch = trainer.global_step, 0",
        "tests/weighting/test_epochs.py",
        "in_a_fit",
    ),
)
