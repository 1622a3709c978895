"""Choosing hints: four methods, leave-one-out, and that the right hint comes with real MiniLM."""

import hashlib
import random

import numpy as np
import pytest

from data import errors
from envs import household_games, household_skills
from retrieval import embed, hint_rules, hints, select


class WordEncoder:
  """Stands in for a sentence encoder: texts that share words are alike."""

  fingerprint = 'words'

  def __init__(self):
    self.calls = []

  def count_tokens(self, text):
    return len(text.split())

  def encode(self, texts):
    self.calls.append(list(texts))
    out = np.zeros((len(texts), 4096), np.float32)
    for row, text in zip(out, texts):
      for word in text.lower().replace('.', ' ').replace(',', ' ').split():
        row[int(hashlib.sha256(word.encode()).hexdigest(), 16) % 4096] += 1
      row /= max(np.linalg.norm(row), 1e-6)
    return out


def _bank(texts, task_type='make'):
  return [
    hints.Hint(f'{task_type}-{i}', text, task_type, len(texts) - i,
               [{'episode_id': f'e{i}', 'task_id': f't{i}'}], 'rules')
    for i, text in enumerate(texts)]


def _query(state='dotted', task_type='make', task_id='q0'):
  return select.Query(f'make a {state} mug.', 'You see a kiln 1, a loom 1 and a bed 1.', task_type,
                      task_id)


STATES = ('dotted', 'salty', 'stiff', 'blue', 'rough')


@pytest.fixture
def index():
  texts = [hint_rules.rule_hint(s, f'verb{i}', f'thing{i}') for i, s in enumerate(STATES)]
  return select.HintIndex(
    hints.HintBank([*_bank(texts), *_bank(['Only one.'], 'other')]), WordEncoder())


@pytest.mark.parametrize('method', ['minilm', 'bm25'])
@pytest.mark.parametrize('state', STATES)
def test_the_hint_about_the_state_comes_first(index, method, state):
  chosen = select.select(_query(state), index, 3, method=method).hints
  assert len(chosen) == 3 and f' {state},' in chosen[0].text
  assert [h.score for h in chosen] == sorted((h.score for h in chosen), reverse=True)


@pytest.mark.parametrize('method', select.METHODS)
def test_types_small_banks_and_leave_one_out(index, method):
  one = select.select(_query(task_type='other'), index, 3, method=method)
  assert [h.text for h in one.hints] == ['Only one.']
  assert select.select(_query(task_type='unknown'), index, 3, method=method).hints == ()
  assert select.select(_query(), index, 0, method=method).hints == ()
  # k is filled up although the best hint is left out.
  chosen = select.select(_query(), index, 4, method=method, exclude_task_id='t0').hints
  assert len(chosen) == 4 and 'make-0' not in {h.id for h in chosen}
  assert select.select(
    _query(task_type='other'), index, 3, method=method, exclude_task_id='t0').hints == ()


def test_a_hint_with_another_source_stays():
  hint = _bank(['Take {object}.'])[0]
  hint.sources.append({'episode_id': 'e9', 'task_id': 't9'})
  index = select.HintIndex(hints.HintBank([hint]))
  assert select.select(_query(), index, 1, method='fixed', exclude_task_id='t0').hints


def test_controls(index):
  fixed = {select.select(_query(s), index, 2, method='fixed').hints for s in STATES}
  assert [[h.id for h in row] for row in fixed] == [['make-0', 'make-1']]
  draw = lambda task, seed: select.select(
    _query(task_id=task), index, 3, method='random', seed=seed).hints
  assert draw('a', 0) == draw('a', 0)
  assert len({tuple(h.id for h in draw(str(i), 0)) for i in range(30)}) > 10
  assert len({tuple(h.id for h in draw('a', seed)) for seed in range(30)}) > 10


@pytest.mark.parametrize('method', select.METHODS)
def test_many_equals_one_by_one(index, method):
  queries = [_query(s, task_id=f't{i}') for i, s in enumerate(STATES)]
  queries.insert(2, _query(task_type='other'))
  excluded = ['t0', None, None, 't1', 't3', None]
  many = select.select_many(queries, index, 3, method=method, exclude_task_ids=excluded)
  single = [select.select(q, index, 3, method=method, exclude_task_id=e)
            for q, e in zip(queries, excluded)]
  assert many == single


