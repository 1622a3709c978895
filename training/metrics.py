"""What a run says while it trains."""

import json
import math
import pathlib
import sys
import time

import tqdm

from data.errors import UserError


class Metrics:
  """metrics.jsonl and the progress bar; the loss is a mean over the steps since the last record.

  Attributes:
    tokens: trained by this process.
    last_loss: of the newest record, None before there is one.
  """

  def __init__(self, path: pathlib.Path, num_steps: int, start: int, log_every: int):
    """Opens file and bar.

    Args:
      path: metrics.jsonl; records of steps after `start` are dropped, for they are done again.
      num_steps: of the whole run.
      start: steps done before.
      log_every: steps a record covers.
    """
    self._log_every, self._last = log_every, num_steps - 1
    kept = []
    if path.exists():
      lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]
      kept = [line for line in lines if line['step'] <= start]
    path.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    self._file = path.open('a')
    self._bar = tqdm.tqdm(
      total=num_steps, initial=start, unit='step', desc='train', file=sys.stderr
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
      **values,
      'loss': sum(self._losses) / len(self._losses),
      'tokens_per_s': self._tokens / seconds,
    }
    self.last_loss = record['loss']
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    self._bar.set_postfix_str(f'loss {record["loss"]:.3f}, {record["tokens_per_s"]:.0f} tok/s')
    self._since, self._losses, self._tokens = time.perf_counter(), [], 0

  def close(self) -> None:
    """Ends bar and file."""
    self._bar.close()
    self._file.close()
