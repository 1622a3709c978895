"""What a run says while it trains."""

import json
import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import tqdm

from data import process_memory
from data.errors import UserError
from training.event_file import EventFile


class _Step(NamedTuple):
  step: int
  metrics: dict[str, Any]
  num_tokens: int
  data_s: float


def memory_bytes() -> int:
  """The most memory in use so far: of a device of this process, on CPUs of the process itself."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max(found.get('peak_bytes_in_use', 0) for found in stats)
  return peak or process_memory.peak_bytes()


class Metrics:
  """metrics.jsonl, the same for TensorBoard, and the progress bar.

  A record covers `log_every` steps: `loss` is their mean, `step_s` the seconds that a step took,
  `data_s` those of it in which this process made and sent its rows (the device waits for them only
  where they are longer than its own), `tokens_per_s` counts tokens that are no padding, `mfu` is
  what these tokens need of the devices' peak, where that is known (padding and what is computed
  again are no use), and `memory_bytes` as `memory_bytes` says.
  The other values are those of the last step.

  Attributes:
    tokens: trained by this start.
    last_loss: of the newest record, None before there is one.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    num_steps: int,
    start: int,
    log_every: int,
    *,
    token_flops: float = 0.0,
    peak_flops: float | None = None,
  ):
    """Opens files and bar.

    Args:
      path: metrics.jsonl; records of steps after `start` are dropped, for they are done again.
        TensorBoard's files are in tensorboard/ beside it. None: the process watches the loss and
        writes nothing.
      num_steps: of the whole run.
      start: steps done before.
      log_every: steps a record covers.
      token_flops: floating point operations of a token that is no padding, on average.
      peak_flops: of all devices a second; None where it is not known.
    """
    self._log_every, self._last = log_every, num_steps - 1
    self._token_flops, self._peak_flops = token_flops, peak_flops
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
    self._waiting: list[_Step] = []  # given, and not read from the device yet
    self._since, self._window = time.perf_counter(), []
    self.tokens = 0
    self.last_loss = kept[-1]['loss'] if kept else None

  def add(self, step: int, metrics: dict, num_tokens: int, data_s: float = 0.0) -> None:
    """Takes the metrics of a step that has been dispatched (device arrays); does not wait for it.

    A record is written when the step behind its last one is given, so that the device has work
    while the host reads.

    Raises:
      UserError: the loss or the gradient of an earlier step is not a finite number.
    """
    if self._waiting and self._ends_record(self._waiting[-1].step):
      self.flush()
    self._waiting.append(_Step(step, metrics, num_tokens, data_s))

  def flush(self) -> None:
    """Waits for the steps given so far and writes the record that ends with the last of them.

    Raises:
      UserError: the loss or the gradient of one is not a finite number.
    """
    given, self._waiting = self._waiting, []
    fetched = jax.device_get([each.metrics for each in given])
    for each, values in zip(given, fetched, strict=True):
      values = {name: float(value) for name, value in values.items()}
      if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
        raise UserError(
          f'Step {each.step + 1}: loss {values["loss"]}, gradient norm {values["grad_norm"]}; '
          'training stopped and the last checkpoint is kept. Lower learning_rate or set clip_norm.'
        )
      self.tokens += each.num_tokens
      self._window.append((each, values))
      self._bar.update()
      if self._ends_record(each.step):
        self._write()

  def _ends_record(self, step: int) -> bool:
    return (step + 1) % self._log_every == 0 or step == self._last

  def _write(self) -> None:
    window, self._window = self._window, []
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    step_s = seconds / len(window)
    last, values = window[-1]
    record = {
      'step': last.step + 1,
      'unix_time': time.time(),
      **values,
      'loss': sum(v['loss'] for _, v in window) / len(window),
      'tokens_per_s': sum(each.num_tokens for each, _ in window) / seconds,
      'step_s': step_s,
      'data_s': sum(each.data_s for each, _ in window) / len(window),
      'memory_bytes': memory_bytes(),
    }
    if self._peak_flops:
      record['mfu'] = record['tokens_per_s'] * self._token_flops / self._peak_flops
    self.last_loss = record['loss']
    if self._file is not None:
      self._file.write(json.dumps(record) + '\n')
      self._file.flush()
      self._events.add(record)
    self._bar.set_postfix_str(f'loss {record["loss"]:.3f}, {record["tokens_per_s"]:.0f} tok/s')

  def close(self) -> None:
    """Ends bar and files; steps that were not read are not recorded."""
    self._bar.close()
    if self._file is None:
      return
    try:
      self._file.close()
    finally:
      self._events.close()
