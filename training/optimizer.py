"""AdamW or Muon with a warm-up, as one optax transformation."""

import jax
import optax
from optax import contrib

from data.errors import UserError

SCHEDULES = ('linear', 'cosine', 'constant')
OPTIMIZERS = ('adamw', 'muon')

# Size (RMS) of Muon's steps in a rate's units; AdamW's are between 0.2 and 0.4 (arXiv 2502.16982).
_MUON_RMS = 0.4


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


def check_name(name: str) -> None:
  """Raises UserError for an optimizer that there is not."""
  if name not in OPTIMIZERS:
    raise UserError(f'optimizer={name!r}: choose {", ".join(OPTIMIZERS)}.')


def make_optimizer(
  schedule: optax.Schedule, *, weight_decay: float, clip_norm: float, name: str = 'adamw'
) -> optax.GradientTransformation:
  """The named optimizer, after clipping by the global norm; clip_norm 0 is none.

  AdamW has b1 0.9, b2 0.999, eps 1e-8. Muon (Jordan et al. 2024) makes the momentum of a matrix
  orthogonal, so that directions of rare tokens grow as fast as those of frequent ones, and leaves
  all else (embeddings, norms) to AdamW, both with Nesterov's momentum. Its steps have the size of
  AdamW's: a rate means the same.

  Args:
    schedule: learning rate of a step.
    weight_decay: decoupled, of all parameters.
    clip_norm: global norm of the gradient, at most.
    name: one of `OPTIMIZERS`.

  Raises:
    UserError: unknown name.
  """
  check_name(name)
  if name == 'muon':
    optimizer = contrib.muon(
      schedule, weight_decay=weight_decay, adam_weight_decay=weight_decay,
      adam_learning_rate=schedule, consistent_rms=_MUON_RMS,
      muon_weight_dimension_numbers=_matrices)
  else:
    optimizer = optax.adamw(schedule, weight_decay=weight_decay)
  if not clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _matrices(params):
  """For Muon: the last two axes of what multiplies, those before them being layers.

  Norms and biases have two axes, too, where layers are stacked, and multiply nothing.
  """

  def numbers(path, value):
    name = jax.tree_util.keystr(path)
    if value.ndim < 2 or any(part in name for part in ('embed', 'norm', 'bias')):
      return None
    return contrib.MuonDimensionNumbers(value.ndim - 2, value.ndim - 1)

  return jax.tree_util.tree_map_with_path(numbers, params)
