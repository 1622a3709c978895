"""NVIDIA GPUs that are not there, as XLA's compiler for them sees them."""

import functools
import importlib.util
import os
import pathlib
import sys

import jax
from jax.experimental import topologies

from data.errors import UserError
from models import chips

# `make gpu-compiler` installs requirements-gpu-compiler.txt here.
FOLDER = pathlib.Path(__file__).parents[1] / '.cache' / 'gpu_compiler'
MOST_DEVICES = 8  # of one host
_PLUGINS = ('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12')

# Multiprocessors, shared memory (bytes) of one and of a block at most, L2 cache (bytes), clock
# (GHz) and compute capability: CUDA C++ Programming Guide, table of technical specifications by
# compute capability, and NVIDIA's whitepapers of A100 and H100.
_SPECS = {
  'a100': (108, 167_936, 166_912, 40 * 2**20, 1.41, 8),
  'h100': (132, 233_472, 232_448, 50 * 2**20, 1.98, 9),
  'h200': (132, 233_472, 232_448, 50 * 2**20, 1.98, 9),
}


def target(name: str) -> str:
  """What XLA is told of a GPU: the text of its GpuTargetConfigProto."""
  cores, shared, most_shared, cache, clock, capability = _SPECS[name]
  chip = chips.GPUS[name]
  return f'''
gpu_device_info {{
  core_count: {cores} fpus_per_core: {64 if capability == 8 else 128}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {most_shared}
  shared_memory_per_block: 49152
  l2_cache_size: {cache} clock_rate_ghz: {clock}
  memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm_bytes}
  cuda_compute_capability {{ major: {capability} }}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kind}"
'''


def _plugin() -> str | None:
  """The installed plugin of JAX for CUDA."""
  try:
    return next((name for name in _PLUGINS if importlib.util.find_spec(name)), None)
  except ModuleNotFoundError:  # No plugin of any kind.
    return None


def is_there() -> bool:
  return _plugin() is not None or (FOLDER / 'jax_plugins').is_dir()


@functools.cache
def _register() -> None:
  """Makes the compiler known to JAX.

  Raises:
    UserError: it is not installed.
  """
  if not is_there():
    raise UserError(
      "XLA's compiler for NVIDIA GPUs is not installed; `make gpu-compiler` (Linux, 220 MB, needs "
      'no GPU).')
  if _plugin() is None:
    sys.path.append(str(FOLDER))
    importlib.invalidate_caches()
  # It looks for ptxas on the PATH.
  programs = FOLDER / 'nvidia' / 'cuda_nvcc' / 'bin'
  os.environ['PATH'] = os.pathsep.join((os.environ.get('PATH', ''), str(programs)))
  jax.config.update('jax_platforms', 'cpu')
  jax.devices()  # Finds the plugins on the path where it has not yet looked for them.
  module = importlib.import_module(_plugin())
  try:
    _topology('h100', 1)
  except NotImplementedError:  # What jax raises while the plugin is not registered.
    module.initialize()


def _topology(name: str, count: int):
  return topologies.get_topology_desc(
    platform='cuda', target_config=target(name), topology=f'1x1x{count}')


def find_devices(name: str, count: int) -> list:
  """Devices to compile for: those of this machine where it has such GPUs, else imagined ones.

  Args:
    name: of `chips.GPUS`.
    count: how many, of one host.

  Raises:
    UserError: there are no such machines, or the compiler is not installed.
  """
  if not 1 <= count <= MOST_DEVICES:
    raise UserError(f'--topology={name}:{count}: give 1 to {MOST_DEVICES} GPUs, those of one host.')
  here = jax.devices()
  if here[0].device_kind == chips.GPUS[name].device_kind and len(here) >= count:
    return here[:count]
  _register()
  return list(_topology(name, count).devices)
