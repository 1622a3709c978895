"""Replies that are restricted to given ones: a trie of their tokens, read on the device.

Tries are built where the replies are known (`data.replies`), and travel as a table with each
dispatch; a slot that is not restricted stands at FREE, where every token may come.

Axes: S slots, E edges, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data.replies import DEAD, FREE, Trie

_PADDING = -3
_MIN_EDGES = 128


class Tables:
  """The tries of all slots, as one array whose size changes seldom; on the host."""

  def __init__(self, num_slots: int):
    """Of slots none of which is restricted."""
    self._tries: list[Trie | None] = [None] * num_slots
    self._edges = np.full((num_slots, _MIN_EDGES, 3), _PADDING, np.int32)
    self.nodes = np.full(num_slots, FREE, np.int32)

  def set(self, slot: int, trie: Trie | None) -> None:
    """Restricts the slot's next reply, or (None) does not."""
    self._tries[slot] = trie
    self.nodes[slot] = FREE if trie is None else 0
    self._edges[slot] = _PADDING
    if trie is None:
      return
    size = self._edges.shape[1]
    while size < len(trie.edges):
      size *= 2
    if size > self._edges.shape[1]:
      added = ((0, 0), (0, size - self._edges.shape[1]), (0, 0))
      self._edges = np.pad(self._edges, added, constant_values=_PADDING)
    self._edges[slot, : len(trie.edges)] = trie.edges

  def advance(self, slot: int, tokens: Sequence[int]) -> None:
    """Takes what the slot sampled."""
    if self._tries[slot] is not None:
      self.nodes[slot] = self._tries[slot].walk(int(self.nodes[slot]), tokens)

  def arrays(self, slots: slice = slice(None)) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges int32 [S, E, 3] and nodes int32 [S] for a dispatch; None if no slot is restricted."""
    if all(trie is None for trie in self._tries[slots]):
      return None
    return self._edges[slots].copy(), self.nodes[slots].copy()


def allowed(edges: jax.Array, nodes: jax.Array, vocab_size: int) -> jax.Array:
  """Which tokens may come next.

  Args:
    edges: int32 [S, E, 3].
    nodes: int32 [S], where each slot stands.
    vocab_size: V.

  Returns:
    bool [S, V].
  """
  slots = edges.shape[0]
  leaving = edges[..., 0] == nodes[:, None]
  tokens = jnp.where(leaving, edges[..., 1], vocab_size)
  rows = jnp.arange(slots)[:, None]
  listed = jnp.zeros((slots, vocab_size), bool).at[rows, tokens].set(True, mode='drop')
  return listed | (nodes == FREE)[:, None]


def follow(edges: jax.Array, nodes: jax.Array, tokens: jax.Array) -> jax.Array:
  """The node of each slot, int32 [S], behind one more token, int32 [S]."""
  taken = (edges[..., 0] == nodes[:, None]) & (edges[..., 1] == tokens[:, None])
  behind = DEAD + jnp.sum(jnp.where(taken, edges[..., 2] - DEAD, 0), axis=1)
  return jnp.where(nodes == FREE, FREE, behind)
