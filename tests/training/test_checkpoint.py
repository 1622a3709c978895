"""Checkpoints come back bit for bit; a torn one gives way to the one before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data.errors import UserError
from models import sharding
from training import checkpoint
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


def test_an_adapter_of_another_rank_is_named_and_not_called_torn(tmp_path):
  save(tmp_path, 10, identity={'model': 'tiny 2x64', 'rank': 4})
  wide = make_state(0)._replace(lora={'a': jnp.zeros((3, 100)), 'b': jnp.zeros((3, 100))})
  for identity, message in (
    ({'model': 'tiny 2x64', 'rank': 8}, 'rank 4 -> 8'),
    ({'model': 'small 4x64', 'rank': 4}, 'model tiny 2x64 -> small 4x64'),
  ):
    checkpoints = Checkpoints(tmp_path, identity)
    with pytest.raises(UserError, match=message):
      checkpoints.restore(wide, SHARDINGS)
    checkpoints.close()
  assert (tmp_path / '10').is_dir()


def test_the_best_are_kept_besides_the_newest(tmp_path):
  checkpoints = Checkpoints(tmp_path, {'rows': 'abc'}, newest=2, best=2)
  for step, score in ((1, 0.2), (2, 0.9), (3, 0.5), (4, 0.1), (5, None), (6, 0.3)):
    checkpoints.save(make_state(step))
    if score is not None:
      checkpoints.mark(step, score)
  checkpoints.save(make_state(7), score=0.4)
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['2', '3', '6', '7', 'scores.json']
  # Known again after a start.
  checkpoints = Checkpoints(tmp_path, {'rows': 'abc'}, newest=2, best=2)
  assert checkpoints.best() == 2 and checkpoints.scores[7] == 0.4
  assert equal(checkpoints.restore(make_state(0), SHARDINGS, 2), make_state(2))
  assert equal(checkpoints.restore(make_state(0), SHARDINGS), make_state(7))
  checkpoints.close()


def test_broken_scores_are_one_sentence(tmp_path):
  (tmp_path / 'scores.json').write_text('{')
  with pytest.raises(UserError, match=r'scores\.json is not readable'):
    Checkpoints(tmp_path, {})


def placed(state, sizes, axes):
  mesh = sharding.make_mesh(*sizes)
  shardings = jax.tree.map(
    lambda x: NamedSharding(mesh, PartitionSpec(*axes) if x.ndim else PartitionSpec()), state)
  return jax.device_put(state, shardings), shardings


def test_another_mesh_gets_the_same_bits(tmp_path):
  values = jax.random.normal(jax.random.key(0), (8, 16))
  state = TrainState({'a': values, 'b': values.astype(jnp.bfloat16)}, {'mu': values}, jnp.int32(3))
  one, _ = placed(state, (8, 1, 1), ('data',))
  checkpoints = Checkpoints(tmp_path, {'rows': 'abc'})
  checkpoints.save(one)
  other, shardings = placed(jax.tree.map(jnp.zeros_like, state), (2, 2, 2), ('fsdp', 'tensor'))
  found = checkpoints.restore(other, shardings)
  checkpoints.close()
  assert equal(found, state)
  assert found.lora['a'].sharding == shardings.lora['a']
  assert found.lora['a'].addressable_shards[0].data.shape == (4, 8)


def test_a_swap_of_two_numbers_changes_the_checksum():
  a = {'0': jnp.arange(6.0).reshape(2, 3)}
  assert checkpoint._checksum(a) == checkpoint._checksum(placed(a, (1, 2, 1), ('fsdp',))[0])
  swapped = {'0': a['0'].at[0, 1].set(a['0'][1, 2]).at[1, 2].set(a['0'][0, 1])}
  assert checkpoint._checksum(a) != checkpoint._checksum(swapped)
  assert checkpoint._checksum(a) != checkpoint._checksum({'0': a['0'].T.reshape(2, 3)})
