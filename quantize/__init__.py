"""A checkpoint of the Kimi K2 family -> the same model with INT4 experts: `moebox.quantize(src, dst)`.

The name `moebox.quantize` has two meanings: it is this package, which holds `moebox.quantize.convert` and
other modules, and it is the function of the Python interface. An import of any of these modules binds the
name to the package. So the package itself is made callable: its class becomes a subclass of `ModuleType`,
and a call of the package calls `moebox.quantize.convert.quantize`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebox.quantize.convert import QuantizeResult


class _CallablePackage(ModuleType):
    def __call__(self, src: Any, dst: Any, **options: Any) -> QuantizeResult:
        """Convert `src` into the folder `dst`; `moebox.quantize.convert.quantize` lists the options."""
        from moebox.quantize.convert import quantize

        return quantize(src, dst, **options)


sys.modules[__name__].__class__ = _CallablePackage
