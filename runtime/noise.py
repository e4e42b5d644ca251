"""Normal noise from a seed: the numbers of `torch.Generator().manual_seed(seed)` with `torch.randn` on the CPU.

The published implementation draws every random tensor from such a generator, so the same seed must give the same
numbers here, without torch. Three things make it so:

- the raw 32-bit words come from MT19937, seeded with the low 32 bits of the seed (`init_genrand`);
- 16 values or more are made in blocks of 16 words by the Box-Muller transform in float32: 8 radii, then 8 angles. On
  x86 torch evaluates it with AVX2 code whose logarithm, sine and cosine are the polynomials of the Cephes library
  (S. Moshier), compiled to fused multiply-adds. The same polynomials are evaluated here with the same roundings, in
  plain IEEE sums and products: the noise is that of torch 2.13 on Linux x86-64 bit for bit, and depends neither on
  this machine's instruction set nor on numpy's version. Where torch itself uses other functions (without AVX2, on ARM)
  its numbers differ from these by up to 3e-6;
- fewer than 16 values are made one by one in float64, two from each pair of uniforms; a left-over value is kept for
  the next small draw and survives large draws between.

Layout of one block (`u` uniform in [0, 1)): out[j] = r cos(a), out[j+8] = r sin(a), with r = sqrt(-2 ln(1 - u[j])) and
a = 2 pi u[j+8], for j = 0..7. If the count is not a multiple of 16, the words of the incomplete block are drawn and
thrown away, and the last 16 values are made again from 16 further words.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..bundle.errors import UsageError

__all__ = ["NoiseSource"]

BLOCK = 16  # values made together; also the smallest count that takes the block path
CHUNK = 1 << 15  # values per pass: every buffer of a pass stays in the processor's second-level cache

# Cephes logf: ln(1 + x) = x - x²/2 + x³ P(x) for sqrt(1/2) <= 1 + x < sqrt(2), highest power first.
LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SQRT_HALF = 0.707106781186547524
LN2_LOW, LN2_HIGH = -2.12194440e-4, 0.693359375  # ln 2 = high + low; the product of high with an exponent is exact

# Cephes sinf and cosf on [-pi/4, pi/4]: sin x = x + x³ S(x²), cos x = 1 - x²/2 + x⁴ C(x²), highest power first.
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
FOUR_OVER_PI = 1.27323954473516
PI_OVER_4 = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # three parts, largest first

Floats = NDArray[np.float32]


def _fused(a: Floats, b: NDArray[np.float64] | float, c: Floats | float) -> Floats:
    """a * b + c, rounded once to float32 (`b` holds float32 values). In float64 the product of float32s is exact."""
    wide = a.astype(np.float64)
    wide *= b
    wide += c
    return wide.astype(np.float32)


def _single(value: float) -> float:
    """`value` rounded to float32."""
    return float(np.float32(value))


def _polynomial(x: NDArray[np.float64], coefficients: Sequence[float]) -> Floats:
    """Horner's rule with fused float32 steps."""
    result = np.full(x.shape, coefficients[0], dtype=np.float32)
    for coefficient in coefficients[1:]:
        result = _fused(result, x, _single(coefficient))
    return result


def _log(x: Floats) -> Floats:
    """Natural logarithm of normal, positive float32 numbers."""
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 126).astype(np.float32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)  # 0.5 <= mantissa < 1
    low = mantissa < np.float32(SQRT_HALF)
    exponent -= low
    mantissa += mantissa * low
    mantissa -= np.float32(1)
    square = mantissa * mantissa
    tail = _polynomial(mantissa.astype(np.float64), LOG_POLYNOMIAL)
    tail *= mantissa
    tail = _fused(tail, square.astype(np.float64), exponent * np.float32(LN2_LOW))
    tail = _fused(square, -0.5, tail)
    mantissa += tail
    return _fused(exponent, LN2_HIGH, mantissa)


