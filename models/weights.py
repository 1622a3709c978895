"""Weights in (Hugging Face folders, GGUF files) and out (folders), PEFT adapters in and out.

A checkpoint's tensors [out, in] become the decoder's kernels [in, out], stacked over the layers in
front for the scan. Tensors are read one at a time into preallocated arrays, so loading needs the
model's own size and one tensor more.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from data import model_folder
from data.errors import UserError
from data.gguf import GGUFFile
from models import decoder
from models.decoder import DecoderConfig
from models.layers import RopeScaling
from models.lora import LoraConfig

# Flat name -> (Hugging Face name, GGUF name); '{}' is the layer. Kernels are transposed on the way.
_GLOBAL_NAMES = {
  'embed.embedding': ('model.embed_tokens.weight', 'token_embd.weight'),
  'final_norm.scale': ('model.norm.weight', 'output_norm.weight'),
  'head.kernel': ('lm_head.weight', 'output.weight'),
}
_LAYER_NAMES = {
  'attn_norm.scale': ('input_layernorm.weight', 'attn_norm.weight'),
  'attn.q.kernel': ('self_attn.q_proj.weight', 'attn_q.weight'),
  'attn.k.kernel': ('self_attn.k_proj.weight', 'attn_k.weight'),
  'attn.v.kernel': ('self_attn.v_proj.weight', 'attn_v.weight'),
  'attn.q.bias': ('self_attn.q_proj.bias', 'attn_q.bias'),
  'attn.k.bias': ('self_attn.k_proj.bias', 'attn_k.bias'),
  'attn.v.bias': ('self_attn.v_proj.bias', 'attn_v.bias'),
  'attn.o.kernel': ('self_attn.o_proj.weight', 'attn_output.weight'),
  'mlp_norm.scale': ('post_attention_layernorm.weight', 'ffn_norm.weight'),
  'mlp.gate.kernel': ('mlp.gate_proj.weight', 'ffn_gate.weight'),
  'mlp.up.kernel': ('mlp.up_proj.weight', 'ffn_up.weight'),
  'mlp.down.kernel': ('mlp.down_proj.weight', 'ffn_down.weight'),
}
# Adapter target -> the module's path within a Hugging Face layer.
_PEFT_MODULES = {t: f'self_attn.{t}_proj' for t in ('q', 'k', 'v', 'o')} | {
  t: f'mlp.{t}_proj' for t in ('gate', 'up', 'down')
}
_PEFT_KEY = re.compile(
  r'base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.weight'
)


def load_pretrained(
  path: str | pathlib.Path, dtype: str = 'float32'
) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
  """Reads a decoder's architecture and weights.

  Args:
    path: a Hugging Face folder (config.json and one or several safetensors) or a .gguf file.
    dtype: 'float32' or 'bfloat16', in which kernels and embedding are kept; norms and biases are
      float32. Compute dtype is the caller's choice and stays 'float32' in the config.

  Returns:
    The config, and flat name -> array in the decoder's layout.

  Raises:
    UserError: a file or tensor is missing, truncated or of the wrong shape, or the architecture is
      not supported.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _load_folder(path, dtype)
  if not path.exists():
    raise UserError(f'there are no weights at {path}; give a Hugging Face folder or a .gguf file.')
  return _load_gguf(path, dtype)


def _assemble(
  config: DecoderConfig,
  source: int,
  layer_prefix: str,
  available: set[str],
  read: Callable[[str], np.ndarray],
  where: pathlib.Path,
) -> dict[str, np.ndarray]:
  """Fills the decoder's flat arrays from a checkpoint's tensors.

  Args:
    config: the architecture; its abstract model gives every name, shape and dtype.
    source: column of the name tables, 0 Hugging Face, 1 GGUF.
    layer_prefix: of a layer's tensors, with '{}' for the layer.
    available: names of all tensors in the checkpoint.
    read: name -> array [out, in].
    where: the checkpoint, for messages.

  Returns:
    Flat name -> array.

  Raises:
    UserError: a tensor is missing, unknown, or of the wrong shape.
  """
  wanted = decoder.to_params(decoder.abstract(config).frozen)
  names = {}
  for flat in wanted:
    if flat.startswith('blocks.'):
      name = layer_prefix + _LAYER_NAMES[flat.removeprefix('blocks.')][source]
      names[flat] = [name.format(layer) for layer in range(config.num_layers)]
    else:
      names[flat] = [_GLOBAL_NAMES[flat][source]]
  needed = {name for group in names.values() for name in group}
  missing, unknown = sorted(needed - available), sorted(available - needed)
  if missing:
    raise UserError(
      f'{where} lacks {len(missing)} tensors of a {config.family} model with {config.num_layers} '
      f'layers, the first is {missing[0]}; download it again.'
    )
  if unknown:
    raise UserError(
      f'{where} holds {len(unknown)} tensors that a {config.family} model does not have, the first '
      f'is {unknown[0]}; this variant of the architecture is not supported.'
    )
  params = {}
  for flat, group in names.items():
    want, stacked = wanted[flat], flat.startswith('blocks.')
    array = np.empty(want.shape, want.dtype)
    for layer, name in enumerate(group):
      slot = array[layer] if stacked else array
      tensor = read(name)
      if tensor.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise UserError(f'{where}: {name} is {tensor.dtype}; only float weights can be read.')
      tensor = tensor.T if flat.endswith('.kernel') else tensor
      if tensor.shape != slot.shape:
        shape = tensor.T.shape if flat.endswith('.kernel') else tensor.shape
        raise UserError(
          f'{where}: {name} has shape {shape}, which does not fit the architecture it states '
          f'({config.family}, {slot.shape} as {flat}); download it again.'
        )
      slot[...] = tensor
    params[flat] = array
  return params


