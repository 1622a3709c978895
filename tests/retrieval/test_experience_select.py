"""Selection of experiences against what the bank holds; the index that keeps their keys."""

import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import errors
from retrieval import experience as experience_lib
from retrieval import experience_index, experience_select

STATES = ('dotted', 'bronze', 'salty', 'stiff')
THINGS = ('mug', 'plate', 'bowl')
COUNT = len


class HashEncoder:
  """A vector a word: texts with the same words are near. `dim` wide."""

  def __init__(self, dim=64, salt=''):
    self.dim, self.fingerprint, self.read = dim, f'hash {dim} {salt}', []

  def encode(self, texts):
    self.read += texts
    vectors = np.zeros((len(texts), self.dim), np.float32)
    for row, text in zip(vectors, texts):
      for word in text.lower().replace('.', ' ').split():
        row += np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.dim)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

  def count_tokens(self, text):
    return len(text.split())


def experience(number, state, thing, *, success=True, task_id='', task_type='make_state'):
  turns = (
    experience_lib.Turn('go to kiln 1', 'go to kiln 1', 'You arrive.'),
    experience_lib.Turn(f'{state}ify {thing} 1', f'{state}ify {thing} 1', 'It is now so.'))
  return experience_lib.Experience(
    id=f'e{number}', task_id=task_id or f'train/{state}-{thing}/{number}', env='household',
    task_type=task_type, split='train', instruction=f'make a {state} {thing}.',
    task=f'A room. Your task is to: make a {state} {thing}.', turns=turns, success=success,
    policy='expert', source='runs/x')


def bank_of(experiences):
  return experience_lib.ExperienceBank(experiences)


def full_bank(copies=2):
  cells = [(s, t) for s in STATES for t in THINGS]
  return bank_of([
    experience(len(cells) * c + i, s, t, success=c % 2 == 0)
    for c in range(copies) for i, (s, t) in enumerate(cells)])


def query_for(one, **changes):
  return dataclasses.replace(
    experience_select.Query(
      one.task_id, one.task_type, one.instruction,
      experience_lib.flat_text(one.task, one.turns[:1])), **changes)


def select(index, queries, **rules):
  return experience_select.select_many(
    queries, index, experience_select.Rules(**rules), lambda text: COUNT(text.split()))


@pytest.mark.parametrize('method', ['minilm', 'bm25'])
@pytest.mark.parametrize('query', experience_index.QUERIES)
def test_the_same_task_of_another_instance_comes_first(method, query):
  bank = full_bank()
  index = experience_index.ExperienceIndex(bank, method, query, HashEncoder())
  queries = [query_for(e, task_id='valid/new') for e in bank.experiences]
  for one, found in zip(bank.experiences, select(index, queries, k=2)):
    assert [r.experience.instruction for r in found.experiences] == [one.instruction] * 2
    assert found.experiences[0].score >= found.experiences[1].score
    assert found.retrieval_tokens == (0 if method == 'bm25' else COUNT(
      query_for(one).text(query).split()))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_leave_one_out_holds_for_every_method_and_rule(data):
  tasks = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
  bank = bank_of([
    experience(i, STATES[t % 4], THINGS[t % 3], task_id=f'train/{t}',
               success=data.draw(st.booleans())) for i, t in enumerate(tasks)])
  method = data.draw(st.sampled_from(['minilm', 'bm25', 'random']))
  index = experience_index.ExperienceIndex(bank, method, 'static', HashEncoder())
  rules = experience_select.Rules(
    k=data.draw(st.integers(0, 6)), outcomes=data.draw(st.sampled_from(experience_select.OUTCOMES)),
    diversity=data.draw(st.sampled_from([0.0, 0.5])))
  for one in bank.experiences:
    own = query_for(one)
    [found] = experience_select.select_many([own], index, rules, COUNT)
    other = experience_select.select_other(own, index, rules, COUNT)
    allowed = [e for e in bank.experiences
               if e.task_id != one.task_id and rules.outcomes in ('all', e.outcome)]
    assert len(found.experiences) == min(rules.k, len(allowed))
    for selection in (found, other):
      ids = [r.experience.id for r in selection.experiences]
      assert len(set(ids)) == len(ids) and set(ids) <= {e.id for e in allowed}
    assert all(r.experience.group != own.group for r in other.experiences)


