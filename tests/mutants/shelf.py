"""One slip in each method of the later shelf: the slip begins with the method's name."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

CONTRACT = "tests/test_contract.py"
TESTS = "tests/weighting/test_shelf.py"

SHELF = (
    Mutation(
        "AuxiliaryCosine: helps where gradients conflict",
        "weighting/auxiliary_cosine.py",
        "torch.zeros_like(products)).clamp(0, 1)",
        "torch.zeros_like(products)).neg().clamp(0, 1)",
        CONTRACT,
        "AuxiliaryCosine",
    ),
    Mutation(
        "DBMTL: the shares of the old mean and the new gradient exchanged",
        "weighting/dbmtl.py",
        "torch.lerp(rows * self.inverse.to(rows)[:, None], self.memory.to(rows), share[:, None])",
        "torch.lerp(self.memory.to(rows), rows * self.inverse.to(rows)[:, None], share[:, None])",
        TESTS,
        "dbmtl",
    ),
    Mutation(
        "ExcessMTL: forgets the squares",
        "weighting/excess_mtl.py",
        "self.memory = self.memory.to(rows).addcmul(rows, rows)",
        "pass",
        TESTS,
        "excess",
    ),
    Mutation(
        "Frozen: goes on following",
        "weighting/frozen.py",
        "return not self.is_frozen and super()",
        "return super()",
        TESTS,
        "frozen",
    ),
    Mutation(
        "IGB: the latest epoch's mean loss",
        "weighting/igb.py",
        "taken = self.epoch == signals.epoch",
        "taken = self.epoch >= 0",
        TESTS,
        "igb",
    ),
    Mutation(
        "PIVRG: prefers the tasks that lead",
        "weighting/pivrg.py",
        "(known / temperature).softmax(0)",
        "(-known / temperature).softmax(0)",
        CONTRACT,
        "PIVRG",
    ),
    Mutation(
        "SDMGrad: the preference is not in what is solved",
        "weighting/sdmgrad.py",
        "+ lam * p[:, None]",
        "+ 0 * lam * p[:, None]",
        CONTRACT,
        "SDMGrad",
    ),
    Mutation(
        "SoftOptimalUncertainty: prefers large losses",
        "weighting/soft_optimal_uncertainty.py",
        "inverse.masked_fill(losses",
        "inverse.neg().masked_fill(losses",
        CONTRACT,
        "SoftOptimalUncertainty",
    ),
    Mutation(
        "MetaBalance: main and auxiliary length exchanged",
        "weighting/metabalance.py",
        "main_magnitude / magnitudes.clamp(min=tiny)",
        "magnitudes / main_magnitude.clamp(min=tiny)",
        CONTRACT,
        "MetaBalance",
    ),
    Mutation(
        "NashMTL: a vanishing gradient is one to bargain with",
        "weighting/preference.py",
        "negligible = NEGLIGIBLE",
        "negligible = 0.0",
        "tests/weighting/test_zero_gradients.py",
        "vanishing and NashMTL",
    ),
)
