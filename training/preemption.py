"""SIGTERM asks a training to stop: clouds and SLURM send it before they take the machine away."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Hears SIGTERM while the context lasts.

  Of several processes one may be told and the others not: JAX's coordination service then names a
  step that none of them has passed, and all stop behind that one.
  """

  def __init__(self):
    self._asked = False
    self._before = None

  def __enter__(self) -> 'Preemption':
    # With several processes the signal belongs to the coordination service; and only the main
    # thread may have a handler.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._hear)
    return self

  def _hear(self, *_) -> None:
    self._asked = True

  def stops_after(self, step: int) -> bool:
    """Whether to save and stop behind this step; every process asks after every step."""
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
