"""From planned batches to arrays on the mesh."""

import jax
import numpy as np

from training import step as step_lib
from training.packing import Batches


class Feed:
  """Places batches on a mesh; a process makes the rows of its own devices and no others."""

  def __init__(self, batches: Batches, mesh):
    """Finds out which devices of this process need which shards.

    Args:
      batches: with as many shards as the mesh has places for rows.
      mesh: of `sharding.AXES`; tensor's devices all get the same rows.
    """
    self._batches = batches
    self._sharding = step_lib.batch_shardings(mesh)
    places = self._sharding.addressable_devices_indices_map((1, batches.num_shards))
    self._shard_of = {device: index[1].start or 0 for device, index in places.items()}

  def __getitem__(self, step: int) -> dict[str, jax.Array]:
    """The batch of a step as `Batches` gives it, in global arrays; returns before it is copied."""
    parts = {shard: self._batches.part(step, shard) for shard in set(self._shard_of.values())}
    batch = {}
    for name in next(iter(parts.values())):
      local = {shard: part[name] for shard, part in parts.items()}
      shape = list(next(iter(local.values())).shape)
      shape[1] *= self._batches.num_shards
      batch[name] = jax.make_array_from_single_device_arrays(
        tuple(shape), self._sharding,
        [jax.device_put(np.ascontiguousarray(local[s]), d) for d, s in self._shard_of.items()])
    return batch
