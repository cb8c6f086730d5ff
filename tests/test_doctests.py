"""The examples in public docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastattn

MODULES = [
    module.name
    for module in pkgutil.walk_packages(fastattn.__path__, "fastattn.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    public = [
        fastattn.optimize,
        fastattn.optimized,
        fastattn.verify,
        fastattn.set_backend,
        *(getattr(fastattn.ops, name) for name in fastattn.ops.__all__),
    ]
    for function in public:
        assert finder.find(function)[0].examples, function.__name__
