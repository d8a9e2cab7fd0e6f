"""Numbers of several kernels."""

from typing import Any

import triton.language as tl


class Constant(tl.constexpr):
    """A global number of kernels. Triton asks at each launch whether it has changed, which takes
    longer by the operators of constexpr."""

    def __ne__(self, other: Any) -> bool:
        return not isinstance(other, tl.constexpr) or self.value != other.value


LOG2_E = Constant(1.4426950408889634)
LN_2 = Constant(0.6931471805599453)
INF = Constant(float("inf"))
