"""Trajectories: the schema of an episode, its journal, its TFDS store, in one place to import.

`data.schema` says what an episode is, `data.journal` keeps a running run safe, `data.rlds` is the
form in which a finished run is given away.
"""

import pathlib

from data import errors
from data.journal import Journal, read_episodes
from data.rlds.store import read_tfds, write_tfds
from data.schema import KIND, KINDS, PARSED, TERMINATIONS, Episode, Step, without

JOURNAL_NAME = 'journal.jsonl'
TFDS_NAME = 'episodes'


def load_episodes(path: str | pathlib.Path, part: tuple[int, int] = (0, 1)) -> list[Episode]:
  """Reads a run folder (its journal, else its TFDS store), a journal file or a TFDS folder.

  A run keeps its journal beside the store, and the journal is the one that a resumed run extends.

  Args:
    path: of the folder or file.
    part: (i, n) for the episodes i, i + n, ... of all: several processes share the reading.

  Raises:
    UserError: nothing there, or a record is broken.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return read_episodes(path, part)
  if (path / JOURNAL_NAME).is_file():
    return read_episodes(path / JOURNAL_NAME, part)
  for folder in (path, path / TFDS_NAME):
    if (folder / 'features.json').is_file():
      return read_tfds(folder, part)
  raise errors.UserError(
    f'{path} holds no episodes: give the --workdir of a rollout ({JOURNAL_NAME} or '
    f'{TFDS_NAME}/ in it), or a TFDS folder.'
  )


__all__ = [
  'JOURNAL_NAME',
  'KIND',
  'KINDS',
  'PARSED',
  'TERMINATIONS',
  'TFDS_NAME',
  'Episode',
  'Journal',
  'Step',
  'load_episodes',
  'read_episodes',
  'read_tfds',
  'without',
  'write_tfds',
]
