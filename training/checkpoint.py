"""Checkpoints of what training changes: adapter, optimizer, step, and the data's identity.

Orbax writes a checkpoint beside its place and renames it, so a killed process leaves none that is
half there. A disk can still tear one; its arrays then come back as an error or as zeros, so a
digest of the arrays is kept with them.
"""

import hashlib
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from data.errors import UserError
from training.step import TrainState

_STATE, _META = 'state', 'meta'


def _leaves(state: TrainState) -> dict[str, jax.Array]:
  """Flat and string-keyed, so that a checkpoint needs no code of ours to be read."""
  flat, _ = jax.tree.flatten(state)
  return {f'{index:05d}': leaf for index, leaf in enumerate(flat)}


def _digest(leaves: dict[str, jax.Array]) -> str:
  """SHA-256 over the arrays; '' where a process cannot see them whole."""
  if not all(leaf.is_fully_addressable for leaf in leaves.values()):
    return ''
  digest = hashlib.sha256()
  for name in sorted(leaves):
    array = np.ascontiguousarray(jax.device_get(leaves[name]))
    digest.update(f'{name} {array.shape} {array.dtype}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


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
    meta = {'identity': self._identity, 'digest': _digest(leaves)}
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
      if meta['digest'] and meta['digest'] != _digest(leaves):
        self._set_aside(step, 'its digest differs')
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
