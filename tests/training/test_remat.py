"""The least recomputation that fits is chosen, and compiled once."""

import jax
import jax.numpy as jnp
import pytest

from data.errors import UserError
from models import decoder, memory
from training import remat

KEPT = {'none': 256, 'mlp': 64, 'full': 4}


def make_step(name):
  """A step that holds KEPT[name] squares of x at a time."""

  @jax.jit
  def step(x):
    squares = jnp.stack([jnp.sin(x * i) for i in range(1, 5)])
    squares = jnp.tile(squares, (KEPT[name] // 4, 1))
    return jnp.sort(squares, axis=0).sum(), x + 1

  return step


def test_the_least_that_fits(capsys):
  steps = {name: make_step(name) for name in decoder.REMAT}
  x = jnp.ones((4096,))
  need = {name: remat.program_bytes(step.lower(x).compile()) for name, step in steps.items()}
  assert need['none'] > need['mlp'] > need['full'] > x.nbytes
  limit = lambda name: int(need[name] / memory.USABLE) + 1
  for name in decoder.REMAT:
    assert remat.choose(steps.get, x, limit=limit(name)) == name
    assert f'remat={name}:' in capsys.readouterr().err
  with pytest.raises(UserError, match=r'does not fit.*none takes.*full takes'):
    remat.choose(steps.get, x, limit=limit('full') // 2)


def test_what_was_compiled_to_be_measured_is_what_runs():
  step, compiled = make_step('none'), []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None)
  x = jnp.ones((4096,))
  before = len(compiled)
  remat.choose(lambda name: step, jax.ShapeDtypeStruct(x.shape, x.dtype), limit=2**40)
  assert len(compiled) == before + 1
  step(x)
  assert len(compiled) == before + 1
