"""How much of a device's memory training takes, and the mesh on which it fits.

Estimates from the architecture, before anything is compiled; the compiler has the last word
(`training.remat`).
"""

import dataclasses
import itertools
import math
import os
import pathlib
import types
from collections.abc import Mapping

import jax
from flax import nnx

from data.errors import UserError
from models import decoder, sharding
from models.decoder import DecoderConfig
from models.lora import LoraConfig

# Share of a device's memory that a plan may fill: the rest is for what the estimate leaves out
# (workspaces of kernels, fragmentation) and, on CPU, for the process's own.
USABLE = 0.9

# Tokens of a shard that the loss has in flight, `losses.frozen_head_cross_entropy`.
LOSS_TOKENS = 1024
_CGROUP = pathlib.Path('/sys/fs/cgroup/memory.max')


def device_bytes(sharing: int | None = None) -> int:
  """Memory of one device of this process; of a CPU device its share of the machine's.

  Args:
    sharing: CPU devices that share the machine's memory, or the container's; None is all of them.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if _CGROUP.is_file() and (limit := _CGROUP.read_text().strip()).isdigit():
    total = min(total, int(limit))
  return total // (sharing or jax.local_device_count())


def held_bytes(arrays) -> int:
  """Bytes of a tree of arrays on one of their devices."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def shard_bytes(state, sizes: Mapping[str, int]) -> int:
  """Bytes of a state of annotated variables on one device of a mesh of these sizes."""
  mesh = types.SimpleNamespace(shape=sizes)
  total = 0
  for _, variable in nnx.to_flat_state(state):
    value = variable.get_value()
    spec = sharding.spec(variable.get_metadata()['out_sharding'], value.shape, mesh)
    axes = itertools.chain.from_iterable(
      (part,) if isinstance(part, str) else part or () for part in spec)
    total += value.size * value.dtype.itemsize // math.prod(sizes[axis] for axis in axes)
  return total


