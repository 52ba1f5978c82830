"""A checkpoint of the Kimi K2 family -> the same with INT4 experts: `moebox.quantize(src, dst)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebox.quantize.convert import QuantizeResult


class _CallablePackage(ModuleType):
    """`moebox.quantize` is both this package and the function that it is about."""

    def __call__(self, src: Any, dst: Any, **options: Any) -> QuantizeResult:
        """See `moebox.quantize.convert.quantize`."""
        from moebox.quantize.convert import quantize

        return quantize(src, dst, **options)


sys.modules[__name__].__class__ = _CallablePackage
