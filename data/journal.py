"""The journal of a run: an append-only file, one episode a line, safe the moment `append` returns.

A line is `{"sha256":"<16 hex digits>","episode":{...}}`: plain JSON lines for any other tool, and a
checksum over the bytes of the episode's JSON for this one.
"""

import fcntl
import hashlib
import os
import pathlib

from data import errors, schema

_HEAD = b'{"sha256":"'
_DIGITS = 16
_BETWEEN = b'","episode":'
_START = len(_HEAD) + _DIGITS + len(_BETWEEN)


def _digest(body: bytes) -> bytes:
  return hashlib.sha256(body).hexdigest()[:_DIGITS].encode()


def _body(line: bytes) -> bytes | None:
  """The episode's JSON of a whole line (without line end), or None where the line is broken."""
  body = line[_START:-1]
  whole = _HEAD + _digest(body) + _BETWEEN + body + b'}'
  return body if line == whole else None


def read_episodes(
  path: str | os.PathLike, part: tuple[int, int] = (0, 1)
) -> list[schema.Episode]:
  """The episodes of a journal, or one part of them; nothing is written.

  Args:
    path: the file; where it is missing, there are none.
    part: (i, n) for the episodes i, i + n, ...: no other one is parsed.

  Raises:
    UserError: as `Journal.read`; a broken line also where it is in no part of the caller's.
  """
  return _read(pathlib.Path(path), part)[0]


def _read(path: pathlib.Path, part: tuple[int, int]) -> tuple[list[schema.Episode], int, int]:
  """The episodes of a part, torn last lines (0 or 1), and the bytes of the lines before them."""
  lines = (path.read_bytes() if path.exists() else b'').split(b'\n')
  if lines[-1] == b'':
    lines.pop()
  episodes, good_bytes = [], 0
  for number, line in enumerate(lines, 1):
    body = _body(line)
    if body is None and number == len(lines):
      return episodes, 1, good_bytes
    if body is None:
      raise errors.UserError(
        f'{path}, line {number}: the record is broken (checksum); delete that line to go on '
        'without its episode.'
      )
    good_bytes += len(line) + 1
    if (number - 1) % part[1] != part[0]:
      continue
    try:
      episodes.append(schema.Episode.from_json(body))
    except (KeyError, TypeError, ValueError) as error:
      raise errors.UserError(
        f'{path}, line {number}: not an episode of this version ({error}); use another run.'
      ) from error
  return episodes, 0, good_bytes


class Journal:
  """Append-only episodes of one run.

  Opening only reads. The first `append` takes the file for this process and moves a torn last line
  (the process was killed while it wrote) to `<path>.torn`; that episode was never reported as done.

  Attributes:
    path: the file; it need not exist.
    torn: torn last lines met, 0 or 1.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = None
    self.torn = 0
    self._good_bytes = 0
    self._ids = {episode.id for episode in self.read()}

  def ids(self) -> set[str]:
    """Ids of the episodes in the journal, those appended by this object included."""
    return set(self._ids)

  def read(self) -> list[schema.Episode]:
    """All episodes, in the order of their appending.

    Raises:
      UserError: a line other than the last is broken, or a line is no episode of this version.
    """
    episodes, self.torn, self._good_bytes = _read(self.path, (0, 1))
    return episodes

  def append(self, episode: schema.Episode) -> None:
    """Writes one episode and returns when it is on disk (fsync).

    Raises:
      UserError: the id is there already, or another process writes this journal.
    """
    if self._file is None:
      self._open()
    if episode.id in self._ids:
      raise errors.UserError(f'{self.path} has an episode {episode.id} already.')
    body = episode.to_json().encode('ascii')
    line = memoryview(_HEAD + _digest(body) + _BETWEEN + body + b'}\n')
    start = os.fstat(self._file.fileno()).st_size
    try:
      while line:
        line = line[self._file.write(line) :]
      os.fsync(self._file.fileno())
    except OSError:
      # A full disk must not leave half a line that a later episode would follow.
      self._file.truncate(start)
      raise
    self._ids.add(episode.id)

  def close(self) -> None:
    """Gives the file back; reading and a later `append` still work."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def _open(self) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered, and held until `close`.
    file = open(self.path, 'ab', buffering=0)  # noqa: SIM115
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.close()
      raise errors.UserError(
        f'{self.path} is being written by another process; wait for it or take another --workdir.'
      ) from error
    self._file = file
    # Read again under the lock: another writer may have come and gone since.
    self._ids = {episode.id for episode in self.read()}
    size = self.path.stat().st_size
    if self.torn:
      with open(f'{self.path}.torn', 'ab') as aside, open(self.path, 'rb') as source:
        source.seek(self._good_bytes)
        aside.write(source.read() + b'\n')
      file.truncate(self._good_bytes)
    elif size < self._good_bytes:
      file.write(b'\n')  # whole last line whose line end is missing
    os.fsync(file.fileno())
    # A new file is safe only when its folder entry is.
    folder = os.open(self.path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)
