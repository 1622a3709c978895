"""Replies that are restricted to given ones: a trie of their tokens, read on the device.

A node is where a reply stands; node 0 is its beginning. The edges of a node say which tokens may
come next. They are built on the host, where the replies are known, and travel as a table with each
dispatch; a slot that is not restricted stands at FREE, where every token may come.

Axes: S slots, E edges, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Nodes that no edge leaves: FREE allows every token, and DEAD, behind a token that was not allowed,
# none.
FREE, DEAD = -1, -2
_PADDING = -3
_MIN_EDGES = 128


class Trie:
  """The replies that are allowed, as token sequences.

  Attributes:
    edges: int32 [E, 3], of each edge the node that it leaves, its token, and the node it leads to.
    longest: tokens of the longest reply, of those that end in free text without that.
  """

  def __init__(
    self, replies: Sequence[Sequence[int]], openings: Sequence[Sequence[int]] = ()
  ):
    """Builds the trie.

    Args:
      replies: whole ones, each with the stop token that ends it.
      openings: beginnings behind which every token may follow.

    Raises:
      ValueError: nothing is allowed, or a reply has no token.
    """
    self._children: dict[tuple[int, int], int] = {}
    count = 1
    for opens, sequences in ((False, replies), (True, openings)):
      for sequence in sequences:
        if not len(sequence):
          raise ValueError('A reply without tokens cannot be allowed.')
        node = 0
        for i, token in enumerate(map(int, sequence)):
          if opens and i == len(sequence) - 1:
            self._children[node, token] = FREE
          elif (node, token) not in self._children:
            self._children[node, token] = count
            count += 1
          node = self._children[node, token]
          if node == FREE:
            break
    if not self._children:
      raise ValueError('No reply is allowed at all.')
    self.edges = np.asarray(
      [(node, token, child) for (node, token), child in self._children.items()], np.int32)
    self.longest = max(map(len, (*replies, *openings)))

  def walk(self, node: int, tokens: Sequence[int]) -> int:
    """The node behind tokens from a node on; DEAD behind one that is not allowed."""
    for token in tokens:
      if node == FREE:
        break
      node = self._children.get((node, int(token)), DEAD)
    return node


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
