"""A full disk ends a command with one sentence; with space made, the same command goes on."""

import errno
import json
import os
import shutil
import sys

import pytest

from data import errors, trajectory
from retrieval import hints
from tests import test_train
from tests.faults import runs

MEND = 'free some space'
EXPERT = {
  'agent': 'expert', 'base': 'random', 'skills': 'loop', 'split': 'train', 'episodes': 12,
  'env_options': 'num_train:12',
}


def test_full_while_playing(disk, tmp_path, tokenizer_folder):
  whole = runs.start(runs.command(
    'rollout', tmp_path / 'whole', tokenizer=tokenizer_folder, **EXPERT))
  assert whole.returncode == 0, whole.stderr
  line = runs.command('rollout', disk.path / 'run', tokenizer=tokenizer_folder, **EXPERT)
  journal = disk.path / 'run' / trajectory.JOURNAL_NAME

  # A third of the journal fits; then not a byte more of it does.
  disk.fill((tmp_path / 'whole' / trajectory.JOURNAL_NAME).stat().st_size // 3)
  runs.check_one_error(runs.start(line), f'The disk is full: {disk.path}/run', MEND)
  kept = trajectory.Journal(journal).read()
  assert 0 < len(kept) < 12
  runs.check_one_error(runs.start(line), f'The disk is full: {disk.path}/run', MEND)
  again = trajectory.Journal(journal)
  assert again.read()[:len(kept)] == kept and again.torn == 0

  disk.free()
  assert runs.start(line).returncode == 0
  runs.check_rollout(disk.path / 'run', tmp_path / 'whole')
  assert trajectory.Journal(journal).read()[:len(kept)] == kept


def test_full_before_anything_is_written(disk, tokenizer_folder):
  disk.fill(0)
  line = runs.command('rollout', disk.path / 'run', tokenizer=tokenizer_folder, **EXPERT)
  runs.check_one_error(runs.start(line), str(disk.path / 'run'), MEND)
  disk.free()
  assert runs.start(line).returncode == 0


@pytest.mark.parametrize('removed, room', [
  (('summary.json', trajectory.TFDS_NAME), 40_000),
  pytest.param(('summary.json',), 0, marks=pytest.mark.slow)])
def test_full_at_the_end_of_a_run(disk, tmp_path, tokenizer_folder, removed, room):
  # All is played; what is removed is what this start has to write.
  run = disk.path / 'run'
  line = runs.command('rollout', run, tokenizer=tokenizer_folder, **EXPERT)
  assert runs.start(line).returncode == 0
  shutil.copytree(run, tmp_path / 'whole')
  (run / 'summary.json').unlink()
  if trajectory.TFDS_NAME in removed:
    shutil.rmtree(run / trajectory.TFDS_NAME)
  disk.fill(room)
  runs.check_one_error(runs.start(line), f'The disk is full: {run}', MEND)
  assert not (run / 'summary.json').exists()
  assert (run / trajectory.TFDS_NAME).exists() == (trajectory.TFDS_NAME not in removed)
  # What could not be finished takes no room either.
  assert {path.name for path in run.iterdir()} <= {
    'config.json', 'counts.json', trajectory.JOURNAL_NAME, trajectory.TFDS_NAME}

  disk.free()
  assert runs.start(line).returncode == 0
  runs.check_rollout(run, tmp_path / 'whole')
  rows = [json.loads((folder / 'summary.json').read_text())['rows']
          for folder in (run, tmp_path / 'whole')]
  assert rows[0] == rows[1]


def test_full_while_the_bank_is_written(disk, tmp_path):
  from tests.retrieval import episodes
  journal = trajectory.Journal(tmp_path / 'run' / trajectory.JOURNAL_NAME)
  journal.append(episodes.episode(episodes.LABELLED))
  journal.close()
  out = disk.path / 'bank.json'
  line = [sys.executable, '-m', 'retrieval.hints', f'--episodes={tmp_path / "run"}',
          f'--out={out}']
  disk.fill(0)
  runs.check_one_error(runs.start(line), str(out), MEND)
  assert [path.name for path in disk.path.iterdir()] == ['ballast']
  disk.free()
  assert runs.start(line).returncode == 0
  assert hints.HintBank.load(out).hints


@pytest.fixture(scope='module')
def training(tmp_path_factory, tokenizer_folder):
  """Episodes to train on, and a run that was never disturbed: (values of the config, folder)."""
  root = tmp_path_factory.mktemp('training')
  values = runs.training_values(root, tokenizer_folder)
  whole = runs.start(runs.command('train', root / 'whole', **values))
  assert whole.returncode == 0, whole.stderr
  return values, root / 'whole'


@pytest.mark.slow
@pytest.mark.parametrize('room, checkpoints', [(100_000, 0), (350_000, 1)])
def test_full_while_a_checkpoint_is_written(disk, training, room, checkpoints):
  values, whole = training
  run = disk.path / 'run'
  line = runs.command('train', run, **values)
  disk.fill(room)
  runs.check_one_error(runs.start(line), f'The disk is full: {run}', MEND)
  kept = [path.name for path in (run / 'checkpoints').iterdir() if path.name.isdigit()]
  assert len(kept) == checkpoints and not (run / 'adapter').exists()
  before = test_train.read_metrics(run)
  assert before
  # Still full: the same sentence, and no record of what was learnt is lost.
  runs.check_one_error(runs.start(line), f'The disk is full: {run}', MEND)
  start = int(max(kept, default='0'))
  assert [m['loss'] for m in test_train.read_metrics(run) if m['step'] <= start] == [
    m['loss'] for m in before if m['step'] <= start]

  disk.free()
  done = runs.start(line)
  assert done.returncode == 0, done.stderr
  assert json.loads((run / 'summary.json').read_text())['resumed_at'] >= start
  assert (run / runs.ADAPTER).read_bytes() == (whole / runs.ADAPTER).read_bytes()


@pytest.mark.slow
def test_full_while_the_adapter_is_written(disk, training):
  values, whole = training
  run = disk.path / 'run'
  shutil.copytree(whole, run)
  shutil.rmtree(run / 'adapter')
  (run / 'summary.json').unlink()
  line = runs.command('train', run, **values)
  disk.fill(28_672)
  runs.check_one_error(runs.start(line), f'The disk is full: {run}', MEND)
  assert not (run / runs.ADAPTER).exists()
  disk.free()
  assert runs.start(line).returncode == 0
  assert (run / runs.ADAPTER).read_bytes() == (whole / runs.ADAPTER).read_bytes()


def test_what_a_full_disk_is():
  full, quota = (OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.EDQUOT))
  wrapped = RuntimeError('Failed to finalize: write() failed: No space left on device; at byte 9')
  assert all(errors.full_disk(error) is error for error in (full, quota, wrapped))
  try:
    try:
      raise full
    finally:
      raise ValueError('while cleaning up')
  except ValueError as error:
    assert errors.full_disk(error) is full
  for other in (None, OSError(errno.EACCES, os.strerror(errno.EACCES)), ValueError('full')):
    assert errors.full_disk(other) is None
