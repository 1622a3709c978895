"""Known architectures, by name; the numbers are those of the published config.json files."""

import dataclasses
import difflib
import math
import pathlib

import jax

from data import model_folder
from data.errors import UserError
from models import decoder, hf_config
from models.families import DecoderConfig
from models.rope import LinearScaling, RopeScaling, YarnScaling


def _qwen25(name, embed, layers, heads, kv_heads, mlp, *, vocab, tied) -> DecoderConfig:
  return DecoderConfig(
    name=name,
    family='qwen2',
    vocab_size=vocab,
    embed_dim=embed,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=embed // heads,
    mlp_dim=mlp,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=tied,
    max_position=32768,
    **hf_config.QUIRKS['qwen2'],
  )


def _qwen3(name, embed, layers, heads, mlp, *, tied, vocab=151936, length=40960) -> DecoderConfig:
  return DecoderConfig(
    name=name,
    family='qwen3',
    vocab_size=vocab,
    embed_dim=embed,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=mlp,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=tied,
    max_position=length,
    **hf_config.QUIRKS['qwen3'],
  )


CONFIGS = {
  config.name: config
  for config in (
    DecoderConfig(
      name='smollm2_135m',
      family='llama',
      vocab_size=49152,
      embed_dim=576,
      num_layers=30,
      num_heads=9,
      num_kv_heads=3,
      head_dim=64,
      mlp_dim=1536,
      rope_theta=1e5,
      norm_eps=1e-5,
      tie_embeddings=True,
      max_position=8192,
    ),
    _qwen25('qwen25_0.5b', 896, 24, 14, 2, 4864, vocab=151936, tied=True),
    _qwen25('qwen25_1.5b', 1536, 28, 12, 2, 8960, vocab=151936, tied=True),
    _qwen25('qwen25_3b', 2048, 36, 16, 2, 11008, vocab=151936, tied=True),
    _qwen25('qwen25_7b', 3584, 28, 28, 4, 18944, vocab=152064, tied=False),
    _qwen25('qwen25_14b', 5120, 48, 40, 8, 13824, vocab=152064, tied=False),
    DecoderConfig(
      name='llama31_8b',
      family='llama',
      vocab_size=128256,
      embed_dim=4096,
      num_layers=32,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      mlp_dim=14336,
      rope_theta=5e5,
      rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
      norm_eps=1e-5,
      max_position=131072,
    ),
    _qwen3('qwen3_0.6b', 1024, 28, 16, 3072, tied=True),
    _qwen3('qwen3_4b', 2560, 36, 32, 9728, tied=True),
    _qwen3('qwen3_8b', 4096, 36, 32, 12288, tied=False),
    _qwen3('qwen3_14b', 5120, 40, 40, 17408, tied=False),
    _qwen3('qwen3_embedding_0.6b', 1024, 28, 16, 3072, tied=True, vocab=151669, length=32768),
    DecoderConfig(
      name='gemma3_4b',
      family='gemma3',
      vocab_size=262208,
      embed_dim=2560,
      num_layers=34,
      num_heads=8,
      num_kv_heads=4,
      head_dim=256,
      mlp_dim=10240,
      rope_theta=1e6,
      rope_scaling=LinearScaling(8.0),
      norm_eps=1e-6,
      tie_embeddings=True,
      query_pre_attn_scalar=256,
      sliding_window=1024,
      global_every=6,
      local_rope_theta=1e4,
      max_position=131072,
      **hf_config.QUIRKS['gemma3'],
    ),
    DecoderConfig(
      name='ministral3_8b',
      family='ministral3',
      vocab_size=131072,
      embed_dim=4096,
      num_layers=34,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      mlp_dim=14336,
      rope_theta=1e6,
      rope_scaling=YarnScaling(16.0, 16384, query_beta=0.1),
      norm_eps=1e-5,
      max_position=262144,
      **hf_config.QUIRKS['ministral3'],
    ),
  )
}


# Where others find the weights; what an exported adapter names as its base.
HUGGING_FACE_IDS = {
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
  'qwen25_0.5b': 'Qwen/Qwen2.5-0.5B-Instruct',
  'qwen25_1.5b': 'Qwen/Qwen2.5-1.5B-Instruct',
  'qwen25_3b': 'Qwen/Qwen2.5-3B-Instruct',
  'qwen25_7b': 'Qwen/Qwen2.5-7B-Instruct',
  'qwen25_14b': 'Qwen/Qwen2.5-14B-Instruct',
  'llama31_8b': 'meta-llama/Llama-3.1-8B-Instruct',
  'qwen3_0.6b': 'Qwen/Qwen3-0.6B',
  'qwen3_4b': 'Qwen/Qwen3-4B',
  'qwen3_8b': 'Qwen/Qwen3-8B',
  'qwen3_14b': 'Qwen/Qwen3-14B',
  'qwen3_embedding_0.6b': 'Qwen/Qwen3-Embedding-0.6B',
  'gemma3_4b': 'google/gemma-3-4b-it',
  'ministral3_8b': 'mistralai/Ministral-3-8B-Instruct-2512-BF16',
}
# Published as parts of models that also read images.
MULTIMODAL = ('gemma3_4b', 'ministral3_8b')


def peft_base(model: str) -> tuple[str, bool]:
  """What a PEFT adapter says of its base.

  Args:
    model: a name of CONFIGS, or the path of weights.

  Returns:
    Where others find it, a Hugging Face id or a path; and whether that is a model that reads
    images, too, whose layers lie deeper (`weights.export_peft`).
  """
  if model in HUGGING_FACE_IDS:
    return HUGGING_FACE_IDS[model], model in MULTIMODAL
  path = pathlib.Path(model).absolute()
  kind = model_folder.read_json(path / 'config.json').get('model_type') if path.is_dir() else None
  return str(path), kind in hf_config.MULTIMODAL


def get_config(name: str, **overrides) -> DecoderConfig:
  """The config of that name, with fields replaced.

  Raises:
    UserError: the name or a field is unknown; the message lists the near ones.
  """
  if name not in CONFIGS:
    near = difflib.get_close_matches(name, CONFIGS, n=3, cutoff=0.3) or list(CONFIGS)
    raise UserError(f'Model {name!r} is unknown; near are {", ".join(near)}.')
  fields = [f.name for f in dataclasses.fields(DecoderConfig)]
  for key in overrides:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=3, cutoff=0.3) or fields
      raise UserError(f'{key!r} is not a field of a model config; near are {", ".join(near)}.')
  return dataclasses.replace(CONFIGS[name], **overrides)


def shrink(
  config: DecoderConfig,
  *,
  vocab_size: int = 256,
  embed_dim: int = 64,
  num_layers: int = 2,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  head_dim: int = 16,
  mlp_dim: int = 128,
  **overrides,
) -> DecoderConfig:
  """A tiny config of the same family, head, bias and rotary kind, for tests and dry runs."""
  if config.sliding_window:
    overrides = {'sliding_window': 16} | overrides
  if config.global_every:
    overrides = {'global_every': 2} | overrides  # both kinds among few layers
  return dataclasses.replace(
    config,
    name=f'{config.name}_tiny',
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    mlp_dim=mlp_dim,
    **overrides,
  )


def count_params(config: DecoderConfig) -> int:
  """Frozen parameters, a tied head counted once, as `transformers` counts them."""
  config = dataclasses.replace(config, base_quantization='none')
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.abstract(config).frozen))
