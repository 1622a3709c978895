"""config.json of Hugging Face model folders: read into a `DecoderConfig`, and written from one."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from data.errors import UserError
from models.families import FAMILIES, DecoderConfig
from models.rope import LinearScaling, RopeScaling, Scaling, YarnScaling

# `model_type` of a text model -> family.
MODEL_TYPES = {family: family for family in FAMILIES} | {'gemma3_text': 'gemma3'}
ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'gemma3': 'Gemma3ForCausalLM',
  'ministral3': 'Ministral3ForCausalLM',
}
# What reads images and text; its text model is described by `text_config`.
MULTIMODAL = ('gemma3', 'mistral3')
# Gemma's folders leave out what equals the defaults of its class in `transformers`.
_GEMMA3_DEFAULTS = {
  'vocab_size': 262208,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'max_position_embeddings': 131072,
  'query_pre_attn_scalar': 256,
  'tie_word_embeddings': True,
}
# What a family brings along that its config.json does not say.
QUIRKS = {
  'llama': {},
  'qwen2': {'qkv_bias': True},
  'qwen3': {'qk_norm': True},
  'gemma3': {
    'qk_norm': True,
    'post_norms': True,
    'norm_offset': True,
    'activation': 'gelu_tanh',
    'scale_embeddings': True,
  },
  'ministral3': {},
}


def read(raw: Mapping[str, Any], folder: pathlib.Path, dtype: str) -> DecoderConfig:
  """The architecture that a config.json describes; of a multimodal model that of its text model.

  Args:
    raw: the file's content.
    folder: where it lies, for the name and for messages.
    dtype: `param_dtype` of the result.

  Raises:
    UserError: the architecture is not supported, or a key is missing.
  """
  outer = raw
  if raw.get('model_type') in MULTIMODAL and 'text_config' in raw:
    raw = raw['text_config']
  family = MODEL_TYPES.get(raw.get('model_type'))
  if family is None or (family == raw.get('model_type') == 'gemma3'):
    raise unsupported(folder, raw.get('model_type'))
  if family == 'gemma3':
    raw = _GEMMA3_DEFAULTS | raw
  activation = 'gelu_pytorch_tanh' if family == 'gemma3' else 'silu'
  key = 'hidden_activation' if family == 'gemma3' else 'hidden_act'
  unusual = {key: raw.get(key, activation) != activation}
  for key in (
    'attention_bias', 'mlp_bias', 'use_sliding_window', 'attn_logit_softcapping',
    'final_logit_softcapping', 'use_bidirectional_attention'):  # fmt: skip
    unusual[key] = bool(raw.get(key))
  for key, set_so in unusual.items():
    if set_so:
      raise UserError(f'{folder}: config.json sets {key}={raw[key]!r}, which is not supported.')
  if outer.get('quantization_config') is not None:
    raise UserError(
      f'{folder}: config.json sets quantization_config={outer["quantization_config"]!r}, which is '
      'not supported; give the folder with bfloat16 or float32 weights.')
  try:
    heads = raw['num_attention_heads']
    return DecoderConfig(
      name=folder.resolve().name,
      family=family,
      vocab_size=raw['vocab_size'],
      embed_dim=raw['hidden_size'],
      num_layers=raw['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=raw.get('num_key_value_heads') or heads,
      head_dim=raw.get('head_dim') or raw['hidden_size'] // heads,
      mlp_dim=raw['intermediate_size'],
      norm_eps=float(raw.get('rms_norm_eps', 1e-6)),
      tie_embeddings=bool(raw.get('tie_word_embeddings', False)),
      query_pre_attn_scalar=raw.get('query_pre_attn_scalar', 0),
      max_position=raw.get('max_position_embeddings', 32768),
      param_dtype=dtype,
      **_positions(raw, family, folder),
      **QUIRKS[family],
    )
  except KeyError as error:
    raise UserError(f'{folder}: config.json has no {error.args[0]}; download it again.') from error


def _positions(raw: Mapping[str, Any], family: str, folder: pathlib.Path) -> dict[str, Any]:
  """The fields of a config about rotary positions and windows."""
  rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
  if family != 'gemma3':
    window = (raw.get('sliding_window') or 0) if family == 'ministral3' else 0
    return {
      'rope_theta': float(rope.get('rope_theta') or raw.get('rope_theta') or 10000.0),
      'rope_scaling': _scaling(rope, raw, folder),
      'sliding_window': window,
    }
  local = {'rope_theta': raw.get('rope_local_base_freq', 10000.0)}
  if 'full_attention' in rope:
    rope, local = rope['full_attention'], local | (rope.get('sliding_attention') or {})
  if local.get('rope_type', 'default') != 'default':
    raise UserError(
      f'{folder}: config.json scales the rotary positions of windowed layers by '
      f'{local["rope_type"]!r}, which is not supported.')
  layers = raw['num_hidden_layers']
  every = raw.get('sliding_window_pattern') or raw.get('_sliding_window_pattern') or 6
  kinds = raw.get('layer_types')
  if kinds is not None:
    # The pattern is stated by its result: the first global layer ends the first period.
    every = kinds.index('full_attention') + 1 if 'full_attention' in kinds else 0
    pattern = [
      'full_attention' if every and (i + 1) % every == 0 else 'sliding_attention'
      for i in range(layers)]
    if kinds != pattern:
      raise UserError(
        f'{folder}: config.json has layer_types that do not repeat with one global layer at the '
        'end of each period, which is not supported.')
  return {
    'rope_theta': float(rope.get('rope_theta') or raw.get('rope_theta') or 1e6),
    'rope_scaling': _scaling(rope, raw, folder),
    'local_rope_theta': float(local['rope_theta']),
    'sliding_window': raw.get('sliding_window') or 4096,
    'global_every': every,
  }


def _scaling(
  rope: Mapping[str, Any], raw: Mapping[str, Any], folder: pathlib.Path
) -> Scaling | None:
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind == 'linear':
    return LinearScaling(float(rope['factor']))
  if kind == 'llama3':
    return RopeScaling(
      factor=float(rope['factor']),
      low_freq_factor=float(rope['low_freq_factor']),
      high_freq_factor=float(rope['high_freq_factor']),
      original_max_position=rope['original_max_position_embeddings'],
    )
  if kind == 'yarn' and rope.get('truncate', True):
    return YarnScaling(
      factor=float(rope['factor']),
      original_max_position=(
        rope.get('original_max_position_embeddings') or raw['max_position_embeddings']),
      beta_fast=float(rope.get('beta_fast') or 32),
      beta_slow=float(rope.get('beta_slow') or 1),
      attention_factor=_attention_factor(rope),
      query_beta=float(rope.get('llama_4_scaling_beta') or 0),
    )
  raise UserError(
    f'{folder}: config.json asks for {kind!r} scaling of rotary positions; supported are '
    '"default", "linear", "llama3" and "yarn" (rounded to whole dimensions).')


def _attention_factor(rope: Mapping[str, Any]) -> float:
  """YaRN's factor of cosine and sine: stated, or from the two `mscale`, or from the factor."""
  if rope.get('attention_factor') is not None:
    return float(rope['attention_factor'])
  log = math.log(max(rope['factor'], 1.0))
  if rope.get('mscale') and rope.get('mscale_all_dim'):
    return (0.1 * rope['mscale'] * log + 1) / (0.1 * rope['mscale_all_dim'] * log + 1)
  return 0.1 * log + 1


