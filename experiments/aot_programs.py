"""The real programs, lowered for machines that are not there: train step, prefill, decode.

Everything is abstract: shapes with shardings on the devices of a topology that only the compiler
knows. What is compiled is what `train.py` and `inference.engine` run.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from data.errors import UserError
from experiments import gpu_compiler
from inference import programs
from inference.sampling import GREEDY
from models import chips, decoder, flash, memory, platform, sharding
from models.kv_cache import KVCache
from models.lora import LoraConfig
from training import optimizer as optimizer_lib
from training import step as step_lib

LIBTPU = 'libtpu==0.0.42.1'

# Of each data shard, where the settings say 0.
SLOTS, BLOCKS = 32, 8


@dataclasses.dataclass(frozen=True)
class Settings:
  """Shapes of the programs.

  Attributes:
    batch_rows: of a train step, on all devices; 0 is one a device.
    row_len: tokens of a row.
    loss_share: of a row's tokens that have a loss.
    rank: of the adapter.
    remat: one of `decoder.REMAT`, or auto.
    slots: conversations at a time, on all devices; 0 is 32 a data shard.
    max_len: tokens a slot can hold; all of them are attended.
    block_len: tokens of a prefill block.
    blocks: prefill blocks at a time, on all devices; 0 is 8 a data shard.
    decode_steps: tokens a slot samples in one dispatch.
    cache_dtype: of keys and values: float32, bfloat16, int8; '' is the model's.
  """

  batch_rows: int = 0
  row_len: int = 4096
  loss_share: float = 0.25
  rank: int = 64
  remat: str = 'auto'
  slots: int = 0
  max_len: int = 4096
  block_len: int = 128
  blocks: int = 0
  decode_steps: int = 8
  cache_dtype: str = ''


def find_devices(topology: str, slices: int):
  """The devices of a topology, as its compiler describes them.

  Raises:
    UserError: the compiler is not installed, or knows no such topology.
  """
  name, _, count = topology.partition(':')
  if name in chips.GPUS:
    if count and not count.isdigit():
      raise UserError(f'--topology={topology}: give the number of GPUs, as in {name}:8.')
    return gpu_compiler.find_devices(name, int(count or 1))
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      f"The TPU compiler is not installed; pip install '{LIBTPU}' (Linux, 165 MB, needs no TPU).")
  kind = re.split('[:=_]', topology)[0]
  if kind not in chips.CHIPS:
    raise UserError(
      f'--topology={topology}: there is no chip {kind!r}; there are {", ".join(chips.CHIPS)}, '
      f'as in v5e:8x8, and {", ".join(chips.GPUS)}, as in h200:8.')
  # libtpu looks for a TPU, which one process may hold, and for the cloud's metadata.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
  jax.config.update('jax_platforms', 'cpu')
  options = {'num_slices': slices} if slices > 1 else {}
  if kind == 'v4':
    options['chip_config_name'] = 'megacore'  # A chip is one device, as on the machine.
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options).devices
  except jax.errors.JaxRuntimeError as error:
    says = str(error).splitlines()[0]
    if not says.startswith(('INVALID_ARGUMENT', 'NOT_FOUND')):
      raise
    raise UserError(
      f'--topology={topology} --slices={slices}: the TPU compiler knows none such ({says}); names '
      'are like v5e:4x4 or v5p:4x4x4.') from None


def with_shardings(shapes, shardings):
  """Shapes that say where they lie; one sharding for all, or a tree of them."""
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: place(x, shardings), shapes)
  return jax.tree.map(place, shapes, shardings)


def lower_train(config, mesh, settings: Settings, remat: str, kind: str):
  """The step of training/step.py, lowered.

  Args:
    config: of the model.
    mesh: of devices.
    settings: shapes.
    remat: what the backward pass computes again.
    kind: 'tpu' or 'gpu', which the step is traced for; of both with the kernel for attention.

  Returns:
    The step, and bytes of its arguments by part, of one device.
  """
  lora = LoraConfig(settings.rank, 2.0 * settings.rank)
  model = decoder.abstract(config, lora)
  schedule = optimizer_lib.make_schedule('constant', 2e-4, 1000, 0.1)
  optimizer = optimizer_lib.make_optimizer(schedule, weight_decay=0.01, clip_norm=1.0)
  state, shardings = step_lib.state_shardings(model, optimizer, mesh)
  frozen = with_shardings(model.frozen, sharding.state_shardings(model.frozen, mesh))
  rows, width, shards = settings.batch_rows, settings.row_len, sharding.batch_shards(mesh)
  budget = max(round(rows * width * settings.loss_share / shards), 1)
  ints = {'tokens': (1, rows, width), 'segment_ids': (1, rows, width),
          'positions': (1, rows, width), 'loss_index': (1, shards, budget),
          'loss_target': (1, shards, budget)}
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()}
  batch['loss_weight'] = jax.ShapeDtypeStruct((1, shards, budget), jnp.float32)
  step = step_lib.make_train_step(
    model, optimizer, schedule, shardings, mesh, seed=0, remat=remat,
    attention_path='kernel' if config.head_dim <= flash.MAX_HEAD_DIM else 'auto')
  with platform.compiling_for(kind), jax.set_mesh(mesh):
    lowered = step.lower(
      with_shardings(state, shardings), frozen, step_lib.batch_shapes(batch, mesh))
  adapter = memory.shard_bytes(model.lora, mesh.shape)
  return lowered, {
    'weights': memory.shard_bytes(model.frozen, mesh.shape), 'adapter': adapter,
    'optimizer': 2 * adapter}


def lower_inference(config, mesh, settings: Settings, program: str, kind: str):
  """Prefill or decode of inference/programs.py, lowered; bytes of what is held, by part.

  Args:
    config: of the model.
    mesh: of devices.
    settings: shapes.
    program: prefill or decode.
    kind: 'tpu' or 'gpu', which the program is traced for.

  Returns:
    The programs of a dispatch (of decoding two, the second of which writes to the cache), and the
    bytes.
  """
  model = decoder.abstract(config, unrolled=True)
  spec = programs.Spec(
    graphdef=model.graphdef, sampling=GREEDY, stop_ids=(0,), num_slots=settings.slots,
    block_len=settings.block_len, decode_steps=settings.decode_steps, mesh=mesh)
  slots, whole = spec.shardings()
  with platform.compiling_for(kind):
    cache = with_shardings(_cache(config, settings), slots)
    state = jax.eval_shape(lambda: programs.SlotState.init(settings.slots, 0))
    params = tuple(
      with_shardings(part, sharding.state_shardings(part, mesh))
      for part in (model.lora, model.frozen))
    state = with_shardings(state, whole)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
    compiled = programs.compiled(spec)
    if program == 'decode':
      tail = jax.eval_shape(lambda cache: cache.tail(settings.decode_steps), cache)
      new = with_shardings(tail, slots), ints(settings.slots, settings.decode_steps)
      lowered = [
        compiled.decode.lower(params, cache, state, ints()),
        compiled.absorb.lower(cache, new)]
    else:
      fields = settings.block_len + len(programs.BLOCK_FIELDS)
      ends = min(settings.blocks, settings.slots)
      lowered = [compiled.prefill.lower(
        params, cache, state, ints(settings.blocks, fields), ints(ends),
        attend_len=settings.max_len)]
  held = kv_bytes(config, settings, mesh.shape)
  return lowered, {'weights': memory.shard_bytes(model.frozen, mesh.shape), 'KV cache': held}


def _cache(config, settings: Settings) -> KVCache:
  """The shapes of all slots' keys and values."""
  return jax.eval_shape(lambda: KVCache.init(
    config, settings.slots, settings.max_len, settings.cache_dtype or config.dtype))


