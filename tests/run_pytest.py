"""What BUILD's py_test targets run: pytest on the files that the arguments name.

A test file run as a program defines its tests and ends with 0, so that nothing was tested.
"""

import pathlib
import sys

import pytest


def main(arguments: list[str]) -> int:
  """Runs pytest; 0 only where tests ran and passed."""
  # Python puts this file's folder first, where tests/data and tests/models would hide the rooms.
  sys.path[:] = [folder for folder in sys.path
                 if not (pathlib.Path(folder) / 'run_pytest.py').is_file()]
  root = str(pathlib.Path(__file__).absolute().parent.parent)
  if root not in sys.path:
    sys.path.insert(0, root)
  return int(pytest.main(['-q', '-p', 'no:cacheprovider', *arguments]))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
