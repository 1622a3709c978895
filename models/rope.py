"""Rotary positions (Su et al., arXiv 2104.09864) and the ways to stretch them over longer texts.

Axes: B batch, T tokens, H head width.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of the low rotary frequencies (`rope_type: llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int

  def frequencies(self, plain: jax.Array, theta: float) -> jax.Array:
    del theta
    wavelength = 2 * math.pi / plain
    low = self.original_max_position / self.low_freq_factor
    high = self.original_max_position / self.high_freq_factor
    smooth = (self.original_max_position / wavelength - self.low_freq_factor) / (
      self.high_freq_factor - self.low_freq_factor
    )
    blended = (1 - smooth) * plain / self.factor + smooth * plain
    scaled = jnp.where(wavelength > low, plain / self.factor, plain)
    return jnp.where((wavelength <= low) & (wavelength >= high), blended, scaled)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """All frequencies divided by one factor (`rope_type: linear`)."""

  factor: float

  def frequencies(self, plain: jax.Array, theta: float) -> jax.Array:
    del theta
    return plain / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (Peng et al., arXiv 2309.00071; `rope_type: yarn`).

  Attributes:
    factor: by which the slow frequencies are divided.
    original_max_position: length that the model was trained for before it was stretched.
    beta_fast: dimensions that turn more often than this in that length are left as they are.
    beta_slow: those that turn less often are divided; between the two there is a linear ramp.
    attention_factor: of cosine and sine.
    query_beta: queries are scaled by 1 + query_beta ln(1 + position // original_max_position), so
      that attention over long texts stays sharp (Llama 4 and Ministral 3); 0 is no scaling.
  """

  factor: float
  original_max_position: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 1.0
  query_beta: float = 0.0

  def frequencies(self, plain: jax.Array, theta: float) -> jax.Array:
    width = 2 * len(plain)

    def dimension(turns):
      """The dimension, not whole, that turns so often in the original length."""
      length = self.original_max_position / (2 * math.pi * turns)
      return width * math.log(length) / (2 * math.log(theta))

    first = max(math.floor(dimension(self.beta_fast)), 0)
    last = min(math.ceil(dimension(self.beta_slow)), width - 1)
    ramp = (jnp.arange(len(plain)) - first) / max(last - first, 1e-3)
    divided = jnp.clip(ramp, 0, 1)
    return plain * (1 - divided) + plain / self.factor * divided


Scaling = RopeScaling | LinearScaling | YarnScaling


class Rotary(NamedTuple):
  """Tables of the positions of one batch.

  Attributes:
    cos: float32 [B, T, 1, H/2].
    sin: the same.
    query_scale: float32 [B, T, 1, 1], by which rotated queries are multiplied; None is 1.
  """

  cos: jax.Array
  sin: jax.Array
  query_scale: jax.Array | None = None

  def rotate(self, x: jax.Array) -> jax.Array:
    """Rotates x [B, T, heads, H]; the two halves of H are the pairs (the Hugging Face layout)."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
      [first * self.cos - second * self.sin, second * self.cos + first * self.sin], axis=-1)


def frequencies(head_dim: int, theta: float, scaling: Scaling | None) -> jax.Array:
  """Inverse frequencies, float32 [H/2]."""
  plain = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return plain if scaling is None else scaling.frequencies(plain, theta)


def tables(
  positions: jax.Array, head_dim: int, theta: float, scaling: Scaling | None
) -> Rotary:
  """The tables of positions int32 [B, T]."""
  angles = positions[..., None, None] * frequencies(head_dim, theta, scaling)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if not isinstance(scaling, YarnScaling):
    return Rotary(cos, sin)
  if scaling.attention_factor != 1:
    cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
  if not scaling.query_beta:
    return Rotary(cos, sin)
  periods = (positions // scaling.original_max_position).astype(jnp.float32)
  return Rotary(cos, sin, 1 + scaling.query_beta * jnp.log1p(periods)[..., None, None])
