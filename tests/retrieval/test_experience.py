"""Banks of experiences: what goes in comes out, adds up, and is refused where it does not fit."""

import dataclasses
import json
import types

import numpy as np
import pytest

from data import errors, trajectory
from retrieval import experience as experience_lib
from tests.agents import fakes
from tests.retrieval.episodes import EFFECT, LABELLED, REFUSED, episode

TASK = 'You are in a hall.\n\nYour task is to: make a dotted mug.'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return fakes.make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


def played(tokenizer, steps, *, task=TASK, system='You solve a task.', **fields):
  """An episode with the tokens of its first prompt."""
  chat = tokenizer.chat
  parts = [
    ('system', [*chat.system_open, *tokenizer.encode(system)]), ('system', chat.system_to_user),
    ('memory', tokenizer.encode('Past attempts:\n\n')),
    ('task', [*tokenizer.encode(task), *chat.user_to_assistant])]
  tokens = [t for _, ids in parts for t in ids]
  kinds = [trajectory.KIND[kind] for kind, ids in parts for _ in ids]
  return dataclasses.replace(
    episode(steps, **fields), tokens=tokens, kinds=kinds, logprobs=np.zeros(len(tokens)),
    tokenizer=tokenizer.fingerprint)


def two(tokenizer):
  return [
    played(tokenizer, EFFECT, id='a', task_id='t0', success=True),
    played(tokenizer, REFUSED, id='b', task_id='t1')]


def test_an_episode_becomes_an_experience_with_what_the_agent_saw(tokenizer):
  bank = experience_lib.ExperienceBank()
  first, second = bank.add_episodes(two(tokenizer), tokenizer, 'runs/x')
  assert first.task == TASK and first.outcome == 'success' and second.outcome == 'failure'
  assert first.turns[0].action == EFFECT[0][0] and first.turns[-1].observation == EFFECT[-1][1]
  assert first.group == ('make_state', 'dotted')
  assert 'runs/x' in first.provenance and 't0' in first.provenance
  assert bank.provenance['tokenizer'] == tokenizer.fingerprint
  assert bank.provenance['sources'] == [
    {'run': 'runs/x', 'policy': 'base', 'failures': 1, 'successes': 1}]


def test_failures_on_purpose_are_marked(tokenizer):
  erring = [dataclasses.replace(e, policy=experience_lib.ERRING_EXPERT) for e in two(tokenizer)]
  bank = experience_lib.ExperienceBank()
  bank.add_episodes([*two(tokenizer), *erring], tokenizer, 'x')
  assert [e.on_purpose for e in bank.experiences] == [False, False, False, True]


def test_save_add_and_load(tokenizer, tmp_path):
  bank = experience_lib.ExperienceBank()
  bank.add_episodes(two(tokenizer), tokenizer, 'x')
  bank.save(tmp_path / 'bank')
  loaded = experience_lib.ExperienceBank.load(tmp_path / 'bank')
  assert loaded.experiences == bank.experiences and loaded.provenance == bank.provenance
  # What is there already is counted and not added twice.
  more = [*two(tokenizer), played(tokenizer, LABELLED, id='c', task_id='t2')]
  new = loaded.add_episodes(more, tokenizer, 'y')
  assert [e.task_id for e in new] == ['t2'] and len(loaded) == 3
  assert loaded.provenance['sources'][-1]['there_already'] == 2
  loaded.save(tmp_path / 'bank')
  assert len(experience_lib.ExperienceBank.load(tmp_path / 'bank')) == 3
  assert len(list((tmp_path / 'bank').iterdir())) == 2, 'the old file is gone'


def test_broken_environments_teach_nothing(tokenizer):
  broken = dataclasses.replace(
    played(tokenizer, EFFECT), termination='env_error', success=False)
  bank = experience_lib.ExperienceBank()
  assert bank.add_episodes([broken], tokenizer, 'x') == []
  assert bank.provenance['sources'][0]['left_out'] == 1


def test_chat_is_one_json_object_a_message(tokenizer):
  bank = experience_lib.ExperienceBank()
  one = bank.add_episodes(two(tokenizer), tokenizer, 'x')[0]
  messages = [json.loads(line) for line in experience_lib.render_chat(one).splitlines()]
  assert messages[0] == {'user': TASK}
  assert messages[1] == {'assistant': EFFECT[0][0]} and messages[2] == {'user': EFFECT[0][1]}
  assert len(messages) == 1 + 2 * len(EFFECT)


