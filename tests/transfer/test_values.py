"""Digests by value: equal for equal values, other for any difference, and none of how a thing prints."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import math
import random
import subprocess
import sys
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import huber_loss, l1_loss, mse_loss

from lightning_mtl.transfer.values import Digests, digest_of


class Silent:
    """Prints the same whatever it holds."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)

    def __repr__(self) -> str:
        return "Silent()"


class Slotted:
    __slots__ = ("__private", "value")

    def __init__(self, value: Any, private: int = 0) -> None:
        self.value, self.__private = value, private


def function(code: str, **names: Any) -> Any:
    """A function of a file of its own, with global values."""
    exec(compile(code, "own.py", "exec"), names)
    return names["f"]


def enclosing(held: Any) -> Any:
    return lambda x: x * held


def circle(value: int) -> list[Any]:
    made: list[Any] = [value]
    made.append({"back": made})
    return made


NAMES = "def f(x):\n    return g(x) * scale\n"
INNER = "def f(x):\n    return x {} 2\n"

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "a number": (1e-3, math.nextafter(1e-3, 1)),
    "kinds of numbers": (1, 1.0),
    "one and true": (1, True),
    "text and bytes": ("a", b"a"),
    "the sign of zero": (0.0, -0.0),
    "nesting": ([1, [2, 3]], [1, 2, [3]]),
    "order of a mapping": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "an attribute": (Silent(lr=0.1), Silent(lr=0.2)),
    "a slot": (Slotted(1), Slotted(2)),
    "a private slot": (Slotted(1, 1), Slotted(1, 2)),
    "a list of its own with an attribute": (OrderedDict(a=1), {"a": 1}),
    "inside a circle": (circle(1), circle(2)),
    "a tensor": (torch.tensor([1.0, 1 + 1e-7]), torch.tensor([1.0, 1.0])),
    "a shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "a type": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "half precision": (torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).half()),
    "a sparse tensor": (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    "a long array": (np.arange(5000), np.r_[np.arange(4999), 0]),
    "an array of objects": (np.array([{}, 1], dtype=object), np.array([{}, 2], dtype=object)),
    "a generator": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "Python's generator": (random.Random(0), random.Random(1)),
    "NumPy's generator": (np.random.default_rng(0), np.random.default_rng(1)),
    "a time": (datetime.timedelta(1), datetime.timedelta(2)),
    "a queue": (deque([1, 2]), deque([1, 3])),
    "delta": (nn.HuberLoss(delta=1.0), nn.HuberLoss(delta=0.1)),
    "weights of classes": (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(2 * torch.ones(3))),
    "rates of dropout": (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))),
    "functions of a library": (mse_loss, l1_loss),
    "arguments": (functools.partial(huber_loss, delta=1.0), functools.partial(huber_loss, delta=0.1)),
    "lambdas": (lambda p, t: 2 * mse_loss(p, t), lambda p, t: 2 * l1_loss(p, t)),
    "what is enclosed": (enclosing(1), enclosing(2)),
    "defaults": (function("def f(x, a=1): return x"), function("def f(x, a=2): return x")),
    "constants": (function("def f(x): return x * 2"), function("def f(x): return x * 3")),
    "a global value": (function(NAMES, g=abs, scale=1.0), function(NAMES, g=abs, scale=2.0)),
    "a global function": (
        function(NAMES, g=function(INNER.format("+")), scale=1),
        function(NAMES, g=function(INNER.format("-")), scale=1),
    ),
    "behind a library's decorator": (torch.no_grad()(enclosing(1)), torch.no_grad()(enclosing(2))),
    "methods": (Silent(a=1).__repr__, Silent(a=2).__repr__),
    "values of a class": (type("Own", (nn.Module,), {"lr": 1}), type("Own", (nn.Module,), {"lr": 2})),
    "code of a class": (type("Own", (), {"f": lambda self: 1})(), type("Own", (), {"f": lambda self: 2})()),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_digest_and_a_copy_the_same(name: str) -> None:
    first, second = DIFFERENT[name]
    assert digest_of(first) != digest_of(second)
    if not isinstance(first, torch.Generator):
        assert digest_of(copy.deepcopy(first)) == digest_of(first)
    assert digest_of({"inside": [first]}) != digest_of({"inside": [second]})


def test_order_of_sets_numbers_of_hooks_and_lines_make_no_difference() -> None:
    assert digest_of({"a", "b", "c"}) == digest_of({"c", "a", "b"}) != digest_of({"a", "b"})
    torch.manual_seed(0)
    hooked = nn.Linear(2, 2)
    before = digest_of(hooked)
    others = copy.deepcopy(hooked), copy.deepcopy(hooked)
    for module in others:
        module.register_forward_hook(enclosing(1))
    assert digest_of(others[0]) == digest_of(others[1]) != before
    moved = function("\n\n" + INNER.format("+")), function(INNER.format("+"))
    assert digest_of(moved[0]) == digest_of(moved[1])


def test_long_chains_of_functions_and_what_has_no_value_are_no_obstacle() -> None:
    last = chain = function(INNER.format("+"))
    for _ in range(500):
        chain = function("def f(x): return g(x)", g=chain)
    assert digest_of(chain) != digest_of(function("def f(x): return g(x)", g=last))
    assert digest_of((i for i in range(3)), sys.stdout, object()) == digest_of((i for i in "abc"), sys.stderr, object())


def test_what_code_finds_outside_can_be_left_out() -> None:
    found = []
    for count in (1, 2):
        values = Digests(outer=False)
        named = function(NAMES, g=abs, scale=count)
        found.append(
            (values.of(type("Counted", (), {"count": count, "f": enclosing(count), "g": named})), values.of_code())
        )
    assert found[0] == found[1]


@pytest.mark.slow
def test_compiling_makes_no_difference() -> None:
    module = nn.Linear(2, 2)
    assert digest_of(torch.compile(module, backend="eager")) == digest_of(module)


@pytest.mark.slow
def test_another_process_finds_the_same() -> None:
    """Whatever the order of its sets and the addresses of its objects."""
    # Functions of a test file are rewritten by pytest, and are another code elsewhere.
    left_out = {"lambdas", "what is enclosed", "methods", "behind a library's decorator", "code of a class"}
    left_out |= {"an attribute", "a slot", "a private slot"}
    code = (
        "import json; from tests.transfer.test_values import DIFFERENT, digest_of; "
        "print(json.dumps({n: [digest_of(v) for v in pair] for n, pair in DIFFERENT.items()}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    for name, pair in json.loads(ran.stdout.splitlines()[-1]).items():
        if name not in left_out:
            assert pair == [digest_of(value) for value in DIFFERENT[name]], name
