"""All situations, a family a file."""

from tests.gradients.situations.base import Situation
from tests.gradients.situations.derivatives import DERIVATIVES
from tests.gradients.situations.nested import NESTED

FAMILIES: dict[str, tuple[Situation, ...]] = {
    "nested": NESTED,
    "derivatives": DERIVATIVES,
}
SITUATIONS = tuple(situation for family in FAMILIES.values() for situation in family)
BY_NAME = {situation.name: situation for situation in SITUATIONS}
assert len(BY_NAME) == len(SITUATIONS), "two situations have one name"
