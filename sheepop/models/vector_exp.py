"""The exponential function in a form of which the compiler behind numba makes vectors; of `math.exp` it makes calls."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LOWEST, HIGHEST = np.float32(-87), np.float32(88)  # the result is neither subnormal nor infinite between them
LOG2_E = np.float32(1 / math.log(2))
SHIFT = np.float32(1.5 * 2**23)  # with this added, a number's last bits are the nearest integer
LN2_UPPER = np.float32(math.ldexp(round(math.ldexp(math.log(2), 12)), -12))  # times an integer exact
LN2_LOWER = np.float32(math.log(2) - float(LN2_UPPER))
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(power)) for power in range(2, 8))
NOTHING, ONE = np.float32(0), np.float32(1)
IN_ANY_ORDER = {"contract", "reassoc", "nsz"}  # sums become vectors; infinities and NaN are kept, and noticed


@intrinsic
def power_of_two(typing: Any, shifted: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Return 2 to the power of the integer in the last bits of a number of fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        bits, whole = ir.IntType(32), builder.bitcast(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.add(builder.shl(whole, bits(23)), bits(127 << 23)), ir.FloatType())

    return types.float32(types.float32), generate


@njit(fastmath={"contract"}, cache=True)  # in any other order SHIFT would be without effect
def exp_fp32(x: Any) -> Any:
    """Return e to the power of x, of fp32, to its last bit but one; x beyond -87 to 88 is taken as these, NaN stays."""
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    shifted = x * LOG2_E + SHIFT
    power = shifted - SHIFT
    x = x - power * LN2_UPPER - power * LN2_LOWER  # from -ln(2)/2 to ln(2)/2
    return (((((((C7 * x + C6) * x + C5) * x + C4) * x + C3) * x + C2) * x + ONE) * x + ONE) * power_of_two(shifted)


@njit(fastmath={"contract"}, inline="always", cache=True)
def power(x: np.float32) -> np.float32:
    """Return e to the power of x, at most 1, or nothing where that is next to nothing; NaN stays."""
    return NOTHING if x <= LOWEST else exp_fp32(x)
