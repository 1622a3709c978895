"""What a training writes for TensorBoard, read back by TensorBoard's own reader."""

import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from data.errors import UserError
from training.metrics import Metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]


def values(step, shift=0.0):
  """Metrics of a step; `shift` tells two runs of it apart."""
  return {
    'loss': np.float32(5 - 0.25 * step + shift),
    'grad_norm': np.float32(1.5),
    'learning_rate': np.float32(1e-3 / (step + 1)),
  }


def accumulator(workdir, *, purge=False):
  """A reader that takes every event of the files as it is, unless it may purge."""
  return event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'), size_guidance={'scalars': 0}, purge_orphaned_data=purge)


def curves(reader):
  """Name -> list of (step, wall time, value)."""
  reader.Reload()
  return {
    tag.removeprefix('train/'): [(e.step, e.wall_time, e.value) for e in reader.Scalars(tag)]
    for tag in reader.Tags()['scalars']
  }


def records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def assert_shows_the_records(shown, lines):
  """The curves are the records of metrics.jsonl: every number, every step once."""
  assert lines and set(shown) == set(lines[0]) - {'step', 'unix_time'}
  assert {'loss', 'grad_norm', 'learning_rate', 'tokens_per_s'} <= set(shown)
  for name, curve in shown.items():
    assert [step for step, _, _ in curve] == [line['step'] for line in lines]
    np.testing.assert_allclose([t for _, t, _ in curve], [line['unix_time'] for line in lines])
    np.testing.assert_allclose(
      [value for _, _, value in curve], [line[name] for line in lines], rtol=1e-6)


def train(workdir, start, stop, *, num_steps=10, log_every=1, shift=0.0):
  metrics = Metrics(workdir / 'metrics.jsonl', num_steps, start, log_every)
  for step in range(start, stop):
    metrics.add(step, values(step, shift), 100)
  metrics.flush()
  return metrics


def test_tensorboard_shows_every_step(tmp_path):
  train(tmp_path, 0, 10).close()
  lines = records(tmp_path)
  assert [line['step'] for line in lines] == list(range(1, 11))
  assert [line['loss'] for line in lines] == [5 - 0.25 * step for step in range(10)]
  assert_shows_the_records(curves(accumulator(tmp_path)), lines)


def test_a_record_of_several_steps(tmp_path):
  train(tmp_path, 0, 10, log_every=4).close()
  lines = records(tmp_path)
  assert [line['step'] for line in lines] == [4, 8, 10]
  assert lines[0]['loss'] == 5 - 0.25 * 1.5
  assert_shows_the_records(curves(accumulator(tmp_path)), lines)


def test_a_resumed_run_neither_loses_nor_doubles_steps(tmp_path):
  # Killed after step 7, the newest checkpoint being of step 5, in the middle of a record.
  killed = train(tmp_path, 0, 7)
  (file,) = (tmp_path / 'tensorboard').iterdir()
  with open(file, 'ab') as f:
    f.write(b'torn')
  before = records(tmp_path)
  assert len(curves(accumulator(tmp_path))['loss']) == 7
  resumed = train(tmp_path, 5, 10, shift=100.0)
  assert_shows_the_records(curves(accumulator(tmp_path)), records(tmp_path))
  resumed.close()
  killed.close()
  lines = records(tmp_path)
  assert [line['step'] for line in lines] == list(range(1, 11))
  assert lines[:5] == before[:5] and all(line['loss'] > 100 for line in lines[5:])
  assert_shows_the_records(curves(accumulator(tmp_path)), lines)


def test_an_open_tensorboard_follows_a_resumed_run(tmp_path, monkeypatch):
  train(tmp_path, 0, 7).close()
  reader = accumulator(tmp_path, purge=True)
  assert len(curves(reader)['loss']) == 7
  # The files are named by the second in which they were begun.
  from tensorboardX import event_file_writer
  now = event_file_writer.time.time()
  monkeypatch.setattr(event_file_writer.time, 'time', lambda: now + 5)
  resumed = train(tmp_path, 5, 8, shift=100.0)
  lines = records(tmp_path)
  assert [line['step'] for line in lines] == list(range(1, 9))
  assert_shows_the_records(curves(reader), lines)
  resumed.add(8, values(8), 100)
  resumed.flush()
  assert_shows_the_records(curves(reader), records(tmp_path))
  resumed.close()


