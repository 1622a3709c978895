"""The folder of a run: its config, its seconds, and files that are there whole or not at all."""

import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data import errors


def write_json(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
  """Writes beside the place and renames."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    temporary.write_text(json.dumps(record, indent=2) + '\n')
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def read_record(path: str | os.PathLike) -> dict[str, Any] | None:
  """What `write_json` wrote; None where there is no such file."""
  path = pathlib.Path(path)
  return json.loads(path.read_text()) if path.is_file() else None


def check_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ()
) -> None:
  """Checks that a folder that holds a run holds this one; writes nothing.

  Args:
    workdir: may not exist.
    config: flat, of JSON's types.
    free_keys: may differ when the run goes on.

  Raises:
    UserError: the folder holds a run with other settings, which are named, or it is no folder that
      can be written.
  """
  there = pathlib.Path(workdir).absolute()
  while not there.exists():
    there = there.parent
  if not there.is_dir():
    raise errors.UserError(f'{there} is a file and not a folder; take another --workdir.')
  if not os.access(there, os.W_OK | os.X_OK):
    raise errors.UserError(f'There is no permission to write to {there}; take another --workdir.')
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    return
  try:
    before = json.loads(path.read_text())
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise errors.UserError(
      f'{path} is not readable JSON ({error}); take another --workdir.') from error
  if not isinstance(before, dict):
    raise errors.UserError(f'{path} is not the config of a run; take another --workdir.')
  changed = [
    f'{key} (there {before.get(key)!r}, now {config.get(key)!r})'
    for key in sorted(before.keys() | config.keys())
    if key not in free_keys and before.get(key) != config.get(key)
  ]
  if changed:
    raise errors.UserError(
      f'{workdir} holds a run with another config: {", ".join(changed)}; take another --workdir, '
      'or the same config to go on.'
    )


def open_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ()
) -> None:
  """Makes the run's folder with its config.json, after `check_workdir`.

  Raises:
    UserError: as `check_workdir`, or the folder cannot be written (a full disk).
  """
  check_workdir(workdir, config, free_keys)
  path = pathlib.Path(workdir) / 'config.json'
  if path.exists():
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
  except OSError as error:
    raise errors.UserError(
      f'{workdir} cannot be written ({error.strerror or error}); free some space, or take another '
      '--workdir.') from error


def is_remote(folder: str | os.PathLike) -> bool:
  """Whether a folder is one of an object store, such as gs://BUCKET/FOLDER."""
  return '://' in os.fspath(folder)


class Mirror:
  """The folder of a run, which may be one of an object store (gs://BUCKET/FOLDER).

  Files of an object store cannot grow, so the run writes to a local folder, and `push` copies what
  has changed since. A run that is started on another machine goes on with what was pushed.

  Attributes:
    local: where to write: the run's folder itself, or a new one for a remote folder.
    folder: the run's folder, for what can write to an object store by itself.
  """

  _PULLED, _EVENTS = ('config.json', 'metrics.jsonl', 'summary.json'), 'tensorboard'

  def __init__(self, folder: str | os.PathLike):
    """Fetches what the folder holds of an earlier start.

    Raises:
      UserError: the object store cannot be read.
    """
    self._pushed: dict[pathlib.Path, tuple[int, int]] = {}
    self._remote = is_remote(folder)
    self.local = self.folder = pathlib.Path(folder)
    if not self._remote:
      return
    self.local = pathlib.Path(tempfile.mkdtemp(prefix='hintsight-'))
    try:
      self.folder = _open_remote(os.fspath(folder))
      for name in self._PULLED:
        if (self.folder / name).exists():
          (self.local / name).write_bytes((self.folder / name).read_bytes())
      # TensorBoard's files are written anew (`training.event_file`), the earlier ones emptied: they
      # need not be read, but known.
      if (self.folder / self._EVENTS).exists():
        for path in (self.folder / self._EVENTS).glob('events.out.tfevents.*'):
          (self.local / self._EVENTS).mkdir(exist_ok=True)
          (self.local / self._EVENTS / path.name).touch()
    # The file systems of the object stores have no common class for "there is no access".
    except Exception as error:
      reason = ' '.join(str(error).split())[:160] or type(error).__name__
      raise errors.UserError(
        f'{folder} cannot be read ({reason}); install gcsfs for gs:// and sign in, or take a local '
        '--workdir.') from error

  def push(self) -> None:
    """Copies the files that have changed to a remote folder; summary.json last."""
    if not self._remote:
      return
    files = [path for path in self.local.rglob('*') if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == 'summary.json', path)):
      stat = path.stat()
      version = (stat.st_size, stat.st_mtime_ns)
      if self._pushed.get(path) != version:
        there = self.folder / path.relative_to(self.local).as_posix()
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes())
        self._pushed[path] = version


def _open_remote(url: str):
  from etils import epath

  return epath.Path(url)


class RunCounts:
  """Seconds and counts of a run over all its starts, kept in `counts.json` of its folder.

  Of a start that was killed, what followed its last `save` is not counted.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    started: float,
    counts: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
    now: Callable[[], float] = time.perf_counter,
  ):
    """Reads what earlier starts took.

    Args:
      workdir: the run's folder; it need not exist.
      started: when this start began, in seconds of `now`.
      counts: what this start has counted so far, by group and name.
      now: a monotonic clock.
    """
    self._path = pathlib.Path(workdir) / 'counts.json'
    self._started, self._counts, self._now = started, counts, now
    try:
      before = json.loads(self._path.read_text())
      self._before_s = float(before.pop('wall_s'))
      self._before = {
        group: {name: value + 0 for name, value in numbers.items()}
        for group, numbers in before.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      # None yet, or damaged by hand: no reason to refuse the run.
      self._before_s, self._before = 0.0, {}

  def seconds(self) -> float:
    """Of all starts, up to now."""
    return self._before_s + self._now() - self._started

  def counts(self) -> dict[str, dict[str, float]]:
    """Of all starts, up to now; of a group that this one has no counts of, those of before."""
    here = self._counts()
    total = {
      group: {name: value + self._before.get(group, {}).get(name, 0)
              for name, value in numbers.items()}
      for group, numbers in here.items()}
    return self._before | {group: numbers for group, numbers in total.items() if numbers}

  def save(self) -> None:
    write_json(self._path, {'wall_s': self.seconds(), **self.counts()})
