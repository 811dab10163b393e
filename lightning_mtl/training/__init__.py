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

Around the step: ``checks`` refuses at setup what cannot work, ``module`` holds Lightning's hooks, ``hooks`` and
``schedulers`` what Lightning does in automatic optimization and a step here has to do itself, ``task_rates`` the tasks'
own learning rates, ``absent`` what ranks owe each other for tasks that a batch lacks, and ``snapshots`` the passes that
leave no trace.
"""