@pytest.mark.slow
@pytest.mark.parametrize('load_fast', ['true', 'false'])  # its two readers
def test_the_program_itself(tmp_path, load_fast):
  train(tmp_path, 0, 7).close()
  server = subprocess.Popen(
    [sys.executable, '-m', 'tensorboard.main', '--logdir', str(tmp_path), '--host', '127.0.0.1',
     '--port', '0', '--reload_interval', '1', f'--load_fast={load_fast}'],
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  try:
    address = next(filter(None, (re.search(r'http://\S+', line) for line in server.stderr)))[0]
    query = f'{address}data/plugin/scalars/scalars?run=tensorboard&tag=train%2Floss'

    def wait_for(last_step):
      for _ in range(200):
        with contextlib.suppress(urllib.error.HTTPError):  # 404 until it has read the first time
          with urllib.request.urlopen(query) as response:
            shown = [(step, value) for _, step, value in json.load(response)]
          if shown and shown[-1][0] == last_step:
            return shown
        time.sleep(0.1)
      raise AssertionError(f'TensorBoard does not show step {last_step}.')

    expected = lambda: [(line['step'], line['loss']) for line in records(tmp_path)]
    assert wait_for(7) == expected()
    train(tmp_path, 5, 10, shift=100.0).close()
    assert wait_for(10) == expected()
    assert len(expected()) == 10
  finally:
    server.terminate()
    server.communicate()


def test_lost_event_files_come_back(tmp_path):
  train(tmp_path, 0, 6).close()
  shutil.rmtree(tmp_path / 'tensorboard')
  train(tmp_path, 6, 10).close()
  assert_shows_the_records(curves(accumulator(tmp_path)), records(tmp_path))


def test_a_step_that_is_no_number_is_in_neither(tmp_path):
  metrics = train(tmp_path, 0, 3)
  metrics.add(3, values(3) | {'loss': np.float32('nan')}, 100)
  with pytest.raises(UserError, match='Step 4: loss nan'):
    metrics.add(4, values(4), 100)
  metrics.close()
  assert len(records(tmp_path)) == 3
  assert_shows_the_records(curves(accumulator(tmp_path)), records(tmp_path))


def test_a_step_is_read_when_the_next_one_has_been_given(tmp_path, monkeypatch):
  read, device_get = [], jax.device_get

  def counting(tree):
    read.append(len(tree))
    return device_get(tree)

  monkeypatch.setattr(jax, 'device_get', counting)
  metrics = Metrics(tmp_path / 'metrics.jsonl', 10, 0, 3)
  for step in range(7):
    metrics.add(step, values(step), 100)
    # Steps 2 and 5 end a record each.
    assert read == [3] * ((step >= 3) + (step >= 6))
  metrics.flush()
  assert read == [3, 3, 1] and len(records(tmp_path)) == 2
  metrics.close()


def test_a_record_says_how_fast_it_was(tmp_path, monkeypatch):
  clock = iter([100.0, 104.0])
  monkeypatch.setattr('training.metrics.time.perf_counter', lambda: next(clock))
  metrics = Metrics(tmp_path / 'metrics.jsonl', 2, 0, 2, token_flops=3e7, peak_flops=6e9)
  for step in range(2):
    metrics.add(step, values(step), 100, data_s=0.25 * (step + 1))
  metrics.flush()
  metrics.close()
  (record,) = records(tmp_path)
  assert (record['step_s'], record['tokens_per_s'], record['mfu']) == (2.0, 50.0, 0.25)
  assert record['data_s'] == 0.375 and record['memory_bytes'] > 1e7
  # Where the devices' peak is not known, nothing is made up.
  monkeypatch.undo()
  (tmp_path / 'unknown').mkdir()
  unknown = Metrics(tmp_path / 'unknown' / 'metrics.jsonl', 1, 0, 1, token_flops=3e7)
  unknown.add(0, values(0), 100)
  unknown.flush()
  unknown.close()
  assert 'mfu' not in records(tmp_path / 'unknown')[0]


def test_neither_tensorflow_nor_torch_is_needed(tmp_path):
  program = (
    'import pathlib, sys\n'
    'for name in ("tensorflow", "torch", "tensorboard"):\n'
    '  sys.modules[name] = None\n'  # importing it raises
    'from training.metrics import Metrics\n'
    'metrics = Metrics(pathlib.Path(sys.argv[1]) / "metrics.jsonl", 2, 0, 1)\n'
    'for step in range(2):\n'
    '  metrics.add(step, {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 3.0}, 10)\n'
    'metrics.flush()\n'
    'metrics.close()\n')
  done = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert_shows_the_records(curves(accumulator(tmp_path)), records(tmp_path))
