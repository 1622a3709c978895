"""Writes and reads a TFDS folder of episodes, without TensorFlow."""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterable

from data import errors, schema


def write_tfds(episodes: Iterable[schema.Episode], folder: str | os.PathLike) -> None:
  """Writes episodes in RLDS form; `tfds.builder_from_directory(folder)` opens them.

  The folder appears whole or not at all, and replaces one that was there.

  Raises:
    UserError: there are no episodes (TFDS knows no empty data set).
  """
  # Imported here: TFDS takes a second, and only a finished run needs it.
  import tensorflow_datasets as tfds

  from data.rlds import builder as builder_lib

  episodes = list(episodes)
  folder = pathlib.Path(folder)
  if not episodes:
    raise errors.UserError(f'No episodes to write to {folder}.')
  work = folder.with_name(f'{folder.name}.writing')
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  try:
    builder = builder_lib.Episodes(
      episodes=episodes, data_dir=str(work), file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    tfds.disable_progress_bar()
    # TFDS prints about downloads, of which there are none.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
    if folder.exists():
      shutil.rmtree(folder)
    os.replace(builder.data_dir, folder)
  finally:
    shutil.rmtree(work, ignore_errors=True)


def read_tfds(
  folder: str | os.PathLike, part: tuple[int, int] = (0, 1)
) -> list[schema.Episode]:
  """Episodes of a folder that `write_tfds` wrote, in their order.

  Args:
    folder: of the data set.
    part: (i, n) for the episodes i, i + n, ...: no other one is read.

  Raises:
    UserError: no such folder, or one of other features.
  """
  import tensorflow_datasets as tfds

  from data.rlds import builder as builder_lib

  folder = pathlib.Path(folder)
  if not (folder / 'features.json').is_file():
    raise errors.UserError(f'{folder} is not a TFDS folder: it has no features.json.')
  source = tfds.builder_from_directory(str(folder)).as_data_source(split='train')
  try:
    indices = range(part[0], len(source), part[1])
    return [builder_lib.from_example(source[index]) for index in indices]
  except (KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
      f'{folder}: not episodes of this version ({error}); write them again from their journal.'
    ) from error
