"""Runs as a user starts them, to be disturbed, and disks that are too small for them."""

import contextlib
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from data import trajectory
from data.tokenizer import Tokenizer
from tests import programs, test_rollout, test_train

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ROLLOUT = {
  'base': 'random', 'shrink': 'true', 'slots': 2, 'max_context': 768, 'max_new_tokens': 8,
  'max_env_steps': 6, 'max_calls': 6, 'skills': 'loop', 'split': 'valid_seen', 'episodes': 40,
}
TRAIN = {
  'base': 'random', 'shrink': 'true', 'row_len': 64, 'batch_rows': 2, 'rank': 4, 'alpha': 8.0,
  'dropout': 0.1, 'learning_rate': 1e-2, 'epochs': 8, 'dtype': 'float32', 'checkpoint_every': 4,
}
ADAPTER = pathlib.Path('adapter') / 'adapter_model.safetensors'


def command(entry: str, workdir: pathlib.Path, **values) -> list[str]:
  argument = ','.join(f'{key}={value}' for key, value in values.items())
  return [sys.executable, f'{entry}.py', f'--config=configs/{entry}.py:{argument}',
          f'--workdir={workdir}']


def start(line: list[str], **changes: str) -> subprocess.CompletedProcess:
  """Runs a command to its end."""
  return subprocess.run(
    line, cwd=ROOT, capture_output=True, text=True, timeout=600,
    env=programs.environment(**changes))


def sentences(stderr: str) -> list[str]:
  """The lines of stderr that are neither a progress bar nor what an entry says before its work."""
  lines = [line.strip() for line in re.split(r'[\r\n]+', stderr)]
  bar = re.compile(
    r'\|\s*\d+/\d+ \[|^\d+ episodes, about |^episodes: |^training: |^mesh |^(remat|attention)=')
  return [line for line in lines if line and not bar.search(line)]


def check_one_error(done: subprocess.CompletedProcess, *parts: str) -> None:
  """The command ended as the README says: one sentence, exit code 1, no traceback."""
  assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
  assert 'Traceback' not in done.stderr, done.stderr
  found = sentences(done.stderr)
  assert len(found) == 1 and found[0].startswith('error: '), done.stderr
  for part in parts:
    assert part in found[0], (part, found)


def check_rollout(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  """A finished run: no episode lost or doubled, all as in the run that was never disturbed."""
  episodes = trajectory.Journal(workdir / trajectory.JOURNAL_NAME).read()
  wanted = trajectory.load_episodes(whole)
  ids = [episode.id for episode in episodes]
  assert len(ids) == len(set(ids)) and set(ids) == {episode.id for episode in wanted}
  stored = trajectory.read_tfds(workdir / trajectory.TFDS_NAME)
  by_id = {episode.id: episode for episode in episodes}
  assert [e.id for e in stored] == [e.id for e in trajectory.read_tfds(
    whole / trajectory.TFDS_NAME)]
  assert stored == [by_id[episode.id] for episode in stored]
  test_rollout.check_same(episodes, wanted)


def training_values(root: pathlib.Path, tokenizer_folder: pathlib.Path) -> dict:
  """Writes episodes to train on; returns the values of a training's config."""
  journal = trajectory.Journal(root / 'episodes' / trajectory.JOURNAL_NAME)
  for episode in test_train.make_episodes(Tokenizer.load(tokenizer_folder)):
    journal.append(episode)
  journal.close()
  return {**TRAIN, 'tokenizer': tokenizer_folder, 'data': root / 'episodes'}


class SmallDisk:
  """A tmpfs of few kilobytes.

  Attributes:
    path: its folder, for this process and those that it starts.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._ballast = path / 'ballast'

  def fill(self, leave: int) -> None:
    """Takes all but about `leave` bytes (whole pages of 4 KiB)."""
    self.free()
    size = shutil.disk_usage(self.path).free - leave
    with open(self._ballast, 'wb') as file:
      file.write(bytes(max(0, size)))

  def free(self) -> None:
    self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[SmallDisk | None]:
  """Mounts a tmpfs of `size` bytes in a namespace of its own; None where that is not allowed.

  It is reached through /proc, and is gone with the process that holds the namespace.
  """
  folder.mkdir(parents=True)
  line = f'mount -t tmpfs -o size={size} tmpfs {folder} && echo mounted && exec sleep 3600'
  for unshare in (['unshare', '--mount', '--user', '--map-root-user'], ['unshare', '--mount']):
    try:
      holder = subprocess.Popen(
        [*unshare, 'sh', '-c', line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
      continue
    try:
      if holder.stdout.readline().strip() == 'mounted':
        yield SmallDisk(pathlib.Path(f'/proc/{holder.pid}/root{folder}'))
        return
    finally:
      holder.kill()
      holder.wait()
      holder.stdout.close()
  yield None
