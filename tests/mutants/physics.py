"""One slip in each of the schemes of physics-informed networks: the slip begins with the method's name."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

CONTRACT = "tests/test_contract.py"
TESTS = "tests/weighting/test_physics.py"

PHYSICS = (
    Mutation(
        "SoftAdapt: slopes keep their sum's sign alone",
        "weighting/softadapt.py",
        "size = slopes.abs().sum()",
        "size = slopes.sum().abs()",
        CONTRACT,
        "SoftAdapt",
    ),
    Mutation(
        "ReLoBRaLo: looks back to the last step",
        "weighting/relobralo.py",
        "relative_progress(losses, first, self.tau) if looks_back",
        "relative_progress(losses, last, self.tau) if looks_back",
        CONTRACT,
        "ReLoBRaLo",
    ),
    Mutation(
        "LRAnnealing: the main task has another weight than 1",
        "weighting/lr_annealing.py",
        "found[signals.tasks.index(main)] = 1.0",
        "found[signals.tasks.index(main)] = 2.0",
        TESTS,
        "lr_annealing",
    ),
    Mutation(
        "NTKWeighting: the newest and the running mean exchanged",
        "weighting/ntk.py",
        "torch.lerp(newest, self.means, self.momentum)",
        "torch.lerp(self.means, newest, self.momentum)",
        CONTRACT,
        "NTK",
    ),
    Mutation(
        "NTKWeighting: traces keep a scaler's factor",
        "gradients/beside.py",
        "norm.to(total) if scale is None else norm.to(total) / scale.to(total)",
        "norm.to(total)",
        TESTS,
        "traces_by_probes",
    ),
    Mutation(
        "Rotating: the newest gradient's turn again",
        "weighting/rotating.py",
        "steps.index(min(steps))",
        "steps.index(max(steps))",
        TESTS,
        "rotating",
    ),
)
