"""Which episodes become training examples, and which of their tokens are trained.

The rules are paper A's (arXiv 2510.01375, steps 3 and 4): successes only, at most two invalid
actions, no repeated no-ops; hint block and few-shot examples removed for a student that is to act
without them.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from data.errors import UserError
from data.trajectory import KIND, Episode, without
from training.packing import Example

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


def select(episodes: Sequence[Episode], rules: Rules) -> tuple[list[Episode], dict[str, int]]:
  """The episodes that pass, in their order, and how many failed each rule.

  Returns:
    (episodes, counts): counts has 'episodes', each reason for leaving one out (the first that
    applies), and 'kept'.
  """
  counts = collections.Counter(episodes=len(episodes))
  kept = []
  for episode in episodes:
    if rules.success_only and not episode.success:
      counts['not_successful'] += 1
    elif episode.invalid_actions > rules.max_invalid:
      counts['too_many_invalid_actions'] += 1
    elif episode.repeated_noops:
      counts['repeated_noops'] += 1
    elif not (episode.kinds == KIND['action']).any():
      counts['no_action_tokens'] += 1
    else:
      kept.append(episode)
  if 0 < rules.max_examples < len(kept):
    counts['over_max_examples'] = len(kept) - rules.max_examples
    chosen = np.random.default_rng(rules.seed).choice(
      len(kept), rules.max_examples, replace=False
    )
    kept = [kept[i] for i in sorted(chosen)]
  counts['kept'] = len(kept)
  return kept, dict(counts)


def make_example(episode: Episode, rules: Rules) -> Example:
  """The training sequence of an episode: its own ids, segments dropped, loss on what is asked."""
  drop = [
    name for name, dropped in (('memory', rules.drop_memory), ('few_shot', rules.drop_few_shot))
    if dropped
  ]
  tokens, kinds, _ = without(episode, drop)
  mask = kinds == KIND['action'] if rules.loss_on == 'action' else np.ones(len(tokens), bool)
  return Example(tokens, mask, episode.id)


def build(episodes: Sequence[Episode], rules: Rules) -> tuple[list[Example], dict[str, int]]:
  """Examples of the episodes that pass the rules, and the counts of `select`.

  Raises:
    UserError: nothing passes.
  """
  kept, counts = select(episodes, rules)
  if not kept:
    reasons = ', '.join(f'{n} {name}' for name, n in counts.items() if name != 'kept') or 'none'
    raise UserError(f'No episode is left to train on ({reasons}).')
  return [make_example(episode, rules) for episode in kept], counts
