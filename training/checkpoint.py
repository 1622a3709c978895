"""Checkpoints of what training changes: adapter, optimizer, step, and the data's identity.

The step is the position in the data and, with the seed, the state of every random draw.

Orbax writes a checkpoint beside its place and renames it, so a killed process leaves none that is
half there. A disk can still tear one; its arrays then come back as an error or as zeros, so a
checksum of the arrays is kept with them.
"""

import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from data.errors import UserError
from data.workdir import is_remote
from training import processes
from training.step import TrainState

_STATE, _META = 'state', 'meta'
_SCORES = 'scores.json'


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
  """The checkpoints of one run: the newest ones are kept, and those with the highest scores.

  A score is what somebody who has played with a checkpoint says of it, such as its share of solved
  tasks. It is known after the checkpoint has been saved (`mark`), and is kept beside them.

  Attributes:
    scores: step -> score, of this and earlier starts.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    identity: dict[str, str | int],
    *,
    newest: int = 2,
    best: int = 1,
  ):
    """Opens the folder.

    Args:
      folder: made if it is not there; also of an object store, gs://BUCKET/FOLDER.
      identity: what a checkpoint must agree with to be resumed: seed, digest of the packed rows...
      newest: how many of the newest are kept.
      best: how many of those with the highest scores are kept besides.
    """
    self.folder = epath.Path(folder if is_remote(folder) else pathlib.Path(folder).absolute())
    self._identity, self._newest, self._best = identity, newest, best
    self.scores = {int(k): v for k, v in processes.by_first(self._read_scores).items()}
    self._manager = self._open()

  def _read_scores(self) -> dict[str, float]:
    try:
      return json.loads((self.folder / _SCORES).read_text())
    except FileNotFoundError:
      return {}
    except json.JSONDecodeError as error:
      raise UserError(
        f'{self.folder / _SCORES} is not readable JSON ({error}); remove it to go on without the '
        'scores.') from error

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=True, preservation_policy=self)
    return ocp.CheckpointManager(self.folder, options=options)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Orbax asks which of these, oldest first, to keep."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self._newest :], *self._by_score(steps)[: self._best]}
    return [step in kept for step in steps]

  def _by_score(self, steps) -> list[int]:
    """Those with a score, the highest first, of equal ones the earliest."""
    return sorted((s for s in steps if s in self.scores), key=lambda s: (-self.scores[s], s))

  def best(self) -> int | None:
    """The step of the kept checkpoint with the highest score; None where none has one."""
    return next(iter(self._by_score(self._manager.all_steps())), None)

  def save(self, state: TrainState, score: float | None = None) -> None:
    """Starts writing a checkpoint; the arrays are copied before this returns.

    Args:
      state: whole or sharded, in every process.
      score: where it is known already; otherwise `mark` it later.
    """
    leaves, step = _leaves(state), int(jax.device_get(state.step))
    if score is not None:
      self.mark(step, score)
    meta = {'identity': self._identity, 'checksum': _checksum(leaves)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{_STATE: ocp.args.StandardSave(leaves), _META: ocp.args.JsonSave(meta)}
      ),
    )

  def mark(self, step: int, score: float) -> None:
    """Notes the score of a checkpoint; which ones are kept is settled at the next save."""
    self.scores[step] = float(score)
    if processes.is_first():
      self.folder.mkdir(parents=True, exist_ok=True)
      partial = self.folder / f'{_SCORES}.tmp'
      partial.write_text(json.dumps({str(step): value for step, value in self.scores.items()}))
      partial.replace(self.folder / _SCORES)

  def restore(
    self, state: TrainState, shardings: TrainState, step: int | None = None
  ) -> TrainState | None:
    """The newest checkpoint that is whole, or None.

    A torn one is set aside as `<step>.torn` with a message, and the one before it is used.

    Args:
      state: gives structure, shapes and dtypes.
      shardings: where to put the arrays, also those of another mesh than the one that saved them.
      step: this one or an older one instead of the newest.

    Raises:
      UserError: the checkpoint belongs to another run.
    """
    self._manager.wait_until_finished()
    steps = sorted(self._manager.all_steps(), reverse=True)
    for found in steps if step is None else [s for s in steps if s <= step]:
      torn, leaves = '', {}
      try:
        meta = self._manager.restore(
          found, args=ocp.args.Composite(**{_META: ocp.args.JsonRestore()}))[_META]
        self._check_identity(meta['identity'])
        leaves = self._read(found, state, shardings)
        if meta['checksum'] != _checksum(leaves):
          torn = 'its checksum differs'
      except UserError:
        raise
      # Orbax and TensorStore have no common class for "this file is damaged".
      except Exception as error:
        torn = ' '.join(str(error).split())[:120] or type(error).__name__
      if not processes.anywhere(bool(torn)):
        return jax.tree.unflatten(
          jax.tree.structure(state), [leaves[name] for name in sorted(leaves)])
      self._set_aside(found, torn or 'another process says so')
    return None

  def _check_identity(self, found: dict[str, str | int]) -> None:
    changed = ', '.join(
      f'{key} {found.get(key)} -> {value}'
      for key, value in self._identity.items()
      if found.get(key) != value
    )
    if changed:
      raise UserError(
        f'{self.folder} is of another run ({changed}); take another --workdir or remove it.'
      )

  def _read(self, step, state, shardings) -> dict[str, jax.Array]:
    # nnx shardings are states of variables that hold a sharding: both flatten in one order.
    places = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    abstract = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
      for (name, leaf), place in zip(_leaves(state).items(), places, strict=True)
    }
    return self._manager.restore(
      step, args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
    )[_STATE]

  def _set_aside(self, step: int, reason: str) -> None:
    print(f'Checkpoint {step} in {self.folder} is torn ({reason}); set aside.', file=sys.stderr)
    self._manager.close()
    folder = self.folder / str(step)

    def rename() -> None:
      if folder.exists():
        folder.rename(self.folder / f'{step}.torn')

    processes.by_first(rename)
    self._manager = self._open()

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()
