"""A trace of some steps, for XProf and TensorBoard's profile plugin."""

import pathlib

import jax

from data.errors import UserError


class Profile:
  """Records the steps of `profile_steps=a,b`, both included, counted from 1 as metrics.jsonl does.

  The trace is written to FOLDER/plugins/profile/TIME/, where the plugin looks for it: one
  `.xplane.pb` for every process.
  """

  def __init__(self, text: str, folder: pathlib.Path):
    """Reads the interval; nothing is written before its first step.

    Args:
      text: 'a,b', or '' for no trace.
      folder: what `tensorboard --logdir` is given, or a folder below it.

    Raises:
      UserError: not two numbers, 1 <= a <= b.
    """
    self._folder, self._running = folder, False
    self._first, self._last = -1, -1
    if not text:
      return
    try:
      self._first, self._last = (int(part) - 1 for part in text.split(','))
    except ValueError:
      self._first = -1
    if not 0 <= self._first <= self._last:
      raise UserError(f'profile_steps={text!r}: give the first and the last step, such as 10,12.')

  def before(self, step: int, state) -> None:
    """Starts at the first step, when the device has done what came before it."""
    if step == self._first:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, state) -> None:
    """Ends behind the last step, when the device has done it."""
    if step == self._last and self._running:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes what was recorded; a no-op where nothing is."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
