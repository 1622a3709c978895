"""How much the backward pass recomputes: the least that fits the device, found by compiling."""

from collections.abc import Callable
from typing import Any

import jax

from data.errors import UserError
from models import memory
from models.decoder import REMAT
from training import processes

_WHAT = {
  'none': 'nothing is recomputed',
  'mlp': 'the feed-forward is recomputed',
  'full': 'blocks are recomputed',
}


def program_bytes(compiled) -> int:
  """Peak bytes on one device of a compiled program: arguments, results and temporaries."""
  stats = compiled.memory_analysis()
  return (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
          + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)


def choose(make_step: Callable[[str], Any], *args, limit: int) -> str:
  """Compiles a step with ever more recomputation until it fits, and says what was chosen.

  The program that fits is compiled once: the step's first call finds it.

  Args:
    make_step: from a name in `decoder.REMAT` to a jitted step.
    *args: of the step; arrays, or shapes with shardings.
    limit: bytes of one device.

  Returns:
    The first name whose program takes at most `memory.USABLE` of the limit.

  Raises:
    UserError: not even the last one does.
  """
  tried = []
  for remat in REMAT:
    try:
      need = program_bytes(make_step(remat).lower(*args).compile())
    except jax.errors.JaxRuntimeError as error:
      # A TPU's compiler refuses what does not fit.
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      tried.append(f'{remat} does not compile into it')
      continue
    tried.append(f'{remat} takes {need / 2**30:.2f}')
    if need <= memory.USABLE * limit:
      processes.say(
        f'remat={remat}: {_WHAT[remat]} in the backward pass; of {limit / 2**30:.2f} GiB a '
        f'device, {", ".join(tried)} GiB.')
      return remat
  raise UserError(
    f'The step does not fit the {limit / 2**30:.2f} GiB of a device ({", ".join(tried)} GiB); use '
    'shorter rows, fewer batch_rows with more grad_accum, or more fsdp or tensor shards in mesh.')
