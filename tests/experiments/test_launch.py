"""A sweep is expanded into runs, run, skipped where finished, and collected."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

from data.errors import UserError
from experiments import launch, launch_recipes
from tests import test_train

rooms = test_train.rooms  # the fixture
ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = ['train.py', '--config=configs/train.py:data=runs/teacher']
# Stands for a program: writes the summary of a run, or fails where it is told to.
PROGRAM = '''
import json, pathlib, sys
given = dict(part.removeprefix('--').split('=', 1) for part in sys.argv[1:])
folder = pathlib.Path(given['workdir'])
folder.mkdir(parents=True)
with open(folder.parent / 'starts', 'a') as file:
  print(folder.name, file=file)
if given['rate'] == given.get('fails', ''):
  sys.exit('no such rate')
(folder / 'summary.json').write_text(json.dumps(
  {'loss': float(given['rate']) / 2, 'steps': 7, 'versions': {'python': '3'}}))
'''


def sweep_file(folder, content):
  path = folder / 'sweep.json'
  path.write_text(json.dumps(content))
  return str(path)


def launched(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.launch', *arguments], cwd=ROOT, capture_output=True,
    text=True)


def test_a_grid_and_a_list_of_grids(tmp_path):
  path = sweep_file(tmp_path, {'grid': {'seed': [0, 1], 'rank': [8, 16, 32]}})
  points, resources = launch.read_sweep(path)
  assert len(points) == 6 and points[1] == {'seed': 0, 'rank': 16} and resources == {}
  path = sweep_file(tmp_path, {
    'grid': [{'seed': [0, 1]}, {'seed': [2], 'rank': [8]}], 'resources': {'timeout_min': 5}})
  points, resources = launch.read_sweep(path)
  assert points == [{'seed': 0}, {'seed': 1}, {'seed': 2, 'rank': 8}]
  assert resources == {'timeout_min': 5}


def test_a_name_depends_on_the_values_alone():
  assert launch.name_of({'seed': 0, 'rank': 8}) == launch.name_of({'rank': 8, 'seed': 0})
  assert launch.name_of({'seed': 0, 'rank': 8}) == 'rank-8_seed-0'
  assert launch.name_of({'shrink': True, '--k': 1.5}) == 'k-1.5_shrink-true'
  paths = [launch.name_of({'data': path}) for path in ('a/b', 'a-b', 'a,b', 'x' * 300)]
  assert len(set(paths)) == 4 and all(not set('/ ,=') & set(p) for p in paths)
  assert max(map(len, paths)) < 140


def test_commands(tmp_path):
  runs = launch.plan(TRAIN, [{'seed': 3, 'shrink': True}], 'runs/sweep')
  assert runs == {'seed-3_shrink-true': [
    '.venv/bin/python', 'train.py',
    '--config=configs/train.py:data=runs/teacher,seed=3,shrink=true',
    '--workdir=runs/sweep/seed-3_shrink-true']}
  program = ['-m', 'experiments.hint_distillation', '--config=configs/hint_distillation.py']
  point = {'k': 3, '--config.evaluate': 'base,base+hints'}
  (line,) = launch.plan(program, [point], 's').values()
  assert line[1:] == [
    '-m', 'experiments.hint_distillation', '--config=configs/hint_distillation.py:k=3',
    '--config.evaluate=base,base+hints', f'--workdir=s/{launch.name_of(point)}']


@pytest.mark.parametrize('program,point,message', [
  ([], {'seed': 1}, 'Behind -- comes'),
  ([*TRAIN, '--workdir=x'], {'seed': 1}, 'but --workdir'),
  (TRAIN, {'learning_rat': 1}, 'learning_rat'),
  (TRAIN, {'rank': 'many'}, "'rank' takes a int"),
  (TRAIN, {'data': 'runs/other'}, 'by the command and by the grid'),
  (['train.py'], {'seed': 1}, 'needs --config='),
  (TRAIN, {'targets': 'q,k=3'}, 'comma and an equals sign'),
])
def test_commands_that_are_wrong_are_told_before_anything_runs(program, point, message):
  with pytest.raises(UserError, match=message):
    launch.plan(program, [point], 'runs/sweep')


@pytest.mark.parametrize('content,message', [
  ('{', 'is not JSON'),
  ('[]', 'a sweep is'),
  ('{"grid": {"seed": 3}}', 'a grid is'),
  ('{"grid": []}', 'holds no grid'),
  ('{"grids": {}}', 'a sweep is'),
])
def test_files_that_are_no_sweep(tmp_path, content, message):
  path = tmp_path / 'sweep.json'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    launch.read_sweep(str(path))
  with pytest.raises(UserError, match='cannot be read'):
    launch.read_sweep(str(tmp_path / 'missing'))


def test_runs_once_and_collects(tmp_path):
  pytest.importorskip('submitit')
  program = tmp_path / 'program.py'
  program.write_text(PROGRAM)
  path = sweep_file(tmp_path, {'grid': {'--rate': [1, 2, 3]}})
  workdir = tmp_path / 'runs'
  line = [f'--sweep={path}', f'--workdir={workdir}', '--parallel=3', '--', str(program)]
  done = launched(*line, '--fails=2')
  assert done.returncode == 1 and 'Traceback' not in done.stderr
  message = done.stderr.splitlines()[-1]
  assert message.startswith('error: 1 of 3 runs failed: rate-2 (')
  log = pathlib.Path(message.partition('rate-2 (')[2].partition(')')[0])
  assert 'no such rate' in log.read_text()
  rows = list(csv.DictReader((workdir / 'table.csv').open()))
  assert [(row['run'], row['rate'], row['loss']) for row in rows] == [
    ('rate-1', '1', '0.5'), ('rate-3', '3', '1.5')]

  # Only what is not finished runs again.
  (workdir / 'rate-2').rmdir()
  done = launched(*line)
  assert done.returncode == 0, done.stderr
  assert '3 runs, 2 of them finished before' in done.stderr
  starts = sorted((workdir / 'starts').read_text().split())
  assert starts == ['rate-1', 'rate-2', 'rate-2', 'rate-3']
  table = json.loads((workdir / 'table.json').read_text())
  assert table['columns'] == ['run', 'rate', 'loss', 'steps']
  assert [row['loss'] for row in table['rows']] == [0.5, 1.0, 1.5]
  assert (workdir / 'table.md').read_text() == done.stdout
  assert '| rate-2 | 2 | 1 | 7 |' in done.stdout


def test_rows_of_a_summary_become_rows_of_the_table(tmp_path):
  (tmp_path / 'seed-0').mkdir()
  (tmp_path / 'seed-0' / 'summary.json').write_text(json.dumps({
    'rows': [{'id': 'base', 'success_rate': 0.25, 'seed': 0, 'terminations': {}},
             {'id': 'distilled', 'success_rate': 0.5, 'seed': 0}], 'paired': []}))
  records = launch.collect({'seed-0': {'seed': 0}, 'seed-1': {'seed': 1}}, tmp_path)
  assert records == [
    {'run': 'seed-0', 'seed': 0, 'id': 'base', 'success_rate': 0.25, 'summary.seed': 0},
    {'run': 'seed-0', 'seed': 0, 'id': 'distilled', 'success_rate': 0.5, 'summary.seed': 0}]


def test_without_submitit_it_is_said_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  with pytest.raises(UserError, match='pip install submitit'):
    launch.execute({'a': ['x']}, tmp_path, {}, 'local', 1)


def test_resources_that_submitit_does_not_know(tmp_path):
  pytest.importorskip('submitit')
  with pytest.raises(UserError, match='does not take these resources'):
    launch.execute({'a': ['x']}, tmp_path, {'gpu': 8}, 'local', 1)


RUNS = launch.plan(TRAIN, [{'seed': 0}, {'seed': 1}], 'gs://BUCKET/sweep')


def test_the_recipe_for_slurm():
  text = launch_recipes.slurm(RUNS, {
    'nodes': 2, 'tasks_per_node': 8, 'gpus_per_node': 8, 'slurm_partition': 'gpu',
    'timeout_min': 600})
  lines = text.splitlines()
  assert lines[0] == '#!/bin/bash'
  for option in ('--array=0-1', '--nodes=2', '--ntasks-per-node=8', '--gpus-per-node=8',
                 '--partition=gpu', '--time=600', '--requeue', '--signal=TERM@120'):
    assert f'#SBATCH {option}' in lines
  assert sum('srun .venv/bin/python train.py --coordinator=auto' in line for line in lines) == 2
  assert subprocess.run(['bash', '-n'], input=text, text=True).returncode == 0
  # What was stopped has saved, and is queued again; nothing else is.
  for code, queued in ((143, 'requeue 7_1\n'), (1, ''), (0, '')):
    fakes = f'srun() {{ return {code}; }}; scontrol() {{ echo "$@"; }}\n'
    done = subprocess.run(
      ['/bin/bash'], input=fakes + text, text=True, capture_output=True,
      env={'SLURM_ARRAY_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': '1', 'PATH': ''})
    assert (done.stdout, done.returncode) == (queued, code), done.stderr
  # One process needs nobody to find.
  assert '--coordinator' not in launch_recipes.slurm(RUNS, {'gpus_per_node': 1})


def test_the_recipe_for_a_tpu_pod_slice():
  text = launch_recipes.tpu(RUNS, {'tpu_type': 'v5litepod-16'})
  assert '--accelerator-type=v5litepod-16' in text and 'jax[tpu]==0.10.2" gcsfs' in text
  runs = [line for line in text.splitlines() if 'train.py' in line]
  assert len(runs) == 2
  for seed, line in enumerate(runs):
    assert line.startswith('gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all ')
    assert '--coordinator=auto' in line and f'seed={seed}' in line
    assert f'--workdir=gs://BUCKET/sweep/seed-{seed}' in line
  assert subprocess.run(['bash', '-n'], input=text, text=True).returncode == 0


def test_the_recipe_for_xpk():
  text = launch_recipes.xpk(RUNS, {'tpu_type': 'v6e-256', 'num_slices': 2})
  runs = [line for line in text.splitlines() if line.startswith('xpk workload create')]
  assert len(runs) == 2
  assert all('--tpu-type=v6e-256 --num-slices=2' in line for line in runs)
  assert '--workload=seed-0 ' in runs[0] and '--coordinator=auto' in runs[0]
  # A fresh image, and a bucket to write to.
  assert all(' gcsfs && ' in line and '--workdir=gs://' in line for line in runs)
  assert subprocess.run(['bash', '-n'], input=text, text=True).returncode == 0


def test_the_recipe_for_eight_gpus():
  text = launch_recipes.gpus(RUNS, {})
  assert 'jax[cuda12]' in text and '--coordinator' not in text
  assert text.count('.venv/bin/python train.py') == 2
  assert subprocess.run(['bash', '-n'], input=text, text=True).returncode == 0


def test_other_programs_have_one_process():
  runs = launch.plan(['rollout.py', '--config=configs/rollout.py'], [{'seed': 0}], 's')
  assert 'rollout.py' in launch_recipes.gpus(runs, {})
  with pytest.raises(UserError, match=r'with train\.py alone'):
    launch_recipes.tpu(runs, {})


def test_several_processes_need_a_cluster(tmp_path):
  path = sweep_file(tmp_path, {'grid': {'seed': [0]}, 'resources': {'tasks_per_node': 8}})
  done = launched(f'--sweep={path}', f'--workdir={tmp_path / "runs"}', '--', *TRAIN)
  assert done.returncode == 1 and 'drop nodes and tasks_per_node' in done.stderr
  done = launched(f'--sweep={path}', '--workdir=gs://bucket/runs', '--', *TRAIN)
  assert done.returncode == 1 and 'a local folder and not in gs://bucket/runs' in done.stderr


@pytest.mark.slow
def test_a_sweep_of_trainings(rooms, tmp_path):
  pytest.importorskip('submitit')
  values = test_train.values(rooms, epochs=1, mesh='1,1,1')
  del values['rank']
  argument = ','.join(f'{key}={value}' for key, value in values.items())
  path = sweep_file(tmp_path, {'grid': {'seed': [0, 1], 'rank': [2]}})
  line = [f'--sweep={path}', f'--workdir={tmp_path / "runs"}', '--', 'train.py',
          f'--config=configs/train.py:{argument}']
  done = launched(*line)
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'runs' / 'table.json').read_text())['rows']
  assert [(row['run'], row['seed'], row['rank']) for row in rows] == [
    ('rank-2_seed-0', 0, 2), ('rank-2_seed-1', 1, 2)]
  assert rows[0]['loss'] != rows[1]['loss'] and rows[0]['steps'] > 0
  for row in rows:
    assert (tmp_path / 'runs' / row['run'] / 'adapter' / 'adapter_config.json').exists()


def test_a_dry_run_prints_and_writes_nothing(tmp_path):
  path = sweep_file(tmp_path, {'grid': {'seed': [0, 1]}})
  done = launched(
    f'--sweep={path}', f'--workdir={tmp_path / "runs"}', '--machine=tpu', '--dry_run', '--', *TRAIN)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('--worker=all') == 4 and not (tmp_path / 'runs').exists()
  done = launched(
    f'--sweep={path}', f'--workdir={tmp_path / "runs"}', '--machine=tpu', '--', *TRAIN)
  assert done.returncode == 1 and '--dry_run prints its commands' in done.stderr
