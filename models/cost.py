"""What the programs compute and move, counted from the architecture, and how long that takes.

The one cost model: it predicts a run before it starts (`training.speed`) and a program that was
compiled for another machine (`experiments.aot`). XLA's own counts do not serve: the body of a loop
over the layers is counted once.

FLOPs are those of products. Bytes are the traffic to a device's memory if every product reads its
operands there and writes its result, and elementwise work is done on the way.
"""

import dataclasses
from collections.abc import Mapping

from models import memory
from models.chips import Chip
from models.decoder import DecoderConfig
from models.lora import LoraConfig


def projections(config: DecoderConfig) -> dict[str, tuple[int, int]]:
  """(in, out) of the products of a block."""
  heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
  embed, mlp = config.embed_dim, config.mlp_dim
  return {
    'q': (embed, heads),
    'k': (embed, kv_heads),
    'v': (embed, kv_heads),
    'o': (heads, embed),
    'gate': (embed, mlp),
    'up': (embed, mlp),
    'down': (mlp, embed),
  }


def train_flops(
  config: DecoderConfig,
  lora: LoraConfig | None,
  num_places: int,
  num_loss_places: int,
  context: float,
) -> float:
  """Floating point operations of the products in training, without recomputation.

  Forward and input gradients of the blocks, all three products of the adapter, causal attention,
  and the head with its input gradient for the loss tokens; the kernels' gradients where they are
  trained.

  Args:
    config: the architecture.
    lora: the adapter; None where there is none.
    num_places: places of all rows, padding included.
    num_loss_places: places of all loss budgets.
    context: keys that a token sees, on average; a row's length is the most there can be.
  """
  shapes = projections(config)
  products = 4 if config.frozen else 6
  layer = sum(products * a * b for a, b in shapes.values())
  if lora is not None:
    layer += sum(6 * (a + b) * lora.rank for name, (a, b) in shapes.items() if name in lora.targets)
  # Two products forward, four backward.
  layer += 6 * 2 * context * config.num_heads * config.head_dim
  head = products * config.embed_dim * config.vocab_size
  return num_places * config.num_layers * layer + num_loss_places * head


def recomputed_flops(
  config: DecoderConfig, lora: LoraConfig | None, num_places: int, context: float, remat: str
) -> float:
  """FLOPs that `remat` adds to those of `train_flops`."""
  if remat == 'none':
    return 0.0
  shapes = projections(config)
  # All of a block but its last product, of which only the adapter's inner numbers are needed.
  names = ('gate', 'up') if remat == 'mlp' else ('q', 'k', 'v', 'o', 'gate', 'up')
  targets = lora.targets if lora is not None else ()
  layer = sum(2 * a * b for a, b in map(shapes.get, names))
  layer += sum(2 * sum(shapes[name]) * lora.rank for name in names if name in targets)
  layer += 2 * shapes['down'][0] * lora.rank if 'down' in targets else 0
  if remat == 'full':
    layer += 2 * 2 * context * config.num_heads * config.head_dim
  return num_places * config.num_layers * layer


def forward_flops(
  config: DecoderConfig, num_places: int, num_sampled: int, context: float
) -> float:
  """FLOPs of inference.

  Args:
    config: the architecture; an adapter is merged.
    num_places: tokens computed.
    num_sampled: of them, those that need logits.
    context: keys that a token sees, on average.
  """
  layer = sum(2 * a * b for a, b in projections(config).values())
  layer += 2 * 2 * context * config.num_heads * config.head_dim
  head = 2 * config.embed_dim * config.vocab_size
  return num_places * config.num_layers * layer + num_sampled * head


def _block_traffic(config: DecoderConfig, tensor: int) -> float:
  """float32 numbers that one forward pass of a block reads and writes for a place."""
  heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
  # Two norms, the inputs and results of the projections, the residual stream.
  whole = 10 * config.embed_dim
  split = 4 * heads + 4 * kv_heads + 6 * config.mlp_dim
  return whole + split / tensor


def train_traffic(
  model, sizes: Mapping[str, int], places: int, loss_places: int, remat: str
) -> float:
  """Bytes to and from one device's memory in a train step.

  Args:
    model: a `decoder.Model`, may be abstract.
    sizes: of the mesh's axes.
    places: of one device.
    loss_places: of one device.
    remat: one of `decoder.REMAT`.
  """
  config, tensor, fsdp = model.config, sizes['tensor'], sizes['fsdp']
  width = 2 if config.weight_dtype == 'bfloat16' else 4
  kernels = sum(a * b for a, b in projections(config).values())
  mlp = 2 * config.embed_dim * config.mlp_dim
  again = {'none': 0.0, 'mlp': mlp / kernels, 'full': 1 - mlp / 2 / kernels}[remat]
  # A gathered kernel is written once before it is read.
  passes = (2 + again) * (2 if fsdp > 1 else 1)
  weights = passes * width * config.num_layers * kernels / tensor
  chunks = -(-loss_places // memory.LOSS_TOKENS)
  head = 2 * chunks * width * config.vocab_size * config.embed_dim / tensor
  logits = 4 * 4 * loss_places * config.vocab_size / tensor
  blocks = (3 + again) * 4 * places * config.num_layers * _block_traffic(config, tensor)
  adapter = 10 * memory.shard_bytes(model.lora, sizes)
  return weights + head + logits + blocks + adapter


def forward_traffic(
  config: DecoderConfig, weight_bytes: int, kv_bytes: float, places: int, sampled: int, tensor: int
) -> float:
  """Bytes to and from one device's memory in a pass of inference: weights and cache once.

  Args:
    config: the architecture.
    weight_bytes: on the device.
    kv_bytes: of the cache that is attended, on the device.
    places: tokens computed on the device.
    sampled: of them, those that need logits.
    tensor: shards of the heads.
  """
  inner = 4 * places * config.num_layers * _block_traffic(config, tensor)
  return weight_bytes + kv_bytes + inner + 3 * 4 * sampled * config.vocab_size / tensor


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that each resource of a device is busy, and what follows.

  Attributes:
    compute: products at the peak rate.
    hbm: traffic to memory.
    ici: what is sent to devices of the slice.
    dcn: what is sent to other slices.
  """

  compute: float
  hbm: float
  ici: float
  dcn: float

  @property
  def overlapped(self) -> float:
    """Seconds if all resources work at the same time: no program is faster."""
    return max(self.compute, self.hbm, self.ici, self.dcn)

  @property
  def serial(self) -> float:
    """Seconds if they work one after the other, each at its best."""
    return self.compute + self.hbm + self.ici + self.dcn

  @property
  def bound(self) -> str:
    """The resource that takes longest."""
    return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(chip: Chip, flops: float, traffic: float, ici: float = 0, dcn: float = 0) -> Roofline:
  """Times of one device.

  Args:
    chip: the device.
    flops: of the device.
    traffic: bytes to and from its memory.
    ici: seconds on the links of the slice, which depend on the groups that communicate.
    dcn: bytes to other slices.
  """
  return Roofline(
    flops / chip.peak_flops, traffic / chip.hbm_bandwidth, ici,
    dcn / chip.dcn_bandwidth if dcn else 0.0)
