"""Checkpoints of what training changes: adapter, optimizer, step, and the data's identity.

Orbax writes a checkpoint beside its place and renames it, so a killed process leaves none that is
half there. A disk can still tear one; its arrays then come back as an error or as zeros, so a
checksum of the arrays is kept with them.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from data.errors import UserError
from training.step import TrainState

_STATE, _META = 'state', 'meta'


def _leaves(state: TrainState) -> dict[str, jax.Array]:
  """Flat and string-keyed, so that a checkpoint needs no code of ours to be read."""
  flat, _ = jax.tree.flatten(state)
  return {f'{index:05d}': leaf for index, leaf in enumerate(flat)}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """For every array one uint32 of its bits and their places.

  A sum modulo 2^32 does not depend on how the array is sharded, nor on who sees which part of it.
  """

  def mix(x):
    # The finalizer of MurmurHash3 (A. Appleby, public domain).
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

  def one(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
      place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
      stride *= x.shape[axis]
    return mix(bits.astype(jnp.uint32) ^ mix(place + jnp.uint32(1))).sum(dtype=jnp.uint32)

  return {name: one(leaf) for name, leaf in leaves.items()}


def _checksum(leaves: dict[str, jax.Array]) -> str:
  """Of all arrays; the same in every process and on every mesh."""
  sums = jax.device_get(_checksums(leaves))
  return ''.join(f'{int(sums[name]):08x}' for name in sorted(sums))


class Checkpoints:
  """The checkpoints of one run, newest last; the two newest are kept."""

  def __init__(self, folder: pathlib.Path, identity: dict[str, str | int]):
    """Opens the folder.

    Args:
      folder: made if it is not there.
      identity: what a checkpoint must agree with to be resumed: seed, digest of the packed rows...
    """
    self.folder = pathlib.Path(folder).absolute()
    self._identity = identity
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )

  def save(self, state: TrainState) -> None:
    """Starts writing a checkpoint; the arrays are copied before this returns."""
    leaves = _leaves(state)
    meta = {'identity': self._identity, 'checksum': _checksum(leaves)}
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        **{_STATE: ocp.args.StandardSave(leaves), _META: ocp.args.JsonSave(meta)}
      ),
    )

  def restore(self, state: TrainState, shardings: TrainState) -> TrainState | None:
    """The newest checkpoint that is whole, or None.

    A torn one is set aside as `<step>.torn` with a message, and the one before it is used.

    Args:
      state: gives structure, shapes and dtypes.
      shardings: where to put the arrays.

    Raises:
      UserError: the checkpoint belongs to another run.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        leaves, meta = self._read(step, state, shardings)
      # Orbax and TensorStore have no common class for "this file is damaged".
      except Exception as error:
        self._set_aside(step, ' '.join(str(error).split())[:120])
        continue
      if meta['identity'] != self._identity:
        changed = ', '.join(
          f'{key} {meta["identity"].get(key)} -> {value}'
          for key, value in self._identity.items()
          if meta['identity'].get(key) != value
        )
        raise UserError(
          f'{self.folder} is of another run ({changed}); take another --workdir or remove it.'
        )
      if meta.get('checksum') != _checksum(leaves):
        self._set_aside(step, 'its checksum differs')
        continue
      flat = [leaves[name] for name in sorted(leaves)]
      return jax.tree.unflatten(jax.tree.structure(state), flat)
    return None

  def _read(self, step, state, shardings):
    # nnx shardings are states of variables that hold a sharding: both flatten in one order.
    places = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    abstract = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
      for (name, leaf), place in zip(_leaves(state).items(), places, strict=True)
    }
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{_STATE: ocp.args.StandardRestore(abstract), _META: ocp.args.JsonRestore()}
      ),
    )
    return found[_STATE], found[_META]

  def _set_aside(self, step: int, reason: str) -> None:
    print(f'Checkpoint {step} in {self.folder} is torn ({reason}); set aside.', file=sys.stderr)
    self._manager.close()
    folder = self.folder / str(step)
    if folder.exists():
      folder.rename(self.folder / f'{step}.torn')
    self._manager = self._open()

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()
