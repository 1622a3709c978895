"""From logical axis names to shardings on a mesh of (data, fsdp, tensor)."""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from data.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

# Parameters: one dimension over fsdp (gathered when used), one over tensor (Megatron's columns then
# rows). Activations: the batch over data and fsdp. 'layers' is scanned over and 'rank' is small.
RULES = {
  'layers': None,
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'rank': None,
  'batch': ('data', 'fsdp'),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
  """A mesh with automatic axes; one of the sizes may be -1, all the devices that are left."""
  devices = jax.devices() if devices is None else list(devices)
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
  if min(sizes) < 1 or math.prod(sizes) > len(devices):
    raise UserError(
      f'A mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices.'
    )
  # jax.make_mesh defaults to explicit axes, which logical rules do not go with.
  return jax.make_mesh(
    sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(sizes)]
  )


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


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Keeps an activation sharded by its logical axes under `jax.set_mesh`; elsewhere a no-op."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def batch_sharding(mesh) -> NamedSharding:
  """Rows of a batch over data and fsdp, the other dimensions replicated."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def put(value, sharding: NamedSharding | None) -> jax.Array:
  """Moves a host array into its shards; every process gives the whole array."""
  if sharding is None:
    return jax.numpy.asarray(value)
  value = np.asarray(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
