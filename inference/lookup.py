"""Prompt-lookup speculation: drafts copied from the slot's own context, verified in one pass.

An agent's replies repeat what it has read: names of objects, its last command. Where the newest
tokens have occurred before, the tokens that followed them there are the draft. A verifying step
gives the model the newest token and the draft at once, chooses a token behind each of them, and
keeps the choices up to the first that differs from the draft.

The choice behind each token is drawn with the key of its own index, as decoding without drafts
draws it. A draft x is thus kept with its probability p(x), and what takes its place has the
distribution of the others, renormalised: the rejection rule of speculative sampling (Leviathan et
al., arXiv 2211.17192) for a draft that is certain of itself. The tokens are those of decoding
without drafts, greedy or sampled.

Axes: S slots, C context, D draft.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from data.errors import UserError

# Tokens that a slot samples without drafts before it tries once more.
_REST = 64
# Weight of one verifying step in a slot's running acceptance.
_RATE = 0.15
# Share of the busy slots that have to draft: a verifying step computes D + 1 tokens of every slot.
_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class LookupConfig:
  """What is drafted, and when drafting stops.

  Attributes:
    draft_len: most tokens of a draft.
    max_ngram: the newest tokens that are looked for; of several places that with the longest match,
      then the latest.
    min_ngram: the fewest of them that have to match.
    min_accepted: accepted tokens a verifying step below which a slot stops drafting for a while.
  """

  draft_len: int = 4
  max_ngram: int = 3
  min_ngram: int = 2
  min_accepted: float = 0.3

  def __post_init__(self):
    if self.draft_len < 1:
      raise UserError(f'draft_len={self.draft_len} is not positive; leave lookup out for none.')
    if not 1 <= self.min_ngram <= self.max_ngram:
      raise UserError(
        f'min_ngram={self.min_ngram} and max_ngram={self.max_ngram} are not in the order '
        '1 <= min_ngram <= max_ngram.')
    if not 0 <= self.min_accepted <= self.draft_len:
      raise UserError(f'min_accepted={self.min_accepted} is not in 0..draft_len.')


def propose(
  context: jax.Array, lengths: jax.Array, config: LookupConfig
) -> tuple[jax.Array, jax.Array]:
  """Looks for the newest tokens further up in each slot.

  Args:
    context: int32 [S, C], the tokens of each slot.
    lengths: int32 [S], at least 1, how many there are.
    config: static.

  Returns:
    drafts int32 [S, D], and how many tokens of each count, int32 [S]; 0 where nothing matched.
  """
  width = context.shape[1]
  place = jnp.arange(width)
  matching = place < (lengths - 1)[:, None]
  matched = jnp.zeros(context.shape, jnp.int32)
  for back in range(config.max_ngram):
    newest = jnp.take_along_axis(context, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
    before = jnp.pad(context, ((0, 0), (back, 0)), constant_values=-1)[:, :width]
    matching &= (before == newest) & (lengths > back)[:, None]
    matched += matching
  best = jnp.max(jnp.where(matched >= config.min_ngram, matched * width + place, -1), axis=1)
  start = jnp.where(best < 0, 0, best % width + 1)
  # A text that repeats itself goes on so: behind its end the draft begins again.
  period = jnp.maximum(lengths - start, 1)[:, None]
  columns = start[:, None] + jnp.arange(config.draft_len) % period
  counts = jnp.where(best < 0, 0, config.draft_len)
  return jnp.take_along_axis(context, columns, axis=1), counts


def accepted(drafts: jax.Array, counts: jax.Array, chosen: jax.Array) -> jax.Array:
  """Tokens of each draft [S, D] that were chosen, up to the first that was not: int32 [S].

  Args:
    drafts: int32 [S, D].
    counts: int32 [S], of them that count.
    chosen: int32 [S, D + 1], behind the newest token and behind each of the draft.
  """
  width = drafts.shape[1]
  same = (drafts == chosen[:, :width]) & (jnp.arange(width) < counts[:, None])
  return jnp.sum(jnp.cumprod(same, axis=1), axis=1, dtype=jnp.int32)


def pays(drafting: np.ndarray, busy: np.ndarray) -> bool:
  """Whether a dispatch should verify drafts: bool [S], which slots draft, and which are busy."""
  return bool((drafting & busy).sum() >= _SHARE * busy.sum())


class Acceptance:
  """Each slot's running acceptance, and thereby which slots draft; on the host.

  A slot whose drafts are too seldom right samples `_REST` tokens without them. Then one step is a
  trial: unless it is accepted, the slot rests again.
  """

  def __init__(self, num_slots: int, config: LookupConfig):
    self._config = config
    self._mean = np.zeros(num_slots)
    self._rest = np.zeros(num_slots, np.int64)
    for slot in range(num_slots):
      self.reset(slot)

  def reset(self, slot: int) -> None:
    """A new conversation, of which nothing is known."""
    self._mean[slot] = self._config.draft_len / 2
    self._rest[slot] = 0

  @property
  def drafting(self) -> np.ndarray:
    """bool [S]."""
    return self._rest <= 0

  def update(self, slot: int, verified: int, accepted: int, sampled: int) -> None:
    """Takes a dispatch's result.

    Args:
      slot: one.
      verified: its steps that verified a draft, an empty one too, as that costs as much.
      accepted: tokens of those drafts that were accepted.
      sampled: all its tokens.
    """
    if self._rest[slot] > 0:
      self._rest[slot] -= sampled
      return
    if not verified:
      return
    weight = 1 - (1 - _RATE) ** verified
    self._mean[slot] += weight * (accepted / verified - self._mean[slot])
    if self._mean[slot] < self._config.min_accepted:
      self._mean[slot], self._rest[slot] = self._config.min_accepted, _REST
