"""All situations, a family a file."""

from tests.gradients.situations.base import Situation
from tests.gradients.situations.derivatives import DERIVATIVES
from tests.gradients.situations.hooks import HOOKS
from tests.gradients.situations.in_place import IN_PLACE
from tests.gradients.situations.inside import INSIDE
from tests.gradients.situations.layers import LAYERS
from tests.gradients.situations.nested import NESTED
from tests.gradients.situations.numbers import NUMBERS
from tests.gradients.situations.outputs import OUTPUTS
from tests.gradients.situations.sharing import SHARING
from tests.gradients.situations.wrapped import WRAPPED

FAMILIES: dict[str, tuple[Situation, ...]] = {
    "layers": LAYERS,
    "nested": NESTED,
    "derivatives": DERIVATIVES,
    "inside": INSIDE,
    "outputs": OUTPUTS,
    "in_place": IN_PLACE,
    "sharing": SHARING,
    "numbers": NUMBERS,
    "wrapped": WRAPPED,
    "hooks": HOOKS,
}
SITUATIONS = tuple(situation for family in FAMILIES.values() for situation in family)
BY_NAME = {situation.name: situation for situation in SITUATIONS}
assert len(BY_NAME) == len(SITUATIONS), "two situations have one name"