def test_flat_is_one_line_and_holds_everything(tokenizer):
  bank = experience_lib.ExperienceBank()
  one = bank.add_episodes(two(tokenizer), tokenizer, 'x')[0]
  flat = experience_lib.render_flat(one)
  assert '\n' not in flat and all(a in flat and o in flat for a, o in EFFECT)
  assert flat == experience_lib.flat_text(one.task, one.turns)


def test_a_summary_keeps_commands_and_news_only(tokenizer):
  bank = experience_lib.ExperienceBank()
  one = bank.add_episodes(two(tokenizer), tokenizer, 'x')[1]
  lines = experience_lib.render_summary(one).splitlines()
  assert lines[0] == 'make a dotted mug.'
  assert lines[1] == f'> {REFUSED[0][0]}: {REFUSED[0][1]}'
  # Nothing happened there: the command alone.
  assert lines[-1] == f'> {REFUSED[-1][0]}'
  thought = dataclasses.replace(one, turns=(experience_lib.Turn('think: hm', '', 'OK.', False),))
  assert experience_lib.render_summary(thought).splitlines() == ['make a dotted mug.']


def test_other_prompts_and_tokenizers_are_refused(tokenizer, tmp_path):
  bank = experience_lib.ExperienceBank()
  bank.add_episodes(two(tokenizer), tokenizer, 'x')
  with pytest.raises(errors.UserError, match=r'other prompts.*system prompt'):
    bank.add_episodes([played(tokenizer, EFFECT, system='You are else.')], tokenizer, 'y')
  react = dataclasses.replace(played(tokenizer, EFFECT), agent='react')
  with pytest.raises(errors.UserError, match=r'format plain.*y holds format react'):
    bank.add_episodes([react], tokenizer, 'y')
  with pytest.raises(errors.UserError, match='tokenised by other'):
    bank.add_episodes(
      [dataclasses.replace(react, tokenizer='other')], tokenizer, 'y')
  own = bank.provenance
  bank.check(own['agent'], own['prompt'], own['tokenizer'])
  with pytest.raises(errors.UserError, match='another tokenizer'):
    bank.check(own['agent'], own['prompt'], 'f' * 64)


def test_missing_torn_old_and_empty_banks(tokenizer, tmp_path):
  load = experience_lib.ExperienceBank.load
  with pytest.raises(errors.UserError, match='There is no experience bank'):
    load(tmp_path / 'nothing')
  experience_lib.ExperienceBank().save(tmp_path / 'empty')
  with pytest.raises(errors.UserError, match='is empty; add episodes'):
    load(tmp_path / 'empty')
  bank = experience_lib.ExperienceBank()
  bank.add_episodes(two(tokenizer), tokenizer, 'x')
  bank.save(tmp_path / 'b')
  data = next((tmp_path / 'b').glob('experiences-*'))
  whole = data.read_bytes()
  for torn in (whole[:-30], whole.replace(b'mug', b'mud', 1)):
    data.write_bytes(torn)
    with pytest.raises(errors.UserError, match=r'experiences of the bank .* are torn'):
      load(tmp_path / 'b')
  data.write_bytes(whole)
  meta = tmp_path / 'b' / 'bank.json'
  record = json.loads(meta.read_text())
  meta.write_text(json.dumps({**record, 'version': 99}))
  with pytest.raises(errors.UserError, match='version 99'):
    load(tmp_path / 'b')
  meta.write_text('{"ver')
  with pytest.raises(errors.UserError, match=r'bank\.json is torn'):
    load(tmp_path / 'b')


def test_the_command_makes_a_bank_and_adds_to_it(tokenizer, tmp_path, capsys):
  for name, episodes in (
      ('one', two(tokenizer)), ('two', [played(tokenizer, LABELLED, id='c', task_id='t2')])):
    journal = trajectory.Journal(tmp_path / name / trajectory.JOURNAL_NAME)
    for e in episodes:
      journal.append(e)
    journal.close()
  for name in ('one', 'two'):
    experience_lib.main(
      types.SimpleNamespace(episodes=str(tmp_path / name), out=str(tmp_path / 'bank')),
      lambda: tokenizer)
  bank = experience_lib.ExperienceBank.load(tmp_path / 'bank')
  assert [e.task_id for e in bank.experiences] == ['t0', 't1', 't2']
  assert '1 failure, 1 success' in capsys.readouterr().out
  with pytest.raises(errors.UserError, match='no run folder'):
    experience_lib.main(types.SimpleNamespace(episodes='', out='x'), lambda: tokenizer)
