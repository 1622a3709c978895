"""Weights are read in parts; the host never holds them as a whole on the way to their shards."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from data.errors import UserError
from models import decoder, registry, sharding, stored, weights

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Array:
  """A tensor in memory that notes what is read of it."""

  def __init__(self, value):
    self.value, self.shape, self.dtype, self.read_sizes = value, value.shape, value.dtype, []

  def read(self, index):
    self.read_sizes.append(self.value[index].nbytes)
    return self.value[index]


@st.composite
def parts(draw):
  """(layers, rows, columns, transposed, the bounds of a part)."""
  sizes = [draw(st.integers(1, 7)) for _ in range(3)]
  bounds = []
  for size in sizes:
    start = draw(st.integers(0, size - 1))
    bounds.append(slice(start, draw(st.integers(start + 1, size))))
  return sizes, draw(st.booleans()), tuple(bounds)


@given(parts(), st.integers(1, 60))
def test_a_part_is_what_numpy_takes_of_the_whole(case, block_bytes):
  sizes, transposed, index = case
  whole = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
  tensors = tuple(Array(layer.T if transposed else layer) for layer in whole)
  before, stored.BLOCK_BYTES = stored.BLOCK_BYTES, block_bytes
  try:
    parameter = stored.Parameter(tensors, whole.shape, np.dtype(np.float64), transposed)
    np.testing.assert_array_equal(parameter[index], whole[index])
    assert parameter[index].dtype == np.float64
    np.testing.assert_array_equal(np.asarray(parameter.layer(0)), whole[0])
    assert (parameter == whole).all() and (2 * parameter - whole == whole).all()
  finally:
    stored.BLOCK_BYTES = before
  # A block is a row at least.
  row = sizes[1] if transposed else sizes[2]
  assert max(max(t.read_sizes, default=0) for t in tensors) <= max(block_bytes, 4 * row)


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_every_shard_is_read_once_and_nothing_else(sizes):
  mesh = sharding.make_mesh(*sizes)
  whole = np.random.default_rng(0).normal(size=(3, 16, 24)).astype(np.float32)
  tensors = tuple(Array(layer.T) for layer in whole)
  place = NamedSharding(mesh, PartitionSpec(None, 'fsdp', 'tensor'))
  parameter = stored.Parameter(tensors, whole.shape, np.dtype(np.float32), transposed=True)
  got = sharding.put(parameter, place, ml_dtypes.bfloat16)
  assert got.sharding == place and got.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(got, whole.astype(ml_dtypes.bfloat16))
  # Also where the data axis holds everything twice.
  assert all(sum(t.read_sizes) == layer.nbytes for t, layer in zip(tensors, whole, strict=True))


def write_shards(folder, config, count):
  """A Hugging Face folder with random weights in `count` files; returns their NumPy arrays."""
  rng = np.random.default_rng(0)
  params = {
    name: rng.standard_normal(want.shape, np.float32).astype(want.dtype)
    for name, want in decoder.to_params(decoder.abstract(config).frozen).items()}
  weights.export_pretrained(folder, config, params)
  whole = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(whole)
  whole.unlink()
  index = {}
  for number in range(count):
    file = f'model-{number + 1:05d}-of-{count:05d}.safetensors'
    chosen = sorted(tensors)[number::count]
    safetensors.numpy.save_file({name: tensors[name] for name in chosen}, folder / file)
    index |= dict.fromkeys(chosen, file)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  return params


def config_of(**sizes):
  return registry.shrink(
    registry.get_config('smollm2_135m', dtype='bfloat16'), tie_embeddings=True, **sizes)


def test_a_folder_of_several_files_on_a_mesh(tmp_path):
  config = config_of(vocab_size=64)
  params = write_shards(tmp_path, config, 3)
  mesh = sharding.make_mesh(2, 2, 2)
  found, loaded = weights.load_pretrained(tmp_path, 'bfloat16')
  model = decoder.from_params(found, loaded, mesh=mesh)
  for name, value in decoder.to_params(model.frozen).items():
    np.testing.assert_array_equal(value, params[name])
  axes = sharding.state_shardings(model.frozen, mesh)
  assert jax.tree.map(lambda x: x.sharding, model.frozen) == axes


def test_a_tensor_that_is_gone_when_it_is_read(tmp_path):
  write_shards(tmp_path, config_of(vocab_size=64), 2)
  _, loaded = weights.load_pretrained(tmp_path, 'bfloat16')
  for file in tmp_path.glob('*.safetensors'):
    file.unlink()
  with pytest.raises(UserError, match='cannot be read'):
    np.asarray(loaded['final_norm.scale'])


# Of the process that loads: what its memory grew by at most, and by what the devices hold.
MEASURE = '''
import re, sys
import jax
from models import decoder, sharding, weights

def kilobytes(key):
  return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])

folder, sizes = sys.argv[1], [int(size) for size in sys.argv[2].split(',')]
mesh = sharding.make_mesh(*sizes)
small = decoder.create(decoder.DecoderConfig(
  'small', 'llama', 8, 8, 2, 2, 1, 4, 8, 1e4), mesh=mesh)  # the first programs, their threads
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
before = kilobytes('VmRSS')
model = decoder.from_params(*weights.load_pretrained(folder, 'bfloat16'), mesh=mesh)
arrays = jax.tree.leaves(model.frozen)
held = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards)
print(1024 * (kilobytes('VmHWM') - before), held)
'''


@pytest.mark.slow
@pytest.mark.parametrize('sizes', ['1,1,1', '1,2,2'])
def test_the_host_never_holds_two_of_the_largest_tensor(tmp_path, sizes):
  config = config_of(
    vocab_size=32768, embed_dim=1024, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=128,
    mlp_dim=4096)
  params = write_shards(tmp_path, config, 4)
  total = sum(value.nbytes for value in params.values())
  largest = params['embed.embedding'].nbytes
  assert total > 300e6 and largest > 60e6
  done = subprocess.run(
    [sys.executable, '-c', MEASURE, str(tmp_path), sizes], cwd=ROOT, capture_output=True,
    text=True)
  assert done.returncode == 0, done.stderr
  grown, held = map(int, done.stdout.split())
  print(f'{sizes}: {held / 1e6:.0f} MB held, {(grown - held) / 1e6:.0f} MB besides at the peak, '
        f'largest tensor {largest / 1e6:.0f} MB')
  assert total <= held < 1.001 * total  # norms are on every device
  assert grown - held < 2 * largest
