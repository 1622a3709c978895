"""Checks both sizes of Qwen2.5 on many TPU slices and on H200s ahead of time, and tabulates it.

  python -m experiments.aot_table --list
  python -m experiments.aot_table --workdir=runs/aot      # compiles what is missing, files all

Each cell is one `experiments.aot` in a process of its own, and one JSON in the workdir: a run that
was stopped goes on where it was. All that are there go into experiments/results/aot.json, beside
those that it has already (--fresh compiles these again), and `python -m experiments.results_table`
makes the table and the plot from it.
"""

import dataclasses
import html
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from configs import cli
from data import errors, summary
from data import workdir as workdir_lib

RESULTS = pathlib.Path(__file__).parent / 'results'
PATH, PLOT = RESULTS / 'aot.json', RESULTS / 'aot_scaling.svg'
_GIB = 2**30
_MODELS = {'qwen25_7b': 'Qwen2.5 7B', 'qwen25_14b': 'Qwen2.5 14B'}
_TOPOLOGIES = ('v5e:4x4', 'v5e:8x8', 'v5e:16x16', 'v5p:2x2x1', 'v5p:4x4x4', 'v5p:8x8x8', 'v6e:2x4',
               'v6e:16x16')
_PREFILL_TOPOLOGIES = ('v5e:4x4', 'v5p:2x2x1', 'v6e:2x4')
_SCALING = ('v5e:16x16', (1, 2, 4))
# Long contexts: four rows at a time, since one for each device of a v6e does not fit.
_LONG, _LONG_ROWS = 32_768, 4
_LONG_CELLS = (
  ('qwen25_7b', 'v5p:2x2x1'), ('qwen25_7b', 'v6e:2x4'), ('qwen25_14b', 'v5p:2x2x1'))
# What decodes on one GPU: slots, tokens of each, kind of cache.
_GPU, _GPU_SIZES = 'h200', (1, 8)
_GPU_CACHES = ((128, 4096, ''), (256, 8192, ''), (256, 8192, 'int8'))


@dataclasses.dataclass(frozen=True)
class Cell:
  """One program on one machine."""

  model: str
  program: str
  topology: str
  slices: int = 1
  row_len: int = 0
  batch_rows: int = 0
  slots: int = 0
  max_len: int = 0
  cache_dtype: str = ''

  @property
  def name(self) -> str:
    shape = (self.row_len, self.slots, self.max_len, self.cache_dtype)
    return '_'.join([
      self.model, self.program, self.topology.replace(':', '_'), f's{self.slices}',
      *(str(value) for value in shape if value)])

  @property
  def gpu(self) -> bool:
    return self.topology.partition(':')[0] == _GPU

  @property
  def flags(self) -> list[str]:
    """Arguments of `experiments.aot`; shapes that are not given are its own."""
    given = {name: value for name, value in dataclasses.asdict(self).items() if value}
    return [f'--{name}={value}' for name, value in given.items()]


def cells() -> list[Cell]:
  """All cells, in the order of the table."""
  found = [Cell(model, program, topology) for model in _MODELS for program in ('train', 'decode')
           for topology in _TOPOLOGIES]
  found += [Cell(model, 'prefill', topology) for model in _MODELS
            for topology in _PREFILL_TOPOLOGIES]
  topology, slices = _SCALING
  found += [Cell(model, 'train', topology, n) for model in _MODELS for n in slices if n > 1]
  found += [Cell(model, 'train', topology, row_len=_LONG, batch_rows=_LONG_ROWS)
            for model, topology in _LONG_CELLS]
  found += [Cell(model, 'train', f'{_GPU}:{n}') for model in _MODELS for n in _GPU_SIZES]
  return found + [
    Cell(model, 'decode', f'{_GPU}:1', slots=slots, max_len=max_len, cache_dtype=dtype)
    for model in _MODELS for slots, max_len, dtype in _GPU_CACHES]


def run(cell: Cell, path: pathlib.Path) -> str:
  """Compiles a cell and writes its record; returns a line about it.

  Raises:
    errors.UserError: the check itself failed; not fitting is a result.
  """
  command = [sys.executable, '-m', 'experiments.aot', *cell.flags, f'--out={path}']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if not path.is_file():
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise errors.UserError(f'{cell.name} failed: {last.removeprefix("error: ")}')
  record = json.loads(path.read_text())
  return f'{cell.name}: {"fits" if record["fits"] else "does not fit"}'


def collect(workdir: pathlib.Path, committed: Mapping[str, Any]) -> dict[str, Any]:
  """The cells of a workdir by name, over those of the record that is committed, in order."""
  done = dict(committed)
  for cell in cells():
    if (path := workdir / f'{cell.name}.json').is_file():
      done[cell.name] = json.loads(path.read_text())
  return {
    'cells': {cell.name: done[cell.name] for cell in cells() if cell.name in done},
    'measured': {
      **summary.measured('experiments.aot_table', ()),
      'command': 'python -m experiments.aot_table --workdir=runs/aot'},
  }