def activation_bytes(
  config: DecoderConfig, lora: LoraConfig | None, places: int, remat: str, tensor: int = 1
) -> int:
  """What the blocks keep of `places` tokens for the backward pass.

  The residual stream and the softmax's sums are float32, the rest has the dtype of the products. A
  frozen kernel's product keeps nothing, its adapter's the input; attention keeps its output a
  second time.
  """
  heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
  width = 2 if config.dtype == 'bfloat16' else 4
  rank = lora.rank if lora is not None else 0
  # Of a place: what all devices of a tensor group hold, and what they share.
  block_input = 4 * config.embed_dim
  attention = (
    width * (config.embed_dim + 4 * rank),
    width * (3 * heads + 2 * kv_heads) + 4 * config.num_heads)
  feed_forward = width * (config.embed_dim + 3 * rank), 3 * width * config.mlp_dim
  whole, split = block_input, 0
  if remat in ('none', 'mlp'):
    whole, split = whole + attention[0] + 4 * config.embed_dim, split + attention[1]
  if remat == 'none':
    whole, split = whole + feed_forward[0], split + feed_forward[1]
  return config.num_layers * places * (whole + split // tensor)


def workspace_bytes(config: DecoderConfig, places: int, sizes: Mapping[str, int]) -> int:
  """What is alive at one time besides: one block's inner numbers, its gathered kernels, logits."""
  tensor = sizes['tensor']
  block = 4 * places * (4 * config.embed_dim + 4 * config.mlp_dim // tensor)
  logits = 2 * 4 * min(places, LOSS_TOKENS) * config.vocab_size // tensor
  gathered = 0
  if sizes['fsdp'] > 1:
    width = 2 if config.weight_dtype == 'bfloat16' else 4
    head = config.vocab_size * config.embed_dim
    # The head while the last blocks still run, and kernels of two blocks: one used, one on its way.
    gathered = width * (head + 2 * 3 * config.embed_dim * config.mlp_dim) // tensor
  return max(block, logits) + gathered


def train_bytes(
  model: decoder.Model, sizes: Mapping[str, int], batch_rows: int, row_len: int, remat: str
) -> dict[str, int]:
  """Bytes by part on one device while a train step runs.

  Args:
    model: may be abstract.
    sizes: of the mesh's axes.
    batch_rows: rows computed at a time, on all devices.
    row_len: tokens of a row.
    remat: one of `decoder.REMAT`.
  """
  places = batch_rows * row_len // (sizes['slice'] * sizes['data'] * sizes['fsdp'])
  adapter = gradient = shard_bytes(model.lora, sizes)
  gathered = 0
  if model.config.frozen and sizes['fsdp'] > 1:
    # `decoder.forward` gathers it once a step; its gradient is whole, too, until it is scattered.
    gathered = gradient = shard_bytes(model.lora, {**sizes, 'fsdp': 1})
  return {
    'weights': shard_bytes(model.frozen, sizes),
    'adapter': adapter,
    'optimizer': 2 * adapter,
    'gathered adapter': gathered,
    'gradient': gradient,
    'activations': activation_bytes(
      model.config, model.lora_config, places, remat, sizes['tensor']),
    'workspace': workspace_bytes(model.config, places, sizes),
  }


def candidates(
  config: DecoderConfig, num_devices: int, slices: int, batch_rows: int
) -> list[dict[str, int]]:
  """Every mesh on these devices whose axes divide the rows and the heads."""
  own = num_devices // slices
  found = []
  for tensor in (t for t in range(1, own + 1) if config.num_kv_heads % t == 0):
    for fsdp in range(1, own // tensor + 1):
      for data in range(1, own // tensor // fsdp + 1):
        if batch_rows % (slices * data * fsdp) == 0:
          found.append(dict(zip(sharding.AXES, (slices, data, fsdp, tensor), strict=True)))
  return found


@dataclasses.dataclass(frozen=True)
class Plan:
  """A mesh, and by the estimate what it needs.

  Attributes:
    sizes: of `sharding.AXES`.
    remat: one of `decoder.REMAT`, the least that fits.
    need: bytes of one device.
    memory: bytes that there are.
  """

  sizes: dict[str, int]
  remat: str
  need: int
  memory: int

  @property
  def fits(self) -> bool:
    return self.need <= USABLE * self.memory

  def __str__(self):
    shown = ', '.join(f'{axis} {size}' for axis, size in self.sizes.items())
    says = f'fits with remat={self.remat}' if self.fits else 'does not fit'
    return (f'mesh of {shown}: {says} by the estimate, {self.need / 2**30:.2f} of '
            f'{self.memory / 2**30:.2f} GiB a device')


def plans(
  model: decoder.Model,
  *,
  num_devices: int,
  slices: int,
  memory: int,
  batch_rows: int,
  row_len: int,
) -> list[Plan]:
  """Meshes for training, the best first: the most devices, the least communication that fits.

  Of the meshes that use the most devices, the one with the fewest `tensor` shards (which all-reduce
  activations in every block), then the least recomputation, then the fewest `fsdp` shards (which
  gather the weights). Those that do not fit come last, by what they take.

  Args:
    model: may be abstract.
    num_devices: of all slices.
    slices: groups of devices with a fast network of their own.
    memory: bytes of one device.
    batch_rows: rows computed at a time, on all devices.
    row_len: tokens of a row.

  Raises:
    UserError: the rows do not divide over the slices.
  """
  if batch_rows % slices:
    raise UserError(
      f'batch_rows={batch_rows} does not divide over {slices} slices; give a multiple of {slices}.')

  def order(plan: Plan):
    devices, sizes = math.prod(plan.sizes.values()), plan.sizes
    kept = decoder.REMAT.index(plan.remat)
    return (0, -devices, sizes['tensor'], kept, sizes['fsdp']) if plan.fits else (1, plan.need)

  found = []
  for sizes in candidates(model.config, num_devices, slices, batch_rows):
    for remat in decoder.REMAT:
      need = sum(train_bytes(model, sizes, batch_rows, row_len, remat).values())
      found.append(Plan(sizes, remat, need, memory))
  return sorted(found, key=order)
