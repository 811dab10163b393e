"""All mutations."""

from tests.mutants.engine import ENGINE
from tests.mutants.gramians import GRAMIANS
from tests.mutants.many_losses import MANY_LOSSES
from tests.mutants.methods import METHODS
from tests.mutants.others import OTHERS
from tests.mutants.outer import OUTER
from tests.mutants.training import TRAINING

MUTATIONS = (*METHODS, *ENGINE, *GRAMIANS, *TRAINING, *OTHERS, *OUTER, *MANY_LOSSES)
