"""Experience retrieval: its parts with scripted players, and a run as a user starts it."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

import rollout
from agents import episode as episode_lib
from agents import experience_memory, expert_episodes
from agents import memory as memory_lib
from configs import experience_retrieval as config_lib
from configs import rollout as rollout_config
from data import errors, trajectory
from envs import get_suite
from experiments import demonstrations, experience_retrieval, experience_rows
from retrieval import experience as experience_lib
from retrieval import experience_index, experience_select
from tests import programs
from tests.agents import fakes
from training import dataset

_ROOT = pathlib.Path(__file__).parents[2]
SPEC = episode_lib.AgentSpec(format='plain', layout='paper_b', max_env_steps=10, max_calls=14)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return fakes.make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def suite():
  return get_suite(
    'household', skills='easy', task_types=['make_state'], num_train=64, num_valid=4,
    num_appliances=(5, 5), num_surfaces=(1, 2), num_things=(2, 3))


@pytest.fixture(scope='module')
def memory(suite, tokenizer):
  """Two games of each of 32 skills, won and, for some, lost on purpose."""
  bank = experience_lib.ExperienceBank()
  for policy, options in (('expert', {}), (experience_lib.ERRING_EXPERT, {'error_rate': 0.6})):
    labels = episode_lib.Labels(policy, 'expert', 'train', 0)
    played = [expert_episodes.expert_episode(
      suite, task, tokenizer, SPEC, labels, known_rules=suite.rules(task), **options)
      for task in suite.tasks('train')]
    bank.add_episodes(
      [e for e in played if e.success == (policy == 'expert')], tokenizer, f'index/{policy}')
  assert sum(e.on_purpose for e in bank.experiences) > 3
  return experience_memory.ExperienceMemory(
    experience_index.ExperienceIndex(bank, 'bm25', 'static'), experience_select.Rules(k=2),
    tokenizer)


def _demonstrate(suite, tokenizer, memory, folder, **options):
  return demonstrations.play(
    suite, suite.tasks('train'), tokenizer, SPEC, memory, folder,
    **{**dict(draw=0, dropout=0.0, mismatched=0.5, knows='rules', seed=0), **options})


@pytest.mark.parametrize('method', ['bm25', 'random'])
@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_no_training_context_contains_its_own_episode(
    suite, tokenizer, memory, tmp_path, method, dropout):
  own = experience_memory.ExperienceMemory(
    experience_index.ExperienceIndex(memory.index.bank, method, 'static'),
    experience_select.Rules(k=4), tokenizer)
  by_id = {e.id: e for e in memory.index.bank.experiences}
  by_task = {}
  for e in by_id.values():
    by_task.setdefault(e.task_id, []).append(e)
  episodes = _demonstrate(suite, tokenizer, own, tmp_path, dropout=dropout)
  assert len(episodes) == len(by_task) == 64
  shown = 0
  for episode in trajectory.load_episodes(tmp_path):  # what train.py reads
    block = tokenizer.decode(
      episode.tokens[episode.kinds == trajectory.KIND['memory']].tolist())
    for r in episode.retrieved:
      shown += 1
      assert by_id[r['id']].task_id != episode.task_id
      assert r['text'] in block
    for e in by_task[episode.task_id]:
      assert experience_lib.render_chat(e) not in block
  assert shown > 100


def test_lora_and_exprag_lora_learn_the_same_tokens(suite, tokenizer, memory, tmp_path):
  """With the memory dropped the contexts are those of episodes that never had one."""
  episodes = _demonstrate(suite, tokenizer, memory, tmp_path / 'with')
  labels = episode_lib.Labels('expert', 'expert', 'train', 0)
  with_memory = dataset.build(episodes, dataset.Rules(drop_memory=False))[0]
  without = dataset.build(episodes, dataset.Rules(drop_memory=True))[0]
  for task, a, b in zip(suite.tasks('train'), with_memory, without):
    plain = expert_episodes.expert_episode(
      suite, task, tokenizer, SPEC, labels, known_rules=suite.rules(task))
    assert b.tokens.tolist() == plain.tokens.tolist()
    assert a.tokens[a.loss_mask].tolist() == b.tokens[b.loss_mask].tolist()
    assert len(a.tokens) > len(b.tokens) + 50


def test_retrieval_dropout_draws_anew_each_time_and_keeps_its_shares(
    suite, tokenizer, memory, tmp_path):
  groups = {e.id: e.group for e in memory.index.bank.experiences}
  kinds = {0: [], 1: []}
  for draw, found in kinds.items():
    for e in _demonstrate(
        suite, tokenizer, memory, tmp_path / str(draw), draw=draw, dropout=0.5):
      assert e.id.endswith(f'seed{draw}')
      group = experience_lib.group_of(e.task_type, e.instruction)
      same = [groups[r['id']] == group for r in e.retrieved]
      found.append('none' if not same else 'matched' if any(same) else 'other')
  for found in kinds.values():
    assert 16 <= found.count('matched') <= 48
    assert found.count('none') >= 6 and found.count('other') >= 6
  assert kinds[0] != kinds[1]
  assert all(
    e.retrieved for e in _demonstrate(suite, tokenizer, memory, tmp_path / 'all', dropout=0.0))
  assert not any(
    e.retrieved for e in
    _demonstrate(suite, tokenizer, memory, tmp_path / 'no', dropout=1.0, mismatched=0.0))


def test_what_the_expert_knows(suite, tokenizer, memory):
  task = suite.tasks('train')[0]
  [found] = memory.choose([task]).values()
  state = experience_lib.group_of(task.task_type, task.instruction)[1]
  rules = {rule.state: rule for rule in suite.rules(task)}
  shown = demonstrations.known_rules(suite, task, found, 'shown')
  assert rules[state] in shown and set(shown) <= set(rules.values())
  assert demonstrations.known_rules(suite, task, memory_lib.NO_MEMORY, 'shown') == []
  failed = memory_lib.Memory('experience', tuple(
    {**r, 'outcome': 'failure'} for r in found.retrieved))
  assert demonstrations.known_rules(suite, task, failed, 'shown') == []
  assert set(demonstrations.known_rules(suite, task, found, 'rules')) == set(rules.values())
  assert not demonstrations.known_rules(suite, task, found, 'nothing')
  with pytest.raises(errors.UserError, match='expert_knows is'):
    demonstrations.check_knows('all')


def test_memory_for_is_what_was_retrieved_without_dropout(memory, suite):
  task = suite.tasks('train')[1]
  retrieved = memory.choose([task])[task.id]
  for seed in range(20):
    assert demonstrations.memory_for(
      task, retrieved, memory, random.Random(seed), dropout=0.0, mismatched=1.0) is retrieved


# Rows.


def test_rows_are_played_on_both_splits_with_the_right_bank():
  rows = experience_rows.parse('lora, exprag_lora+matched,exprag_lora+mismatched,frozen+all')
  assert [row.id for row in rows][:2] == ['easy/lora', 'easy/exprag_lora+matched']
  banks = {row.id: row.bank for row in rows}
  assert banks['hard/exprag_lora+matched'] == banks['easy/exprag_lora+mismatched'] == 'hard'
  assert banks['hard/exprag_lora+mismatched'] == 'easy' and banks['hard/frozen+all'] == 'all'
  assert banks['easy/lora'] == ''
  wanted = experience_rows.pairs(rows)
  assert ('hard/exprag_lora+matched', 'hard/lora') in wanted
  assert ('hard/exprag_lora+matched', 'hard/exprag_lora+mismatched') in wanted
  assert all(a.split('/')[0] == b.split('/')[0] for a, b in wanted)


def test_collapse_is_what_a_worse_index_costs():
  rates = {'hard/exprag_lora+matched': 0.75, 'hard/exprag_lora': 0.25,
           'hard/exprag_lora+mismatched': 0.5, 'hard/lora': 0.1}
  assert experience_rows.collapse(rates) == {
    'hard/exprag_lora': {'empty': 0.5, 'mismatched': 0.25}}


def test_the_matrix_is_policies_by_conditions():
  rates = {'easy/lora': 0.5, 'easy/lora+matched': 0.25, 'hard/lora': 0.125, 'hard/distilled': 1.0}
  lines = [line.split() for line in experience_rows.matrix(rates).splitlines()]
  assert lines == [
    ['easy', 'matched', 'empty'], ['lora', '25.0', '50.0'],
    ['hard', 'matched', 'empty'], ['lora', '12.5'], ['distilled', '100.0']]
  assert experience_rows.headline(('hard/exprag_lora+matched', 'hard/lora'))
  assert experience_rows.headline(('hard/exprag_lora_dropout', 'hard/exprag_lora'))
  assert not experience_rows.headline(('hard/lora+matched', 'hard/lora'))


@pytest.mark.parametrize('text, words', [
  ('lora,lora', 'twice'), ('', 'no row'), ('lora+hints', "'lora\\+hints'"), ('sft', "'sft'")])
def test_bad_rows(text, words):
  with pytest.raises(errors.UserError, match=words):
    experience_rows.parse(text)


# Config.


def test_recipes_are_config_values_and_single_keys_win():
  ours = config_lib.get_config('')
  paper = config_lib.get_config('recipe=paper')
  assert (paper.rank, paper.alpha, paper.dropout, paper.targets) == (8, 16.0, 0.1, 'q,k,v,o')
  assert (paper.learning_rate, paper.schedule, paper.weight_decay) == (5e-5, 'constant', 0.0)
  assert (paper.loss_on, paper.epochs, ours.rank) == ('action', 9.0, 16)
  earlier = config_lib.get_config('recipe=earlier,epochs=2')
  assert (earlier.loss_on, earlier.rank, earlier.epochs) == ('all', 64, 2.0)
  assert config_lib.get_config('model=qwen25_7b').setting == 'paper'
  assert config_lib.get_config('setting=paper').recipe == 'paper'
  for bad in ('setting=none', 'recipe=none'):
    with pytest.raises(errors.UserError, match='There is no'):
      config_lib.get_config(bad)


@pytest.mark.parametrize('argument, words', [
  ('index_games=-1', 'must not be negative'), ('failures=2', 'failures lies'),
  ('dropout_draws=0', 'dropout_draws'), ('teacher=lora', 'teacher is'),
  ('teacher_splits=medium', 'teacher_splits'), ('grow=0', 'grow and'),
  ('candidates=2,validation_games=0', 'validation_games'),
  ('experience_format=xml', 'experience format'), ('expert_knows=x', 'expert_knows'),
  ('data=$NOWHERE', 'that variable is not set')])
def test_bad_configs(argument, words):
  with pytest.raises(errors.UserError, match=words):
    experience_retrieval.check(config_lib.get_config(argument))


def _suite_of(setting, kind, split, data):
  import rollout
  config = config_lib.get_config(f'setting={setting}')
  run = experience_retrieval.Experiment(config, pathlib.Path('unused'))
  values = {key: config[key] for key in rollout_config.DEFAULTS if key in config}
  values.update(run.tasks_of(kind), data=data)
  return rollout.make_suite(rollout_config.make(values)).tasks(split)


def test_skills_of_the_splits_are_disjoint():
  states = {
    kind: {experience_lib.group_of(t.task_type, t.instruction)[1]
           for t in _suite_of('houses', kind, 'valid_unseen', 'generated')}
    for kind in ('easy', 'hard', 'validation')}
  assert [len(states[kind]) for kind in states] == [32, 12, 12]
  assert not states['easy'] & states['hard'] and not states['hard'] & states['validation']


def test_official_types_are_split_as_in_the_paper():
  easy, hard = (
    {t.task_type for t in _suite_of('household', kind, 'valid_unseen', 'generated')}
    for kind in ('easy', 'hard'))
  assert easy == {
    'look_at_obj_in_light', 'pick_clean_then_place_in_recep', 'pick_and_place_simple'}
  assert hard == {
    'pick_cool_then_place_in_recep', 'pick_heat_then_place_in_recep', 'pick_two_obj_and_place'}


@pytest.mark.slow
def test_alfworld_has_as_many_games_a_split_as_the_paper():
  folder = os.path.expandvars(os.path.join('${HINTSIGHT_DATA}', 'alfworld', 'json_2.1.1'))
  if not pathlib.Path(folder).is_dir():
    pytest.skip('HINTSIGHT_DATA is not set')
  for split, counts in (('train', (1748, 1805)), ('valid_seen', (75, 65))):
    assert tuple(
      len(_suite_of('alfworld', kind, split, folder)) for kind in ('easy', 'hard')) == counts


# The run.


def _command(config, workdir):
  return [sys.executable, '-m', 'experiments.experience_retrieval', '--dry_run',
          f'--config=configs/experience_retrieval.py:{config}', f'--workdir={workdir}']


def _environment():
  environment = programs.environment()
  environment.pop('HINTSIGHT_DATA', None)
  return environment


def _config_of(workdir, stage):
  return json.loads((workdir / stage / 'config.json').read_text())


_EVERYTHING = (
  'evaluate=frozen,lora,lora+matched,exprag_lora+matched,exprag_lora_dropout,'
  'exprag_lora_dropout+mismatched,exprag_lora_dropout+all,exprag_lora_dropout+random,'
  'exprag_lora_dropout+growing,distilled,candidates=2,experience_format=summary')


@pytest.mark.slow
def test_every_stage_survives_a_kill_and_goes_on(smollm2_path, minilm_path, tmp_path):
  workdir = tmp_path / 'run'
  command = _command(_EVERYTHING, workdir)
  process = subprocess.Popen(
    command, cwd=_ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  deadline = time.time() + 900
  while not (workdir / 'lora' / 'done.json').exists() and process.poll() is None:
    assert time.time() < deadline
    time.sleep(0.2)
  process.send_signal(signal.SIGKILL)
  process.wait()
  index = (workdir / 'index' / 'easy' / 'done.json').read_text()
  run = subprocess.run(command, cwd=_ROOT, env=_environment(), capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  assert '[lora] finished before' in run.stdout
  assert (workdir / 'index' / 'easy' / 'done.json').read_text() == index
  record = json.loads((workdir / 'summary.json').read_text())
  rows = experience_rows.parse(_EVERYTHING.partition('=')[2].partition(',candidates')[0])
  assert [row['id'] for row in record['rows']] == [row.id for row in rows]
  assert all(row['n'] == 4 for row in record['rows'])
  assert {(p['a'], p['b']) for p in record['paired']} == set(experience_rows.pairs(rows))
  assert record['stages']['index/easy']['index'] == {
    'kind': 'exact', 'recall': 1.0, 'recall_k': 9}
  for stage, source, drop in (
      ('lora', 'demonstrations/draw0', True), ('exprag_lora', 'demonstrations/draw0', False),
      ('exprag_lora_dropout', 'demonstrations_dropout/draw0', False)):
    config = _config_of(workdir, stage)
    assert config['data'].split(',')[0] == str(workdir / source)
    assert config['drop_memory'] == drop
    assert len(list((workdir / stage / 'validation').iterdir())) == 2, 'checkpoints that played'
    assert json.loads((workdir / stage / 'done.json').read_text())['best']['step'] >= 1
  assert _config_of(workdir, 'exprag_lora_dropout')['epochs'] == 0.5
  distilled = _config_of(workdir, 'distilled')
  assert distilled['drop_memory'] and distilled['data'] == (
    f'{workdir}/teacher/easy,{workdir}/teacher/hard')
  # No task of the evaluation is in an index, and every row of a split plays the same.
  indexed = {
    e.task_id for name in ('easy', 'hard', 'all')
    for e in experience_lib.ExperienceBank.load(workdir / 'index' / name / 'bank').experiences}
  for split in experience_rows.SPLITS:
    tasks = [
      {e.task_id for e in trajectory.load_episodes(workdir / 'evaluation' / row.id)}
      for row in rows if row.split == split]
    assert all(t == tasks[0] for t in tasks) and not tasks[0] & indexed
  for row in rows:
    config = _config_of(workdir, f'evaluation/{row.id}')
    assert config['split'] == 'valid_unseen' and config['skills'] == row.split
    assert config['experiences'] == (
      str(workdir / 'index' / row.bank / 'bank') if row.bank else '')
  assert '+matched' in record['paired'][0]['a']
  for split in experience_rows.SPLITS:
    page = (workdir / f'report-{split}.html').read_text()
    assert 'A dry run' in page and 'The experience banks' in page


def test_the_mesh_of_an_experiment_is_that_of_its_trainings(monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(rollout, 'run', lambda config, folder, base: seen.append(config))
  monkeypatch.setattr(trajectory, 'load_episodes', lambda folder: [])
  run = experience_retrieval.Experiment(config_lib.get_config('mesh=auto'), tmp_path)
  monkeypatch.setattr(run, '_base_in', lambda dtype: object())
  run.play(tmp_path, episodes=3)
  assert (seen[0].mesh, seen[0].episodes) == ('', 3)
  assert run.train_config(data='x', init_adapter='').mesh == 'auto'
