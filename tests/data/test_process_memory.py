"""What memory a process holds."""

import mmap
import subprocess
import sys

import pytest

from data import process_memory

_SIZE = 64 * 2**20


def test_pages_that_are_written_are_held_until_they_are_given_back():
  before = process_memory.resident_bytes()
  with mmap.mmap(-1, _SIZE) as pages:
    pages.write(b'x' * _SIZE)
    assert process_memory.resident_bytes() - before > 0.9 * _SIZE
    held = process_memory.peak_bytes()
    assert held - before > 0.9 * _SIZE
  assert process_memory.resident_bytes() - before < 0.5 * _SIZE
  assert process_memory.peak_bytes() >= held


def test_a_child_of_a_large_process_starts_small():
  """getrusage would say what its parent held when it started it."""
  ballast = b'x' * 200 * 2**20
  peak = subprocess.run(
    [sys.executable, '-c', 'from data import process_memory; print(process_memory.peak_bytes())'],
    capture_output=True, text=True, check=True).stdout
  assert int(peak) < len(ballast)


def test_another_process_and_one_that_is_gone():
  child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
  assert process_memory.resident_bytes(child.pid) > 0
  child.communicate(b'\n')
  with pytest.raises(FileNotFoundError):
    process_memory.resident_bytes(child.pid)