def unsupported(path: pathlib.Path, kind: Any, supported=FAMILIES) -> UserError:
  return UserError(f'{path} is of architecture {kind!r}; supported are {", ".join(supported)}.')


def write(config: DecoderConfig, dtype: str = 'float32') -> dict[str, Any]:
  """The content of config.json for a folder of these weights, kept in `dtype`."""
  family = config.family
  rope = {'rope_type': 'default', 'rope_theta': config.rope_theta} | _scaling_json(config)
  settings = {
    'architectures': [ARCHITECTURES[family]],
    'model_type': 'gemma3_text' if family == 'gemma3' else family,
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'max_position_embeddings': config.max_position,
    'dtype': dtype,
  }
  if family == 'gemma3':
    return settings | {
      'hidden_activation': 'gelu_pytorch_tanh',
      'query_pre_attn_scalar': config.query_pre_attn_scalar or config.head_dim,
      'sliding_window': config.sliding_window,
      'layer_types': [
        'sliding_attention' if window else 'full_attention' for window in config.windows],
      'rope_parameters': {
        'full_attention': rope,
        'sliding_attention': {'rope_type': 'default', 'rope_theta': config.local_rope_theta},
      },
    }
  if family == 'ministral3':
    settings['sliding_window'] = config.sliding_window or None
  # `rope_theta` is also where readers from before `rope_parameters` look for it.
  return settings | {
    'hidden_act': 'silu', 'rope_parameters': rope, 'rope_theta': config.rope_theta}


def _scaling_json(config: DecoderConfig) -> dict[str, Any]:
  match config.rope_scaling:
    case None:
      return {}
    case LinearScaling(factor):
      return {'rope_type': 'linear', 'factor': factor}
    case RopeScaling() as scaling:
      return {
        'rope_type': 'llama3',
        'factor': scaling.factor,
        'low_freq_factor': scaling.low_freq_factor,
        'high_freq_factor': scaling.high_freq_factor,
        'original_max_position_embeddings': scaling.original_max_position,
      }
    case YarnScaling() as scaling:
      return {
        'rope_type': 'yarn',
        'factor': scaling.factor,
        'original_max_position_embeddings': scaling.original_max_position,
        'beta_fast': scaling.beta_fast,
        'beta_slow': scaling.beta_slow,
        'attention_factor': scaling.attention_factor,
      } | (
        {'llama_4_scaling_beta': scaling.query_beta} if config.family == 'ministral3' else {})
