"""A grid of runs: expanded from a file, run here or on SLURM, and collected into one table.

  python -m experiments.launch --sweep=sweep.json --workdir=runs/sweep -- PROGRAM FLAGS

The file is JSON: `{"grid": {"seed": [0, 1, 2], "rank": [8, 16]}}` is six runs, a list of grids is
the runs of all. A key is one of the config, or a flag where it begins with `--`; `"resources"` is
what submitit asks of the machine: `{"nodes": 1, "tasks_per_node": 8, "gpus_per_node": 8,
"timeout_min": 600, "slurm_partition": "gpu"}`. The program is a file (train.py, rollout.py) or a
module (-m experiments.hint_distillation), with all of its flags but --workdir.

A run's folder is named by its values. The same command again runs what is not finished: the
summaries of all that is are in table.csv, table.md and table.json.
"""

import csv
import hashlib
import importlib
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from configs import cli
from data import errors
from data import workdir as workdir_lib
from experiments import launch_job, launch_recipes

_MAX_NAME = 120
_POLL_S = 0.5
# submitit's own default is five minutes.
_TIMEOUT_MIN = 14 * 24 * 60


def read_sweep(path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The points of the grid and the resources of a sweep's file.

  Raises:
    UserError: the file is missing or not such a sweep.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text())
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be read ({error.strerror}); give --sweep=FILE.') from error
  except json.JSONDecodeError as error:
    raise errors.UserError(f'{path} is not JSON ({error}).') from error
  if not isinstance(content, dict) or not content.keys() <= {'grid', 'resources'}:
    raise errors.UserError(
      f'{path}: a sweep is {{"grid": ..., "resources": ...}} and nothing else.')
  grids = content.get('grid') or []
  points = []
  for grid in grids if isinstance(grids, list) else [grids]:
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
      raise errors.UserError(f'{path}: a grid is {{"key": [value, ...], ...}}, not {grid!r}.')
    points += [
      dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
  if not points:
    raise errors.UserError(f'{path} holds no grid; the least is {{"grid": {{"seed": [0]}}}}.')
  return points, content.get('resources', {})


def name_of(point: Mapping[str, Any]) -> str:
  """The folder of a run: its keys and values in the order of the alphabet.

  Without commas and equals signs, so that a path with it can be the value of a config's key.
  """
  text = '_'.join(f'{key.lstrip("-")}-{_text(point[key])}' for key in sorted(point))
  name = re.sub(r'[^\w.+-]+', '-', text)
  if name != text or len(name) > _MAX_NAME:
    name = f'{name[:_MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'
  return name


def _text(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def make_command(program: Sequence[str], point: Mapping[str, Any], folder: str) -> list[str]:
  """The command line of one run.

  Args:
    program: what follows `--` in the launcher's command.
    point: of the grid; a config's key goes into the argument of `--config=FILE.py:...`.
    folder: its --workdir.

  Raises:
    UserError: there is no config for the keys, a key is set twice, or a value cannot be written.
  """
  line = ['.venv/bin/python', *program]
  keys = {key: _text(value) for key, value in point.items() if not key.startswith('--')}
  where = [i for i, part in enumerate(line) if part.startswith('--config=')]
  if keys and len(where) != 1:
    raise errors.UserError(
      f'The grid sets {", ".join(keys)}: the command needs --config=configs/NAME.py once.')
  if keys:
    given = line[where[0]]
    set_already = [key for key in keys if re.search(rf'[:,]{re.escape(key)}=', given)]
    if set_already:
      raise errors.UserError(f'{set_already[0]} is set by the command and by the grid; drop one.')
    for key, value in keys.items():
      if re.search(r',[^,]*=', value):
        raise errors.UserError(
          f'The value {value!r} of {key} has a comma and an equals sign; give it with '
          f'"--config.{key}" as the key of the grid.')
    separator = ',' if ':' in given else ':'
    line[where[0]] = given + separator + ','.join(f'{k}={v}' for k, v in keys.items())
  line += [f'{key}={_text(value)}' for key, value in point.items() if key.startswith('--')]
  return [*line, f'--workdir={folder}']


def check_config(line: Sequence[str]) -> None:
  """Reads the config of a command of this repository.

  Raises:
    UserError: it has no such key, or not such a value.
  """
  for part in line:
    match = re.fullmatch(r'--config=configs/(\w+)\.py(?::(.*))?', part)
    if match:
      importlib.import_module(f'configs.{match[1]}').get_config(match[2])


def plan(
  program: Sequence[str], points: Sequence[Mapping[str, Any]], workdir: str
) -> dict[str, list[str]]:
  """Name -> command of every run.

  Raises:
    UserError: a command is not right, or two runs are the same.
  """
  if not program or any(part.startswith('--workdir') for part in program):
    raise errors.UserError(
      'Behind -- comes the program and its flags but --workdir, such as '
      '-- train.py --config=configs/train.py:data=RUN.')
  runs = {}
  for point in points:
    name = name_of(point)
    if name in runs:
      raise errors.UserError(f'The grid holds {name} twice.')
    runs[name] = make_command(program, point, f'{workdir.rstrip("/")}/{name}')
    check_config(runs[name])
  return runs


def execute(
  runs: Mapping[str, Sequence[str]], workdir: pathlib.Path, resources: Mapping[str, Any],
  cluster: str, parallel: int,
) -> dict[str, str]:
  """Runs commands through submitit, and waits for them.

  Args:
    runs: name -> command, of what is not finished.
    workdir: of the sweep; jobs/ in it gets submitit's files and logs.
    resources: of each job, as `submitit.AutoExecutor.update_parameters` takes them.
    cluster: 'local' or 'slurm'.
    parallel: how many at once; 0 is all.

  Returns:
    Name -> path of the log of each that failed.

  Raises:
    UserError: submitit is not installed, or does not know a resource.
  """
  try:
    import submitit
  except ImportError as error:
    raise errors.UserError(
      'Sweeps run through submitit, which is not installed: pip install submitit (--dry_run prints '
      'the commands without it).') from error
  try:
    executor = submitit.AutoExecutor(workdir / 'jobs', cluster=cluster)
    executor.update_parameters(**{'timeout_min': _TIMEOUT_MIN, 'name': 'hintsight', **resources})
  except (NameError, ValueError, TypeError, RuntimeError) as error:
    raise errors.UserError(f'submitit does not take these resources: {error}') from error
  waiting, running, failed = list(runs), {}, {}
  record = workdir / 'jobs.json'
  known = json.loads(record.read_text()) if record.exists() and cluster == 'slurm' else {}
  for name in list(waiting):
    # Queued by an earlier start of the launcher, which did not wait.
    if name in known:
      job = submitit.SlurmJob(workdir / 'jobs', known[name])
      if job.state in ('PENDING', 'RUNNING', 'REQUEUED', 'CONFIGURING'):
        running[name] = job
        waiting.remove(name)
  try:
    while waiting or running:
      while waiting and (not parallel or len(running) < parallel):
        name = waiting.pop(0)
        running[name] = executor.submit(launch_job.Command(_absolute(runs[name])))
        known[name] = running[name].job_id
        workdir_lib.write_json(record, known)
        print(f'{name}: job {running[name].job_id}', file=sys.stderr, flush=True)
      for name, job in list(running.items()):
        if job.done():
          del running[name]
          if job.exception() is not None:
            failed[name] = str(job.paths.stderr)
          print(f'{name}: {"failed" if name in failed else "done"}', file=sys.stderr, flush=True)
      time.sleep(_POLL_S)
  except KeyboardInterrupt:
    # What runs here would be left without anybody who knows it; a queue goes on by itself.
    for job in running.values() if cluster == 'local' else ():
      job.cancel()
    raise
  return failed


def _absolute(line: Sequence[str]) -> list[str]:
  """The command with the interpreter that runs this one."""
  return [sys.executable, *line[1:]]


def collect(points: Mapping[str, Mapping[str, Any]], workdir: pathlib.Path) -> list[dict[str, Any]]:
  """One record for every finished run, or for every row of its summary where it has rows."""
  records = []
  for name, point in points.items():
    try:
      summary = json.loads((workdir / name / 'summary.json').read_text())
    except FileNotFoundError:
      continue
    for part in summary.get('rows') if isinstance(summary.get('rows'), list) else [summary]:
      record = {'run': name} | {key.lstrip('-'): value for key, value in point.items()}
      for key, value in part.items():
        if isinstance(value, (bool, int, float, str)) or value is None:
          record[key if key not in record else f'summary.{key}'] = value
      records.append(record)
  return records


def write_table(records: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> str:
  """Writes table.json, table.csv and table.md; returns the last."""
  columns = list(dict.fromkeys(key for record in records for key in record))
  workdir_lib.write_json(workdir / 'table.json', {'columns': columns, 'rows': list(records)})
  with open(workdir / 'table.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(records)
  show = lambda value: f'{value:.4g}' if isinstance(value, float) else str(value)
  rows = [[show(record.get(column, '')) for column in columns] for record in records]
  lines = [columns, ['---'] * len(columns), *rows]
  text = '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines) + '\n'
  (workdir / 'table.md').write_text(text)
  return text


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  points, resources = read_sweep(given.sweep)
  runs = plan(argv[1:], points, given.workdir)
  if given.dry_run:
    print(getattr(launch_recipes, given.machine)(runs, resources))
    return
  if given.machine not in ('here', 'slurm'):
    raise errors.UserError(
      f'--machine={given.machine} is not reached from here; --dry_run prints its commands.')
  if workdir_lib.is_remote(given.workdir):
    raise errors.UserError(
      f'The table of a sweep is made in a local folder and not in {given.workdir}; --dry_run '
      'prints the commands of its runs.')
  if launch_recipes.processes(resources) > 1:
    if given.machine == 'here':
      raise errors.UserError(
        'Several processes of a run find one another on SLURM (--machine=slurm); here one process '
        'drives all devices: drop nodes and tasks_per_node.')
    runs = {name: launch_recipes.together(line) for name, line in runs.items()}
  workdir = pathlib.Path(given.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  left = {name: line for name, line in runs.items()
          if not (workdir / name / 'summary.json').exists()}
  print(f'{len(runs)} runs, {len(runs) - len(left)} of them finished before.', file=sys.stderr)
  cluster = 'slurm' if given.machine == 'slurm' else 'local'
  parallel = given.parallel if given.parallel >= 0 else (0 if cluster == 'slurm' else 1)
  failed = execute(left, workdir, resources, cluster, parallel) if left else {}
  by_name = {name_of(point): point for point in points}
  print(write_table(collect(by_name, workdir), workdir), end='')
  if failed:
    logs = ', '.join(f'{name} ({log})' for name, log in failed.items())
    raise errors.UserError(
      f'{len(failed)} of {len(runs)} runs failed: {logs}; the same command runs them again.')


if __name__ == '__main__':
  flags.DEFINE_string('sweep', None, 'JSON file with the grid.')
  flags.DEFINE_string('workdir', None, 'Folder of all runs, or gs://BUCKET/FOLDER.')
  flags.DEFINE_enum(
    'machine', 'here', launch_recipes.MACHINES, 'Where it runs; gpus, tpu, xpk are for --dry_run.')
  flags.DEFINE_integer('parallel', -1, 'Runs at once, 0 is all; by default 1, on SLURM all.')
  flags.DEFINE_bool('dry_run', False, 'Print the commands for the machine and stop.')
  cli.run(main, required=('sweep', 'workdir'))
