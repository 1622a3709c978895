"""The architecture of a decoder, and the families that it covers.

llama       pre-norm attention and gated feed-forward; the others are this and
qwen2       biases on query, key and value
qwen3       a norm of every head's query and key
gemma3      that norm; norms behind attention and feed-forward too, all scaled by 1 + w; scaled
            embeddings; GELU; windowed and global layers, each with their rotary base
ministral3  YaRN positions, and queries that grow with the position
"""

import dataclasses

from data.errors import UserError
from models.rope import Scaling

FAMILIES = ('llama', 'qwen2', 'qwen3', 'gemma3', 'ministral3')
ACTIVATIONS = ('silu', 'gelu_tanh')
QUANTIZATIONS = ('none', 'int8', 'int4', 'nf4')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Architecture and arithmetic of a decoder.

  Attributes:
    name: of the registry, or of the file it came from.
    family: one of FAMILIES.
    head_dim: width of a head, independent of embed_dim.
    qk_norm: an RMS norm over every head's query and key, before they are rotated.
    post_norms: norms on what attention and feed-forward add to the residual stream.
    norm_offset: norms scale by 1 + w instead of w.
    activation: of the feed-forward's gate, one of ACTIVATIONS.
    scale_embeddings: embeddings are multiplied by the square root of their width.
    query_pre_attn_scalar: scores are divided by its square root; 0 is head_dim.
    sliding_window: a token sees so many of the newest tokens, itself included; 0 is all of them.
    global_every: every so manieth layer sees all tokens despite `sliding_window`; 0 is none.
    local_rope_theta: rotary base, unscaled, of the windowed layers; 0 is that of the others.
    dtype: 'float32' or 'bfloat16', the operands of the products. The residual stream, norms and
      softmax are float32 either way.
    param_dtype: in which the kernels are kept when dtype is 'float32'; with 'bfloat16' they are
      bfloat16. Norms, biases and adapters are always float32.
    base_quantization: one of QUANTIZATIONS (see `models.quantise`), how the kernels of the blocks
      are kept; they are dequantised to `dtype` in each product.
    frozen: training changes an adapter only. False trains all parameters, kept in float32 (an
      update is often too small for bfloat16).
  """

  name: str
  family: str
  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_theta: float
  rope_scaling: Scaling | None = None
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  norm_offset: bool = False
  activation: str = 'silu'
  scale_embeddings: bool = False
  query_pre_attn_scalar: int = 0
  sliding_window: int = 0
  global_every: int = 0
  local_rope_theta: float = 0.0
  max_position: int = 32768
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  base_quantization: str = 'none'
  frozen: bool = True

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise UserError(f'Model family {self.family!r} is unknown; known are {", ".join(FAMILIES)}.')
    for field in ('dtype', 'param_dtype'):
      if getattr(self, field) not in ('float32', 'bfloat16'):
        raise UserError(f'{field}={getattr(self, field)!r}: choose float32 or bfloat16.')
    if self.activation not in ACTIVATIONS:
      raise UserError(f'activation={self.activation!r}: choose from {", ".join(ACTIVATIONS)}.')
    if self.base_quantization not in QUANTIZATIONS:
      raise UserError(
        f'base_quantization={self.base_quantization!r}: choose from {", ".join(QUANTIZATIONS)}.')
    if self.base_quantization != 'none' and not self.frozen:
      raise UserError('A base whose parameters are all trained cannot be quantised.')
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'{self.num_heads} query heads do not divide into {self.num_kv_heads} key-value heads.'
      )

  @property
  def weight_dtype(self) -> str:
    if not self.frozen:
      return 'float32'
    return 'bfloat16' if self.dtype == 'bfloat16' else self.param_dtype

  @property
  def windows(self) -> tuple[int, ...]:
    """The sliding window of every layer; 0 where it sees all tokens."""
    every = self.global_every
    return tuple(
      0 if every and (layer + 1) % every == 0 else self.sliding_window
      for layer in range(self.num_layers)
    )
