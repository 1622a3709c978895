"""What accelerators can do, by the numbers of their makers: the one place for such figures.

Sources:
- Google Cloud documentation, the specification tables of TPU v4, v5e, v5p, v6e and TPU7x
  (docs.cloud.google.com/tpu/docs/v4 and so on): peak FLOP/s, HBM bytes and bandwidth, chips a host.
- J. Austin et al., "How to Scale Your Model", chapter "How to Think About TPUs"
  (jax-ml.github.io/scaling-book/tpus): bandwidth of one ICI link and direction, and of the data
  centre network (DCN) by chip.
- NVIDIA's data sheets: memory, its bandwidth, dense bfloat16 FLOP/s and NVLink of the SXM modules.
- `program_bytes`: what the TPU compiler (libtpu 0.0.42.1) leaves to a program of the HBM; it names
  the number when it refuses one.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX sees it: a chip, of TPU7x half of one.

  Attributes:
    name: as in a topology's name.
    device_kind: as JAX names it.
    hbm_bytes: memory.
    program_bytes: of it, what a program may use; on a GPU all of it, of which XLA takes the share
      XLA_PYTHON_CLIENT_MEM_FRACTION (0.75 unless it is set).
    hbm_bandwidth: bytes/s.
    peak_flops: bfloat16 FLOP/s.
    link_bandwidth: bytes/s of one ICI link in one direction; of a GPU what all its NVLinks send.
    torus: dimensions of its ICI network; 0 where a switch joins the devices.
    dcn_bandwidth: bytes/s out of its slice.
  """

  name: str
  device_kind: str
  hbm_bytes: int
  program_bytes: int
  hbm_bandwidth: float
  peak_flops: float
  link_bandwidth: float = 0.0
  torus: int = 0
  dcn_bandwidth: float = 0.0

  def ici_bandwidth(self, group: int) -> float:
    """Bytes/s at which a device sends in a ring of `group` devices: one link in each direction."""
    return 2 * self.link_bandwidth if self.torus and group > 2 else self.link_bandwidth


CHIPS = {
  chip.name: chip for chip in (
    Chip('v4', 'TPU v4', 32 * GIB, int(30.75 * GIB), 1.2e12, 275e12, 4.5e10, 3, 6.25e9),
    Chip('v5e', 'TPU v5 lite', 16 * GIB, int(15.75 * GIB), 8.19e11, 197e12, 4.5e10, 2, 3.125e9),
    Chip('v5p', 'TPU v5', 96 * GIB, int(95.74 * GIB), 2.765e12, 459e12, 9e10, 3, 6.25e9),
    Chip('v6e', 'TPU v6 lite', 32 * GIB, int(31.25 * GIB), 1.638e12, 918e12, 9e10, 2, 12.5e9),
    # Two devices a chip: each has half of everything but its links.
    Chip('tpu7x', 'TPU7x', 96 * GIB, int(94.75 * GIB), 3.69e12, 1153.5e12, 9e10, 3, 6.25e9),
  )
}

GPUS = {
  chip.name: chip for chip in (
    Chip('a100', 'NVIDIA A100-SXM4-80GB', 80 * 10**9, 80 * 10**9, 2.039e12, 312e12, 3e11),
    Chip('h100', 'NVIDIA H100 80GB HBM3', 80 * 10**9, 80 * 10**9, 3.35e12, 989e12, 4.5e11),
    Chip('h200', 'NVIDIA H200', 141 * 10**9, 141 * 10**9, 4.8e12, 989e12, 4.5e11),
  )
}


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 FLOP/s of a device as JAX names it; None where it is not known."""
  return _peaks(device_kind)[0]


def peak_bandwidth(device_kind: str) -> float | None:
  """Bytes/s of a device's memory, likewise."""
  return _peaks(device_kind)[1]


def _peaks(device_kind: str) -> tuple[float | None, float | None]:
  chips = {chip.device_kind: chip for chip in (*CHIPS.values(), *GPUS.values())}
  chip = chips.get(device_kind)
  return (chip.peak_flops, chip.hbm_bandwidth) if chip else (None, None)
