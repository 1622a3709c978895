"""How a run computes attention: by a kernel, or in blocks of plain XLA; chosen once, and said.

The kernel for GPUs is tried before it is relied on: a few hundred tokens, its values and gradients
against plain attention in float32, with the compiler and on the device that will run it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from data.errors import UserError
from models import attention, flash, platform
from models.families import DecoderConfig
from training import processes

# Of the largest number. Rounding to bfloat16 makes 0.4 to 0.6 %, a token that sees one key too many
# tens.
_TOLERANCE = 0.02
_WIDTH, _ENDS, _WINDOW = 300, (70, 260, 280), 90


def choose(request: str, config: DecoderConfig) -> str:
  """Which `attention.PATHS` a run takes, 'blocks' or 'kernel'; says it with its reason.

  Args:
    request: 'auto', or one of the two.
    config: of the decoder: its heads, their width, the products' dtype, whether it has windows.

  Raises:
    UserError: the kernel is asked for where it cannot be had.
  """
  path, why = processes.by_first(lambda: _decide(request, config))
  processes.say(f'attention={path}: {why}.')
  return path


def _decide(request: str, config: DecoderConfig) -> tuple[str, str]:
  where = platform.name()
  if request == 'blocks':
    return 'blocks', 'as the config says, in blocks of plain XLA'
  if where == 'tpu':
    return 'kernel', 'splash attention'
  if where == 'cpu':
    if request == 'kernel':
      raise UserError('attention=kernel needs a GPU or a TPU; leave it at auto.')
    return 'blocks', 'blocks of plain XLA; the kernels are for GPUs and TPUs'
  device = jax.devices()[0].device_kind
  found = refusal(config)
  if not found:
    return 'kernel', f'the kernel for GPUs, which equals plain attention on this {device}'
  if request == 'kernel':
    raise UserError(f'attention=kernel cannot be had on this {device}: {found}; use '
                    'attention=blocks.')
  return 'blocks', f'blocks of plain XLA, because on this {device} {found}'


def refusal(config: DecoderConfig) -> str:
  """Why the kernel for GPUs is not to be used for a decoder on this machine; '' where it is."""
  if config.head_dim > flash.MAX_HEAD_DIM:
    return f'the kernel has heads of at most {flash.MAX_HEAD_DIM} numbers, not {config.head_dim}'
  try:
    gap = disagreement(config)
  except Exception as error:  # Whatever a compiler or a driver raises, the blocks need none of it.
    says = ' '.join(str(error).split()) or type(error).__name__
    return f'the kernel does not run ({says[:160]})'
  # A number that is none is no agreement either.
  if not gap <= _TOLERANCE:
    return f'the kernel is wrong by {gap:.1%} of the largest number'
  return ''


def disagreement(config: DecoderConfig) -> float:
  """The kernel's largest difference from plain attention, as a share of the largest number.

  Of value and gradients, over one packed row with a window where the decoder has one.
  """
  heads, kv_heads = 2 * config.num_heads // config.num_kv_heads, 2
  rng = np.random.default_rng(0)
  shapes = [(1, _WIDTH, n, config.head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  q, k, v, target = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  # What both compute with: numbers of the products' dtype.
  q, k, v = (x.astype(config.dtype).astype(jnp.float32) for x in (q, k, v))
  segments = jnp.asarray(np.searchsorted(_ENDS, np.arange(_WIDTH), side='right')[None], jnp.int32)
  window = _WINDOW if config.sliding_window else 0

  def run(path, dtype):

    @jax.jit
    def value_and_gradient(q, k, v):
      def loss(q, k, v):
        out = attention.attention(
          q, k.astype(dtype), v.astype(dtype), segment_ids=segments, window=window, path=path)
        return (out * target).sum(), out

      return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    (_, out), gradients = value_and_gradient(q, k, v)
    return out, *gradients

  found = run('kernel', config.dtype)
  with jax.default_matmul_precision('highest'):
    plain = run('blocks', 'float32')
  pairs = zip(jax.device_get(found), jax.device_get(plain), strict=True)
  return float(max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs))