def _load_folder(
  folder: pathlib.Path, dtype: str
) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
  config = _config_from_hf(model_folder.read_json(folder / 'config.json'), folder, dtype)
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    files = model_folder.read_json(index).get('weight_map', {})
  else:
    files = dict.fromkeys(_open(folder / 'model.safetensors').keys(), 'model.safetensors')
  handles = {file: _open(folder / file) for file in sorted(set(files.values()))}
  available = {
    name
    for name in files
    if not name.endswith('rotary_emb.inv_freq')  # a buffer of old checkpoints
    and not (config.tie_embeddings and name == 'lm_head.weight')
  }

  def read(name):
    try:
      return handles[files[name]].get_tensor(name)
    except safetensors.SafetensorError as error:
      raise UserError(f'{folder / files[name]}: {name} cannot be read ({error}).') from error

  params = _assemble(config, 0, 'model.layers.{}.', available, read, folder)
  return config, params


def _open(path: pathlib.Path):
  if not path.is_file():
    raise UserError(f'{path} is missing; give the folder of a whole model with safetensors.')
  try:
    return safetensors.safe_open(path, framework='np')
  except safetensors.SafetensorError as error:
    raise UserError(
      f'{path} is truncated or damaged ({error}); download it again.'
    ) from error


def _config_from_hf(raw: dict[str, Any], folder: pathlib.Path, dtype: str) -> DecoderConfig:
  family = raw.get('model_type')
  if family not in decoder.FAMILIES:
    raise _unsupported(folder, family)
  unusual = {
    'hidden_act': raw.get('hidden_act', 'silu') != 'silu',
    'attention_bias': bool(raw.get('attention_bias')),
    'mlp_bias': bool(raw.get('mlp_bias')),
    'use_sliding_window': bool(raw.get('use_sliding_window')),
    'quantization_config': raw.get('quantization_config') is not None,
  }
  for key, set_so in unusual.items():
    if set_so:
      raise UserError(f'{folder}: config.json sets {key}={raw[key]!r}, which is not supported.')
  rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
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
      rope_theta=float(rope.get('rope_theta') or raw.get('rope_theta') or 10000.0),
      rope_scaling=_rope_scaling_from_hf(rope, folder),
      norm_eps=float(raw.get('rms_norm_eps', 1e-6)),
      tie_embeddings=bool(raw.get('tie_word_embeddings', False)),
      qkv_bias=family == 'qwen2',
      max_position=raw.get('max_position_embeddings', 32768),
      param_dtype=dtype,
    )
  except KeyError as error:
    raise UserError(f'{folder}: config.json has no {error.args[0]}; download it again.') from error


def _rope_scaling_from_hf(rope: Mapping[str, Any], folder: pathlib.Path) -> RopeScaling | None:
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind != 'llama3':
    raise UserError(
      f'{folder}: config.json asks for {kind!r} scaling of rotary positions; supported are '
      '"default" and "llama3".'
    )
  return RopeScaling(
    factor=float(rope['factor']),
    low_freq_factor=float(rope['low_freq_factor']),
    high_freq_factor=float(rope['high_freq_factor']),
    original_max_position=rope['original_max_position_embeddings'],
  )