def kv_bytes(config, settings: Settings, sizes) -> int:
  """Keys and values of all slots on one device, their scales included."""
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_cache(config, settings)))
  split = (('data', settings.slots), ('tensor', config.num_kv_heads))
  return whole // math.prod(sizes[axis] for axis, size in split if size % sizes[axis] == 0)


def inference_plans(
  config, num_devices: int, limit: int, settings: Settings
) -> list[memory.Plan]:
  """Meshes for inference, the best first: what fits with the fewest devices for one copy."""
  model, found = decoder.abstract(config), []
  for tensor in range(1, num_devices + 1):
    if num_devices % tensor or config.num_kv_heads % tensor:
      continue
    for fsdp in (n for n in range(1, num_devices // tensor + 1) if num_devices // tensor % n == 0):
      sizes = dict(zip(
        sharding.AXES, (1, num_devices // tensor // fsdp, fsdp, tensor), strict=True))
      own = dataclasses.replace(settings, slots=settings.slots or SLOTS * sizes['data'])
      if own.slots % sizes['data']:
        continue
      need = (memory.shard_bytes(model.frozen, sizes) + kv_bytes(config, own, sizes)
              + 4 * 4 * own.slots * config.vocab_size // tensor)
      found.append(memory.Plan(sizes, 'none', need, limit))
  # Sharding over fsdp, too, sums partial products in every block: only where tensor does not do.
  return sorted(found, key=lambda plan: (
    not plan.fits, plan.sizes['fsdp'] if plan.fits else plan.need, plan.sizes['tensor']))


def check_mesh(config, mesh_sizes, settings: Settings, program: str) -> None:
  """Raises a UserError for rows or slots that the mesh does not divide."""
  shards = math.prod(mesh_sizes[axis] for axis in sharding.RULES['batch'])
  if program == 'train' and settings.batch_rows % shards:
    raise UserError(
      f'--batch_rows={settings.batch_rows} does not divide into the {shards} slice, data and fsdp '
      'shards of the mesh.')
  if program != 'train' and settings.slots % mesh_sizes['data']:
    raise UserError(
      f'--slots={settings.slots} does not divide into the {mesh_sizes["data"]} data shards.')
  if program == 'prefill' and settings.blocks % mesh_sizes['data']:
    raise UserError(
      f'blocks={settings.blocks} does not divide into the {mesh_sizes["data"]} data shards.')
  if config.num_kv_heads % mesh_sizes['tensor']:
    raise UserError(
      f'tensor={mesh_sizes["tensor"]} does not divide the {config.num_kv_heads} key-value heads of '
      f'{config.name}.')
