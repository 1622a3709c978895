"""AdamW with a warm-up, as one optax transformation."""

import optax

from data.errors import UserError

SCHEDULES = ('linear', 'cosine', 'constant')


def make_schedule(
  name: str, learning_rate: float, num_steps: int, warmup_fraction: float
) -> optax.Schedule:
  """Learning rate of a step: a linear warm-up to the peak, then the named course to the end.

  Args:
    name: 'linear' (to zero, paper A), 'cosine' (to zero) or 'constant' (paper B).
    learning_rate: the peak.
    num_steps: of the whole run.
    warmup_fraction: share of the steps that warm up.

  Raises:
    UserError: unknown name, or a fraction outside [0, 1).
  """
  if name not in SCHEDULES:
    raise UserError(f'schedule={name!r}: choose {", ".join(SCHEDULES)}.')
  if not 0 <= warmup_fraction < 1:
    raise UserError(f'warmup_fraction={warmup_fraction} is not in [0, 1).')
  warmup = round(num_steps * warmup_fraction)
  rest = max(1, num_steps - warmup)
  after = {
    'linear': optax.linear_schedule(learning_rate, 0.0, rest),
    'cosine': optax.cosine_decay_schedule(learning_rate, rest),
    'constant': optax.constant_schedule(learning_rate),
  }[name]
  if not warmup:
    return after
  # The first step already moves: with few steps a wasted one shows.
  ramp = optax.linear_schedule(learning_rate / warmup, learning_rate, max(1, warmup - 1))
  return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
  schedule: optax.Schedule, *, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
  """AdamW (b1 0.9, b2 0.999, eps 1e-8) after clipping by the global norm; clip_norm 0 is none."""
  adamw = optax.adamw(schedule, weight_decay=weight_decay)
  if not clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
