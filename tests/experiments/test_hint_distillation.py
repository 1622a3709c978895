"""The whole loop as a user starts it, with a tiny random model, in both settings."""

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import rollout
import train
from agents import policy as policy_lib
from configs import experience_retrieval as experience_config
from configs import hint_distillation as hint_config
from data import errors, trajectory
from experiments import experience_retrieval, from_scratch, hint_distillation, stages
from tests import programs
from training import speed

_ROOT = pathlib.Path(__file__).parents[2]
_ROW_KEYS = {
  'id', 'policy', 'memory', 'split', 'seed', 'n', 'success_rate', 'success_ci95', 'score_mean',
  'env_steps_mean', 'model_calls_mean', 'prompt_tokens_mean', 'prefilled_tokens_mean',
  'generated_tokens_mean', 'terminations'}


def _command(config, workdir):
  return [sys.executable, '-m', 'experiments.hint_distillation', '--dry_run',
          f'--config=configs/hint_distillation.py:{config}', f'--workdir={workdir}']


def _environment():
  environment = programs.environment()
  environment.pop('HINTSIGHT_DATA', None)
  return environment


def _check(workdir, games):
  record = json.loads((workdir / 'summary.json').read_text())
  assert [row['id'] for row in record['rows']] == ['base', 'base+hints', 'sft', 'distilled']
  for row in record['rows']:
    assert row.keys() >= _ROW_KEYS
    assert row['n'] == games == sum(row['terminations'].values())
    low, high = row['success_ci95']
    assert 0 <= low <= row['success_rate'] <= high <= 1
  assert {(p['a'], p['b']) for p in record['paired']} >= {
    ('distilled', 'base'), ('base+hints', 'base')}
  for pair in record['paired']:
    assert pair['ci95'][0] <= pair['difference'] <= pair['ci95'][1]
  assert record['wall_s'].keys() >= {'base', 'hints', 'teacher', 'sft', 'distilled'}
  assert 'jax' in record['versions']
  return record


def _stage_config(workdir, stage):
  return json.loads((workdir / stage / 'config.json').read_text())


def _check_wiring(workdir, warm):
  """Each stage reads what the method says it reads."""
  start = str(workdir / 'warm_start' / 'adapter') if warm else ''
  for stage, source in (('sft', 'base'), ('distilled', 'teacher')):
    config = _stage_config(workdir, stage)
    assert config['data'] == str(workdir / source)
    assert config['init_adapter'] == start
    assert config['drop_memory'] and config['drop_few_shot']
  adapters = {'base': start, 'base+hints': start, 'sft': str(workdir / 'sft' / 'adapter'),
              'distilled': str(workdir / 'distilled' / 'adapter')}
  played = {}
  for row, adapter in adapters.items():
    config = _stage_config(workdir, f'evaluation/{row}')
    assert config['adapter'] == adapter
    assert config['memory'] == ('hints' if row == 'base+hints' else 'none')
    assert config['split'] == 'valid_unseen' and config['temperature'] == 0
    played[row] = trajectory.load_episodes(workdir / 'evaluation' / row)
  tasks = [{e.task_id for e in episodes} for episodes in played.values()]
  assert tasks[0] == tasks[1] == tasks[2] == tasks[3]
  for stage, memory in (('base', 'none'), ('teacher', 'hints')):
    config = _stage_config(workdir, stage)
    assert (config['split'], config['memory'], config['adapter']) == ('train', memory, start)
    trained_on = {e.task_id for e in trajectory.load_episodes(workdir / stage)}
    assert not trained_on & tasks[0]
  bank = json.loads((workdir / 'hints' / 'bank.json').read_text())
  assert bank['provenance']['runs'] == [str(workdir / 'base')]
  assert all(e.memory == 'hints' and e.retrieved for e in played['base+hints'])
  assert not any((e.kinds == trajectory.KIND['memory']).any() for e in played['distilled'])
  return bank


