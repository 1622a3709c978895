"""Compiles the real programs for machines that are not there, and says what they will take.

  python -m experiments.aot --model=qwen25_14b --topology=v5e:8x8 --program=train
  python -m experiments.aot --topology=h200 --program=decode --slots=256 --max_len=8192

The train step, prefill or decode of this repository, Pallas kernels included, by the compilers for
TPUs (libtpu) and for NVIDIA GPUs (`make gpu-compiler`), which need neither: memory of a device by
part, FLOPs and bytes counted from the architecture, what is sent to other devices read from the
compiled program, and from these how fast it can be at best. Exit code 1 where it does not fit, with
what would.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

import jax
from absl import flags

from configs import cli
from data import errors, summary
from data import workdir as workdir_lib
from experiments import aot_programs, gpu_compiler
from experiments.aot_programs import Settings
from models import chips, cost, decoder, hlo, memory, registry, sharding
from models.lora import LoraConfig
from training import remat as remat_lib

PROGRAMS = ('train', 'prefill', 'decode')
_GIB = 2**30
# The settings that are flags.
_FLAGS = {
  'batch_rows': 'Rows of a train step, on all devices; 0 is one a device.',
  'row_len': 'Tokens of a row.',
  'rank': 'Of the adapter.',
  'remat': 'What the backward pass computes again: auto, none, mlp, full.',
  'slots': 'Conversations at a time, on all devices; 0 is 32 a data shard.',
  'max_len': 'Tokens that a slot can hold; all of them are attended.',
  'decode_steps': 'Tokens that a slot samples in one dispatch.',
  'cache_dtype': "Of keys and values: float32, bfloat16, int8; '' is that of the model.",
}
_PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax')


def check(
  model: str,
  topology: str,
  program: str,
  *,
  mesh: str = 'auto',
  slices: int = 1,
  settings: Settings | None = None,
  config: decoder.DecoderConfig | None = None,
  text_path: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles a program and counts.

  Args:
    model: a name of `models.registry`.
    topology: as in 'v5e:8x8', of one slice; or GPUs of `chips.GPUS`, as in 'h200:8'.
    program: one of PROGRAMS.
    mesh: auto, or sizes as `sharding.parse_sizes` takes them.
    slices: how many.
    settings: shapes; zeros are filled in.
    config: None is that of the model, in bfloat16.
    text_path: file for the compiled program's text.

  Returns:
    A record for JSON: what was compiled, 'fits', 'memory' (bytes of a device, by part), 'flops',
    'traffic', 'collectives', 'seconds' (by resource), 'tokens_per_s' and 'mfu' (at best, and with
    nothing overlapped). Where the compiler refused, only what it said and the estimate.

  Raises:
    errors.UserError: a name is wrong, a mesh does not divide, or the compiler is missing.
  """
  if program not in PROGRAMS:
    raise errors.UserError(f'--program={program}: choose from {", ".join(PROGRAMS)}.')
  if slices > 1 and program != 'train':
    raise errors.UserError('Inference does not span slices; give --slices with --program=train.')
  gpu = chips.GPUS.get(topology.partition(':')[0])
  if gpu and slices > 1:
    raise errors.UserError(f'--topology={topology} has no slices; they are of TPUs.')
  kind = 'gpu' if gpu else 'tpu'
  settings = settings or Settings()
  if settings.cache_dtype not in ('', 'float32', 'bfloat16', 'int8'):
    raise errors.UserError(
      f'--cache_dtype={settings.cache_dtype}: choose from float32, bfloat16, int8.')
  config = config or registry.get_config(model, dtype='bfloat16')
  devices = aot_programs.find_devices(topology, slices)
  chip = gpu or chips.CHIPS[re.split('[:=_]', topology)[0]]
  sizes, modes, settings = _plan(config, program, mesh, slices, len(devices), chip, settings)
  if min(sizes.values()) > 0:
    aot_programs.check_mesh(config, sizes, settings, program)
  grid = sharding.make_mesh(**sizes, devices=devices)
  aot_programs.check_mesh(config, grid.shape, settings, program)
  record = {
    'model': model, 'topology': topology, 'slices': slices, 'devices': grid.size,
    'compiler': devices[0].platform,
    'program': program, 'mesh': dict(grid.shape), 'settings': dataclasses.asdict(settings),
    'hbm_bytes': chip.hbm_bytes, 'limit_bytes': chip.program_bytes,
    'versions': summary.versions(_PACKAGES)}

  started = time.perf_counter()
  for remat in modes:
    if program == 'train':
      lowered, parts = aot_programs.lower_train(config, grid, settings, remat, kind)
      lowered = [lowered]
      record['remat'] = remat
    else:
      lowered, parts = aot_programs.lower_inference(config, grid, settings, program, kind)
    try:
      compiled, *others = [program.compile() for program in lowered]
      break
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      refused = str(error).splitlines()[0]
      record.setdefault('refused', {})[remat] = refused
  else:
    return record | {
      'fits': False, 'memory': parts, 'compile_s': time.perf_counter() - started,
      'would_fit': would_fit(config, program, dict(grid.shape), chip, settings)}
  record['compile_s'] = time.perf_counter() - started

  stats = compiled.memory_analysis()
  need = remat_lib.program_bytes(compiled)
  record['memory'] = {
    **parts,
    'other arguments': stats.argument_size_in_bytes - sum(parts.values()),
    'temporaries': stats.temp_size_in_bytes,
    'code and results': need - stats.argument_size_in_bytes - stats.temp_size_in_bytes,
  }
  for other in others:
    # The weights stay where they are while what was decoded is written to the cache.
    more = max(0, parts['weights'] + remat_lib.program_bytes(other) - need)
    record['memory']['temporaries'] += more
    need += more
  record['need_bytes'], record['fits'] = need, need <= chip.program_bytes
  if not record['fits']:
    record['would_fit'] = would_fit(config, program, dict(grid.shape), chip, settings)
  text = compiled.as_text()
  if text_path is not None:
    text_path.write_text(text)
  traffic = hlo.collectives(
    text, grid.size, num_slices=slices, dynamic_trips=settings.decode_steps)
  return record | _speed(config, program, grid.shape, chip, settings, record, traffic)