# The table.


def _range(record: Mapping[str, Any], key: str, show) -> str:
  return f'{show(record["serial"][key])} to {show(record["at_best"][key])}'


def _row(cell: Cell, record: Mapping[str, Any]) -> str:
  sizes = record['mesh']
  mesh = ','.join(str(sizes[axis]) for axis in ('data', 'fsdp', 'tensor'))
  slices = f' x {cell.slices}' if cell.slices > 1 else ''
  settings = record['settings']
  shape = record.get('remat') or settings['slots']
  if cell.max_len:
    shape = f'{shape} of {cell.max_len:,}, {settings["cache_dtype"] or "bfloat16"}'
  front = (f'| {_MODELS[cell.model]} | {cell.topology}{slices} | {record["devices"]} | {mesh} | '
           f'{shape}')
  if 'seconds' not in record:
    return f'{front} | does not fit | | | | |'
  sent = sum(kind['bytes'] for kind in record['collectives'].values())
  need = f'{record["need_bytes"] / _GIB:.1f} of {record["limit_bytes"] / _GIB:.1f}'
  return (
    f'{front} | {need}{"" if record["fits"] else ", does not fit"} | '
    f'{record["traffic_bytes"] / _GIB:,.0f}, {sent / _GIB:,.1f} | {record["bound"]} | '
    f'{_range(record, "tokens_per_s", lambda x: f"{x:,.0f}")} | '
    f'{_range(record, "mfu", lambda x: f"{100 * x:.0f}")} |')


def _table(
  program: str, records: Mapping[str, Any], row_len: int = 0, gpu: bool = False
) -> str:
  wanted = (program, row_len, gpu)
  rows = [_row(cell, records[cell.name]) for cell in cells()
          if (cell.program, cell.row_len, cell.gpu) == wanted and cell.name in records]
  shape = 'recomputed' if program == 'train' else 'slots'
  return '\n'.join([
    f'| model | slice | devices | data, fsdp, tensor | {shape} | GiB a device | GiB moved, sent | '
    'bound by | tokens/s | MFU % |', '|---|---|---|---|---|---|---|---|---|---|', *rows])


def section(record: Mapping[str, Any]) -> str:
  """The tables as Markdown, with what they are."""
  from experiments import aot_programs  # Needs jax, which --help does not wait for.

  done, measured, shapes = record['cells'], record['measured'], aot_programs.Settings()
  lacking = [cell.name for cell in cells() if cell.name not in done]
  parts = [
    'Nothing here has run on a TPU or an H200. The programs were compiled for them by their own '
    'compilers, which say what memory they take; FLOPs and bytes moved are counted from the '
    'architecture, bytes sent are read from the compiled program. Tokens/s and MFU are bounds, not '
    'measurements: from every resource at its peak one after the other, to all of them at the same '
    'time.',
    'Training: LoRA of rank 64, rows of 4,096 tokens, one a device, a quarter of the tokens with a '
    f'loss.\n\n{_table("train", done)}',
    'Decoding: 8 steps a dispatch, slots of 4,096 tokens that are full.\n\n'
    f'{_table("decode", done)}',
    f'Prefill: {aot_programs.BLOCKS} blocks of {shapes.block_len} new tokens a dispatch into such '
    f'slots of each data shard.\n\n{_table("prefill", done)}',
    f'Training on {_LONG_ROWS} rows of {_LONG:,} tokens at a time.\n\n'
    f'{_table("train", done, _LONG)}']
  if points(done):
    parts.append(f'![Training on ever more devices]({PLOT.name})')
  if any(cell.gpu for cell in cells() if cell.name in done):
    parts.append(
      'NVIDIA H200, by the compiler for GPUs, the Pallas kernel for attention included: training '
      f'as above, and decoding.\n\n{_table("train", done, gpu=True)}\n\n'
      f'{_table("decode", done, gpu=True)}')
  if lacking:
    parts.append(f'Not compiled yet: {", ".join(lacking)}.')
  parts.append(
    f'{len(done)} of {len(cells())} cells; {summary.origin(measured)}')
  return '\n\n'.join(parts)


# The plot.


