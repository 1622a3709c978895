"""Which mesh is chosen, and what a step is estimated to hold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from models import decoder, memory, registry, sharding
from models.lora import LoraConfig

GIB = 2**30
LORA = LoraConfig(64, 128.0)
MODEL = decoder.abstract(registry.get_config('qwen25_7b', dtype='bfloat16'), LORA)


def choose(model=MODEL, **changes):
  options = {'num_devices': 8, 'slices': 1, 'memory': 80 * GIB, 'batch_rows': 8, 'row_len': 4096}
  plan = memory.plans(model, **{**options, **changes})[0]
  return tuple(plan.sizes.values()), str(plan)


def test_the_mesh_follows_model_memory_devices_and_rows():
  # All on data where a whole copy fits; weights over fsdp where it does not.
  small = decoder.abstract(registry.get_config('smollm2_135m', dtype='bfloat16'), LORA)
  assert choose(small)[0] == (1, 8, 1, 1)
  sizes, why = choose(memory=16 * GIB)
  assert sizes[0] == 1 and sizes[2] > 1 and sizes[3] == 1 and math.prod(sizes) == 8
  assert 'fits with remat=' in why and '16.00 GiB' in why
  # Fewer rows than devices: the rest splits the heads, as far as they divide.
  assert choose(batch_rows=2)[0][3] == 4
  assert choose(batch_rows=1)[0] == (1, 1, 1, 4)
  # Slices hold whole copies.
  assert choose(num_devices=16, slices=2, batch_rows=16)[0][0] == 2
  with pytest.raises(UserError, match='batch_rows=3'):
    choose(slices=2, batch_rows=3)
  # Nothing fits: the mesh that takes the least, and it is said.
  sizes, why = choose(memory=GIB)
  assert 'does not fit' in why and sizes[2] * sizes[3] == 8


@given(devices=st.integers(1, 16), slices=st.integers(1, 3), rows=st.integers(1, 12),
       gib=st.integers(1, 100))
def test_a_chosen_mesh_always_divides(devices, slices, rows, gib):
  rows *= slices
  sizes, _ = choose(num_devices=devices * slices, slices=slices, batch_rows=rows, memory=gib * GIB)
  assert sizes[0] == slices and math.prod(sizes) <= devices * slices
  assert rows % math.prod(sizes[:3]) == 0
  assert MODEL.config.num_kv_heads % sizes[3] == 0


def test_an_adapter_that_is_sharded_is_held_whole_as_well():
  sizes = {'slice': 1, 'data': 1, 'fsdp': 8, 'tensor': 1}
  parts = memory.train_bytes(MODEL, sizes, 8, 4096, 'full')
  whole = memory.shard_bytes(MODEL.lora, {**sizes, 'fsdp': 1})
  assert parts['gathered adapter'] == parts['gradient'] == whole > parts['adapter']
  assert memory.train_bytes(MODEL, {**sizes, 'data': 8, 'fsdp': 1}, 8, 4096, 'full')[
    'gathered adapter'] == 0
  # The compiler took 15.8 GiB for this where the shards alone come to 13.3.
  large = decoder.abstract(registry.get_config('qwen25_14b', dtype='bfloat16'), LORA)
  need = sum(memory.train_bytes(
    large, {**sizes, 'data': 8}, 64, 4096, 'full').values())
  assert need > memory.USABLE * 15.75 * GIB


def test_shard_bytes_are_those_of_the_shards():
  config = registry.shrink(registry.get_config('qwen25_7b'))
  model = decoder.abstract(config, LoraConfig(4, 8))
  mesh = sharding.make_mesh(2, 2, 2)
  want = 0
  for variable, place in zip(
      jax.tree.leaves(model.frozen),
      jax.tree.leaves(sharding.state_shardings(model.frozen, mesh)), strict=True):
    want += math.prod(place.shard_shape(variable.shape)) * variable.dtype.itemsize
  assert memory.shard_bytes(model.frozen, dict(mesh.shape)) == want


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('remat', decoder.REMAT)
def test_activation_bytes_are_what_the_backward_pass_is_handed(dtype, remat):
  config = dataclasses.replace(
    registry.shrink(registry.get_config('qwen25_7b'), num_layers=4), dtype=dtype)
  lora, shape = LoraConfig(4, 8), (2, 120)
  model = decoder.abstract(config, lora)
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)

  def kept(lora, frozen, tokens):
    forward = lambda lora: decoder.forward(
      model.graphdef, lora, frozen, tokens, tokens, segment_ids=tokens, remat=remat)
    return jax.vjp(forward, lora)[1]

  leaves = jax.tree.leaves(jax.eval_shape(kept, model.lora, model.frozen, tokens))
  # What is stacked by layer and has a token axis; weights are kept too, but are not activations.
  got = sum(x.size * x.dtype.itemsize for x in leaves
            if x.shape[:1] == (config.num_layers,) and 120 in x.shape[2:])
  want = memory.activation_bytes(config, lora, math.prod(shape), remat)
  assert got == pytest.approx(want, rel=0.2)
