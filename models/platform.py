"""For which kind of device a program is traced."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

_COMPILING_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'compiling_for', default=None)


def name() -> str:
  """'cpu', 'gpu' or 'tpu': the default backend, or what `compiling_for` says."""
  return _COMPILING_FOR.get() or jax.default_backend()


def compiler_options() -> dict[str, int]:
  """For `jax.jit`, of a program that is compiled once and then runs for long.

  XLA uses half of the width of a CPU's 512-bit vectors. All of it: an exponential takes half the
  time, SmolLM2's train step 0.95 of it (2 cores, in turns in one run).
  """
  return {'xla_cpu_prefer_vector_width': 512} if name() == 'cpu' and _has_avx512() else {}


@functools.cache
def _has_avx512() -> bool:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return 'avx512f' in file.read()
  except OSError:
    return False


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Programs traced inside are for another platform than this machine's (ahead of time)."""
  token = _COMPILING_FOR.set(platform)
  try:
    yield
  finally:
    _COMPILING_FOR.reset(token)
