"""The tap: a named hook at the interesting points of the forward pass.

A component calls `x = tap("name", x)`. The silent tap hands x back. A recording tap keeps it, a
comparing tap checks it, a patching tap returns another array: one mechanism for all three.
"""

from copy import copy
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


class Tap:
    """The silent tap, and the base of every other one."""

    def __call__(self, name: str, x: Array) -> Array:
        """See `x`, of any shape and dtype, under `name`; what is returned goes on from here."""
        return x

    def wants(self, name: str) -> bool:
        """Whether `name`, which only a tap would look at, is worth computing."""
        return False

    def at(self, scope: str) -> "Tap":
        """The tap for the module `scope` inside this one; names join with a dot."""
        return self


silent = Tap()


class ScopedTap(Tap):
    """A tap that knows the full name of what it is shown; the base of those that need it."""

    _scope = ""

    def at(self, scope: str) -> Tap:
        inner = copy(self)
        inner._scope = self._full(scope)
        return inner

    def _full(self, name: str) -> str:
        return f"{self._scope}.{name}" if self._scope else name
