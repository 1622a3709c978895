"""One run as a submitit job: nothing but a command, so that a cluster's node can load it."""

import pathlib
import signal
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Command:
  """Runs a command from the repository's root, and lets it save itself when its time is up."""

  def __init__(self, line: list[str]):
    self.line = line
    self._process = None

  def __call__(self) -> None:
    """Runs it to its end.

    Raises:
      RuntimeError: it failed; the job's log has what it said.
    """
    self._process = subprocess.Popen(self.line, cwd=ROOT)
    code = self._process.wait()
    if code:
      raise RuntimeError(f'exit code {code}')

  def checkpoint(self):
    """What submitit calls before a time limit or a preemption; the job is queued again."""
    from submitit import helpers

    if self._process is not None:
      # A training saves and ends (configs/cli.py); what else there is goes on by its journal.
      self._process.send_signal(signal.SIGTERM)
      self._process.wait()
    return helpers.DelayedSubmission(Command(self.line))
