"""From failures to a bank: counting, merging, the file, the command."""

import json
import subprocess
import sys

import pytest

from data import errors
from data import trajectory as trajectory_lib
from retrieval import hint_rules, hint_writers, hints
from tests.retrieval.episodes import EFFECT, LABELLED, REFUSED, episode


class Fixed:
  """A writer that gives the same lists for every failure."""

  name = 'fixed'

  def __init__(self, texts):
    self._texts = texts
    self.counts = {'odd': 2}

  def provenance(self):
    return {'name': self.name}

  def write(self, failures):
    return [list(self._texts) for _ in failures]


def _bank(rows):
  merged, count = hints.merge(
    [(t, text, i, {'episode_id': f'e{i}', 'task_id': f't{i}'}) for i, (t, text) in enumerate(rows)],
    'rules')
  return merged, count


def test_normalise():
  assert hints.normalise(' - open  the kiln ,then fire it ') == 'Open the kiln,then fire it.'
  assert hints.normalise('2) "Take {object}."') == 'Take {object}.'
  assert hints.normalise('  ') == ''


def test_same_hints_are_counted_and_near_duplicates_merged():
  kept, merged = _bank([
    ('a', 'Examine each appliance before you take {object}.'),
    ('a', 'examine every appliance before you take {object}'),
    ('a', 'Examine each appliance before you take {object}'),
    ('b', 'Examine each appliance before you take {object}.'),
  ])
  assert [(h.task_type, h.count) for h in kept] == [('a', 3), ('b', 1)]
  assert merged == 1
  assert [s['task_id'] for s in kept[0].sources] == ['t0', 't1', 't2']


@pytest.mark.parametrize('other', [
  hint_rules.rule_hint('matte', 'fire', 'kiln'),  # another state
  hint_rules.rule_hint('glazed', 'bake', 'kiln'),  # another verb
  hint_rules.rule_hint('glazed', 'fire', 'loom'),  # another appliance
  hint_rules.rule_hint('glazed', 'fire', 'kiln', 'open'),  # a precondition
])
def test_different_facts_are_never_merged(other):
  kept, merged = _bank([('a', hint_rules.rule_hint('glazed', 'fire', 'kiln')), ('a', other)])
  assert len(kept) == 2 and merged == 0


@pytest.mark.parametrize('pair', [
  ('Fire {object} before you open the kiln.', 'Fire {object} after you open the kiln.'),
  ('Move {object} from the shelf to the desk.', 'Move {object} to the shelf from the desk.'),
  ('Use the kiln before the loom for {object}.', 'Use the loom before the kiln for {object}.'),
  ('Put {object} on the shelf, not on the bed.', 'Put {object} on the shelf, on the bed.'),
  ('Turn on the kiln and fire {object} there.', 'Turn off the kiln and fire {object} there.'),
])
def test_order_and_small_words_of_a_rule_count(pair):
  assert not hints.near_duplicates(*pair)


def test_ranking_and_coinciding_ids_of_two_runs():
  source = {'episode_id': 'e0', 'task_id': 't0'}
  rows = [('a', 'Zebra.', 0, source), ('a', 'Apple.', 1, source), ('a', 'Zebra.', 2, source)]
  kept, _ = hints.merge(rows, 'rules')
  assert [(h.text, h.count) for h in kept] == [('Zebra.', 2), ('Apple.', 1)]


def test_distil_uses_failures_only_and_says_where_from(tmp_path):
  episodes = [episode(LABELLED, id='e0'), episode(EFFECT, id='e1', success=True),
              episode([], id='e2', task_id='t2', instruction='dance.')]
  bank = hints.distil(episodes, hint_writers.RulesWriter(), runs=['runs/base'])
  fact = bank.of_type('make_state')[0]
  texts = [h.text for h in bank.hints]
  assert 'To make {object} dotted, sort it with the kiln after you open it.' in texts
  assert not any('salty' in t for t in texts)  # a success teaches nothing here
  assert fact.sources == [{'episode_id': 'e0', 'task_id': 't0'}]
  assert fact.taught_only_by('t0') and not fact.taught_only_by('t1')
  assert bank.provenance['failures'] == 2 and bank.provenance['failures_without_hints'] == 1
  assert bank.provenance['policies'] == ['base'] and bank.provenance['runs'] == ['runs/base']
  bank.save(tmp_path / 'bank.json')
  again = hints.HintBank.load(tmp_path / 'bank.json')
  assert again == bank and again.fingerprint == bank.fingerprint
  first = (tmp_path / 'bank.json').read_bytes()
  again = hints.distil(episodes, hint_writers.RulesWriter(), runs=['runs/base'])
  again.save(tmp_path / 'bank.json')
  assert (tmp_path / 'bank.json').read_bytes() == first
  table = hints.summary_table(bank)
  assert 'make_state' in table and 'without hints' in table


def test_bad_banks(tmp_path):
  path = tmp_path / 'bank.json'
  with pytest.raises(errors.UserError, match='cannot be read'):
    hints.HintBank.load(path)
  path.write_text('{"version": 1, "hin')
  with pytest.raises(errors.UserError, match='not JSON'):
    hints.HintBank.load(path)
  path.write_text(json.dumps({'version': 9}))
  with pytest.raises(errors.UserError, match='version 9'):
    hints.HintBank.load(path)
  path.write_text(json.dumps({'version': 1, 'hints': [{'id': 'a', 'text': 'x'}]}))
  with pytest.raises(errors.UserError, match='Hint 0'):
    hints.HintBank.load(path)
  hint = dict(id='a', text='x', task_type='t', count=1, sources=[], writer='rules')
  path.write_text(json.dumps({'version': 1, 'hints': [hint, hint]}))
  with pytest.raises(errors.UserError, match='twice'):
    hints.HintBank.load(path)


def test_a_place_that_cannot_be_written_to(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot be written'):
    hints.HintBank([]).save(tmp_path / 'file' / 'bank.json')


def _run(folder, episodes):
  journal = trajectory_lib.Journal(folder / trajectory_lib.JOURNAL_NAME)
  for e in episodes:
    journal.append(e)


def _command(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'retrieval.hints', *flags], capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
  for name, steps in (('one', LABELLED), ('two', REFUSED)):
    (tmp_path / name).mkdir()
    _run(tmp_path / name, [episode(steps)])
  runs = f'{tmp_path / "one"},{tmp_path / "two"}'
  done = _command(f'--episodes={runs}', '--writer=rules', f'--out={tmp_path / "bank.json"}')
  assert done.returncode == 0, done.stderr
  assert 'make_state' in done.stdout and 'bank.json' in done.stdout
  bank = hints.HintBank.load(tmp_path / 'bank.json')
  assert bank.provenance['runs'] == runs.split(',') and bank.provenance['failures'] == 2
  broken = _command(f'--episodes={tmp_path / "none"}', f'--out={tmp_path / "b.json"}')
  assert broken.returncode == 1 and 'Traceback' not in broken.stderr
  (line,) = broken.stderr.strip().splitlines()
  assert line.startswith('error: ')


def test_what_the_command_refuses(tmp_path):
  with pytest.raises(errors.UserError, match='no hint writer'):
    hints.check_flags('oracle', '')
  with pytest.raises(errors.UserError, match='--model'):
    hints.check_flags('openai', '')
  (tmp_path / 'run').mkdir()
  _run(tmp_path / 'run', [episode(EFFECT, success=True)])
  with pytest.raises(errors.UserError, match='no failure'):
    hints.load_runs([str(tmp_path / 'run')])
