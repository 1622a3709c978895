"""train.py as several processes on this machine: one adapter, one summary, and no hanging."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

import train
from configs import train as train_config
from data import errors
from data.tokenizer import Tokenizer
from models import decoder, registry, weights
from tests import programs, test_train
from training import processes

ADAPTER = 'adapter/adapter_model.safetensors'
rooms = test_train.rooms  # the fixture


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def launch(rooms, workdir, count, devices=1, **changes):
  """Starts `count` processes of one training, each with `devices` virtual devices."""
  port = free_port()
  return [
    subprocess.Popen(
      [*test_train.command(rooms, workdir, **changes), f'--coordinator=127.0.0.1:{port}',
       f'--num_processes={count}', f'--process_id={i}'],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=programs.environment(devices))
    for i in range(count)]


def finish(started, timeout=300):
  """(exit code, stdout, stderr) of each, in their order."""
  try:
    said = [process.communicate(timeout=timeout) for process in started]
  finally:
    for process in started:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def largest_difference(folder, other):
  """Of two adapters, relative to the largest entry of each tensor."""
  a, b = (safetensors.numpy.load_file(f / ADAPTER) for f in (folder, other))
  assert a.keys() == b.keys()
  return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in a)


def model_folder(rooms, folder):
  shutil.copytree(rooms / 'tokenizer', folder)
  vocab_size = Tokenizer.load(folder).vocab_size
  config = registry.shrink(registry.get_config('smollm2_135m'), vocab_size=vocab_size)
  params = decoder.to_params(decoder.create(config, seed=3).frozen)
  weights.export_pretrained(folder, config, jax.device_get(params))
  return str(folder)


def steps_of(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize('count,devices,mesh', [
  (2, 1, '2,1,1'),
  pytest.param(2, 2, '1,2,2', marks=pytest.mark.slow),  # an adapter that no process holds whole
  pytest.param(2, 2, '2,1,2', marks=pytest.mark.slow),
  pytest.param(4, 1, '4,1,1', marks=pytest.mark.slow),
])
def test_several_processes_train_what_one_does(rooms, tmp_path, count, devices, mesh):
  changes = {'epochs': 3, 'batch_rows': 4, 'mesh': mesh}
  if mesh == '1,2,2':
    # Weights of a folder, of which each process reads its own half.
    changes |= {'model': model_folder(rooms, tmp_path / 'model'), 'base': '', 'shrink': False}
  started = launch(rooms, tmp_path / 'run', count, devices, **changes)
  alone = tmp_path / 'alone'
  train.run(train_config.make(test_train.values(rooms, **changes)), alone)
  ended = finish(started)
  assert [code for code, _, _ in ended] == [0] * count, ended
  assert largest_difference(tmp_path / 'run', alone) < 1e-5
  # Process 0 alone speaks and writes.
  assert 'adapter in' in ended[0][1] and f'of {count * devices} devices' in ended[0][2]
  assert all('steps' not in out and 'training' not in err for _, out, err in ended[1:])
  lines = test_train.read_metrics(tmp_path / 'run')
  wanted = test_train.read_metrics(alone)
  assert [line['step'] for line in lines] == [line['step'] for line in wanted]
  np.testing.assert_allclose(
    [line['loss'] for line in lines], [line['loss'] for line in wanted], rtol=1e-5)


@pytest.mark.slow
def test_what_a_process_cannot_do_is_told_by_each(rooms, tmp_path):
  # The folder holds another run, which only process 0 looks at.
  (tmp_path / 'config.json').write_text(json.dumps({'seed': 1}))
  ended = finish(launch(rooms, tmp_path, 2))
  assert [code for code, _, _ in ended] == [1, 1]
  for _, _, err in ended:
    assert 'holds a run with another config' in err and 'Traceback' not in err
  # Two rows over three devices.
  ended = finish(launch(rooms, tmp_path / 'other', 3))
  assert all(code == 1 and 'all have to be in it' in err for code, _, err in ended), ended


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_a_process_that_dies_ends_the_others(rooms, tmp_path, killed):
  workdir = tmp_path / 'run'
  started = launch(rooms, workdir, 2, epochs=400, batch_rows=4, checkpoint_every=4)
  deadline = time.time() + 300
  while not (workdir / 'checkpoints' / '8').is_dir():
    assert started[0].poll() is None and time.time() < deadline
    time.sleep(0.01)
  started[killed].send_signal(signal.SIGKILL)
  began = time.time()
  ended = finish(started, timeout=110)
  assert time.time() - began < 60
  code, _, err = ended[1 - killed]
  assert code not in (0, None)
  # Of the first, which holds the coordination service, JAX tells it as well, in its own words.
  assert re.search('another process has ended|another task died', err), err
  if killed:
    assert code == 1 and 'start the same command again in every process' in err


@pytest.mark.slow
def test_sigterm_to_one_stops_all_behind_the_same_step(rooms, tmp_path):
  workdir, changes = tmp_path / 'run', {'epochs': 60, 'batch_rows': 4, 'checkpoint_every': 50}
  started = launch(rooms, workdir, 2, **changes)
  deadline = time.time() + 300
  while len(steps_of(workdir)) < 5:
    assert started[0].poll() is None and time.time() < deadline
    time.sleep(0.01)
  started[1].send_signal(signal.SIGTERM)
  ended = finish(started)
  assert [code for code, _, _ in ended] == [errors.EXIT_PREEMPTED] * 2, ended
  told = [re.search(r'step (\d+) of 180 is saved', err)[1] for _, _, err in ended]
  assert told[0] == told[1] and (workdir / 'checkpoints' / told[0]).is_dir()
  # One process with two devices goes on, and the result is that of a run that was never stopped.
  config = train_config.make(test_train.values(rooms, mesh='2,1,1', **changes))
  assert train.run(config, workdir)['resumed_at'] == int(told[0])
  train.run(config, tmp_path / 'alone')
  np.testing.assert_allclose(
    [line['loss'] for line in test_train.read_metrics(workdir)],
    [line['loss'] for line in test_train.read_metrics(tmp_path / 'alone')], rtol=1e-4)


@pytest.mark.parametrize('given,message', [
  (('', 2, 0), 'need --coordinator'),
  (('localhost', 2, 0), 'HOST:PORT'),
  (('localhost:1', 2, 2), '--process_id below'),
  (('auto', 0, -1), 'No cluster tells'),
])
def test_flags_that_do_not_go_together(given, message, monkeypatch):
  def no_cluster():
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', no_cluster)
  with pytest.raises(errors.UserError, match=message), processes.joined(*given):
    pass
