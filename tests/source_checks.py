"""What the tests of several kinds of source ask of each of them."""

import importlib.util

import numpy as np
import pytest


def needs(package, extra):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: pip install 'jaxdist[{extra}]'")


def everything(source):
    return source.get(np.arange(len(source)))


def assert_rows_are_as_described(source):
    rows = source.get(np.array([len(source) - 1, 0, 0]))
    assert rows.keys() == source.features.keys()
    for name, feature in source.features.items():
        assert rows[name].shape == (3, *feature.shape)
        assert rows[name].dtype == feature.dtype
