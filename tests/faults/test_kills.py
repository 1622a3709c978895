"""Kills lose nothing: runs that are killed at any moment and started again end as if never killed.

SIGKILL goes to the whole process group of a command as a user starts it. Once at random moments,
spread over as long as the run takes; once right before file operations, named by a run that lists
all that it does to its folder.
"""

import collections
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest

from data import trajectory
from tests import programs, test_train
from tests.faults import runs

KILLS = 10

# Python runs this before any program. Each operation on the run's folder is named by its event and
# file; before the one that is waited for the n-th time, the process group dies.
HOOK = r'''
import os, re, signal, sys, threading

_folder, _moment, _log = (os.environ.get(f'FAULTS_{n}', '') for n in ('FOLDER', 'MOMENT', 'LOG'))
_EVENTS = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate')
_busy, _seen = threading.local(), []


def _name(event, arguments):
  path = arguments[0]
  if isinstance(path, bytes):
    path = os.fsdecode(path)
  if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(_folder):
    return ''
  if event == 'open' and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
    return ''
  path = re.sub(r'[0-9A-Za-z]{32}|incomplete[.]\w+|\d+', '#', os.fspath(path)[len(_folder):])
  return f'{event} {path}'


def _hook(event, arguments):
  if event not in _EVENTS or getattr(_busy, 'now', False):
    return
  _busy.now = True
  try:
    name = _name(event, arguments)
    if name and _log:
      with open(_log, 'a') as file:
        file.write(name + '\n')
    if name:
      _seen.append(name)
    if name and f'{_seen.count(name)} {name}' == _moment:
      os.killpg(0, signal.SIGKILL)
  finally:
    _busy.now = False


if _folder:
  sys.addaudithook(_hook)
'''


