"""What a process of ours asks of the system before it starts to work."""

import glob
import importlib.util
import os
import sys

_HUGE_PAGES = 'glibc.malloc.hugetlb=1'


def use_huge_pages() -> None:
  """Starts this program again with glibc's allocator on huge pages, as `configs.cli.run` does.

  XLA's CPU programs take gigabytes for one call and give them back after it, and the kernel hands
  them out zeroed in pages of 4 KiB: 259,000 page faults and 30 % of the processor time in forward
  and backward of a 6-layer SmolLM2 on 2,048 tokens. With huge pages (madvise mode, the kernels'
  default) it is 1,000 faults and 6 %. glibc 2.35 reads the setting once, at start, hence the second
  start; it is a no-op elsewhere, and where the setting is there already.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if not sys.platform.startswith('linux') or 'glibc.malloc.hugetlb' in tunables:
    return
  os.environ['GLIBC_TUNABLES'] = ':'.join(filter(None, (tunables, _HUGE_PAGES)))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def leave_tpu_alone() -> None:
  """Keeps JAX from looking for a TPU where there is none: libtpu says half a page about it.

  The wheel is installed on machines without a TPU to compile for one (`experiments.aot`). A no-op
  where the platform is chosen already, where a TPU's or a GPU's device file is, or without libtpu.
  """
  devices = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/kfd')
  if 'JAX_PLATFORMS' in os.environ or any(map(glob.glob, devices)):
    return
  if importlib.util.find_spec('libtpu') is not None:
    os.environ['JAX_PLATFORMS'] = 'cpu'
