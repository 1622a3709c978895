"""Weights in (Hugging Face folders, GGUF files) and out (folders), PEFT adapters in and out.

A checkpoint's tensors [out, in] become the decoder's kernels [in, out], stacked over the layers in
front for the scan. What is loaded are `stored.Parameter`s, which read a part when it is asked for:
`decoder.from_params` streams them into their shards.
"""

import dataclasses
import functools
import json
import math
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
from models import decoder, hf_config, quantise, stored
from models.families import DecoderConfig
from models.lora import LoraConfig
from models.rope import RopeScaling

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
  'attn.q_norm.scale': ('self_attn.q_norm.weight', 'attn_q_norm.weight'),
  'attn.k_norm.scale': ('self_attn.k_norm.weight', 'attn_k_norm.weight'),
  'mlp_norm.scale': ('post_attention_layernorm.weight', 'ffn_norm.weight'),
  'mlp.gate.kernel': ('mlp.gate_proj.weight', 'ffn_gate.weight'),
  'mlp.up.kernel': ('mlp.up_proj.weight', 'ffn_up.weight'),
  'mlp.down.kernel': ('mlp.down_proj.weight', 'ffn_down.weight'),
}
# Gemma's layers have four norms and call them otherwise.
_GEMMA3_LAYER_NAMES = {
  'attn_post_norm.scale': 'post_attention_layernorm.weight',
  'mlp_norm.scale': 'pre_feedforward_layernorm.weight',
  'mlp_post_norm.scale': 'post_feedforward_layernorm.weight',
}
_GGUF_FAMILIES = ('llama', 'qwen2', 'qwen3')
# Adapter target -> the module's path within a Hugging Face layer.
_PEFT_MODULES = {t: f'self_attn.{t}_proj' for t in ('q', 'k', 'v', 'o')} | {
  t: f'mlp.{t}_proj' for t in ('gate', 'up', 'down')
}
_PEFT_KEY = re.compile(
  r'base_model\.model\.model\.(?:language_model\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj'
  r'\.lora_([AB])\.weight'
)


def _names(config: DecoderConfig, flat: str, source: int, layer_prefix: str) -> list[str]:
  """The tensors of a flat parameter: one, or one a layer.

  Args:
    config: the architecture.
    flat: the parameter.
    source: column of the name tables, 0 Hugging Face, 1 GGUF.
    layer_prefix: of a layer's tensors, with '{}' for the layer.
  """
  if not flat.startswith('blocks.'):
    return [_GLOBAL_NAMES[flat][source]]
  flat = flat.removeprefix('blocks.')
  if config.family == 'gemma3' and flat in _GEMMA3_LAYER_NAMES:
    name = _GEMMA3_LAYER_NAMES[flat]
  else:
    name = _LAYER_NAMES[flat][source]
  return [layer_prefix.format(layer) + name for layer in range(config.num_layers)]


