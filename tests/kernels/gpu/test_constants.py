"""Numbers that the Triton kernels share with the rest."""

from __future__ import annotations

from moebox import config
from moebox.kernels.gpu.base import ROUND_PAIRS
from moebox.kernels.gpu.triton import experts, int4


def test_triton_has_the_numbers_of_the_other_languages():
    assert int4.GROUP_SIZE.value == config.GROUP_SIZE
    assert experts.ROUND_PAIRS == ROUND_PAIRS
