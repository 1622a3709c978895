"""One run's episodes played by several processes, none lost and none twice.

Process I of N plays every N-th task, beginning with the I-th, and keeps its episodes in a journal
of its own, `parts/I` in the run's folder. The last one to be ready joins them, and the parts go.
The processes tell each other nothing: they need a file system that they share, with locks.
"""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agents import episode as episode_lib
from data import errors, trajectory
from data import workdir as workdir_lib

_RECORD, _PLAYING = 'process.json', 'playing.lock'


@dataclasses.dataclass(frozen=True)
class Share:
  """Which process this is: `index` of `count`."""

  index: int = 0
  count: int = 1

  def __post_init__(self):
    if self.count < 1 or not 0 <= self.index < self.count:
      raise errors.UserError(
        f'process_id={self.index} of num_processes={self.count}: give a number from 0 to below '
        'num_processes, another one to each process.')

  def folder(self, workdir: pathlib.Path) -> pathlib.Path:
    """Where this process writes its episodes."""
    return workdir if self.count == 1 else workdir / 'parts' / str(self.index)

  def games(
    self, workdir: pathlib.Path, games: Sequence[episode_lib.Game]
  ) -> list[episode_lib.Game]:
    """Of a run's games those of this process's tasks: none that another journal has."""
    if self.count == 1:
      return list(games)
    own = self.folder(workdir)
    known = {e.id for folder in _folders(workdir) if folder != own for e in _episodes(folder)}
    tasks = {id_: i for i, id_ in enumerate(dict.fromkeys(game.task.id for game in games))}
    return [game for game in games
            if tasks[game.task.id] % self.count == self.index and game.id not in known]


def _folders(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The run's own folder, then those of processes."""
  return [workdir, *sorted(path for path in workdir.glob('parts/*') if path.is_dir())]


def _episodes(folder: pathlib.Path) -> list[trajectory.Episode]:
  return trajectory.read_episodes(folder / trajectory.JOURNAL_NAME)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps the other processes of a run from the files that they share; waits for them."""
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / 'parts.lock', 'ab') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


class Playing:
  """Tells the other processes that this one is at work, for as long as it lives or until `end`."""

  def __init__(self, folder: pathlib.Path):
    """Takes the folder.

    Raises:
      errors.UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self._file = open(folder / _PLAYING, 'ab')  # noqa: SIM115
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._file.close()
      raise errors.UserError(
        f'{folder} is being played by another process; give each process its own --process_id, or '
        'wait for it.') from error

  def end(self) -> None:
    """This process writes nothing more to its folder."""
    self._file.close()


def _held(workdir: pathlib.Path) -> list[Playing]:
  """All parts, taken.

  Raises:
    errors.UserError: a process is still playing.
  """
  held: list[Playing] = []
  try:
    for part in _folders(workdir)[1:]:
      held.append(Playing(part))
  except errors.UserError:
    for part in held:
      part.end()
    raise
  return held


def take_over(workdir: pathlib.Path) -> None:
  """Joins what several processes have played so far, for one that goes on alone.

  Raises:
    errors.UserError: one of them is still playing.
  """
  if held := _held(workdir):
    _join(workdir)
    clean(workdir)
    for part in held:
      part.end()


def _join(workdir: pathlib.Path) -> dict[str, trajectory.Episode]:
  """Appends the parts' episodes to the run's journal; all of them, by id."""
  journal = trajectory.Journal(workdir / trajectory.JOURNAL_NAME)
  found = {episode.id: episode for episode in journal.read()}
  for part in _folders(workdir)[1:]:
    for episode in _episodes(part):
      if episode.id not in found:
        found[episode.id] = episode
        journal.append(episode)
  journal.close()
  return found


def record(folder: pathlib.Path, numbers: Mapping[str, Any]) -> None:
  """Keeps what a process counted, for `gather`."""
  folder.mkdir(parents=True, exist_ok=True)
  workdir_lib.write_json(folder / _RECORD, numbers)


def gather(
  workdir: pathlib.Path, ids: Sequence[str]
) -> tuple[list[trajectory.Episode], list[dict[str, Any]]] | None:
  """Joins the parts if they have all episodes; call it under `locked`.

  Args:
    workdir: the run's folder.
    ids: of the episodes, in the order of the games.

  Returns:
    The episodes and what the processes recorded; None where some are still to be played, or a
    process is still at work, which then gathers itself.
  """
  there = {episode.id for folder in _folders(workdir) for episode in _episodes(folder)}
  if not there.issuperset(ids):
    return None
  try:
    held = _held(workdir)
  except errors.UserError:
    return None
  found = _join(workdir)
  episodes = [found[id_] for id_ in ids]
  store = workdir / trajectory.TFDS_NAME
  shutil.rmtree(store, ignore_errors=True)
  trajectory.write_tfds(episodes, store)
  records = [json.loads(path.read_text()) for path in sorted(workdir.glob(f'parts/*/{_RECORD}'))]
  for part in held:
    part.end()
  return episodes, records


def clean(workdir: pathlib.Path) -> None:
  """Removes the parts of a run whose summary is written."""
  shutil.rmtree(workdir / 'parts', ignore_errors=True)
