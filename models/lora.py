"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the decoder's projections."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from data.errors import UserError

TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Shape of an adapter.

  Attributes:
    rank: inner dimension R of the two factors.
    alpha: the product is scaled by alpha / rank.
    dropout: probability with which an input element of the adapter is dropped in training.
    targets: projections that carry an adapter, a subset of TARGETS.
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  targets: tuple[str, ...] = TARGETS

  def __post_init__(self):
    unknown = sorted(set(self.targets) - set(TARGETS))
    if unknown or not self.targets:
      raise UserError(f'LoRA targets {unknown} are unknown; choose from {", ".join(TARGETS)}.')
    # One order for all, so that two configs with the same targets are equal.
    object.__setattr__(self, 'targets', tuple(t for t in TARGETS if t in self.targets))
    if self.rank < 1:
      raise UserError(f'LoRA rank {self.rank} is not positive; give a rank of at least 1.')
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f'LoRA dropout {self.dropout} is not in [0, 1).')

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def init_lora_a(key: jax.Array, in_dim: int, rank: int) -> jax.Array:
  """Kaiming uniform with slope sqrt(5), as `peft` draws it: float32 [in, R]."""
  bound = 1.0 / math.sqrt(in_dim)
  return jax.random.uniform(key, (in_dim, rank), jnp.float32, -bound, bound)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Drops elements with probability `rate` and scales the rest by 1 / (1 - rate).

  16 random bits an element halve the cost of the generator, which on CPU is a visible part of a
  step; the rate is met to within 2^-17.
  """
  threshold = round(rate * 65536)
  keep = jax.random.bits(key, x.shape, jnp.uint16) >= threshold
  return jnp.where(keep, x * (65536 / (65536 - threshold)), 0).astype(x.dtype)