def test_the_whole_query_is_read_and_counted():
  encoder = WordEncoder()
  index = select.HintIndex(hints.HintBank(_bank(['Take {object}.'])), encoder)
  room = 'You see ' + ', '.join(f'a drawer {i}' for i in range(3000)) + '.'
  query = select.Query('make a dotted mug.', room, 'make', 'q0')
  chosen = select.select(query, index, 1)
  assert any(room in call for call in encoder.calls)
  assert chosen.retrieval_tokens == len(room.split()) + 4
  assert select.select(query, index, 1, method='bm25').retrieval_tokens == 0


def test_bm25_reads_the_hints_and_survives_odd_queries(index):
  chosen = select.select(
    select.Query('other', 'make', 'make', 'q'), index, 5, method='bm25').hints
  assert {h.score for h in chosen[1:]} == {chosen[0].score}  # a type's name is no word of a hint
  assert len(select.select(select.Query('', '', 'make', 'q'), index, 2, method='bm25').hints) == 2


def test_bad_calls(index):
  with pytest.raises(errors.UserError, match='no hint retrieval'):
    select.select(_query(), index, 1, method='psychic')
  with pytest.raises(errors.UserError, match='needs an encoder'):
    select.select(_query(), select.HintIndex(index.bank), 1)


def test_vectors_are_kept_per_encoder(tmp_path):
  path = tmp_path / 'v.npz'
  encoder = WordEncoder()
  first = embed.TextEmbedder(encoder, path)
  vectors = first(['a b', 'c', 'a b'])
  assert vectors.shape == (3, 4096) and encoder.calls == [['a b', 'c']] and first.tokens_read == 3
  first.save()
  second = embed.TextEmbedder(encoder, path)
  np.testing.assert_array_equal(second(['c', 'a b']), vectors[1:])
  assert len(encoder.calls) == 1 and second.tokens_read == 0
  other = WordEncoder()
  other.fingerprint = 'others'
  embed.TextEmbedder(other, path)(['c'])
  assert other.calls == [['c']]
  path.write_bytes(b'torn')
  torn = WordEncoder()
  embed.TextEmbedder(torn, path)(['c'])
  assert torn.calls == [['c']]


def test_real_minilm_finds_the_rule_of_the_state(minilm_path):
  """44 hints on 24 states; queries are real instructions and rooms of the generator."""
  from models import encoder
  rules = [*household_skills.draw('loop', 0), *household_skills.draw('hard', 0)]
  texts = [hint_rules.rule_hint(r.state, r.verb, r.appliance) for r in rules]
  texts += [hint_rules.explore_hint(s) for s in household_skills.POOLS['warm'][:12]]
  texts += [
    'Take {object} as soon as you see it, before you go elsewhere.',
    'Open each cabinet to look for {object} inside.',
    'Visit every {location} once to find {object}.',
    'Once you hold {object} as asked, go to {container} and move it there.',
    'Do not repeat an action that changed nothing; try another one.',
    'Do not go back to a {location} that you have already searched.',
    'Take only {object}; leave other things where they are.',
    'Answer with one command in the listed wording.']
  random.Random(0).shuffle(texts)
  options = household_games.SkillOptions(num_appliances=(10, 12), task_types=('make_state',))
  queries, states = [], []
  for number in range(48):
    pool = ('loop', 'hard')[number % 2]
    game = household_games.skill_game(pool, 0, 'valid_unseen', number // 2, options)
    queries.append(select.Query(game.instruction, game.game().reset(), 'make', game.id))
    states.append(game.params['state_target'])
  index = select.HintIndex(hints.HintBank(_bank(texts)), encoder.load_encoder(minilm_path))
  chosen = select.select_many(queries, index, 3)
  hits = [any(f' {s},' in h.text for h in c.hints) for c, s in zip(chosen, states)]
  assert np.mean(hits) >= 0.95
  assert all(c.retrieval_tokens > 30 for c in chosen)