def test_filters_by_outcome_and_type_reach_beyond_the_nearest():
  # The only failure and the only one of the other type are the least similar of 60.
  bank = bank_of([
    *(experience(i, 'dotted', 'mug') for i in range(60)),
    experience(60, 'stiff', 'bowl', success=False),
    experience(61, 'stiff', 'plate', task_type='make_state_then_place')])
  index = experience_index.ExperienceIndex(bank, 'minilm', 'static', HashEncoder())
  query = query_for(bank.experiences[0], task_id='new')
  [failed] = select(index, [query], k=2, outcomes='failure')
  assert [r.experience.id for r in failed.experiences] == ['e60']
  other = dataclasses.replace(query, task_type='make_state_then_place')
  [typed] = select(index, [other], k=2, same_type=True)
  assert [r.experience.id for r in typed.experiences] == ['e61']


def test_diversity_prefers_what_is_not_yet_there():
  bank = bank_of([experience(i, 'dotted', 'mug') for i in range(5)]
                 + [experience(9, 'dotted', 'plate')])
  for method in ('minilm', 'bm25'):
    index = experience_index.ExperienceIndex(bank, method, 'static', HashEncoder())
    query = query_for(bank.experiences[0], task_id='new')
    plain = select(index, [query], k=2)[0].experiences
    diverse = select(index, [query], k=2, diversity=0.7)[0].experiences
    assert [r.experience.id for r in plain] == ['e0', 'e1']
    assert [r.experience.id for r in diverse] == ['e0', 'e9']


def test_budget_drops_the_least_similar_whole_and_counts_it():
  bank = full_bank()
  index = experience_index.ExperienceIndex(bank, 'minilm', 'static', HashEncoder())
  query = query_for(bank.experiences[0], task_id='new')
  [free] = select(index, [query], k=4)
  size = COUNT(free.experiences[0].text.split())
  assert free.dropped == 0
  [tight] = select(index, [query], k=4, max_tokens=2 * size + 1)
  assert [r.text for r in tight.experiences] == [r.text for r in free.experiences[:2]]
  assert tight.dropped == 2
  [last] = select(index, [query], k=4, max_tokens=2 * size + 1, order='best_last')
  assert last.experiences == tight.experiences[::-1]
  with pytest.raises(errors.UserError, match=rf'takes {size} tokens as chat.*raise memory_tokens'):
    select(index, [query], k=1, max_tokens=size - 1)


def test_no_experiences_for_k_0_and_for_an_empty_bank():
  index = experience_index.ExperienceIndex(full_bank(), 'bm25', 'static')
  query = query_for(index.bank.experiences[0])
  assert select(index, [query], k=0) == [experience_select.Selection()]
  empty = experience_index.ExperienceIndex(bank_of([]), 'minilm', 'static', HashEncoder())
  assert select(empty, [query], k=2) == [experience_select.Selection()]


def test_random_depends_on_task_and_seed_alone():
  index = experience_index.ExperienceIndex(full_bank(), 'random', 'static')
  queries = [query_for(e) for e in index.bank.experiences]
  ids = lambda found: [[r.experience.id for r in s.experiences] for s in found]
  assert ids(select(index, queries)) == ids(select(index, queries[::-1]))[::-1]
  assert ids(select(index, queries)) != ids(select(index, queries, seed=1))


# The kept index.


def test_a_kept_index_embeds_only_what_is_new(tmp_path):
  bank = full_bank()
  encoder = HashEncoder()
  open_index = lambda e: experience_index.ExperienceIndex.open(
    tmp_path / 'i', bank, 'minilm', 'dynamic', e)
  built = open_index(encoder)
  assert len(encoder.read) == len({t for t in encoder.read}) == 12, 'equal texts once'
  again = HashEncoder()
  loaded = open_index(again)
  assert again.read == []
  query = query_for(bank.experiences[3], task_id='new')
  assert select(loaded, [query]) == select(built, [query])
  bank.experiences += [experience(99, 'bronze', 'laptop')]
  third = HashEncoder()
  grown = open_index(third)
  assert len(third.read) == 1 and 'laptop' in third.read[0]
  assert grown.report.size == len(bank) == 25
  fourth = HashEncoder()
  assert open_index(fourth).report.size == 25 and fourth.read == []


