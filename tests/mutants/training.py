"""Slips around the steps of a training: bases of methods, ranks, labels, figures, schedules, checkpoints."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

BASE = "tests/test_weighting_base.py"
DDP = "tests/distributed/test_ddp.py"
LABELS = "tests/test_labels.py"
METRICS = "tests/test_metrics.py"
PARTIAL = "tests/distributed/test_partial_labels.py"
RESUME = "tests/test_resume.py"
SCHEDULERS = "tests/test_schedulers.py"
STAGES = "tests/test_stages.py"

TRAINING = (
    # The base of all weightings.
    Mutation(
        "importance is ignored",
        "method/base.py",
        "return weights * importance",
        "return weights + 0 * importance",
        BASE,
        "importance",
    ),
    Mutation(
        "a method starts one step late",
        "method/base.py",
        "return step >= self.start_step and",
        "return step > self.start_step and",
        BASE,
        "start or first_step",
    ),
    Mutation(
        "weights are not held between measurements",
        "method/base.py",
        "self.held_weights[numbers(positions, self.held_weights.device)] = weights.to(self.held_weights)",
        "pass",
        BASE,
        "between_measurements",
    ),
    Mutation(
        "total is ignored",
        "method/base.py",
        "weights * (self.total / found)",
        "weights",
        "tests/weighting/test_scalarizations.py",
        "total",
    ),
    Mutation(
        "a hook does not reach the method inside another",
        "method/holder.py",
        "getattr(child, name)(*arguments, **named)",
        "pass",
        "tests/weighting/test_children.py",
        "hook",
    ),
    Mutation(
        "an argument that a method does not have is taken",
        "method/arguments.py",
        "if unknown and not any(",
        "if False and not any(",
        "tests/weighting/test_arguments.py",
        "refused",
    ),
    Mutation(
        "a method's state is not restored",
        "method/task_state.py",
        "setattr(self, key, value.to(getattr(self, key).device))",
        "setattr(self, key, getattr(self, key))",
        "tests/test_contract.py",
        "checkpoint",
    ),
    Mutation(
        "what a method learns without the absent tasks is lost",
        "method/task_state.py",
        "value.to(part.dtype).index_put(cut[name], part)",
        "value",
        "tests/test_absent_tasks.py",
        "states",
    ),
    # What the ranks have to add up.
    Mutation(
        "losses are not agreed on among ranks",
        "training/losses.py",
        "    ranks.sum(table)",
        "    pass",
        PARTIAL,
    ),
    Mutation(
        "ranks count alike however many samples they have",
        "training/reduced.py",
        "return self.own_counts / self.counts",
        "return self.own_counts * 0 + 0.5",
        PARTIAL,
    ),
    Mutation(
        "a rank forgets gradients that only the other reached",
        "training/absent.py",
        "flags = window.ranks.sum(flags)",
        "pass",
        DDP,
        "default",
    ),
    Mutation(
        "mean losses of an epoch are each rank's own",
        "training/logging.py",
        "sum_over(module.trainer, torch.stack([self.totals, self.counts]))",
        "torch.stack([self.totals, self.counts])",
        PARTIAL,
    ),
    Mutation(
        "fractions of labels are each rank's own",
        "training/losses.py",
        "sum_over(module.trainer, own)",
        "own",
        PARTIAL,
    ),
    # Absent tasks and missing labels.
    Mutation(
        "a task without a label in the batch counts",
        "task/batches.py",
        "int(output.num_samples) > 0:",
        "int(output.num_samples) >= 0:",
        LABELS,
        "absent",
    ),
    Mutation(
        "missing labels are counted",
        "task/labels.py",
        "found = len(where[0])",
        "found = mask.numel()",
        LABELS,
    ),
    Mutation(
        "a mask is used the wrong way round beside missing values",
        "task/labels.py",
        "return mask & present",
        "return mask | present",
        LABELS,
        "have_to_agree",
    ),
    # The optimizer's step.
    Mutation(
        "clipping is skipped",
        "training/update.py",
        "self.configure_gradient_clipping(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)",
        "pass",
        "tests/test_clipping.py",
    ),
    Mutation(
        "a step is taken whatever is not finite",
        "training/update.py",
        "self.drops = not all(math.isfinite(float(values[name])) for name in",
        "self.drops = any(False for name in",
        "tests/test_not_finite.py",
    ),
    Mutation(
        "the losses after the step leave random numbers used up",
        "training/snapshots.py",
        "finally:\n        before.put_back()",
        "finally:\n        pass",
        "tests/weighting/test_famo.py",
        "leaves_no_trace",
    ),
    Mutation(
        "hooks of an instance pass clipping by",
        "training/module.py",
        "            wrap_own(self, name, wrap)",
        "            pass",
        "tests/test_hooks.py",
        "instance",
    ),
    # Schedulers.
    Mutation(
        "a scheduler is stepped twice",
        "training/schedulers.py",
        "        module.lr_scheduler_step(config.scheduler, value)",
        "        [module.lr_scheduler_step(config.scheduler, value) for _ in range(2)]",
        SCHEDULERS,
    ),
    Mutation(
        "no scheduler follows a batch that takes no step",
        "training/schedulers.py",
        "            self.step_waiting(module)\n            self.step(module)",
        "            pass",
        "tests/test_due_schedulers.py",
        "without_a_step",
    ),
    Mutation(
        "schedulers count epochs and steps from one off",
        "training/schedulers.py",
        "(index + 1) % config.frequency",
        "index % config.frequency",
        SCHEDULERS,
        "frequency",
    ),
    Mutation(
        "an epoch's number is one off for schedulers that follow a metric",
        "training/logging.py",
        'self.due.waiting = "epoch", trainer.current_epoch',
        'self.due.waiting = "epoch", trainer.current_epoch + 1',
        SCHEDULERS,
        "plateau",
    ),
    # Figures.
    Mutation(
        "mean losses of an epoch forget the number of samples",
        "training/logging.py",
        "self.totals += losses * samples",
        "self.totals += losses",
        STAGES,
        "num_samples or whole_epoch",
    ),
    Mutation(
        "metrics go on from epoch to epoch",
        "training/scores.py",
        "metrics.reset()",
        "pass",
        STAGES,
        "begins_anew",
    ),
    Mutation(
        "the mean losses of an interrupted epoch are not restored",
        "training/logging.py",
        'state_dict["loss_sums"].clone().unbind()',
        'torch.zeros_like(state_dict["loss_sums"]).unbind()',
        RESUME,
        "without_a_weighting",
    ),
    Mutation(
        "a scheduler that is due is not restored",
        "training/logging.py",
        '= state_dict["plateau_due"], state_dict["scheduled"]',
        '= None, state_dict["scheduled"]',
        SCHEDULERS,
        "due",
    ),
    Mutation(
        "delta_m has the other sign",
        "metrics.py",
        "baseline - score if higher else score - baseline",
        "score - baseline if higher else baseline - score",
        METRICS,
        "delta_m",
    ),
    Mutation(
        "mean_rank counts from the worst",
        "metrics.py",
        "np.where(np.asarray(higher_is_better), -table, table)",
        "np.where(np.asarray(higher_is_better), table, -table)",
        METRICS,
        "rank",
    ),
)
