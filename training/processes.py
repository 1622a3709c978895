"""Several processes that train one model together, on one machine or on many.

Process 0 decides and writes; the others hear what it decided. All of them run every compiled
program and every save of a checkpoint, which are collective. `jax.distributed` joins them.
"""

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from data import errors

T = TypeVar('T')

# How runtimes say that another process is gone: gloo (CPU), NCCL, and JAX's coordination service.
_LOST = ('gloo', 'nccl', 'coordination service', 'heartbeat', 'closed by peer', 'UNAVAILABLE')
# The coordination service lives in process 0, and its end kills the others at once: it goes last.
_GRACE_S = 2.0


def is_first() -> bool:
  """Whether this process writes the run's files."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line for the user to stderr, once for all processes."""
  if is_first():
    print(text, file=sys.stderr)


def by_first(decide: Callable[[], T]) -> T:
  """Calls `decide` in process 0 alone; every process returns what it returned.

  Raises:
    UserError: `decide` raised it; in every process.
  """
  return from_each(lambda: decide() if is_first() else None)[0]


def from_each(make: Callable[[], T]) -> list[T]:
  """Calls `make` in every process; every process returns what all of them returned, in their order.

  What they return is pickled and held by every process.

  Raises:
    UserError: `make` raised it in a process; in every process that of the first one.
  """
  if jax.process_count() == 1:
    return [make()]
  try:
    answer = {'value': make()}
  except errors.UserError as error:
    answer = {'error': str(error)}
  own = np.frombuffer(pickle.dumps(answer), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(own.size))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[:own.size] = own
  rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
  answers = [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
  for answer in answers:
    if 'error' in answer:
      raise errors.UserError(answer['error'])
  return [answer['value'] for answer in answers]


def anywhere(here: bool) -> bool:
  """Whether it is so in any process."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.bool_(here)).any())


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Ends this process at once where another one is lost, as told of `joined`.

  For what is followed by anything collective, such as closing checkpoints: that would wait for the
  lost one.
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() > 1 and _is_lost(error):
      _end(error)
    raise


@contextlib.contextmanager
def joined(coordinator: str, num_processes: int, process_id: int) -> Iterator[None]:
  """Makes this process one of several for as long as the context lasts.

  A process that fails tells why and ends at once, without the farewell in which it would wait for
  the others. They end too: where the network tells them that it is gone (gloo) with a sentence
  within seconds, and at the latest when JAX's coordination service misses its heartbeats (100 s) or
  process 0, which ends a process hard (SIGABRT) with a message of its own.

  Args:
    coordinator: HOST:PORT of process 0; 'auto' where the cluster tells all three (a TPU pod slice,
      SLURM, Open MPI, Kubernetes); '' for a single process.
    num_processes: of all; 0 with 'auto'.
    process_id: of this one, from 0.

  Raises:
    UserError: the three do not go together, or there is no cluster that tells them.
  """
  if not coordinator:
    if num_processes or process_id >= 0:
      raise errors.UserError(
        'num_processes and process_id need --coordinator=HOST:PORT, the address of process 0.')
    yield
    return
  try:
    if coordinator == 'auto':
      jax.distributed.initialize()
    else:
      if not 0 <= process_id < num_processes or not coordinator.rpartition(':')[2].isdigit():
        raise errors.UserError(
          f'--coordinator={coordinator} needs the form HOST:PORT, --num_processes, and a '
          f'--process_id below it (given: {num_processes} and {process_id}).')
      jax.distributed.initialize(coordinator, num_processes, process_id)
  except ValueError as error:
    raise errors.UserError(
      f'No cluster tells the processes of this run ({error}); give --coordinator=HOST:PORT, '
      '--num_processes and --process_id.') from error
  except RuntimeError as error:
    raise errors.UserError(
      f'The process at {coordinator} cannot be joined ({" ".join(str(error).split())[:160]}); '
      'start every process with the same --coordinator and --num_processes.') from error
  try:
    yield
  except errors.Preempted:
    raise
  except Exception as error:
    if jax.process_count() == 1:
      raise
    _end(error)


def _is_lost(error: Exception) -> bool:
  return any(sign.lower() in str(error).lower() for sign in _LOST)


def _end(error: Exception) -> None:
  """Tells why this process ends, and ends it."""
  who = f'process {jax.process_index()} of {jax.process_count()}'
  text = ' '.join(str(error).split())
  if isinstance(error, errors.UserError):
    message = f'error: {text}' if is_first() else f'error: {who}: {text}'
  elif _is_lost(error):
    message = (
      f'error: {who}: another process has ended ({text[:160]}); see what it says, then start the '
      'same command again in every process to go on from the newest checkpoint.')
  else:
    message = ''.join(traceback.format_exception(error)) + f'error: {who} failed.'
  print(f'\n{message}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  if is_first():
    time.sleep(_GRACE_S)
  os._exit(1)


def to_host(tree):
  """The arrays of a tree as NumPy arrays, whole in every process, however they are sharded."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
