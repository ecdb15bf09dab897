"""Views of leaves, and the parts of them that a process reads."""

import itertools

import numpy as np
import pytest

from mlrl.models import layouts


@pytest.mark.parametrize("view", [
    layouts.whole, layouts.outputs_first, lambda x: x[2, :, 1].T, lambda x: x[1].T,
    lambda x: np.moveaxis(x[:, :, :-2], 0, -1), lambda x: np.swapaxes(x, 1, 2),
])  # fmt: skip
def test_a_part_of_a_leaf_is_read_from_its_tensors(view):
    leaf = np.arange(4.0 * 3 * 5 * 2).reshape(4, 3, 5, 2)
    tensor = np.ascontiguousarray(view(leaf))  # as in a file, in any shape
    seen = np.full(leaf.shape, False)
    view(seen)[...] = True
    for index in itertools.product(*([slice(0, n), slice(0, n // 2), slice(n // 2, n)] for n in leaf.shape)):
        part, held = leaf[index], np.full(leaf[index].shape, -1.0)
        meet = layouts.overlap(view, leaf.shape, index)
        if meet:
            held[meet.inside] = tensor.reshape(-1).reshape(meet.shape)[meet.outside].transpose(meet.order)
        np.testing.assert_array_equal(held, np.where(seen[index], part, -1.0))
