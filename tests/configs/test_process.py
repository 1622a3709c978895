"""The second start keeps the command and sets the allocator once."""

import os
import subprocess
import sys

import pytest

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