@pytest.fixture(scope='module')
def hook(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hook')
  (folder / 'sitecustomize.py').write_text(HOOK)
  return str(folder)


def launch(line, log, **changes) -> subprocess.Popen:
  """Starts a command in a process group of its own; what it says goes to the file `log`."""
  with open(log, 'w') as file:
    return subprocess.Popen(
      line, cwd=runs.ROOT, start_new_session=True, stdout=file, stderr=file,
      env=programs.environment(**changes))


def cpu_seconds(pid: int) -> float:
  """Processor time of a process that runs: it tells how far it is, however busy the machine is."""
  with open(f'/proc/{pid}/stat') as file:
    fields = file.read().rpartition(')')[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def kill_at(process: subprocess.Popen, moment: float) -> bool:
  """Kills the process group at a moment in processor seconds; False where it ended before."""
  with process:
    while process.poll() is None:
      if cpu_seconds(process.pid) >= moment:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return process.returncode == -signal.SIGKILL
      time.sleep(0.005)
  return False


def check_training(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  """A finished training: the adapter bit for bit, one record for every step."""
  assert (workdir / runs.ADAPTER).read_bytes() == (whole / runs.ADAPTER).read_bytes()
  records = [[{key: m[key] for key in ('step', 'loss')} for m in test_train.read_metrics(folder)]
             for folder in (workdir, whole)]
  assert records[0] == records[1]
  summaries = [json.loads((folder / 'summary.json').read_text()) for folder in (workdir, whole)]
  for key in ('steps', 'tokens', 'loss', 'episodes'):
    assert summaries[0][key] == summaries[1][key]


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tokenizer_folder):
  """Runs that were never disturbed, played when asked for.

  A function from a name to (what makes a command for a folder, the folder, what checks another).
  """
  root = tmp_path_factory.mktemp('whole')
  training = runs.training_values(root, tokenizer_folder) | {'epochs': 10, 'checkpoint_every': 3}
  playing = {**runs.ROLLOUT, 'episodes': 80, 'tokenizer': tokenizer_folder}
  expert = {
    'agent': 'expert', 'base': 'random', 'skills': 'loop', 'split': 'train', 'episodes': 6,
    'env_options': 'num_train:6', 'tokenizer': tokenizer_folder}

  @functools.cache
  def find(name):
    entry, values, check = {
      'rollout': ('rollout', playing, runs.check_rollout),
      'expert': ('rollout', expert, runs.check_rollout),
      'train': ('train', training, check_training)}[name]
    make = lambda workdir: runs.command(entry, workdir, **values)
    done = runs.start(make(root / name))
    assert done.returncode == 0, done.stderr
    return make, root / name, check

  return find


def played(workdir: pathlib.Path) -> list[str]:
  """The episodes that a run has said to be safe; none for a training."""
  journal = workdir / trajectory.JOURNAL_NAME
  if journal.exists():
    return [e.to_json() for e in trajectory.Journal(journal).read()]
  return []


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rollout', 'train'])
def test_ten_kills_at_random_moments(name, whole, tmp_path):
  make, wanted, check = whole(name)
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert runs.start(make(tmp_path / 'timed')).returncode == 0
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  duration = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
  rng = random.Random(name)
  # One moment from every tenth of the run, in random order.
  moments = [(i + rng.random()) / KILLS * duration for i in range(KILLS)]
  rng.shuffle(moments)
  number, workdir = 0, tmp_path / 'run0'
  for moment in moments:
    while True:
      before, fresh = played(workdir), not workdir.exists()
      process = launch(make(workdir), tmp_path / 'log')
      if kill_at(process, moment):
        break
      # Done before the kill: it has to be right, and the kill needs another run.
      assert process.returncode == 0, (tmp_path / 'log').read_text()
      check(workdir, wanted)
      number, workdir = number + 1, tmp_path / f'run{number + 1}'
      moment *= 0.9 if fresh else 1.0
    assert played(workdir)[:len(before)] == before
  done = runs.start(make(workdir))
  assert done.returncode == 0, done.stderr
  check(workdir, wanted)


def operations(make, workdir, hook, log) -> list[str]:
  """All that a run does to its folder, in order: 'N OPERATION', its third time where there is one.

  By then something is there that could be lost.
  """
  done = runs.start(
    make(workdir), PYTHONPATH=hook, FAULTS_FOLDER=str(workdir), FAULTS_LOG=str(log))
  assert done.returncode == 0, done.stderr
  counts = collections.Counter(log.read_text().splitlines())
  return [f'{min(3, count)} {name}' for name, count in counts.items()]


def check_a_kill_before(operation, make, wanted, check, hook, workdir) -> None:
  """Kills the run right before an operation, starts it again, and checks what comes of it."""
  log = workdir.with_suffix('.log')
  with launch(make(workdir), log, PYTHONPATH=hook, FAULTS_FOLDER=str(workdir),
              FAULTS_MOMENT=operation) as process:
    process.wait()
  assert process.returncode == -signal.SIGKILL, f'{operation} did not come: {log.read_text()}'
  before = played(workdir)
  done = runs.start(make(workdir))
  assert done.returncode == 0, (operation, done.stderr)
  assert played(workdir)[:len(before)] == before
  check(workdir, wanted)
  # Whatever the kill left half done has been replaced.
  left = [path for pattern in ('*.tmp', '*.partial', '*-tmp') for path in workdir.rglob(pattern)]
  assert not left, (operation, left)


@pytest.mark.slow
def test_a_kill_before_every_operation_of_a_rollout(whole, hook, tmp_path):
  make, wanted, check = whole('expert')
  names = operations(make, tmp_path / 'listed', hook, tmp_path / 'log')
  for part in (trajectory.JOURNAL_NAME, 'open /counts', 'rename /counts', 'rename /config',
               'rename /summary', 'rename /episodes.writing', 'rmdir /episodes.writing'):
    assert any(part in name for name in names), (part, names)
  for number, name in enumerate(names):
    check_a_kill_before(name, make, wanted, check, hook, tmp_path / f'run{number}')
    shutil.rmtree(tmp_path / f'run{number}')


@pytest.mark.slow
def test_a_kill_before_the_operations_of_a_training(whole, hook, tmp_path):
  make, wanted, check = whole('train')
  names = operations(make, tmp_path / 'listed', hook, tmp_path / 'log')
  chosen = []
  # One operation for each kind of file; Orbax has dozens within one checkpoint.
  for part in ('rename /config', 'metrics', 'orbax-checkpoint-tmp/meta', 'mkdir /checkpoints/#',
               'rename /checkpoints/#', 'rmdir /checkpoints/#', 'rename /adapter/adapter_model',
               'rename /adapter/adapter_config', 'rename /summary'):
    found = [name for name in names if part in name]
    assert found, (part, names)
    chosen.append(found[-1])
  for number, name in enumerate(chosen):
    check_a_kill_before(name, make, wanted, check, hook, tmp_path / f'run{number}')
    shutil.rmtree(tmp_path / f'run{number}')


def test_a_torn_journal_line_is_shown_and_played_again(whole, tmp_path):
  make, wanted, check = whole('expert')
  run = tmp_path / 'run'
  shutil.copytree(wanted, run)
  (run / 'summary.json').unlink()
  shutil.rmtree(run / trajectory.TFDS_NAME)
  journal = run / trajectory.JOURNAL_NAME
  journal.write_bytes(journal.read_bytes()[:-1000])
  done = runs.start(make(run))
  assert done.returncode == 0, done.stderr
  assert 'The journal ended in a torn record; its episode is played again.' in done.stderr
  assert (run / f'{trajectory.JOURNAL_NAME}.torn').stat().st_size > 1000
  check(run, wanted)

  # A broken line before others is no kill's work; the sentence says what can be done.
  lines = journal.read_bytes().splitlines(keepends=True)
  journal.write_bytes(b''.join([lines[0], lines[1].replace(b'"seed"', b'"sead"'), *lines[2:]]))
  (run / 'summary.json').unlink()
  runs.check_one_error(runs.start(make(run)), f'{journal}, line 2', 'delete that line')
  journal.write_bytes(b''.join([lines[0], *lines[2:]]))
  assert runs.start(make(run)).returncode == 0
  assert sorted(played(run)) != sorted(played(wanted))  # other seconds, the same episodes
  runs.check_rollout(run, wanted)


@pytest.mark.slow
def test_a_torn_checkpoint_is_shown_and_trained_again(whole, tmp_path):
  make, wanted, check = whole('train')
  run = tmp_path / 'run'
  shutil.copytree(wanted, run)
  (run / 'summary.json').unlink()
  shutil.rmtree(run / 'adapter')
  steps = sorted(int(path.name) for path in (run / 'checkpoints').iterdir())
  for path in (run / 'checkpoints' / str(steps[-1]) / 'state').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
  done = runs.start(make(run))
  assert done.returncode == 0, done.stderr
  assert f'Checkpoint {steps[-1]} in {run}/checkpoints is torn' in done.stderr
  assert f'steps {steps[-2]} to {steps[-1]}' in done.stderr
  assert (run / 'checkpoints' / f'{steps[-1]}.torn').is_dir()
  check(run, wanted)
