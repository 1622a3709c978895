"""Random tiny `transformers` models (torch, float32), their weights under flat names."""

import numpy as np
import torch
import transformers

from models import registry
from models.families import DecoderConfig
from models.rope import LinearScaling, RopeScaling, YarnScaling

TINY = {'vocab_size': 97, 'embed_dim': 48, 'num_layers': 2, 'num_heads': 6, 'num_kv_heads': 2}
TINY |= {'head_dim': 8, 'mlp_dim': 80, 'max_position': 256}

CONFIGS = {
  'llama_tied': registry.shrink(registry.get_config('smollm2_135m'), **TINY),
  'llama_untied_scaled_rope': registry.shrink(
    registry.get_config('llama31_8b'),
    **TINY,
    # Short wavelengths, so that all three branches of the scaling are met.
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
  ),
  'qwen2_tied': registry.shrink(registry.get_config('qwen25_0.5b'), **TINY),
  'qwen2_untied': registry.shrink(registry.get_config('qwen25_7b'), **TINY),
  'qwen2_yarn': registry.shrink(
    registry.get_config('qwen25_7b'),
    **TINY,
    rope_scaling=YarnScaling(4.0, 32, beta_fast=8.0, attention_factor=1.25),
  ),
  # A head's width is not the embedding's over their number.
  'qwen3_tied': registry.shrink(registry.get_config('qwen3_4b'), **TINY | {'head_dim': 12}),
  'qwen3_untied': registry.shrink(registry.get_config('qwen3_8b'), **TINY | {'head_dim': 12}),
  'gemma3': registry.shrink(
    registry.get_config('gemma3_4b'),
    **TINY | {'num_layers': 5, 'head_dim': 12},
    sliding_window=9,
    global_every=3,
    query_pre_attn_scalar=7,
  ),
  # Short enough that the test's texts are stretched and their queries scaled.
  'ministral3': registry.shrink(
    registry.get_config('ministral3_8b'), **TINY, rope_scaling=YarnScaling(16.0, 16, query_beta=0.1)
  ),
  'ministral3_windowed': registry.shrink(
    registry.get_config('ministral3_8b'),
    **TINY,
    rope_scaling=YarnScaling(16.0, 16, query_beta=0.1),
    sliding_window=9,
  ),
}


def hf_config(config: DecoderConfig):
  """The `transformers` config of the same architecture."""
  rope = {'rope_type': 'default', 'rope_theta': config.rope_theta}
  scaling = config.rope_scaling
  if isinstance(scaling, RopeScaling):
    rope |= {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_freq_factor,
      'high_freq_factor': scaling.high_freq_factor,
      'original_max_position_embeddings': scaling.original_max_position,
    }
  elif isinstance(scaling, LinearScaling):
    rope |= {'rope_type': 'linear', 'factor': scaling.factor}
  elif isinstance(scaling, YarnScaling):
    rope |= {
      'rope_type': 'yarn',
      'factor': scaling.factor,
      'original_max_position_embeddings': scaling.original_max_position,
      'beta_fast': scaling.beta_fast,
      'beta_slow': scaling.beta_slow,
    }
    if config.family == 'ministral3':
      rope |= {'mscale': 1.0, 'mscale_all_dim': 1.0, 'llama_4_scaling_beta': scaling.query_beta}
    else:
      rope['attention_factor'] = scaling.attention_factor
  special = {'rope_parameters': rope}
  if config.family == 'gemma3':
    special = {
      'rope_parameters': {
        'full_attention': rope,
        'sliding_attention': {'rope_type': 'default', 'rope_theta': config.local_rope_theta},
      },
      'sliding_window': config.sliding_window,
      'sliding_window_pattern': config.global_every,
      'query_pre_attn_scalar': config.query_pre_attn_scalar,
    }
  elif config.family == 'ministral3':
    special['sliding_window'] = config.sliding_window or None
  kind = {
    'llama': transformers.LlamaConfig,
    'qwen2': transformers.Qwen2Config,
    'qwen3': transformers.Qwen3Config,
    'gemma3': transformers.Gemma3TextConfig,
    'ministral3': transformers.Ministral3Config,
  }[config.family]
  return kind(
    vocab_size=config.vocab_size,
    hidden_size=config.embed_dim,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.mlp_dim,
    rms_norm_eps=config.norm_eps,
    tie_word_embeddings=config.tie_embeddings,
    max_position_embeddings=config.max_position,
    # Inside these tiny vocabularies.
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation='eager',
    **special,
  )


def build(config: DecoderConfig, device: str = 'cpu'):
  """A random model in evaluation mode; on device 'meta' it has shapes and no numbers."""
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(hf_config(config), dtype=torch.float32)
  if device != 'meta':
    torch.manual_seed(0)
    centre = 0.0 if config.family == 'gemma3' else 1.0
    with torch.no_grad():
      for name, value in model.named_parameters():
        # Wider than the usual init and off-centre norms, so that a slip shows.
        value.normal_(centre if 'norm' in name else 0.0, 0.2)
  return model.eval()


def names(config: DecoderConfig) -> dict[str, tuple[str, bool]]:
  """Flat name -> (torch name with {} for the layer, whether the matrix is transposed)."""
  table = {
    'embed.embedding': ('model.embed_tokens.weight', False),
    'final_norm.scale': ('model.norm.weight', False),
    'blocks.attn_norm.scale': ('model.layers.{}.input_layernorm.weight', False),
    'blocks.mlp_norm.scale': ('model.layers.{}.post_attention_layernorm.weight', False),
  }
  if config.family == 'gemma3':
    for flat, name in (
      ('attn_post_norm', 'post_attention'),
      ('mlp_norm', 'pre_feedforward'),
      ('mlp_post_norm', 'post_feedforward'),
    ):
      table[f'blocks.{flat}.scale'] = ('model.layers.{}.' + f'{name}_layernorm.weight', False)
  if config.family in ('qwen3', 'gemma3'):
    for letter in 'qk':
      table[f'blocks.attn.{letter}_norm.scale'] = (
        'model.layers.{}.self_attn.' + f'{letter}_norm.weight',
        False,
      )
  for letter in 'qkvo':
    table[f'blocks.attn.{letter}.kernel'] = (
      'model.layers.{}.self_attn.' + f'{letter}_proj.weight',
      True,
    )
    if config.qkv_bias and letter != 'o':
      table[f'blocks.attn.{letter}.bias'] = (
        'model.layers.{}.self_attn.' + f'{letter}_proj.bias',
        False,
      )
  for name in ('gate', 'up', 'down'):
    table[f'blocks.mlp.{name}.kernel'] = ('model.layers.{}.mlp.' + f'{name}_proj.weight', True)
  if not config.tie_embeddings:
    table['head.kernel'] = ('lm_head.weight', True)
  return table


def params(config: DecoderConfig, model) -> dict[str, np.ndarray]:
  """The torch model's weights, stacked over layers, under flat names."""
  state = model.state_dict()
  result = {}
  for name, (pattern, transposed) in names(config).items():
    layers = range(config.num_layers) if '{}' in pattern else [None]
    arrays = [state[pattern.format(layer)].numpy() for layer in layers]
    arrays = [array.T if transposed else array for array in arrays]
    result[name] = np.stack(arrays) if '{}' in pattern else arrays[0]
  return result


def logits(model, tokens: np.ndarray) -> np.ndarray:
  """float32 [B, T, V] of int tokens [B, T]."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.numpy()
