"""The measurement of our engine against TextWorld: its numbers, its refusals, one small run."""

import dataclasses
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys

import pytest

import envs
from data import errors
from experiments.bench import env_rows
from experiments.bench import envs as bench


def test_ratio_is_of_sums_and_its_interval_is_the_bootstrap_s():
  rng = random.Random(0)
  ours = [rng.uniform(0.5, 1.5) for _ in range(30)]
  theirs = [rng.uniform(300, 900) * x for x in ours]
  found = bench.ratio(ours, theirs)
  assert found['value'] == pytest.approx(sum(theirs) / sum(ours))
  single = [b / a for a, b in zip(ours, theirs)]
  assert found['games'] == pytest.approx([min(single), max(single)])
  drawn = []
  for _ in range(4000):
    games = rng.choices(range(30), k=30)
    drawn.append(sum(theirs[i] for i in games) / sum(ours[i] for i in games))
  cuts = statistics.quantiles(drawn, n=40)
  assert found['ci95'] == pytest.approx([cuts[0], cuts[-1]], rel=0.02)


def test_rates_and_the_verdict():
  games = [
    {'fast': {'load': 0.001, 'steps': 0.01}, 'textworld': {'load': 0.5, 'steps': 2.0}},
    {'fast': {'load': 0.003, 'steps': 0.01}, 'textworld': {'load': 1.5, 'steps': 4.0}},
  ]
  record = bench.summarise(games, 40, 300)
  assert record['engines']['fast']['load_per_s'] == pytest.approx(500)
  assert record['engines']['fast']['steps_per_s'] == pytest.approx(4000)
  assert record['engines']['textworld']['load_per_s'] == pytest.approx(1)
  assert record['engines']['textworld']['steps_per_s'] == pytest.approx(80 / 6)
  assert record['ratio']['load']['value'] == pytest.approx(500)
  assert record['ratio']['steps']['value'] == pytest.approx(300)
  assert record['reached']
  # Both have to be reached.
  assert not bench.summarise(games, 40, 301)['reached']
  assert '500 times' in bench.table({**record, 'games': 'games'})


class _Altered:
  """An environment with one word changed in its answers."""

  def __init__(self, environment):
    self._environment = environment
    self.reset = environment.reset
    self.admissible_commands = environment.admissible_commands

  def step(self, action):
    result = self._environment.step(action)
    return dataclasses.replace(result, observation=result.observation.replace('You', 'They'))


def test_engines_that_do_not_answer_alike_are_not_measured(monkeypatch):
  suite, other = (
    envs.get_suite('household', num_train=1, num_receptacles=6) for _ in range(2))
  task = suite.tasks('train')[0]
  seconds = bench.measure({'fast': suite, 'textworld': other}, task, 30)
  assert set(seconds) == set(bench.ENGINES)
  assert all(s > 0 for measures in seconds.values() for s in measures.values())
  make = other.make
  monkeypatch.setattr(other, 'make', lambda task: _Altered(make(task)))
  with pytest.raises(errors.UserError, match='do not answer alike'):
    bench.measure({'fast': suite, 'textworld': other}, task, 30)


@pytest.mark.skipif(
  importlib.util.find_spec('alfworld') is None, reason='the official engine is not installed')
def test_a_small_run_states_its_time_first_and_fails_below_the_least_ratio(tmp_path):
  path = tmp_path / 'results' / 'bench.json'
  command = [
    sys.executable, '-m', 'experiments.bench.envs', '--games=2', '--steps=3', f'--out={path}',
    '--min_ratio=1e9', '--rows=', '--catalogue=0']
  environment = {k: v for k, v in os.environ.items() if k != 'HINTSIGHT_DATA'}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 1, done.stdout + done.stderr
  assert 'NOT reached' in done.stdout
  assert done.stdout.startswith('2 generated games') and 'minutes' in done.stdout.splitlines()[0]
  record = json.loads(path.read_text())
  assert (record['n'], record['steps_per_game'], record['reached']) == (2, 3, False)
  for measure in bench.MEASURES:
    value, (low, high) = record['ratio'][measure]['value'], record['ratio'][measure]['ci95']
    assert low <= value <= high and value > 20
  measured = record['measured']
  assert measured['command'].startswith('python -m experiments.bench.envs --games=2')
  assert f'{os.cpu_count()} CPU' in measured['machine'] and measured['date']
  assert {'python', 'textworld', 'alfworld'} <= measured['versions'].keys()


def test_too_few_games_are_named(tmp_path):
  from envs import household_files, household_official

  household_files.write_game(tmp_path, household_official.official_game(0, 'train', 0), [])
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.envs', f'--data={tmp_path}', '--games=1'],
    capture_output=True, text=True)
  assert done.returncode == 1 and '--games=1' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_rows_of_every_environment_and_the_catalogue(tmp_path):
  path = tmp_path / 'bench.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.envs', '--games=0', '--row_games=2', '--row_steps=5',
     '--row_rounds=1', '--processes=2', '--catalogue=300', f'--out={path}'],
    capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  record = json.loads(path.read_text())
  assert [(r['environment'], r['processes']) for r in record['rows']] == [
    (name, number) for name in env_rows.ROWS for number in (1, 2)]
  for row in record['rows']:
    assert 0 < row['steps'] <= 10 and row['steps_per_s'] > 0.1 and row['memory_mb'] > 10
    assert row['start_s'] > 0 and row['load_s'] > 0
  # A Java process belongs to what it costs.
  assert next(r for r in record['rows'] if r['environment'] == 'scienceworld')['memory_mb'] > 150
  catalogue = record['catalogue']
  assert catalogue['full']['disk_mb'] == pytest.approx(
    catalogue['disk_mb'] * env_rows.FULL_CATALOGUE / 300)
  assert '1,180,000 products (in proportion)' in done.stdout


def test_rows_of_the_household(capsys):
  [one] = env_rows.measure_rows(['household'], games=2, steps=4, rounds=2, processes=1)
  assert one['steps'] == 16 and one['processes'] == 1
  assert one['steps_per_s'] > 1 and one['load_s'] > 0 and 'household' in capsys.readouterr().out


def test_a_generated_catalogue_is_read_back_as_it_was(tmp_path):
  from envs import webshop_catalogue, webshop_generate
  env_rows.write_catalogue(tmp_path, 20)
  products, skipped, _ = webshop_catalogue.load_products(tmp_path)
  assert products == webshop_generate.products(0, 20) and not skipped


def test_unknown_rows_are_named():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.envs', '--rows=household,chess', '--games=0'],
    capture_output=True, text=True)
  assert done.returncode == 1 and 'knows no chess' in done.stderr