def test_the_demo_setting_survives_a_kill_and_goes_on(smollm2_path, minilm_path, tmp_path):
  workdir = tmp_path / 'demo'
  command = _command('model=smollm2_135m', workdir)
  process = subprocess.Popen(
    command, cwd=_ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  deadline = time.time() + 300
  while not (workdir / 'base' / 'done.json').exists() and process.poll() is None:
    assert time.time() < deadline
    time.sleep(0.2)
  process.send_signal(signal.SIGKILL)
  process.wait()
  warm_start = (workdir / 'warm_start' / 'done.json').read_text()
  run = subprocess.run(command, cwd=_ROOT, env=_environment(), capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  assert '[base] finished before' in run.stdout
  assert (workdir / 'warm_start' / 'done.json').read_text() == warm_start
  _check(workdir, 4)
  _check_wiring(workdir, warm=True)
  assert _stage_config(workdir, 'base')['skills'] == 'loop'
  warm = json.loads((workdir / 'warm_start' / 'done.json').read_text())
  assert warm['won'] == warm['episodes'] == 8
  assert (workdir / 'distilled' / 'adapter' / 'adapter_config.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('model', ['qwen25_7b'])
def test_the_papers_setting_runs_dry(model, smollm2_path, minilm_path, tmp_path):
  workdir = tmp_path / 'paper'
  run = subprocess.run(
    _command(f'model={model}', workdir), cwd=_ROOT, env=_environment(), capture_output=True,
    text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  record = _check(workdir, 4)
  bank = _check_wiring(workdir, warm=False)
  assert bank['provenance']['writer']['name'] == 'openai'
  config = record['config']
  assert (config['k'], config['rank'], config['alpha']) == (3, 64, 128)
  assert config['agent'] == 'react' and config['layout'] == 'paper_a' and config['few_shots'] > 0


def test_the_papers_setting_is_the_papers():
  from configs import hint_distillation
  config = hint_distillation.get_config('model=qwen25_14b')
  assert config.train_games == 1200 and config.eval_games == 134 and config.warm_episodes == 0
  assert (config.learning_rate, config.dropout, config.weight_decay) == (2e-4, 0.10, 0.01)
  assert (config.batch_rows, config.grad_accum, config.row_len, config.epochs) == (2, 4, 1024, 1)


def test_a_setting_is_chosen_by_the_model_or_by_name(tmp_path):
  from configs import hint_distillation
  assert hint_distillation.get_config().setting == 'demo'
  assert hint_distillation.get_config(f'model={tmp_path}').setting == 'demo'
  assert hint_distillation.get_config('model=qwen25_0.5b').setting == 'paper'
  small = hint_distillation.get_config('setting=alfworld,train_games=7')
  assert (small.model, small.train_games, small.eval_split) == ('smollm2_135m', 7, 'valid_seen')
  with pytest.raises(errors.UserError, match='no setting'):
    hint_distillation.get_config('setting=x')


def test_the_loop_survives_a_base_that_never_fails_or_never_wins(tmp_path, monkeypatch):
  from configs import hint_distillation as config_lib
  from experiments import hint_distillation
  loop = hint_distillation.Loop(config_lib.get_config('warm_episodes=0'), tmp_path)
  won = types.SimpleNamespace(success=True, invalid_actions=9, repeated_noops=0)
  monkeypatch.setattr(trajectory, 'load_episodes', lambda _: [won])
  assert loop.stage('hints', loop.hints)['hints'] == 0
  assert json.loads(pathlib.Path(loop.bank()).read_text())['hints'] == []
  # Nine invalid actions: the paper's filter leaves nothing to train on.
  record = loop.stage('sft', lambda folder: loop.student(folder, ['base']))
  assert record['trained'] == 0 and record['adapter'] == ''


def test_sft_gets_as_many_examples_as_the_teacher_has(tmp_path, monkeypatch):
  from configs import hint_distillation as config_lib
  from experiments import hint_distillation
  loop = hint_distillation.Loop(
    config_lib.get_config('train_games=10,sft_examples=matched'), tmp_path)

  def episodes(won, lost):
    return [types.SimpleNamespace(success=i < won, invalid_actions=0, repeated_noops=0, tokens=[1],
                                  kinds=np.array([trajectory.KIND['action']]))
            for i in range(won + lost)]

  played = {'base': episodes(4, 6), 'teacher': episodes(9, 1)}
  asked = []

  def rollout(folder, *, games, skip, **_):
    asked.append((folder.name, games, skip))
    # Fewer than its rate so far promises, so that a second helping is needed.
    played[folder.name] = episodes(games // 4, games - games // 4)
    return played[folder.name]

  monkeypatch.setattr(loop, 'rollout', rollout)
  monkeypatch.setattr(trajectory, 'load_episodes', lambda folder: played[pathlib.Path(folder).name])
  sources = loop.more_base_games()
  assert sources == ['base', *(name for name, _, _ in asked)] and len(asked) >= 2
  assert loop.usable(sources) >= 9 > loop.usable(sources[:-1])
  # No training game twice.
  at = 10
  for _, games, skip in asked:
    assert skip == at
    at += games


def test_a_next_round_plays_other_games_from_the_student_on(tmp_path):
  from configs import hint_distillation as config_lib
  from experiments import hint_distillation
  before = tmp_path / 'before'
  for stage, record in (('base', {'skip': 5, 'episodes': 20, 'won': 2}),
                        ('base_more_1', {'episodes': 7}), ('hints', {}),
                        ('distilled', {'adapter': 'the/student'})):
    (before / stage).mkdir(parents=True)
    (before / stage / 'done.json').write_text(json.dumps(record))
  config = config_lib.get_config(f'next_after={before},warm_episodes=0')
  hint_distillation.check(config)
  loop = hint_distillation.Loop(config, tmp_path / 'next')
  assert (loop.start_adapter, loop.train_skip) == ('the/student', 32)


def test_the_budget_grows_with_what_is_asked_for(smollm2_path):
  from agents import policy
  from configs import hint_distillation as config_lib
  from experiments import budget, evaluation_rows
  base = policy.load_base('smollm2_135m', 'random', shrink=True)
  config = config_lib.get_config('shrink=true,base=random,dtype=float32,play_dtype=float32')

  def parts(evaluate, config=config):
    rows = evaluation_rows.parse(evaluate)
    return {p['part']: p for p in budget.predict(config, base, rows)}

  few, many = parts('base,sft'), parts('base,base+hints,sft,distilled')
  assert many['students']['tokens'] == 2 * few['students']['tokens'] > 0
  assert many['evaluation']['episodes'] == 4 * config.eval_games
  assert 250 < many['warm start']['tokens'] / config.warm_episodes < 600
  assert 'all' in budget.table(list(many.values()))


def test_the_budget_is_predicted_once(tmp_path):
  asked = []

  def predict(evaluate):
    return stages.predicted(
      tmp_path, {'evaluate': evaluate}, lambda: asked.append(evaluate) or [len(asked)])

  assert [predict('base'), predict('base'), predict('base,sft')] == [[1], [1], [2]]


@pytest.mark.parametrize('program, configs, setting', [
  (hint_distillation.Loop, hint_config, 'webshop'),
  (experience_retrieval.Experiment, experience_config, 'scienceworld')])
def test_a_decoder_of_its_own_is_the_model_of_every_stage(
    program, configs, setting, tmp_path, monkeypatch):
  config = configs.get_config(f'setting={setting},seed=3')
  run, done = program(config, tmp_path), []
  monkeypatch.setattr(from_scratch, 'run', lambda *args: done.append(args) or {'steps': 7})
  run.train_decoder()
  [(lessons, folder)] = done
  assert folder == tmp_path / 'decoder' and run.records['decoder']['training'] == {'steps': 7}
  # It learns as it will play, with the experiment's seed and precision.
  for key in ('env', 'agent', 'layout', 'prompt', 'max_context', 'seed', 'dtype'):
    assert lessons[key] == config[key], key
  assert lessons.task_types == config.get('easy_types', '')
  # The expert's episodes are tokenised by rollout.py, which is told the model by name alone.
  monkeypatch.setattr(trajectory, 'load_episodes', lambda folder: [])
  monkeypatch.setattr(rollout, 'run', lambda *arguments, base: done.append(arguments))
  monkeypatch.setattr(run, '_base_in', lambda dtype: types.SimpleNamespace())
  run.play(tmp_path / 'played', agent='expert')
  model = str(tmp_path / 'decoder' / from_scratch.MODEL_FOLDER)
  assert done[1][0].model == run.train_config().model == model
  # Without the key it is the model of that name.
  other = program(configs.get_config(f'setting={setting},decoder='), tmp_path / 'other')
  other.train_decoder()
  assert len(done) == 2 and other.model == 'smollm2_135m'


@pytest.mark.parametrize('config, words', [
  ('sft_examples=some', 'own or matched'), ('evaluate=sft', 'needs the row base'),
  ('next_after=/nowhere', 'stage base is finished'),
  ('train_games=0', 'at least 1'), ('writer=none', 'no hint writer'),
  ('model=qwen25_7b', 'that variable is not set'),
  ('model=qwen25_7b,data=generated', 'OPENAI_API_KEY'),
  ('writer=openai,hint_base_url=http://127.0.0.1:1/v1', '--model'),
  ('setting=webshop,eval_split=valid_unseen', 'has train, valid, test'),
  ('setting=webshop,decoder=nothing', 'There is no setting')])
def test_bad_input_is_one_sentence(config, words, tmp_path):
  command = _command(config, tmp_path / 'run')
  command.remove('--dry_run')
  environment = _environment()
  environment.pop('OPENAI_API_KEY', None)
  run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 1
  assert words in run.stderr and 'Traceback' not in run.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('seed', range(3))
def test_warm_start_hints_tell_no_rule_of_the_loop(seed):
  from envs import get_suite, household_skills
  from experiments import warm_start
  from retrieval import hint_rules
  suite = get_suite('household', skills='warm', seed=seed, num_train=60, task_types=('make_state',))
  held_out = {(r.verb, r.appliance) for pool in ('loop', 'hard')
              for r in household_skills.draw(pool, seed)}
  states = {s for pool in ('loop', 'hard') for s in household_skills.POOLS[pool]}
  told_count = 0
  for task in suite.tasks('train'):
    memory, told = warm_start.hint_block(
      task, suite.rules(task), random.Random(task.id), k=3, rule_share=0.8, seed=seed)
    texts = [hint['text'] for hint in memory.retrieved]
    assert len(texts) == len(set(texts)) == 3
    state = hint_rules.parse_goal(task.instruction).state
    about = [t for t in texts if f' {state},' in t]
    assert len(about) == len(told) and all(rule.state == state for rule in told)
    told_count += len(told)
    for text in texts:
      match = re.match(r'To make {object} (\w+), (\w+) it with the (\w+)', text)
      if match:
        assert match[1] not in states and (match[2], match[3]) not in held_out
  assert 0.6 < told_count / 60 < 0.95


@pytest.mark.parametrize('program, configs', [
  (hint_distillation, hint_config), (experience_retrieval, experience_config)])
def test_training_and_playing_take_what_is_faster_for_each(program, configs, tmp_path, monkeypatch):
  """float32 products are the faster ones, and own kernels play bfloat16: a CPU with AVX2 alone."""
  rates, seen = {'float32': 2.0, 'bfloat16': 1.0}, []
  monkeypatch.setattr(speed, 'product_rate', rates.get)
  monkeypatch.setattr(policy_lib.incremental, 'can_be_native', lambda config: True)
  monkeypatch.setattr(policy_lib, 'load_base', lambda *args, dtype, **options: dtype)
  monkeypatch.setattr(trajectory, 'load_episodes', lambda folder: [])
  monkeypatch.setattr(
    rollout, 'run', lambda config, folder, base: seen.append((config.dtype, base)))
  monkeypatch.setattr(
    train, 'run', lambda config, folder, base, score: seen.append((config.dtype, base)))

  def dtypes(options=''):
    make = getattr(program, 'Loop', None) or program.Experiment
    loop = make(configs.get_config(options), tmp_path)
    loop.play(tmp_path)
    loop.train(tmp_path, 'x', '')
    played, trained = seen[-2:]
    assert played[0] == played[1] and trained[0] == trained[1]
    return trained[0], played[0], loop

  *taken, loop = dtypes()
  assert taken == ['float32', 'bfloat16'] and loop.base != loop.playing
  assert dtypes('dtype=float32')[:2] == ('float32', 'float32')
  assert dtypes('dtype=bfloat16,play_dtype=float32')[:2] == ('bfloat16', 'float32')
  # What a run began with it goes on with, on another machine, too.
  (tmp_path / 'config.json').write_text(loop.config.to_json())
  rates['bfloat16'] = 3.0
  assert dtypes()[:2] == ('float32', 'bfloat16')
  monkeypatch.setattr(policy_lib.incremental, 'can_be_native', lambda config: False)
  assert dtypes()[:2] == ('float32', 'bfloat16')
  for key, value in (('dtype', 'float8'), ('play_dtype', 'auto')):
    with pytest.raises(errors.UserError, match=value):
      program.check(configs.get_config(f'{key}={value}'))
