"""The second start keeps the command and sets the allocator once."""

import os
import subprocess
import sys

import pytest

from configs import process as process_lib

SCRIPT = """
import os, sys
from configs import process
process.use_huge_pages()
print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc only')
@pytest.mark.parametrize('before', ['', 'glibc.malloc.check=0'])
def test_starts_again_with_the_same_command(tmp_path, before):
  script = tmp_path / 'entry.py'
  script.write_text(SCRIPT)
  env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | {'PYTHONPATH': '.'}
  if before:
    env['GLIBC_TUNABLES'] = before
  process = subprocess.Popen(
    [sys.executable, str(script), '--x=1', 'two words'], env=env, stdout=subprocess.PIPE, text=True
  )
  output, _ = process.communicate(timeout=60)
  wanted = ':'.join(filter(None, (before, 'glibc.malloc.hugetlb=1')))
  assert output.split('\n')[0] == f"{process.pid} {wanted} ['--x=1', 'two words']"


@pytest.mark.parametrize('found, installed, chosen, platforms', [
  ([], True, None, 'cpu'),
  ([], False, None, None),
  (['/dev/accel0'], True, None, None),
  ([], True, 'tpu', 'tpu'),
])
def test_no_tpu_is_looked_for_where_there_is_none(
    monkeypatch, found, installed, chosen, platforms):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  if chosen:
    monkeypatch.setenv('JAX_PLATFORMS', chosen)
  monkeypatch.setattr(
    process_lib.glob, 'glob', lambda pattern: [p for p in found if p[:8] in pattern])
  monkeypatch.setattr(
    process_lib.importlib.util, 'find_spec', lambda name: object() if installed else None)
  process_lib.leave_tpu_alone()
  assert os.environ.get('JAX_PLATFORMS') == platforms