def _plan(config, program, mesh, slices, num_devices, chip, settings):
  """Sizes for `make_mesh`, the remat modes to try in turn, and settings without zeros."""
  lora = LoraConfig(settings.rank, 2.0 * settings.rank)
  if program == 'train':
    settings = dataclasses.replace(settings, batch_rows=settings.batch_rows or num_devices)
    plans = memory.plans(
      decoder.abstract(config, lora), num_devices=num_devices, slices=slices,
      memory=chip.program_bytes, batch_rows=settings.batch_rows, row_len=settings.row_len)
  else:
    plans = aot_programs.inference_plans(config, num_devices, chip.program_bytes, settings)
  if mesh == 'auto':
    if not plans:
      raise errors.UserError(
        f'--slots={settings.slots} do not divide over {num_devices} devices in any mesh.')
    sizes = dict(plans[0].sizes)
  else:
    sizes = {'slice': slices, **sharding.parse_sizes(mesh)}
    plans = [p for p in plans if p.sizes == sizes]
  if program != 'train':
    shards = max(sizes['data'], 1)
    return sizes, ['none'], dataclasses.replace(
      settings, slots=settings.slots or aot_programs.SLOTS * shards,
      blocks=settings.blocks or aot_programs.BLOCKS * shards)
  if settings.remat != 'auto':
    if settings.remat not in decoder.REMAT:
      raise errors.UserError(
        f'--remat={settings.remat}: choose auto, {", ".join(decoder.REMAT)}.')
    return sizes, [settings.remat], settings
  # Compiling takes a minute: begin with what the estimate takes for possible.
  first = decoder.REMAT.index(plans[0].remat) if plans and plans[0].fits else -1
  return sizes, list(decoder.REMAT[first:]), settings


