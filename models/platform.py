"""For which kind of device a program is traced."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_COMPILING_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'compiling_for', default=None)


def name() -> str:
  """'cpu', 'gpu' or 'tpu': the default backend, or what `compiling_for` says."""
  return _COMPILING_FOR.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Programs traced inside are for another platform than this machine's (ahead of time)."""
  token = _COMPILING_FOR.set(platform)
  try:
    yield
  finally:
    _COMPILING_FOR.reset(token)
