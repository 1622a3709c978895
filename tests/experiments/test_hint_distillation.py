"""The whole loop as a user starts it, with a tiny random model, in both settings."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_ROW_KEYS = {
  'id', 'policy', 'memory', 'split', 'seed', 'n', 'success_rate', 'success_ci95', 'score_mean',
  'env_steps_mean', 'model_calls_mean', 'prompt_tokens_mean', 'prefilled_tokens_mean',
  'generated_tokens_mean', 'terminations'}


def _command(config, workdir):
  return [sys.executable, '-m', 'experiments.hint_distillation', '--dry_run',
          f'--config=configs/hint_distillation.py:{config}', f'--workdir={workdir}']


def _environment():
  # One device, as on a user's machine: XLA_FLAGS of the test session would make eight.
  environment = {**os.environ, 'XLA_FLAGS': ''}
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
  assert (workdir / 'distilled' / 'adapter' / 'adapter_config.json').exists()


@pytest.mark.parametrize('model', ['qwen25_7b'])
def test_the_papers_setting_runs_dry(model, smollm2_path, minilm_path, tmp_path):
  workdir = tmp_path / 'paper'
  run = subprocess.run(
    _command(f'model={model}', workdir), cwd=_ROOT, env=_environment(), capture_output=True,
    text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  record = _check(workdir, 4)
  config = record['config']
  assert (config['k'], config['rank'], config['alpha']) == (3, 64, 128)
  assert config['agent'] == 'react' and config['layout'] == 'paper_a' and config['few_shots'] > 0


def test_the_papers_setting_is_the_papers():
  from configs import hint_distillation
  config = hint_distillation.get_config('model=qwen25_14b')
  assert config.train_games == 1200 and config.eval_games == 134 and config.warm_episodes == 0
  assert (config.learning_rate, config.dropout, config.weight_decay) == (2e-4, 0.10, 0.01)
  assert (config.batch_rows, config.grad_accum, config.row_len, config.epochs) == (2, 4, 1024, 1)
