"""From logical axis names to shardings on a mesh of (slice, data, fsdp, tensor)."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data.errors import UserError
from models import stored

AXES = ('slice', 'data', 'fsdp', 'tensor')

# Parameters: one dimension over fsdp (gathered when used), one over tensor (Megatron's columns then
# rows). Activations: the batch over slices, data and fsdp. Slices hold whole copies of all else, so
# that only the adapter's gradient crosses the network between them. 'layers' is scanned over;
# 'rank' and 'head_dim' are small.
RULES = {
  'layers': None,
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'rank': None,
  'head_dim': None,
  'batch': ('slice', 'data', 'fsdp'),
}


def count_slices(devices: Sequence) -> int:
  """Groups of devices with a fast network of their own, as the devices tell it; at least 1."""
  return len({getattr(device, 'slice_index', 0) for device in devices})


def make_mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, *, slice: int | None = None, devices=None
) -> Mesh:
  """A mesh with automatic axes.

  Args:
    data: size of the axis, within a slice; one of the three may be -1, all devices that are left.
    fsdp: likewise.
    tensor: likewise.
    slice: None is as many as the devices tell. Devices that tell of none are split in their order.
    devices: None is all.

  Raises:
    UserError: sizes that the devices cannot fill.
  """
  devices = jax.devices() if devices is None else list(devices)
  found = count_slices(devices)
  slices = found if slice is None else slice
  sizes = [data, fsdp, tensor]
  shown = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, [slices, *sizes], strict=True))
  if slices < 1 or len(devices) % slices or found not in (1, slices):
    raise UserError(
      f'A mesh of {shown} does not fit {len(devices)} devices of {found} slices; give as many '
      'slices as there are.'
    )
  own = len(devices) // slices
  if sizes.count(-1) == 1 and own % -math.prod(sizes) == 0:
    sizes[sizes.index(-1)] = own // -math.prod(sizes)
  if min(sizes) < 1 or math.prod(sizes) > own:
    within = f'the {own} devices of a slice' if slices > 1 else f'{own} devices'
    raise UserError(f'A mesh of {shown} does not fit {within}.')
  if found > 1:
    devices = sorted(devices, key=lambda device: device.slice_index)
  # Each slice by itself, so that its axes lie along its own links.
  used = math.prod(sizes)
  try:
    parts = [
      _arrange((1, *sizes), devices[start : start + used]) for start in range(0, len(devices), own)
    ]
  except AssertionError:
    # A TPU's network has a shape; a part of a slice has to be a box.
    raise UserError(
      f'A mesh of {shown} takes {used} of the {own} chips of a slice, which form no box; use all '
      'of them.'
    ) from None
  # Logical rules do not go with explicit axes.
  return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: tuple[int, ...], devices: list) -> np.ndarray:
  """Devices in the shape of a mesh, neighbours of an axis on neighbouring chips."""
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:
    # An axis of 4 on a network of 16 x 16 gets a part of one of its dimensions.
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def parse_sizes(text: str) -> dict[str, int]:
  """'DATA,FSDP,TENSOR' or 'SLICE,DATA,FSDP,TENSOR' as arguments of `make_mesh`.

  Raises:
    UserError: it is neither.
  """
  try:
    sizes = [int(size) for size in text.split(',')]
  except ValueError:
    sizes = []
  if len(sizes) not in (3, 4):
    raise UserError(
      f'mesh={text!r}: give three sizes data,fsdp,tensor, or four with the number of slices before '
      'them, or leave it at its default.'
    )
  return dict(zip(AXES[-len(sizes):], sizes, strict=True))


def batch_shards(mesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in RULES['batch'])


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh, rules=None) -> PartitionSpec:
  """The partition of an array with these logical axes.

  A dimension that its mesh axes do not divide is replicated (9 heads on 2 devices).
  """
  rules = RULES if rules is None else rules
  parts = []
  for name, size in zip(axes, shape, strict=True):
    part = rules[name] if name is not None else None
    names = (part,) if isinstance(part, str) else part or ()
    split = math.prod(mesh.shape[n] for n in names)
    parts.append(part if split > 1 and size % split == 0 else None)
  return PartitionSpec(*parts)


def state_shardings(state: nnx.State, mesh, rules=None) -> nnx.State:
  """NamedShardings in the structure of a state of annotated variables (arrays or abstract)."""

  def one(variable: nnx.Variable) -> nnx.Variable:
    value = variable.get_value()
    axes = variable.get_metadata()['out_sharding']
    return variable.replace(NamedSharding(mesh, spec(axes, value.shape, mesh, rules)))

  return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _ambient_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh of `jax.set_mesh`; None without one, and within `jax.shard_map`.

  There an array is one device's part along some axes, which the others' rules do not fit.
  """
  mesh = jax.sharding.get_abstract_mesh()
  manual = jax.sharding.AxisType.Manual
  return None if mesh.empty or manual in mesh.axis_types else mesh


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Keeps an activation sharded by its logical axes under `jax.set_mesh`; elsewhere a no-op."""
  mesh = _ambient_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def gather(state: nnx.State, axis: str) -> nnx.State:
  """Variables with one logical axis whole on every device, under `jax.set_mesh`; else a no-op.

  Small kernels that every layer of a loop needs are gathered once before it. XLA would send each
  part round a ring while it multiplies, in every layer and direction: for an adapter of rank 64 on
  a 7B model and 16 TPU devices, 9,000 messages of 28 kB a step beside the kernels' 5,700.
  """
  mesh = _ambient_mesh()
  if mesh is None:
    return state
  rules = RULES | {axis: None}

  def one(variable: nnx.Variable) -> nnx.Variable:
    value = variable.get_value()
    place = spec(variable.get_metadata()['out_sharding'], value.shape, mesh, rules)
    return variable.replace(jax.lax.with_sharding_constraint(value, place))

  return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def over_rows_and_heads(attend, q, k, v, segment_ids) -> jax.Array:
  """A kernel of attention, run by each device on its own rows and heads under `jax.set_mesh`.

  Args:
    attend: of the four arrays, or of a device's part of them.
    q: [B, T, N, H], T tokens and H numbers a head.
    k: [B, T, K, H].
    v: [B, T, K, H].
    segment_ids: int32 [B, T].

  Returns:
    `attend`'s [B, T, N, H].
  """
  mesh = _ambient_mesh()
  if mesh is None:
    return attend(q, k, v, segment_ids)
  # A device keeps whole groups: heads are split only where the key-value heads divide too.
  heads = spec(('kv_heads',), (k.shape[2],), mesh)[0]
  rows = spec(('batch',), (q.shape[0],), mesh)[0]
  heads_spec, rows_spec = PartitionSpec(rows, None, heads), PartitionSpec(rows)
  return jax.shard_map(
    attend, mesh=mesh, in_specs=(heads_spec, heads_spec, heads_spec, rows_spec),
    out_specs=heads_spec, check_vma=False)(q, k, v, segment_ids)


def batch_sharding(mesh) -> NamedSharding:
  """Rows of a batch over data and fsdp, the other dimensions replicated."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def put(value, sharding: NamedSharding | None, dtype) -> jax.Array:
  """Moves an array into its shards, in which it is converted; every process calls it.

  Args:
    value: a host array, of which every process gives the whole; a device array; or a
      `stored.Parameter`, of which a process reads what its own devices hold, one layer at a time;
      or `stored.Layers`, likewise.
    sharding: None is the default device.
    dtype: of the result.
  """
  if isinstance(value, jax.Array):
    value = value.astype(dtype)
    return value if sharding is None else jax.device_put(value, sharding)
  in_parts = isinstance(value, (stored.Parameter, stored.Layers))
  if not in_parts:
    value = np.asarray(value).astype(dtype, copy=False)
  if not in_parts or not value.stacked:
    return _put_parts(value, sharding, dtype)
  # The host never holds more than a layer: each is written into the stack on the devices.
  each = sharding
  if sharding is not None:
    each = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  stack = jax.jit(lambda: jnp.zeros(value.shape, dtype), out_shardings=sharding)()
  for number in range(value.shape[0]):
    stack = _set_layer(stack, _put_parts(value.layer(number), each, dtype), number)
    stack.block_until_ready()
  return stack


def _put_parts(value, sharding, dtype) -> jax.Array:
  """Makes each part once, also where several devices hold it."""
  if sharding is None:
    return jnp.asarray(np.asarray(value, dtype))
  parts = {}

  def part(index):
    key = tuple((i.start, i.stop) for i in index)
    if key not in parts:
      parts[key] = np.asarray(value[index], dtype)
    return parts[key]

  return jax.make_array_from_callback(value.shape, sharding, part)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)