def _speed(config, program, sizes, chip, settings, record, traffic) -> dict[str, Any]:
  """FLOPs, bytes and times of a program; of one step, or of one dispatch."""
  devices, tensor = math.prod(sizes.values()), sizes['tensor']
  lora = LoraConfig(settings.rank, 2.0 * settings.rank)
  if program == 'train':
    shards = math.prod(sizes[axis] for axis in sharding.RULES['batch'])
    tokens = settings.batch_rows * settings.row_len
    losses = round(tokens * settings.loss_share)
    context = (settings.row_len + 1) / 2
    useful = cost.train_flops(config, lora, tokens, losses, context)
    again = cost.recomputed_flops(config, lora, tokens, context, record['remat'])
    moved = cost.train_traffic(
      decoder.abstract(config, lora), sizes, tokens // shards, losses // shards, record['remat'])
  else:
    # Slots, and the blocks that are read into them, are split over data.
    per_device = lambda count: count // sizes['data']
    kv, slots = aot_programs.kv_bytes(config, settings, sizes), per_device(settings.slots)
    weights, again = record['memory']['weights'], 0.0
    if program == 'decode':
      tokens = settings.slots * settings.decode_steps
      useful = cost.forward_flops(config, tokens, tokens, settings.max_len)
      moved = settings.decode_steps * cost.forward_traffic(
        config, weights, kv, slots, slots, tensor)
    else:
      tokens, blocks = settings.blocks * settings.block_len, per_device(settings.blocks)
      ends = min(blocks, slots)
      useful = cost.forward_flops(config, tokens, ends * sizes['data'], settings.max_len)
      moved = cost.forward_traffic(
        config, weights, kv * blocks / slots, per_device(tokens), ends, tensor)
  ici = sum(t.sent / chip.ici_bandwidth(t.group) for t in traffic if not t.across)
  dcn = sum(t.sent for t in traffic if t.across)
  times = cost.roofline(chip, (useful + again) / devices, moved, ici, dcn)
  rate = lambda seconds: {
    'tokens_per_s': tokens / seconds,
    'mfu': useful / (seconds * devices * chip.peak_flops)}
  return {
    'tokens': tokens,
    'flops': {'useful': useful, 'recomputed': again},
    'traffic_bytes': moved,
    'collectives': hlo.summary(traffic),
    'dcn_bytes': dcn,
    'seconds': dataclasses.asdict(times),
    'bound': times.bound,
    'at_best': rate(times.overlapped),
    'serial': rate(times.serial),
  }


def would_fit(config, program, tried, chip, settings) -> list[str]:
  """What fits by the estimate: other meshes on the same devices, smaller shapes, more devices.

  Args:
    config: of the model.
    program: one of PROGRAMS.
    tried: sizes of the mesh that was compiled for, which is not among them whatever is estimated.
    chip: of the devices.
    settings: shapes that were compiled for.
  """
  num_devices, slices = math.prod(tried.values()), tried['slice']
  model = decoder.abstract(config, LoraConfig(settings.rank, 2.0 * settings.rank))

  def best(devices, **changes):
    """The best plan that fits; None where there is none."""
    own = dataclasses.replace(settings, **changes)
    if program == 'train':
      plans = memory.plans(
        model, num_devices=devices, slices=slices, memory=chip.program_bytes,
        batch_rows=own.batch_rows, row_len=own.row_len)
    else:
      plans = aot_programs.inference_plans(config, devices, chip.program_bytes, own)
    if not changes:
      # Of a mesh every kind of remat has been tried, unless one was asked for.
      plans = [p for p in plans if p.sizes != tried or settings.remat not in ('auto', p.remat)]
    return next((plan for plan in plans if plan.fits), None)

  shown = lambda plan: (
    f'--mesh={",".join(str(size) for axis, size in plan.sizes.items() if axis != "slice")}'
    + (f' --remat={plan.remat}' if program == 'train' else ''))
  says = []
  if plan := best(num_devices):
    says.append(f'{shown(plan)} on the same devices')
  if program == 'train':
    smaller = [{'row_len': settings.row_len // 2**n} for n in range(1, 5)]
  else:
    smaller = [{'slots': settings.slots // 2**n} for n in range(1, 6)]
  for changes in smaller:
    if min(changes.values()) and (plan := best(num_devices, **changes)):
      options = ' '.join(f'--{name}={value}' for name, value in changes.items())
      says.append(f'{options} {shown(plan)} on the same devices')
      break
  most = gpu_compiler.MOST_DEVICES if chip.name in chips.GPUS else 16 * num_devices
  for times in (n for n in (2, 4, 8, 16) if n * num_devices <= most):
    if plan := best(num_devices * times):
      says.append(f'{shown(plan)} on {num_devices * times} devices of the kind')
      break
  return says


def table(record: dict[str, Any]) -> str:
  """The record for a terminal."""
  gib = lambda size: f'{size / _GIB:8.2f} GiB'
  sizes = ', '.join(f'{axis} {size}' for axis, size in record['mesh'].items())
  settings = record['settings']
  names = {'train': ('batch_rows', 'row_len', 'rank'), 'decode': (
    'slots', 'max_len', 'decode_steps'), 'prefill': ('blocks', 'block_len', 'slots', 'max_len')}
  shapes = ', '.join(f'{name} {settings[name]}' for name in names[record['program']])
  if 'remat' in record:
    shapes += f', remat {record["remat"]}'
  slices = f'{record["slices"]} x ' if record['slices'] > 1 else ''
  lines = [
    f'{record["model"]} {record["program"]} on {slices}{record["topology"]}, '
    f'{record["devices"]} devices: {sizes}; {shapes}', '', 'memory of a device']
  lines += [f'  {name:<18} {gib(size)}' for name, size in record['memory'].items()]
  if 'need_bytes' in record:
    lines.append(
      f'  {"all":<18} {gib(record["need_bytes"])} of the {record["limit_bytes"] / _GIB:.2f} GiB '
      f'that a program may use of {record["hbm_bytes"] / _GIB:.0f} GiB')
  for remat, says in record.get('refused', {}).items():
    lines.append(f'  the compiler refused remat={remat}: {says}' if record['program'] == 'train'
                 else f'  the compiler refused: {says}')
  if 'seconds' in record:
    flops, seconds = record['flops'], record['seconds']
    lines += [
      '', f'{record["tokens"]:,} tokens a step: {flops["useful"]:.3e} FLOPs and '
      f'{flops["recomputed"]:.3e} recomputed; a device moves '
      f'{record["traffic_bytes"] / _GIB:,.1f} GiB of memory, and sends']
    lines += [f'  {kind:<18} {gib(value["bytes"])} in {value["count"]:,}'
              for kind, value in record['collectives'].items()]
    if record['dcn_bytes']:
      lines.append(f'  {"to other slices":<18} {gib(record["dcn_bytes"])} of these')
    lines += ['', 'seconds at the peak of each resource: ' + ', '.join(
      f'{name} {value:.4f}' for name, value in seconds.items()), '']
    for title, key in (('all at once', 'at_best'), ('one after another', 'serial')):
      rate = record[key]
      lines.append(f'  {title:<18} {rate["tokens_per_s"]:>12,.0f} tokens/s  {rate["mfu"]:6.1%} MFU')
  lines.append('')
  if record['fits']:
    lines.append(f'It fits. Compiled in {record["compile_s"]:.0f} s.')
  else:
    lines.append('It does NOT fit.' + (' By the estimate these would:' if record['would_fit'] else
                                       ' Nothing near it does either.'))
    lines += [f'  {says}' for says in record['would_fit']]
  return '\n'.join(lines)


def main(_) -> None:
  values = flags.FLAGS
  settings = Settings(**{name: values[name].value for name in _FLAGS})
  record = check(
    values.model, values.topology, values.program, mesh=values.mesh, slices=values.slices,
    settings=settings, text_path=pathlib.Path(values.hlo) if values.hlo else None)
  if values.out:
    workdir_lib.write_json(pathlib.Path(values.out), record)
  print(json.dumps(record, indent=2) if values.json else table(record))
  if not record['fits']:
    sys.exit(1)


def define_flags() -> None:
  """Flags of the command; not defined on import, since tests import this module."""
  flags.DEFINE_string('model', 'qwen25_7b', 'A name of models/registry.py.')
  flags.DEFINE_string(
    'topology', 'v5e:4x4',
    'Of v4, v5e, v5p, v6e or tpu7x a shape, too; of a100, h100 or h200 a number.')
  flags.DEFINE_enum('program', 'train', PROGRAMS, 'What is compiled.')
  flags.DEFINE_string('mesh', 'auto', 'Sizes data,fsdp,tensor within a slice.')
  flags.DEFINE_integer('slices', 1, 'Slices of that topology, data-parallel.', lower_bound=1)
  flags.DEFINE_bool('json', False, 'Print the record as JSON.')
  flags.DEFINE_string('out', '', 'JSON file to write as well.')
  flags.DEFINE_string('hlo', '', "File for the compiled program's text.")
  for name, meaning in _FLAGS.items():
    default = getattr(Settings, name)
    define = flags.DEFINE_string if isinstance(default, str) else flags.DEFINE_integer
    define(name, default, meaning)


if __name__ == '__main__':
  define_flags()
  cli.run(main, required=())
