"""How the programs of tests are compiled, and the environment of those that tests start."""

import os

# They are small and run a few times, so that the time goes to their machine code: LLVM is told to
# be quick about it. What XLA makes of the program before that is what it always is.
QUICK_COMPILES = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def flags(devices: int) -> str:
  """XLA_FLAGS for that many virtual CPU devices."""
  return f'--xla_force_host_platform_device_count={devices} {QUICK_COMPILES}'


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
  """A user's, who has one device, with `changes`; the eight of conftest.py are for meshes."""
  return {**os.environ, 'XLA_FLAGS': flags(devices), 'PYTHONUNBUFFERED': '1', **changes}
