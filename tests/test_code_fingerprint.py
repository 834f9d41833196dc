"""What is known by its code changes its fingerprint when numbers may change, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedkd.code_fingerprint import code_fingerprints

SOURCE = '''
"""A module of a user."""
import functools
import math
import numpy as np
import torch
from torch import nn

WIDTH = 5
SIZES = [7, 11]
CONFIG = {"act": nn.ReLU, "drop": 0.1}
MEAN = torch.tensor([0.5, -0.25])
SCALE = np.array([1.0, 3.0])
_memory = {}
_calls = 0

def half(x):
    return x / 2

def scaled(x, by=3.0, *, shift=-1.0):
    """Return more."""
    return half(x) * by + shift  # a comment

class Base(nn.Module):
    depth = 2

    def forward(self, x):
        return scaled(self.layer(x)) * MEAN.sum()

class Net(Base):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 3)

    @property
    def wide(self):
        return SCALE

    @staticmethod
    def slope():
        return 0.01

def made(factor):
    def inner(x):
        return x * factor
    return inner

times = made(3)
tilt = functools.partial(scaled, by=2.0)

def net(shape, classes):
    global _calls
    _calls += 1
    _memory[shape] = torch.zeros(2)
    layers = [CONFIG["act"]() for _ in SIZES]
    return nn.Sequential(Net(WIDTH), *layers, nn.Linear(3, classes)), times, tilt, math.pi

def other():
    return 13

unused = 17
'''

CHANGES = {
    "a global number": ("WIDTH = 5", "WIDTH = 200"),
    "an item of a list": ("[7, 11]", "[7, 13]"),
    "a value of a dict": ('"drop": 0.1', '"drop": 0.2'),
    "a library's class in a dict": ("nn.ReLU", "nn.Tanh"),
    "a tensor": ("[0.5, -0.25]", "[0.5, -0.75]"),
    "an array": ("[1.0, 3.0]", "[1.0, 3.5]"),
    "a function that a function calls": ("x / 2", "x / 3"),
    "a default": ("by=3.0", "by=4.0"),
    "a keyword's default": ("shift=-1.0", "shift=1.0"),
    "the body of a method": ("self.layer(x)", "-self.layer(x)"),
    "an attribute of a base class": ("depth = 2", "depth = 3"),
    "a property": ("return SCALE", "return -SCALE"),
    "a static method": ("0.01", "0.02"),
    "what a function closes over": ("made(3)", "made(5)"),
    "what partial fixes": ("by=2.0", "by=2.5"),
    "a function defined in a function": ("x * factor", "x + factor"),
    "an attribute of a library": ("math.pi", "math.e"),
    "another base": ("class Net(Base)", "class Net(nn.Module)"),
}
"""Each changes what `net` computes or may compute."""

HARMLESS = {
    "comments, docstrings and lines": [
        ("  # a comment", ""),
        ("Return more.", "Return\n\n    less."),
        ('"""A module of a user."""', "# nothing"),
    ],
    "what is not used": [("unused = 17", "unused = 19"), ("return 13", "return 17")],
}


def fingerprints(source: str, name: str = "a_users_module") -> dict[str, str]:
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(source, f"{name}.py", "exec"), vars(module))
        return code_fingerprints([module.net])
    finally:
        del sys.modules[name]


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_change_numbers_changes_the_fingerprints(change: str) -> None:
    old, new = CHANGES[change]
    assert SOURCE.count(old) == 1
    before, after = fingerprints(SOURCE), fingerprints(SOURCE.replace(old, new))
    changed = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    assert changed
    assert len(changed) < len(before) / 3  # it is named, and not all that uses it


@pytest.mark.parametrize("change", HARMLESS)
def test_what_cannot_change_numbers_does_not(change: str) -> None:
    source = SOURCE
    for old, new in HARMLESS[change]:
        assert source.count(old) == 1
        source = source.replace(old, new)
    assert fingerprints(source) == fingerprints(SOURCE)


def test_what_is_changed_is_named() -> None:
    before, after = fingerprints(SOURCE), fingerprints(SOURCE.replace("x / 2", "x / 3"))
    assert {n for n in before if before[n] != after[n]} == {"a_users_module:half"}
    assert not any(name.startswith(("torch", "math", "numpy")) for name in before)


def test_running_it_changes_nothing_and_a_new_value_does() -> None:
    module = ModuleType("a_users_module")
    exec(SOURCE, vars(module))
    sys.modules["a_users_module"] = module
    try:
        before = code_fingerprints([module.net])
        module.net((1, 2, 3), 7)
        assert code_fingerprints([module.net]) == before
        vars(module)["WIDTH"] = 3  # as a notebook's next cell does
        assert code_fingerprints([module.net]) != before
    finally:
        del sys.modules["a_users_module"]


def test_modules_are_followed_also_where_they_are_imported_late_or_read_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_helper.py").write_text("width = 5\ndepth = 7\nunused = 3\n")
    (tmp_path / "late_model.py").write_text(
        "import late_helper\n"
        "def early():\n    return late_helper.width\n"
        "def late():\n    import late_helper as it\n    return it.width\n"
        "def drawn():\n    from late_helper import depth\n    return depth\n"
        "def named():\n    return getattr(late_helper, 'depth')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import late_helper  # type: ignore[import-not-found]
    import late_model  # type: ignore[import-not-found]

    def all_of_them() -> dict[str, dict[str, str]]:
        names = ("early", "late", "drawn", "named")
        return {name: code_fingerprints([getattr(late_model, name)]) for name in names}

    before = all_of_them()
    for attribute, users in (("width", {"early", "late"}), ("depth", {"drawn", "named"})):
        with monkeypatch.context() as patch:
            patch.setattr(late_helper, attribute, 13)
            after = all_of_them()
        assert {name for name in before if before[name] != after[name]} == users
        for name in users:
            changed = {n for n in before[name] if before[name][n] != after[name].get(n)}
            assert changed == {f"late_helper:{attribute}"}
    monkeypatch.setattr(late_helper, "unused", 5)
    assert all_of_them() == before


def test_another_process_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the seed of the hashes of texts, on which the order of sets depends."""
    (tmp_path / "hashed.py").write_text(
        SOURCE + 'NAMES = {"a", "b", "c"}\n'
        'def chosen(x):\n    return x in {"d", "e", "f"} and NAMES\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import hashed  # type: ignore[import-not-found]

    here = code_fingerprints([hashed.net, hashed.chosen])
    call = (
        "import json, hashed; from fedkd.code_fingerprint import code_fingerprints; "
        "print(json.dumps(code_fingerprints([hashed.net, hashed.chosen])))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # by default it is drawn
    done = subprocess.run(
        [sys.executable, "-c", call],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == here
    assert "hashed:chosen" in here


def test_classes_and_functions_that_refer_to_each_other_come_to_an_end() -> None:
    source = SOURCE + (
        "class Node:\n    def up(self):\n        return Tree\n"
        "class Tree(Node):\n    root = None\n    def down(self):\n        return Node, net2, RING\n"
        "RING = [Tree, Node]\nTree.root = Tree()\nTree.root.me = Tree.root\n"
        "def net2():\n    return Tree\nnet = net2\n"
    )
    assert {"a_users_module:Node", "a_users_module:Tree", "a_users_module:net2"} <= set(
        fingerprints(source)
    )
