"""Paper A's rules for what is trained on."""

import numpy as np
import pytest

from data.errors import UserError
from data.trajectory import KIND, Episode
from training import dataset


def make_episode(id, **changes):
  kinds = [KIND[k] for k in ('system', 'few_shot', 'memory', 'task', 'action', 'observation')]
  kinds = np.repeat(kinds, [2, 3, 3, 2, 4, 2])
  fields = dict(
    id=id, task_id=id, env='household', task_type='pick', split='train', instruction='', seed=0,
    policy='base', agent='plain', memory='none', model='tiny', tokenizer='t', steps=[],
    tokens=np.arange(len(kinds)), kinds=kinds, logprobs=np.zeros(len(kinds)), success=True,
    score=1.0, termination='success',
  )
  return Episode(**(fields | changes))


EPISODES = [
  make_episode('good'),
  make_episode('lost', success=False),
  make_episode('two_invalid', invalid_actions=2),
  make_episode('three_invalid', invalid_actions=3),
  make_episode('noops', repeated_noops=1),
  make_episode('silent', kinds=np.zeros(16)),
]


def test_rules_leave_out_and_count():
  kept, counts = dataset.select(EPISODES, dataset.Rules())
  assert [e.id for e in kept] == ['good', 'two_invalid']
  assert counts == {
    'episodes': 6, 'not_successful': 1, 'too_many_invalid_actions': 1, 'repeated_noops': 1,
    'no_action_tokens': 1, 'kept': 2,
  }
  kept, _ = dataset.select(EPISODES, dataset.Rules(success_only=False, max_invalid=3))
  assert [e.id for e in kept] == ['good', 'lost', 'two_invalid', 'three_invalid']


def test_subset_is_drawn_by_seed_and_counted():
  many = [make_episode(f'e{i}') for i in range(20)]
  draw = lambda seed: dataset.select(many, dataset.Rules(max_examples=5, seed=seed))
  (kept, counts), (again, _), (other, _) = draw(1), draw(1), draw(2)
  assert [e.id for e in kept] == [e.id for e in again] != [e.id for e in other]
  assert counts['over_max_examples'] == 15 and counts['kept'] == 5


@pytest.mark.parametrize(
  'drop_memory,drop_few_shot,tokens',
  [
    (True, True, [0, 1, *range(8, 16)]),
    (True, False, [0, 1, 2, 3, 4, *range(8, 16)]),
    (False, False, list(range(16))),
  ],
)
def test_segments_are_dropped_and_actions_keep_their_ids(drop_memory, drop_few_shot, tokens):
  rules = dataset.Rules(drop_memory=drop_memory, drop_few_shot=drop_few_shot)
  example = dataset.make_example(EPISODES[0], rules)
  assert example.tokens.tolist() == tokens
  assert example.tokens[example.loss_mask].tolist() == [10, 11, 12, 13]


def test_loss_on_all_tokens():
  example = dataset.make_example(EPISODES[0], dataset.Rules(loss_on='all'))
  assert example.loss_mask.all()


def test_bad_rules_and_empty_sets_are_named():
  with pytest.raises(UserError, match='loss_on'):
    dataset.Rules(loss_on='thoughts')
  with pytest.raises(UserError, match='1 not_successful'):
    dataset.build([EPISODES[1]], dataset.Rules())


@pytest.mark.parametrize('max_examples', [0, 3])
def test_parts_that_processes_read_make_what_one_makes(max_examples):
  sources = [[make_episode(f'{name}{i}', success=i % 3 > 0) for i in range(count)]
             for name, count in (('a', 7), ('b', 2))]
  rules = dataset.Rules(max_examples=max_examples)
  whole, counts = dataset.build([*sources[0], *sources[1]], rules)
  parts = [dataset.sift(source[i::4], rules, number, (i, 4))
           for i in range(4) for number, source in enumerate(sources)]
  joined, joined_counts, tokenizers = dataset.join(parts, rules)
  assert [e.id for e in joined] == [e.id for e in whole] and joined_counts == counts
  assert counts['episodes'] == 9 and counts['kept'] == (max_examples or 5)
  assert tokenizers == {sources[0][0].tokenizer}
