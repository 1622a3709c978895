"""An environment that raises or dies ends its own episode, counted and shown, and no other."""

import dataclasses
import sys

import pytest

import rollout
from agents import episode as episode_lib
from agents import memory, runner
from configs import rollout as config_lib
from data import errors, summary, trajectory
from envs import base, household_suite, workers
from inference import engine as engine_lib
from retrieval import hints, select
from tests.agents import fakes

LABELS = episode_lib.Labels('base', 'mock', 'test', 0)
SPEC = episode_lib.AgentSpec('plain', max_env_steps=5)


@pytest.fixture(scope='module')
def tokenizer(tokenizer_folder):
  return fakes.Tokenizer.load(tokenizer_folder)


def play(tokenizer, suite, tasks, workdir, replies=('look', 'inventory', 'dance', 'wait', 'sing'),
         **options):
  script = lambda text: replies[min(len(replies), text.count('assistant\n')) - 1]
  played = fakes.ScriptedEngine(
    tokenizer, script, max_len=9000, overflow=engine_lib.ContextOverflow,
    completion=engine_lib.Completion)
  return runner.play(
    played, tokenizer, suite, episode_lib.games(tasks, [LABELS]), SPEC, workdir, progress=False,
    **options)


def without_seconds(episodes):
  for episode in episodes:
    episode.wall_s = 0.0
  return episodes


class FaultySuite(fakes.LeverSuite):
  """The lever game; task 1 has a fault of its own kind, 'sing' brings it out."""

  def __init__(self, fault):
    super().__init__(4)
    self._fault = fault

  def make(self, task):
    environment = super().make(task)
    if task.id != 'test/lever-1':
      return environment
    if self._fault == 'exits at the start':
      sys.exit('planner: critical error')
    if self._fault == 'no text at the start':
      environment.reset = lambda: None
    elif self._fault == 'cannot be closed':
      environment.close = self._raise
    elif self._fault != 'none':
      answers = {
        'raises': self._raise,
        'exits': lambda: sys.exit(11),
        'answers nothing': lambda: None,
        'no text': lambda: base.StepResult(b'bytes', 0.0, False, False, True, True),
        'no reward': lambda: base.StepResult('You sing.', None, False, False, True, True),
      }
      step = environment.step
      environment.step = lambda action: (
        answers[self._fault]() if action == 'sing' else step(action))
    return environment

  def _raise(self):
    raise BrokenPipeError('the worker died')


@pytest.mark.parametrize('fault, calls, shown', [
  ('raises', 3, 'BrokenPipeError: the worker died'),
  ('exits', 3, 'SystemExit: 11'),
  ('answers nothing', 3, 'AttributeError'),
  ('no text', 3, "TypeError: the observation is no text but b'bytes'"),
  ('no reward', 3, 'TypeError'),
  ('exits at the start', 0, 'SystemExit: planner: critical error'),
  ('no text at the start', 0, 'TypeError: the observation is no text but None'),
])
def test_a_fault_ends_its_own_episode(tokenizer, tmp_path, capsys, fault, calls, shown):
  replies = ('wait', 'dance', 'sing', 'lose')
  played = {}
  for name in (fault, 'none'):
    suite = FaultySuite(name)
    played[name] = without_seconds(
      play(tokenizer, suite, suite.tasks('test'), tmp_path / name, replies))
  faulty, *others = [played[fault].pop(1), *played[fault]]
  played['none'].pop(1)
  assert others == played['none'] and len(others) == 3
  assert faulty.termination == 'env_error' and not faulty.success and faulty.model_calls == calls
  error = capsys.readouterr().err
  assert f'1 episode(s) with an environment error: {shown}' in error
  # Kept like any other: the same command does not play it again.
  assert faulty.id in trajectory.Journal(tmp_path / fault / trajectory.JOURNAL_NAME).ids()


def test_an_environment_that_cannot_be_closed_changes_no_result(tokenizer, tmp_path, capsys):
  suite = FaultySuite('cannot be closed')
  episodes = play(tokenizer, suite, suite.tasks('test'), tmp_path, ('pull lever 2', 'lose'))
  assert [e.termination for e in episodes] == ['failure', 'success', 'failure', 'failure']
  assert 'while closing: BrokenPipeError: the worker died' in capsys.readouterr().err


@pytest.mark.parametrize('fault', ['none', 'exits at the start', 'no text at the start',
                                   'cannot be closed'])
def test_a_game_that_does_not_start_stops_no_retrieval(fault):
  suite = FaultySuite(fault)
  bank = hints.HintBank([
    hints.Hint(f'h-{kind}', 'Try lever 2.', kind, 1, [], 'rules') for kind in ('odd', 'even')])
  found = memory.retrieve_hints(
    select.HintIndex(bank), suite, suite.tasks('test'), 1, method='fixed')
  starts = fault in ('none', 'cannot be closed')
  assert ('test/lever-1' in found) == starts and len(found) == 3 + starts
  assert all(m.retrieved[0]['text'] == 'Try lever 2.' for m in found.values())


HOSTILE = 'tests.envs.hostile:HostileSuite'