def points(done: Mapping[str, Any]) -> dict[str, list[tuple[int, float, float]]]:
  """By model: (devices, tokens/s with nothing overlapped, at best) of training on v5e."""
  chip = _SCALING[0].partition(':')[0]
  found = {}
  for model in _MODELS:
    records = [done[cell.name] for cell in cells()
               if (cell.model, cell.program, cell.row_len) == (model, 'train', 0)
               and cell.topology.startswith(f'{chip}:') and cell.name in done]
    line = sorted((r['devices'], r['serial']['tokens_per_s'], r['at_best']['tokens_per_s'])
                  for r in records if 'serial' in r)
    if len(line) > 1:
      found[model] = line
  return found


def plot(done: Mapping[str, Any]) -> str:
  """Tokens/s against devices as SVG, both axes logarithmic: a band a model."""
  lines = points(done)
  every = [point for line in lines.values() for point in line]
  low_x, high_x = (f(point[0] for point in every) for f in (min, max))
  low_y = 10 ** math.floor(math.log10(min(point[1] for point in every)))
  high_y = 10 ** math.ceil(math.log10(max(point[2] for point in every)))
  left, top, width, height = 64, 34, 520, 280

  def x(value):
    return left + width * math.log(value / low_x) / math.log(high_x / low_x)

  def y(value):
    return top + height * (1 - math.log(value / low_y) / math.log(high_y / low_y))

  text = lambda x, y, words, anchor='middle', extra='': (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{html.escape(words)}</text>')
  parts = [
    f'<rect width="{left + width + 96}" height="{top + height + 54}" fill="#ffffff"/>',
    text(left, 18, 'Training tokens/s on v5e: bounds of the ahead-of-time check', 'start',
         ' font-weight="bold"')]
  for power in range(round(math.log10(low_y)), round(math.log10(high_y)) + 1):
    at = y(10**power)
    parts += [f'<path d="M{left} {at:.1f}h{width}" stroke="#d5d5d5"/>',
              text(left - 8, at + 4, f'{10**power:,}', 'end')]
  for devices in sorted({point[0] for point in every}):
    slices = f' ({devices // 256} slices)' if devices > 256 else ''
    parts += [f'<path d="M{x(devices):.1f} {top}v{height}" stroke="#eeeeee"/>',
              text(x(devices), top + height + 18, f'{devices}{slices}')]
  parts.append(text(left + width / 2, top + height + 42, 'devices, one row of 4,096 tokens each'))
  for (model, line), colour in zip(lines.items(), ('#0b6bcb', '#c2410c'), strict=False):
    upper = [(x(devices), y(best)) for devices, _, best in line]
    lower = [(x(devices), y(serial)) for devices, serial, _ in line]
    path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in [*upper, *reversed(lower)])
    parts += [f'<polygon points="{path}" fill="{colour}" fill-opacity="0.3" stroke="{colour}"/>',
              text(upper[-1][0] + 8, (upper[-1][1] + lower[-1][1]) / 2 + 4, _MODELS[model], 'start',
                   f' fill="{colour}"')]
  return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 96} '
          f'{top + height + 54}" font-family="sans-serif" font-size="12">'
          f'{"".join(parts)}</svg>\n')


def names(text: Sequence[str]) -> list[Cell]:
  """The cells of these names.

  Raises:
    errors.UserError: there is none of a name.
  """
  known = {cell.name: cell for cell in cells()}
  if unknown := [name for name in text if name not in known]:
    raise errors.UserError(f'There is no cell {", ".join(unknown)}; --list shows all.')
  return [known[name] for name in text] or list(known.values())


def main(_) -> None:
  workdir = pathlib.Path(flags.FLAGS.workdir)
  wanted = names([name for name in flags.FLAGS.only.split(',') if name])
  path_of = lambda cell: workdir / f'{cell.name}.json'
  committed = {} if flags.FLAGS.fresh else (
    workdir_lib.read_record(PATH) or {'cells': {}})['cells']
  missing = [cell for cell in wanted
             if cell.name not in committed and not path_of(cell).is_file()]
  if flags.FLAGS.list:
    for cell in wanted:
      print(f'{cell.name:<40} {"missing" if cell in missing else "there"}')
    return
  workdir.mkdir(parents=True, exist_ok=True)
  print(f'{len(wanted) - len(missing)} cells are there, {len(missing)} to compile, about '
        f'{2 * len(missing)} minutes on two quiet cores.', flush=True)
  for cell in missing:
    print(run(cell, path_of(cell)), flush=True)
  workdir_lib.write_json(PATH, collect(workdir, committed))
  print(f'{PATH}; python -m experiments.results_table writes the pages again.')


if __name__ == '__main__':
  flags.DEFINE_bool('list', False, 'Print the cells and stop.')
  flags.DEFINE_string('only', '', 'Cells to compile, comma separated; all by default.')
  flags.DEFINE_bool('fresh', False, 'Leave what is committed out of account.')
  flags.DEFINE_string('workdir', 'runs/aot', 'Folder of the cells.')
  cli.run(main, required=())