def _load_gguf(path: pathlib.Path, dtype: str) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
  file = GGUFFile(path)
  family = file.metadata.get('general.architecture')
  if family not in decoder.FAMILIES:
    raise _unsupported(path, family)

  def field(key, default=None):
    value = file.metadata.get(f'{family}.{key}', default)
    if value is None:
      raise UserError(f'{path}: the metadata has no {family}.{key}; use another conversion.')
    return value

  if field('rope.scaling.type', 'none') != 'none':
    raise UserError(
      f'{path} asks for {field("rope.scaling.type")!r} scaling of rotary positions, which is not '
      'supported.'
    )
  if 'token_embd.weight' not in file.tensors:
    raise UserError(f'{path} has no token_embd.weight; it is not a language model.')
  heads, embed_dim = field('attention.head_count'), field('embedding_length')
  head_dim = field('attention.key_length', embed_dim // heads)
  rope_theta = float(field('rope.freq_base', 10000.0))
  config = DecoderConfig(
    name=path.stem,
    family=family,
    vocab_size=file.tensors['token_embd.weight'].shape[0],
    embed_dim=embed_dim,
    num_layers=field('block_count'),
    num_heads=heads,
    num_kv_heads=field('attention.head_count_kv', heads),
    head_dim=head_dim,
    mlp_dim=field('feed_forward_length'),
    rope_theta=rope_theta,
    rope_scaling=_rope_scaling_from_gguf(file, head_dim, rope_theta),
    # The float32 of the metadata, as the decimal number it was written from.
    norm_eps=float(np.format_float_scientific(
      np.float32(field('attention.layer_norm_rms_epsilon')), unique=True
    )),
    tie_embeddings='output.weight' not in file.tensors,
    qkv_bias=family == 'qwen2',
    max_position=field('context_length'),
    param_dtype=dtype,
  )

  def read(name):
    tensor = file.array(name)
    if family == 'llama' and re.fullmatch(r'blk\.\d+\.attn_[qk]\.weight', name):
      tensor = _unpermute(tensor, config.head_dim)
    return tensor

  available = set(file.tensors) - {'rope_freqs.weight'}
  return config, _assemble(config, 1, 'blk.{}.', available, read, path)


def _unpermute(kernel: np.ndarray, head_dim: int) -> np.ndarray:
  """Puts the rows of a Llama GGUF's query or key kernel back in the rotate-half order.

  llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ...; its converter interleaves the halves of
  each head for it. Rotate-half RoPE pairs (0, H/2), (1, H/2 + 1), ... .

  Args:
    kernel: [heads * H, D].
    head_dim: H.

  Returns:
    [heads * H, D].
  """
  pairs = kernel.reshape(-1, head_dim // 2, 2, kernel.shape[1])
  return pairs.swapaxes(1, 2).reshape(kernel.shape)


def _rope_scaling_from_gguf(
  file: GGUFFile, head_dim: int, theta: float
) -> RopeScaling | None:
  """A GGUF keeps Llama 3.1's scaling as the factors themselves: recognise them."""
  if 'rope_freqs.weight' not in file.tensors:
    return None
  factors = file.array('rope_freqs.weight')
  scaling = RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
  frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  turns = scaling.original_max_position * frequencies / (2 * np.pi)
  smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
  expected = 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
  if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
    raise UserError(
      f'{file.path} scales rotary positions in another way than Llama 3.1, which is not supported.'
    )
  return scaling


def _unsupported(path: pathlib.Path, family: Any) -> UserError:
  return UserError(
    f'{path} is of architecture {family!r}; supported are {", ".join(decoder.FAMILIES)}.'
  )


def hf_settings(config: DecoderConfig, dtype: str = 'float32') -> dict[str, Any]:
  """The content of a Hugging Face config.json of this architecture."""
  rope = {'rope_type': 'default', 'rope_theta': config.rope_theta}
  if config.rope_scaling is not None:
    rope['rope_type'] = 'llama3'
    rope |= dataclasses.asdict(config.rope_scaling)
    rope['original_max_position_embeddings'] = rope.pop('original_max_position')
  return {
    'architectures': [{'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}[config.family]],
    'model_type': config.family,
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'hidden_act': 'silu',
    'rope_parameters': rope,
    # Where readers from before `rope_parameters` look for it.
    'rope_theta': config.rope_theta,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'max_position_embeddings': config.max_position,
    'dtype': dtype,
  }


def export_pretrained(
  folder: str | pathlib.Path, config: DecoderConfig, params: Mapping[str, np.ndarray]
) -> None:
  """Writes a whole model as a Hugging Face folder: config.json and model.safetensors.

  What `load_pretrained` reads back to the same arrays. The tokenizer's files are not written.

  Args:
    folder: made if missing; its two files are replaced one by one, each atomically.
    config: the architecture.
    params: flat name -> array of all its parameters, kept in their dtype.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for flat, value in params.items():
    arrays, names = [np.asarray(value)], [_GLOBAL_NAMES.get(flat, ('',))[0]]
    if flat.startswith('blocks.'):
      name = 'model.layers.{}.' + _LAYER_NAMES[flat.removeprefix('blocks.')][0]
      arrays, names = list(arrays[0]), [name.format(i) for i in range(config.num_layers)]
    for name, array in zip(names, arrays, strict=True):
      tensors[name] = np.ascontiguousarray(array.T if flat.endswith('.kernel') else array)
  dtypes = {str(array.dtype) for array in tensors.values() if array.ndim > 1}
  settings = hf_settings(config, dtypes.pop() if len(dtypes) == 1 else 'float32')
  partial = folder / 'model.safetensors.partial'
  safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
  os.replace(partial, folder / 'model.safetensors')
  partial = folder / 'config.json.partial'
  partial.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
  os.replace(partial, folder / 'config.json')


def export_peft(
  folder: str | pathlib.Path,
  config: DecoderConfig,
  lora_config: LoraConfig,
  lora_params: Mapping[str, np.ndarray],
  base_model_name: str,
) -> None:
  """Writes an adapter as a PEFT folder, which `peft` and vLLM load.

  Args:
    folder: made if missing; its adapter files are replaced one by one, each atomically.
    config: the base model's architecture.
    lora_config: the adapter's shape.
    lora_params: flat name -> array, lora_a [L, in, R] and lora_b [L, R, out], kept in their dtype.
    base_model_name: written as `base_model_name_or_path`, e.g. a Hugging Face id.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for flat, layer_arrays in lora_params.items():
    target, factor = flat.split('.')[-2:]
    layer_arrays = np.asarray(layer_arrays)
    for layer in range(config.num_layers):
      key = f'base_model.model.model.layers.{layer}.{_PEFT_MODULES[target]}'
      key += f'.lora_{factor[-1].upper()}.weight'
      tensors[key] = np.ascontiguousarray(layer_arrays[layer].T)
  alpha = lora_config.alpha
  settings = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model_name,
    'r': lora_config.rank,
    'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
    'lora_dropout': lora_config.dropout,
    'target_modules': [f'{target}_proj' for target in lora_config.targets],
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'modules_to_save': None,
    'use_dora': False,
    'use_rslora': False,
  }
  partial = folder / 'adapter_model.safetensors.partial'
  safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
  os.replace(partial, folder / 'adapter_model.safetensors')
  partial = folder / 'adapter_config.json.partial'
  partial.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
  os.replace(partial, folder / 'adapter_config.json')


def load_peft(
  folder: str | pathlib.Path, config: DecoderConfig
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
  """Reads a PEFT adapter.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    config: the base model's architecture.

  Returns:
    The adapter's shape, and flat name -> array [L, in, R] or [L, R, out] in the stored dtype.

  Raises:
    UserError: a file or tensor is missing, damaged or does not fit the base model, or the adapter
      uses more than plain LoRA on the seven projections.
  """
  folder = pathlib.Path(folder)
  settings = model_folder.read_json(folder / 'adapter_config.json')
  if settings.get('peft_type') != 'LORA':
    raise UserError(f'{folder} is a {settings.get("peft_type")} adapter; only LORA can be read.')
  extras = ('use_dora', 'use_rslora', 'modules_to_save', 'rank_pattern', 'alpha_pattern')
  extras += ('layers_to_transform', 'layer_replication', 'lora_bias')
  used = [key for key in extras if settings.get(key)]
  used += ['bias'] if settings.get('bias', 'none') != 'none' else []
  if used:
    raise UserError(f'{folder} uses {used[0]}={settings[used[0]]!r}; only plain LoRA can be read.')
  file = _open(folder / 'adapter_model.safetensors')
  keys, targets = {}, set()
  for key in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
    match = _PEFT_KEY.fullmatch(key)
    if not match or match[2] not in _PEFT_MODULES or int(match[1]) >= config.num_layers:
      raise UserError(
        f'{folder}: tensor {key} has no place in {config.name} ({config.num_layers} layers); the '
        'adapter is for another base model.'
      )
    keys[match[2], match[3], int(match[1])] = key
    targets.add(match[2])
  try:
    lora_config = LoraConfig(
      rank=settings['r'],
      alpha=settings['lora_alpha'],
      dropout=settings.get('lora_dropout', 0.0),
      targets=tuple(targets),
    )
  except KeyError as error:
    raise UserError(f'{folder}: adapter_config.json has no {error.args[0]}.') from error
  params = {}
  for flat, want in decoder.to_params(decoder.abstract(config, lora_config).lora).items():
    target, factor = flat.split('.')[-2:]
    layers = []
    for layer in range(config.num_layers):
      key = keys.get((target, factor[-1].upper(), layer))
      if key is None:
        raise UserError(f'{folder} has no {factor} for {target}_proj of layer {layer}.')
      tensor = file.get_tensor(key).T
      if tensor.shape != want.shape[1:]:
        raise UserError(
          f'{folder}: {key} has shape {tensor.shape[::-1]}, {config.name} at rank '
          f'{lora_config.rank} needs {want.shape[:0:-1]}; the adapter is for another base model.'
        )
      layers.append(tensor)
    params[flat] = np.stack(layers)
  return lora_config, params
