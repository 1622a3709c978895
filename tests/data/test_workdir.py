"""The folder of a run: what it refuses, and seconds that add up over starts."""

import errno
import json
import os

import pytest
from etils import epath

from data import errors, workdir
from training import event_file


def test_the_config_is_written_once_and_guards_the_folder(tmp_path):
  folder = tmp_path / 'deep' / 'run'
  workdir.open_workdir(folder, {'seed': 1, 'slots': 2})
  workdir.open_workdir(folder, {'seed': 1, 'slots': 4}, free_keys=('slots',))
  assert json.loads((folder / 'config.json').read_text()) == {'seed': 1, 'slots': 2}
  with pytest.raises(errors.UserError, match=r'seed \(there 1, now 2\)'):
    workdir.check_workdir(folder, {'seed': 2, 'slots': 2})


@pytest.mark.parametrize('below', ['', 'run', 'deep/run'])
def test_a_file_in_the_place_of_the_folder(tmp_path, below):
  (tmp_path / 'notes.txt').write_text('mine')
  for function in (workdir.check_workdir, workdir.open_workdir):
    with pytest.raises(errors.UserError, match=r'notes.txt is a file.*--workdir'):
      function(tmp_path / 'notes.txt' / below, {})
  assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with pytest.raises(errors.UserError, match=r'no permission to write.*--workdir'):
    workdir.check_workdir(tmp_path / 'run', {})


def test_a_full_disk(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(errors.UserError, match=r'[Nn]o space left.*free some'):
    workdir.open_workdir(tmp_path / 'run', {'seed': 1})
  assert not list((tmp_path / 'run').iterdir())


@pytest.mark.parametrize('content', [b'{"seed"', b'[1]', b'\xff\xfe'])
def test_a_config_that_is_none(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(errors.UserError, match=r'config.json is not.*--workdir'):
    workdir.check_workdir(tmp_path, {})


def test_seconds_and_counts_add_up_over_starts(tmp_path):
  first = workdir.RunCounts(
    tmp_path, started=100.0, now=lambda: 130.0, counts=lambda: {'engine': {'a': 1}, 'pool': {}})
  first.save()
  first.save()
  second = workdir.RunCounts(
    tmp_path, started=200.0, now=lambda: 205.0,
    counts=lambda: {'engine': {'a': 2, 'b': 5}, 'pool': {'c': 1}})
  assert second.seconds() == 35.0
  assert second.counts() == {'engine': {'a': 3, 'b': 5}, 'pool': {'c': 1}}
  second.save()
  third = workdir.RunCounts(tmp_path, started=0.0, now=lambda: 1.0)
  assert third.seconds() == 36.0 and third.counts() == second.counts()


@pytest.mark.parametrize('content', [
  '{}', '[]', '{"wall_s": "x"}', '{"wall_s": 1, "engine": 3}',
  '{"wall_s": 1, "engine": {"a": "b"}}'])
def test_counts_that_were_damaged_begin_anew(tmp_path, content):
  (tmp_path / 'counts.json').write_text(content)
  counters = workdir.RunCounts(
    tmp_path, started=200.0, now=lambda: 205.0, counts=lambda: {'engine': {'a': 1}})
  assert counters.seconds() == 5.0 and counters.counts() == {'engine': {'a': 1}}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """gs://bucket as a folder of this disk, by the same library that reaches the real one."""
  root = tmp_path / 'bucket'
  root.mkdir()
  monkeypatch.setattr(
    workdir, '_open_remote', lambda url: epath.Path(root / url.removeprefix('gs://bucket/')))
  return root


def test_a_remote_folder_gets_what_has_changed(bucket):
  mirror = workdir.Mirror('gs://bucket/run')
  assert mirror.local.is_dir() and not mirror.local.is_relative_to(bucket)
  (mirror.local / 'metrics.jsonl').write_text('1\n')
  (mirror.local / 'adapter').mkdir()
  (mirror.local / 'adapter' / 'weights').write_bytes(b'abc')
  mirror.push()
  assert (bucket / 'run' / 'adapter' / 'weights').read_bytes() == b'abc'
  (bucket / 'run' / 'adapter' / 'weights').unlink()
  (mirror.local / 'metrics.jsonl').write_text('1\n2\n')
  mirror.push()
  assert (bucket / 'run' / 'metrics.jsonl').read_text() == '1\n2\n'
  assert not (bucket / 'run' / 'adapter' / 'weights').exists(), 'it had not changed'
  # Another machine goes on.
  again = workdir.Mirror('gs://bucket/run')
  assert again.local != mirror.local
  assert (again.local / 'metrics.jsonl').read_text() == '1\n2\n'


def test_the_curves_of_a_stopped_start_are_shown_once(bucket):
  names = []
  for _ in range(2):
    mirror = workdir.Mirror('gs://bucket/run')
    events = event_file.EventFile(mirror.local / 'tensorboard', [{'step': 1, 'loss': 1.0}])
    events.close()
    [new] = {p for p in (mirror.local / 'tensorboard').iterdir() if p.stat().st_size}
    # Another machine: its file has another name.
    names.append(new.rename(new.with_name(f'{new.name}.{len(names)}')).name)
    mirror.push()
  kept = bucket / 'run' / 'tensorboard'
  assert [(kept / name).stat().st_size > 0 for name in names] == [False, True]


def test_a_local_folder_is_its_own_mirror(tmp_path):
  mirror = workdir.Mirror(tmp_path)
  assert mirror.local == mirror.folder == tmp_path
  mirror.push()
  assert not list(tmp_path.iterdir())


def test_an_object_store_that_cannot_be_reached(monkeypatch):
  def fail(url):
    raise ImportError('Please install gcsfs')

  monkeypatch.setattr(workdir, '_open_remote', fail)
  with pytest.raises(errors.UserError, match=r'gs://bucket/run cannot be read .*gcsfs'):
    workdir.Mirror('gs://bucket/run')