def _sin_cos(x: Floats) -> tuple[Floats, Floats]:
    """Sine and cosine of float32 angles in [0, 2 pi]."""
    octant = (x * np.float32(FOUR_OVER_PI)).astype(np.int32)
    octant = (octant + 1) & ~1  # even: the nearest multiple of pi/2, counted in pi/4
    turns = octant.astype(np.float32)
    for part in PI_OVER_4:
        x = _fused(turns, -_single(part), x)
    square = x * x
    wide = square.astype(np.float64)
    cos = _polynomial(wide, COS_POLYNOMIAL)
    cos *= square
    cos = _fused(cos, wide, square * np.float32(-0.5))
    cos += np.float32(1)
    sin = _polynomial(wide, SIN_POLYNOMIAL)
    sin *= square
    sin = _fused(sin, x.astype(np.float64), x)

    # In the odd quadrants sine and cosine change places; then the quadrant gives each its sign. All on the bits.
    swap = (sin.view(np.int32) ^ cos.view(np.int32)) & -((octant >> 1) & 1)
    sin_bits = sin.view(np.int32) ^ swap ^ ((octant & 4) << 29)
    cos_bits = cos.view(np.int32) ^ swap ^ (((octant + 2) & 4) << 29)
    return sin_bits.view(np.float32), cos_bits.view(np.float32)


def _box_muller(words: NDArray[np.uint32], out: Floats) -> None:
    """Turns whole blocks of random words, [16 n], into normals, written to `out`, [16 n] float32."""
    uniform = (words & np.uint32(0x00FFFFFF)).astype(np.float32) * np.float32(2.0**-24)
    halves = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - halves[:, 0].reshape(-1)))
    sin, cos = _sin_cos(halves[:, 1].reshape(-1) * np.float32(2 * np.pi))
    blocks = out.reshape(halves.shape)
    blocks[:, 0] = (radius * cos).reshape(-1, BLOCK // 2)
    blocks[:, 1] = (radius * sin).reshape(-1, BLOCK // 2)
    out += np.float32(0)  # turns -0 into +0, as torch's addition of the mean does


class NoiseSource:
    """A stream of standard normals, equal to torch's CPU generator with the same seed.

    Every draw advances the stream, so tensors must be drawn in the published order. One thread at a time may draw.

    Args:
        seed: from -2**63 to 2**64 - 1, as torch accepts it. Only its low 32 bits (two's complement) matter:
            seeds that agree in them, such as 7 and 7 + 2**32, give the same noise, in torch too.

    Raises:
        UsageError: the seed is not a whole number or is outside that range.
    """

    def __init__(self, seed: int) -> None:
        try:
            number = operator.index(seed)
        except TypeError as error:
            raise UsageError(f"The seed {seed!r} is not a whole number. Give one from 0 to 2**64 - 1.") from error
        if not -(2**63) <= number < 2**64:
            raise UsageError(f"The seed {number} is out of range. Give a whole number from 0 to 2**64 - 1.")
        self.seed = number
        # RandomState and not Generator: numpy promises that this stream never changes.
        self._words = np.random.RandomState(number & 0xFFFFFFFF)
        self._consumed = 0
        self._left_over: float | None = None

    @property
    def consumed(self) -> int:
        """How many 32-bit words of the underlying MT19937 have been used so far."""
        return self._consumed

    def normal(self, shape: int | Sequence[int]) -> NDArray[np.float32]:
        """Draws a C-contiguous float32 array of `shape` from the standard normal distribution.

        The same as `torch.randn(shape, generator=generator, dtype=torch.float32)`. Needs about 1 MB beside the result.
        """
        out = np.empty(shape, dtype=np.float32)
        flat = out.reshape(-1)
        if flat.size >= BLOCK:
            self._fill_blocks(flat)
        else:
            for i in range(flat.size):
                flat[i] = self._one()
        return out

    def skip(self, shape: int | Sequence[int]) -> None:
        """Goes on as if `normal(shape)` had been drawn, for less than a tenth of its cost."""
        count = math.prod(shape) if isinstance(shape, Sequence) else shape
        if count < BLOCK:
            self.normal(shape)  # these are drawn in pairs, of which one may be left over
        else:
            self._take(count + (BLOCK if count % BLOCK else 0))

    def _fill_blocks(self, flat: Floats) -> None:
        whole = flat.size - flat.size % BLOCK
        for start in range(0, whole, CHUNK):
            stop = min(start + CHUNK, whole)
            _box_muller(self._take(stop - start), flat[start:stop])
        if whole < flat.size:
            self._take(flat.size - whole)
            _box_muller(self._take(BLOCK), flat[-BLOCK:])

    def _one(self) -> float:
        if self._left_over is not None:
            value, self._left_over = self._left_over, None
            return value
        angle = 2.0 * math.pi * self._uniform53()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform53()))
        self._left_over = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        high, low = self._take(2).tolist()
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)

    def _take(self, count: int) -> NDArray[np.uint32]:
        self._consumed += count
        return self._words.randint(0, 2**32, size=count, dtype=np.uint32)
