"""The attended lengths that programs are compiled for: cost follows the tokens that there are."""

from collections.abc import Sequence


def attend_buckets(max_len: int, step: int = 128) -> list[int]:
  """Static lengths of the attended prefix: multiples of `step`, coarser beyond 4 of them.

  A program is compiled for each that is used; 128 positions more cost 32 slots of SmolLM2-135M
  about a tenth of a decode step.
  """
  lengths, width = [], step
  while not lengths or lengths[-1] < max_len:
    lengths.append((lengths[-1] if lengths else 0) + width)
    if lengths[-1] >= 4 * width:
      width *= 2
  return [min(length, max_len) for length in lengths]


def affordable(lengths: Sequence[int], cache_bytes: int, room: float) -> list[int]:
  """The attended lengths for which decoding has the memory.

  All of a slot is read where it lies; less of it is copied first, so that a dispatch reads what it
  needs and no more.

  Args:
    lengths: of `attend_buckets`.
    cache_bytes: of the whole cache on a device.
    room: bytes that are free there.
  """
  whole = lengths[-1]
  return [n for n in lengths if n == whole or n / whole * cache_bytes <= room]
