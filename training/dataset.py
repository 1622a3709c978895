"""Which episodes become training examples, and which of their tokens are trained.

The rules are paper A's (arXiv 2510.01375, steps 3 and 4): successes only, at most two invalid
actions, no repeated no-ops; hint block and few-shot examples removed for a student that is to act
without them.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from data.errors import UserError
from data.trajectory import KIND, Episode, without
from training.packing import Example

T = TypeVar('T')

LOSS_ON = ('action', 'all')


@dataclasses.dataclass(frozen=True)
class Rules:
  """How a data set is made of episodes.

  Attributes:
    success_only: leave out episodes that did not solve their task.
    max_invalid: leave out episodes with more invalid actions.
    drop_memory, drop_few_shot: remove these segments from the context.
    loss_on: 'action' trains the sampled tokens, 'all' every token (paper A's full sequence).
    max_examples: a random subset of that size; 0 is all.
    seed: of the subset.
  """

  success_only: bool = True
  max_invalid: int = 2
  drop_memory: bool = True
  drop_few_shot: bool = True
  loss_on: str = 'action'
  max_examples: int = 0
  seed: int = 0

  def __post_init__(self):
    if self.loss_on not in LOSS_ON:
      raise UserError(f'loss_on={self.loss_on!r}: choose {" or ".join(LOSS_ON)}.')


def rejection(episode: Episode, rules: Rules) -> str | None:
  """The first of the rules that leaves an episode out; None where it passes."""
  if rules.success_only and not episode.success:
    return 'not_successful'
  if episode.invalid_actions > rules.max_invalid:
    return 'too_many_invalid_actions'
  if episode.repeated_noops:
    return 'repeated_noops'
  if not (episode.kinds == KIND['action']).any():
    return 'no_action_tokens'
  return None


def _limited(kept: list[T], counts: collections.Counter, rules: Rules) -> list[T]:
  """At most `max_examples` of what is kept, drawn by seed, in their order; completes the counts."""
  if 0 < rules.max_examples < len(kept):
    counts['over_max_examples'] = len(kept) - rules.max_examples
    chosen = np.random.default_rng(rules.seed).choice(
      len(kept), rules.max_examples, replace=False
    )
    kept = [kept[i] for i in sorted(chosen)]
  counts['kept'] = len(kept)
  return kept


def select(episodes: Sequence[Episode], rules: Rules) -> tuple[list[Episode], dict[str, int]]:
  """The episodes that pass, in their order, and how many failed each rule.

  Returns:
    (episodes, counts): counts has 'episodes', each reason for leaving one out (the first that
    applies), and 'kept'.
  """
  counts = collections.Counter(episodes=len(episodes))
  reasons = [rejection(episode, rules) for episode in episodes]
  counts.update(filter(None, reasons))
  kept = [episode for episode, reason in zip(episodes, reasons, strict=True) if reason is None]
  return _limited(kept, counts, rules), dict(counts)


def make_example(episode: Episode, rules: Rules) -> Example:
  """The training sequence of an episode: its own ids, segments dropped, loss on what is asked."""
  drop = [
    name for name, dropped in (('memory', rules.drop_memory), ('few_shot', rules.drop_few_shot))
    if dropped
  ]
  tokens, kinds, _ = without(episode, drop)
  mask = kinds == KIND['action'] if rules.loss_on == 'action' else np.ones(len(tokens), bool)
  return Example(tokens, mask, episode.id)


@dataclasses.dataclass(frozen=True)
class Part:
  """What one process makes of the episodes that it read.

  Attributes:
    examples: of those that pass, each with its place among the examples of all parts.
    counts: of the episodes, and of the reasons for leaving one out.
    tokenizers: fingerprints of the tokenizers that the episodes are of.
  """

  examples: list[tuple[tuple[int, int], Example]]
  counts: collections.Counter
  tokenizers: set[str]


def sift(
  episodes: Sequence[Episode], rules: Rules, source: int = 0, part: tuple[int, int] = (0, 1)
) -> Part:
  """Examples of the episodes that pass the rules, before any are drawn from them.

  Args:
    episodes: of one source, or a part of it.
    rules: for them.
    source: its number: the examples of one come before those of the next.
    part: (i, n) where they are the episodes i, i + n, ... of the source.
  """
  counts, examples = collections.Counter(episodes=len(episodes)), []
  for index, episode in enumerate(episodes):
    if reason := rejection(episode, rules):
      counts[reason] += 1
    else:
      place = source, part[0] + index * part[1]
      examples.append((place, make_example(episode, rules)))
  return Part(examples, counts, {episode.tokenizer for episode in episodes})


def join(parts: Iterable[Part], rules: Rules) -> tuple[list[Example], dict[str, int], set[str]]:
  """All parts as one, the same however many there were: examples, counts of `select`, tokenizers.

  Raises:
    UserError: nothing passes.
  """
  found, counts, tokenizers = [], collections.Counter(), set()
  for part in parts:
    found += part.examples
    counts.update(part.counts)
    tokenizers |= part.tokenizers
  if not found:
    reasons = ', '.join(f'{n} {name}' for name, n in counts.items()) or 'none'
    raise UserError(f'No episode is left to train on ({reasons}).')
  examples = [example for _, example in sorted(found, key=lambda item: item[0])]
  return _limited(examples, counts, rules), dict(counts), tokenizers


def build(episodes: Sequence[Episode], rules: Rules) -> tuple[list[Example], dict[str, int]]:
  """Examples of the episodes that pass the rules, and the counts of `select`.

  Raises:
    UserError: nothing passes.
  """
  return join([sift(episodes, rules)], rules)[:2]
