"""What memory a process holds, and the most that it has held."""

import os
import pathlib
import resource
import sys


def resident_bytes(pid: int | None = None) -> int:
  """Bytes that a process holds now, by default this one.

  Where the system has no /proc it is the most that this process has held.

  Raises:
    FileNotFoundError: there is no process of that number any more.
  """
  try:
    pages = int(pathlib.Path(f'/proc/{pid or "self"}/statm').read_text().split()[1])
  except FileNotFoundError:
    if pid is not None:
      raise
    return peak_bytes()
  return pages * os.sysconf('SC_PAGE_SIZE')


def peak_bytes() -> int:
  """The most bytes that this process has held; not its parent's, with which getrusage begins."""
  try:
    status = pathlib.Path('/proc/self/status').read_text()
  except FileNotFoundError:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == 'darwin' else largest * 1024
  return int(status.partition('VmHWM:')[2].split()[0]) * 1024
