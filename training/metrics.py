"""What a run says while it trains."""

import json
import math
import os
import pathlib
import sys
import time

import tqdm

from data.errors import UserError
from training.event_file import EventFile


class Metrics:
  """metrics.jsonl, the same for TensorBoard, and the progress bar.

  The loss of a record is a mean over the steps since the last one.

  Attributes:
    tokens: trained by this process.
    last_loss: of the newest record, None before there is one.
  """

  def __init__(self, path: pathlib.Path | None, num_steps: int, start: int, log_every: int):
    """Opens files and bar.

    Args:
      path: metrics.jsonl; records of steps after `start` are dropped, for they are done again.
        TensorBoard's files are in tensorboard/ beside it. None: the process watches the loss and
        writes nothing.
      num_steps: of the whole run.
      start: steps done before.
      log_every: steps a record covers.
    """
    self._log_every, self._last = log_every, num_steps - 1
    self._file = self._events = None
    kept = []
    if path is not None and path.exists():
      lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]
      kept = [line for line in lines if line['step'] <= start]
    if path is not None:
      # Beside the place and renamed: a run that is killed here, or on a full disk, keeps its
      # records.
      temporary = path.with_name(f'{path.name}.tmp')
      temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
      os.replace(temporary, path)
      self._file = path.open('a')
      self._events = EventFile(path.parent / 'tensorboard', kept)
    self._bar = tqdm.tqdm(
      total=num_steps, initial=start, unit='step', desc='train', file=sys.stderr,
      disable=path is None,
    )
    self._since, self._losses, self._tokens = time.perf_counter(), [], 0
    self.tokens = 0
    self.last_loss = kept[-1]['loss'] if kept else None

  def add(self, step: int, metrics: dict, num_tokens: int) -> None:
    """Takes the metrics of one step (device arrays); waits for them.

    Raises:
      UserError: the loss or the gradient is not a finite number.
    """
    values = {name: float(value) for name, value in metrics.items()}
    if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
      raise UserError(
        f'Step {step}: loss {values["loss"]}, gradient norm {values["grad_norm"]}; training '
        'stopped and the last checkpoint is kept. Lower learning_rate or set clip_norm.'
      )
    self.tokens += num_tokens
    self._tokens += num_tokens
    self._losses.append(values['loss'])
    self._bar.update()
    if (step + 1) % self._log_every and step != self._last:
      return
    seconds = time.perf_counter() - self._since
    record = {
      'step': step + 1,
      'unix_time': time.time(),
      **values,
      'loss': sum(self._losses) / len(self._losses),
      'tokens_per_s': self._tokens / seconds,
    }
    self.last_loss = record['loss']
    if self._file is not None:
      self._file.write(json.dumps(record) + '\n')
      self._file.flush()
      self._events.add(record)
    self._bar.set_postfix_str(f'loss {record["loss"]:.3f}, {record["tokens_per_s"]:.0f} tok/s')
    self._since, self._losses, self._tokens = time.perf_counter(), [], 0

  def close(self) -> None:
    """Ends bar and files."""
    self._bar.close()
    if self._file is None:
      return
    try:
      self._file.close()
    finally:
      self._events.close()