def test_added_experiences_are_found_at_once():
  bank = full_bank()
  for method in ('minilm', 'bm25', 'random'):
    bank = full_bank()
    index = experience_index.ExperienceIndex(bank, method, 'static', HashEncoder())
    new = experience(99, 'rustic', 'kettle')
    bank.experiences.append(new)
    index.add([new])
    [found] = select(index, [query_for(new, task_id='other')], k=25)
    assert 'e99' in {r.experience.id for r in found.experiences}
    assert method == 'random' or found.experiences[0].experience.id == 'e99'


def test_queries_are_embedded_once_and_not_kept_for_ever(monkeypatch):
  monkeypatch.setattr(experience_index, '_REMEMBERED', 5)
  encoder = HashEncoder()
  index = experience_index.ExperienceIndex(full_bank(), 'minilm', 'static', encoder)
  encoder.read.clear()
  for _ in range(2):
    index.search(['a', 'b'], 1)
  assert encoder.read == ['a', 'b']
  for n in range(20):
    index.search([f'query {n}'], 1)
  index.search(['a'], 1)
  assert encoder.read.count('a') == 2 and len(index._keys._queries) <= 6


def test_an_index_of_another_encoder_kind_or_bank_is_refused(tmp_path):
  bank = full_bank()
  folder = tmp_path / 'i'
  open_index = experience_index.ExperienceIndex.open
  open_index(folder, bank, 'minilm', 'static', HashEncoder())
  with pytest.raises(errors.UserError, match=r'keys of width 64 and the encoder minilm gives 32'):
    open_index(folder, bank, 'minilm', 'static', HashEncoder(32))
  with pytest.raises(errors.UserError, match='was built by minilm'):
    open_index(folder, bank, 'minilm', 'static', HashEncoder(64, 'other'))
  with pytest.raises(errors.UserError, match=r'for static queries, not by minilm .* for dynamic'):
    open_index(folder, bank, 'minilm', 'dynamic', HashEncoder())
  with pytest.raises(errors.UserError, match='is of another bank'):
    open_index(folder, bank_of(bank.experiences[::-1]), 'minilm', 'static', HashEncoder())
  meta = folder / 'experience_index.json'
  whole = meta.read_text()
  meta.write_text(whole[:20])
  with pytest.raises(errors.UserError, match=r'experience_index\.json is torn'):
    open_index(folder, bank, 'minilm', 'static', HashEncoder())
  meta.write_text(json.dumps({**json.loads(whole)}))
  shutil.copy(meta, folder / 'keys.npy')
  with pytest.raises(errors.UserError, match=r'keys\.npy is torn'):
    open_index(folder, bank, 'minilm', 'static', HashEncoder())


def test_bad_names_and_numbers():
  with pytest.raises(errors.UserError, match='no experience retrieval'):
    experience_index.ExperienceIndex(bank_of([]), 'tfidf')
  with pytest.raises(errors.UserError, match='query is static or dynamic'):
    experience_index.ExperienceIndex(bank_of([]), 'bm25', 'sometimes')
  for rules, words in (
      ({'format': 'xml'}, 'no experience format'), ({'outcomes': 'good'}, 'outcomes is'),
      ({'order': 'x'}, 'block_order'), ({'diversity': 1.0}, 'diversity'), ({'k': -1}, 'k and')):
    with pytest.raises(errors.UserError, match=words):
      experience_select.Rules(**rules)


def test_minilm_tells_states_apart(minilm_path):
  bank = full_bank()
  index = experience_index.ExperienceIndex(bank, 'minilm', 'static')
  queries = [query_for(e, task_id='new') for e in bank.experiences]
  found = select(index, queries, k=2)
  right = [r.experience.group == q.group for q, s in zip(queries, found) for r in s.experiences]
  assert np.mean(right) == 1.0
