"""Checkpoints come back bit for bit; a torn one gives way to the one before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import UserError
from training.checkpoint import Checkpoints
from training.step import TrainState

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_state(step):
  values = jax.random.normal(jax.random.key(step), (3, 50))
  lora = {'a': values, 'b': values.astype(jnp.bfloat16)}
  return TrainState(lora, {'mu': values * 2}, jnp.int32(step))


SHARDINGS = jax.tree.map(lambda _: PLACE, make_state(0))


def equal(one, other):
  same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
  return all(jax.tree.leaves(same))


def save(folder, *steps, identity=None):
  checkpoints = Checkpoints(folder, identity or {'rows': 'abc'})
  for step in steps:
    checkpoints.save(make_state(step))
  checkpoints.close()


def restore(folder, identity=None):
  checkpoints = Checkpoints(folder, identity or {'rows': 'abc'})
  state = checkpoints.restore(make_state(0), SHARDINGS)
  return state, checkpoints


def test_restores_the_newest_and_keeps_two(tmp_path):
  assert restore(tmp_path / 'run')[0] is None
  save(tmp_path / 'run', 10, 20, 30)
  state, _ = restore(tmp_path / 'run')
  assert equal(state, make_state(30))
  assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == ['20', '30']


@pytest.mark.parametrize('damage', ['truncate', 'zero', 'remove'])
def test_torn_checkpoint_is_set_aside(tmp_path, capsys, damage):
  save(tmp_path, 10, 20)
  files = [p for p in (tmp_path / '20' / 'state').rglob('*') if p.is_file() and '/d/' in str(p)]
  assert files
  for file in files:
    if damage == 'truncate':
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == 'zero':
      file.write_bytes(bytes(file.stat().st_size))
    else:
      file.unlink()
  state, checkpoints = restore(tmp_path)
  assert equal(state, make_state(10))
  assert 'Checkpoint 20' in capsys.readouterr().err
  assert (tmp_path / '20.torn').is_dir()
  checkpoints.save(make_state(20))
  checkpoints.close()
  assert equal(restore(tmp_path)[0], make_state(20))


def test_checkpoint_of_another_run_is_named(tmp_path):
  save(tmp_path, 10)
  with pytest.raises(UserError, match='rows abc -> xyz'):
    restore(tmp_path, {'rows': 'xyz'})
