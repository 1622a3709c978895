"""Which replies an agent may give: a trie of their tokens, built where its environment is.

A node is where a reply stands; node 0 is its beginning. The edges of a node say which tokens may
come next. What is built is one array, which goes from an environment's own process to the one that
samples.

Axes: E edges.
"""

from collections.abc import Sequence

import numpy as np

from data.errors import UserError
from data.tokenizer import Tokenizer

# Nodes that no edge leaves: FREE allows every token, and DEAD, behind a token that was not allowed,
# none.
FREE, DEAD = -1, -2
# Texts whose tokens are kept: commands repeat.
_MOST_KEPT = 50_000


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
    children: dict[tuple[int, int], int] = {}
    count = 1
    for opens, sequences in ((False, replies), (True, openings)):
      for sequence in sequences:
        if not len(sequence):
          raise ValueError('A reply without tokens cannot be allowed.')
        node = 0
        for i, token in enumerate(map(int, sequence)):
          if opens and i == len(sequence) - 1:
            children[node, token] = FREE
          elif (node, token) not in children:
            children[node, token] = count
            count += 1
          node = children[node, token]
          if node == FREE:
            break
    if not children:
      raise ValueError('No reply is allowed at all.')
    self.edges = np.asarray(
      [(node, token, child) for (node, token), child in children.items()], np.int32)
    self.longest = max(map(len, (*replies, *openings)))

  def walk(self, node: int, tokens: Sequence[int]) -> int:
    """The node behind tokens from a node on; DEAD behind one that is not allowed."""
    for token in tokens:
      if node == FREE:
        break
      taken = (self.edges[:, 0] == node) & (self.edges[:, 1] == int(token))
      [node] = self.edges[taken, 2].tolist() or [DEAD]
    return node


class Replies:
  """How commands become replies; goes once to each process that has environments."""

  def __init__(self, tokenizer: Tokenizer, openings: Sequence[str], max_tokens: int):
    """For one kind of agent.

    Args:
      tokenizer: the model's.
      openings: beginnings of what the agent may reply besides, any text behind them.
      max_tokens: of a reply.
    """
    self._tokenizer, self._openings, self._max_tokens = tokenizer, tuple(openings), max_tokens
    self._encoded: dict[str, list[int]] = {}

  def __getstate__(self):
    return {**self.__dict__, '_encoded': {}}

  def trie(self, commands: Sequence[str], openings: Sequence[str]) -> Trie | None:
    """What may be replied; None where nothing is known, so that anything may.

    Args:
      commands: that the environment admits.
      openings: of commands that end in free text.

    Raises:
      UserError: a command is longer than a reply can be.
    """
    end = self._tokenizer.chat.end_of_turn
    replies = [[*self._encode(text), end] for text in commands]
    begun = [self._encode(text) for text in (*openings, *self._openings)]
    if not replies and not begun:
      return None
    for text, reply in zip(commands, replies):
      if len(reply) > self._max_tokens:
        raise UserError(
          f'The command {text!r} has {len(reply)} tokens with the one that ends it, and '
          f'max_new_tokens is {self._max_tokens}; set it to that or more.')
    return Trie(replies, begun)

  def _encode(self, text: str) -> list[int]:
    if text not in self._encoded:
      if len(self._encoded) >= _MOST_KEPT:
        self._encoded.clear()
      self._encoded[text] = self._tokenizer.encode(text)
    return self._encoded[text]