@pytest.mark.parametrize('once', [True, False])
def test_an_environment_that_dies_takes_no_run_with_it(tokenizer, tmp_path, capsys, once):
  config = config_lib.make({
    'env': HOSTILE, 'slots': 3, 'env_workers': 1,
    'env_options': 'fault:is killed' + (f';once:{tmp_path / "once"}' if once else '')})
  suite = rollout.make_suite(config)
  tasks = suite.tasks('train')
  replies = ('more', 'now', 'more', 'more', 'more')
  try:
    episodes = play(tokenizer, suite, tasks, tmp_path, replies)
  finally:
    suite.close()
  ends = ['success'] * 4
  if not once:
    ends[1] = 'env_error'
  assert [e.termination for e in episodes] == ends
  assert episodes[1].env_restarts == 1 and suite.summary()['crashed'] == 1 + (not once)
  shown = capsys.readouterr().err
  assert ('EnvironmentDied: its worker died twice, the second time as it was killed by signal 9'
          in shown) == (not once)
  # The record says it, and so does the summary of the run.
  kept = {e.task_id: e.env_restarts for e in trajectory.load_episodes(tmp_path)}
  assert kept == {e.task_id: e.env_restarts for e in episodes}
  row = summary.row(
    episodes, id='base', policy='base', memory='none', split='train', seed=0)
  rollout.show(tmp_path, {'rows': [row], 'paired': []})
  number = sum(kept.values())
  assert row['env_restarts'] == number and f'{number} time(s) an episode was played again' in (
    capsys.readouterr().out)


def test_which_suites_run_in_workers():
  make = lambda **values: rollout.make_suite(config_lib.make({'env': HOSTILE, **values}))
  assert isinstance(make(), workers.WorkerSuite)
  assert not isinstance(make(env_workers=0), workers.WorkerSuite)
  assert not isinstance(make(env='household'), workers.WorkerSuite)
  assert isinstance(make(env='household', env_workers=1), workers.WorkerSuite)
  assert isinstance(
    make(env='household', env_options='engine:textworld'), workers.WorkerSuite)
  with pytest.raises(errors.UserError, match='env_workers'):
    make(env_workers=-2)
  with pytest.raises(errors.UserError, match='a worker for each of the slots=4'):
    make(env_workers=2, slots=4, env_options='exclusive:True')
  make(env_workers=4, slots=4, env_options='exclusive:True')


def broken_problems(problem):
  """PDDL that TextWorld's planner meets with errors of its own; the last calls sys.exit."""
  start, goal, rest = problem.partition('(:goal')
  return {
    'cut in the middle': problem[:len(problem) // 2],
    'an object that is not there': problem.replace('(atLocation agent1', '(atLocation nobody', 1),
    'a predicate that is not there': start + goal + rest.replace('inReceptacle', 'inThePocket'),
  }


def test_textworld_s_own_crashes(tokenizer, tmp_path, capsys):
  pytest.importorskip('textworld')
  pytest.importorskip('alfworld')
  suite = household_suite.HouseholdSuite(num_train=2, num_receptacles=6, engine='textworld')
  whole, other = suite.tasks('train')
  broken = [
    dataclasses.replace(whole, id=f'train/{name}', payload={**whole.payload, 'problem': problem})
    for name, problem in broken_problems(whole.payload['problem']).items()]
  episodes = play(tokenizer, suite, [whole, *broken, other], tmp_path)
  assert [e.termination for e in episodes] == [
    'step_limit', 'env_error', 'env_error', 'env_error', 'step_limit']
  assert 'carrying' in episodes[0].steps[1].observation
  shown = [line for line in capsys.readouterr().err.splitlines() if 'environment error' in line]
  assert len(shown) == 3 and any('SystemExit' in line for line in shown)


def test_the_entry_counts_and_shows_it(tokenizer_folder, tmp_path, monkeypatch, capsys):
  config = config_lib.make({
    'agent': 'expert', 'base': 'random', 'tokenizer': str(tokenizer_folder), 'skills': 'loop',
    'split': 'train', 'episodes': 3, 'env_options': 'num_train:3', 'memory': 'hints',
    'retrieval': 'fixed', 'bank': str(tmp_path / 'bank.json')})
  hints.HintBank([hints.Hint('h', 'Look first.', 'make_state', 1, [], 'rules')]).save(config.bank)
  make = household_suite.HouseholdSuite.make
  broken = rollout.make_suite(config).tasks('train')[1].id

  def dies(self, task):
    if task.id == broken:
      raise EOFError('the worker died')
    return make(self, task)

  monkeypatch.setattr(household_suite.HouseholdSuite, 'make', dies)
  rollout.run(config, tmp_path / 'run')
  assert 'ended by: env_error 1, success 2' in capsys.readouterr().out
  found = {e.task_id: e.termination for e in trajectory.load_episodes(tmp_path / 'run')}
  assert found.pop(broken) == 'env_error' and set(found.values()) == {'success'}

  def missing(self, task):
    raise errors.UserError('There is no game.')

  # What a user can mend is told, and no episode is written off for it.
  monkeypatch.setattr(household_suite.HouseholdSuite, 'make', missing)
  with pytest.raises(errors.UserError, match='no game'):
    rollout.run(config, tmp_path / 'other')
