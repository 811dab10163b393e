"""One optimizer step, from a batch to the optimizer, reads from top to bottom in ``step``.

::

    window    = the state of this optimizer step                            window, cast: who takes part
    outputs   = module.present_outputs(batch)                               what task_losses returns, checked
    losses    = reduce over the ranks                                       losses: the one place that counts samples
    gradients = an engine of the gradients package: add(losses)             nothing, or each task's gradients
    if the window is not complete: return                                   a weighting is asked once a window
    measured  = gradients.measure(what the weighting reads)                 norms, Gramian or rows, over all ranks
    decision  = window.decide(measured)                                     asks the weighting
    loss      = gradients.surrogate_loss(weights, head weights, directions)
    backward                                                                its one pass writes every .grad
    finite?, hooks, clip, optimizer, schedulers                             update; closure: the step once more
    weighting, monitors, logging                                            observation, logging

An engine never calls back: what it is asked for, it is asked for in this order. There are four of them, with the same
methods. A micro-batch itself (``gradients.micro_batch``) is the plain one: the weighted sum of losses, one backward
pass. ``gradients.features`` measures at the trunk's output and sends one weighted gradient on into the trunk,
``gradients.trunk`` keeps each task's gradient of all parameters until the weights are known, and ``gradients.sharded``
does both where parameters are sharded.

Around the step: ``checks`` refuses at setup what cannot work, ``module`` and ``hooks`` are where Lightning calls in,
``schedulers`` and ``closure`` do what Lightning does by itself in automatic optimization, ``synchronization`` and
``absent`` say what ranks owe each other, ``resting`` sets tasks aside whose heads train alone, ``features`` chooses
where gradients are measured, ``task_rates`` takes the tasks' own learning rates to the optimizer, ``scores`` and
``reduced`` log a stage's metrics, ``wrapping`` keeps hooks that are set on an instance, ``resume`` does what was due
when a checkpoint was written, and ``snapshots`` makes passes that leave no trace.
"""