def load_pretrained(
  path: str | pathlib.Path, dtype: str = 'float32'
) -> tuple[DecoderConfig, dict[str, stored.Parameter]]:
  """Reads a decoder's architecture and checks its weights, whose numbers stay in the file.

  Args:
    path: a Hugging Face folder (config.json and one or several safetensors) or a .gguf file.
    dtype: 'float32' or 'bfloat16', in which kernels and embedding are kept; norms and biases are
      float32. Compute dtype is the caller's choice and stays 'float32' in the config.

  Returns:
    The config, and flat name -> parameter in the decoder's layout (`np.asarray` reads all of it).

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
  find: Callable[[str], stored.Tensor],
  where: pathlib.Path,
) -> dict[str, stored.Parameter]:
  """Makes the decoder's flat parameters of a checkpoint's tensors.

  Args:
    config: the architecture; its abstract model gives every name, shape and dtype.
    source: column of the name tables, 0 Hugging Face, 1 GGUF.
    layer_prefix: of a layer's tensors, with '{}' for the layer.
    available: names of all tensors in the checkpoint.
    find: name -> tensor [out, in].
    where: the checkpoint, for messages.

  Returns:
    Flat name -> parameter.

  Raises:
    UserError: a tensor is missing, unknown, or of the wrong shape.
  """
  wanted = decoder.to_params(decoder.abstract(config).frozen)
  names = {flat: _names(config, flat, source, layer_prefix) for flat in wanted}
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
    want, transposed = wanted[flat], flat.endswith('.kernel')
    each = want.shape[1:] if flat.startswith('blocks.') else want.shape
    tensors = [find(name) for name in group]
    for name, tensor in zip(group, tensors, strict=True):
      if tensor.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise UserError(f'{where}: {name} holds no floats; only float weights can be read.')
      if tensor.shape != (each[::-1] if transposed else each):
        raise UserError(
          f'{where}: {name} has shape {tensor.shape}, which does not fit the architecture it '
          f'states ({config.family}, {each} as {flat}); download it again.'
        )
    params[flat] = stored.Parameter(tuple(tensors), want.shape, want.dtype, transposed)
  return params


def _load_folder(
  folder: pathlib.Path, dtype: str
) -> tuple[DecoderConfig, dict[str, stored.Parameter]]:
  config = hf_config.read(model_folder.read_json(folder / 'config.json'), folder, dtype)
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    files = model_folder.read_json(index).get('weight_map', {})
  else:
    files = dict.fromkeys(_open(folder / 'model.safetensors').keys(), 'model.safetensors')
  handles = {file: _open(folder / file) for file in sorted(set(files.values()))}
  # Of a multimodal model only the text model is wanted, under the names of a text model.
  names = {name: name for name in files}
  if any('language_model.' in name for name in files):
    names = {
      name.replace('model.language_model.', 'model.').removeprefix('language_model.'): name
      for name in files
      if 'language_model.' in name or name == 'lm_head.weight'}
    config = dataclasses.replace(config, tie_embeddings='lm_head.weight' not in names)
  elif 'embed_tokens.weight' in files:  # a model without a head, for embeddings
    names = {f'model.{name}': name for name in files}
    config = dataclasses.replace(config, tie_embeddings=True)
  available = {
    name
    for name in names
    if not name.endswith('rotary_emb.inv_freq')  # a buffer of old checkpoints
    and not (config.tie_embeddings and name == 'lm_head.weight')
  }

  def find(name):
    file, name = files[names[name]], names[name]
    if name not in handles[file].keys():  # noqa: SIM118 (a handle is not a mapping)
      raise UserError(f'{folder / file}: {name} cannot be read (it is not in the file).')
    return stored.SafeTensor.describe(handles[file], folder / file, name)

  params = _assemble(config, 0, 'model.layers.{}.', available, find, folder)
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


def _load_gguf(
  path: pathlib.Path, dtype: str
) -> tuple[DecoderConfig, dict[str, stored.Parameter]]:
  file = GGUFFile(path)
  family = file.metadata.get('general.architecture')
  if family not in _GGUF_FAMILIES:
    raise hf_config.unsupported(path, family, _GGUF_FAMILIES)

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
    max_position=field('context_length'),
    param_dtype=dtype,
    **hf_config.QUIRKS[family],
  )

  def load(name):
    tensor = file.array(name)
    if family == 'llama' and re.fullmatch(r'blk\.\d+\.attn_[qk]\.weight', name):
      tensor = _unpermute(tensor, config.head_dim)
    return tensor

  def find(name):
    return stored.WholeTensor(tuple(file.tensors[name].shape), functools.partial(load, name))

  available = set(file.tensors) - {'rope_freqs.weight'}
  return config, _assemble(config, 1, 'blk.{}.', available, find, path)


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


def export_pretrained(
  folder: str | pathlib.Path,
  config: DecoderConfig,
  params: Mapping[str, np.ndarray],
  *,
  adapter: tuple[LoraConfig, Mapping[str, np.ndarray]] | None = None,
  dtype: str | None = None,
  max_shard_bytes: float = 5e9,
) -> None:
  """Writes a whole model as a Hugging Face folder: config.json and safetensors.

  What `load_pretrained` reads back to the same arrays. The tokenizer's files are not written.

  Args:
    folder: made if missing. Its weights and config are replaced file by file, each atomically, the
      config last; shards of an earlier export that are left over are removed.
    config: the architecture.
    params: flat name -> array of all its parameters. Where the config says that the base is
      quantised, what is written is what the codes of these kernels stand for.
    adapter: shape and arrays of one that is folded in, W + A B alpha / R in float32.
    dtype: in which all tensors are written, 'float32' or 'bfloat16'; None keeps their own.
    max_shard_bytes: a file holds at most so many bytes of tensors, or one tensor.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  lora_config, lora_params = adapter or (None, {})

  def tensor(flat, layer):
    value = params[flat]
    # Sliced on every axis: weights that are still in files are read in such parts.
    index = [slice(None)] * len(value.shape)
    if layer is not None:
      index[0] = slice(layer, layer + 1)
    array = np.asarray(value[tuple(index)])
    array = array if layer is None else array[0]
    if config.base_quantization != 'none' and quantise.names([flat]):
      codes = quantise.quantise_layer(array, config.base_quantization)
      wide = quantise.dequantise_layer(*codes, config.base_quantization)
      array = np.asarray(wide).astype(array.dtype)
    a = lora_params.get(f'{flat.removesuffix(".kernel")}.lora_a')
    if a is not None:
      a = np.asarray(a[layer], np.float32)
      b = np.asarray(lora_params[f'{flat.removesuffix(".kernel")}.lora_b'][layer], np.float32)
      array = (array.astype(np.float32) + a @ b * lora_config.scale).astype(array.dtype)
    array = array.T if flat.endswith('.kernel') else array
    return np.ascontiguousarray(array if dtype is None else array.astype(dtype))

  shards, size, total = [{}], 0, 0
  for flat, value in params.items():
    names = _names(config, flat, 0, 'model.layers.{}.')
    stacked = flat.startswith('blocks.')
    each = math.prod(value.shape[stacked:]) * np.dtype(dtype or value.dtype).itemsize
    for layer, name in enumerate(names):
      if shards[-1] and size + each > max_shard_bytes:
        shards.append({})
        size = 0
      shards[-1][name] = (flat, layer if stacked else None)
      size, total = size + each, total + each
  files = ['model.safetensors']
  if len(shards) > 1:
    files = [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
  for file, shard in zip(files, shards, strict=True):
    tensors = {name: tensor(*place) for name, place in shard.items()}
    partial = folder / f'{file}.partial'
    safetensors.numpy.save_file(tensors, partial, metadata={'format': 'pt'})
    os.replace(partial, folder / file)
  index = folder / 'model.safetensors.index.json'
  for old in {*folder.glob('model*.safetensors'), index} - {folder / file for file in files}:
    old.unlink(missing_ok=True)
  if len(shards) > 1:
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    _write_json(index, {'metadata': {'total_size': total}, 'weight_map': where})
  kept = {dtype or str(value.dtype) for value in params.values() if len(value.shape) > 1}
  _write_json(
    folder / 'config.json', hf_config.write(config, kept.pop() if len(kept) == 1 else 'float32'))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
  os.replace(partial, path)


def export_peft(
  folder: str | pathlib.Path,
  config: DecoderConfig,
  lora_config: LoraConfig,
  lora_params: Mapping[str, np.ndarray],
  base_model_name: str,
  *,
  multimodal: bool = False,
) -> None:
  """Writes an adapter as a PEFT folder, which `peft` and vLLM load.

  Args:
    folder: made if missing; its adapter files are replaced one by one, each atomically.
    config: the base model's architecture.
    lora_config: the adapter's shape.
    lora_params: flat name -> array, lora_a [L, in, R] and lora_b [L, R, out], kept in their dtype.
    base_model_name: written as `base_model_name_or_path`, e.g. a Hugging Face id.
    multimodal: the base is the text model of a model that also reads images (Gemma 3, Ministral 3
      as they are published): its layers lie deeper, and those of the images get no adapter.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for flat, layer_arrays in lora_params.items():
    target, factor = flat.split('.')[-2:]
    layer_arrays = np.asarray(layer_arrays)
    for layer in range(config.num_layers):
      inside = 'language_model.layers' if multimodal else 'layers'
      key = f'base_model.model.model.{inside}.{layer}.{_PEFT_MODULES[target]}'
      key += f'.lora_{factor[-1].upper()}.weight'
      tensors[key] = np.ascontiguousarray(layer_arrays[layer].T)
  alpha = lora_config.alpha
  targets = [f'{target}_proj' for target in lora_config.targets]
  if multimodal:
    targets = rf'.*\.language_model\.layers\.\d+\.(self_attn|mlp)\.({"|".join(targets)})'
  settings = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model_name,
    'r': lora_config.rank,
    'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
    'lora_dropout': lora_config.dropout,
    'target_modules': targets,
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
  _write_json(folder / 'adapter_config.json', settings)


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
