"""Ahead of time: small programs compiled for real TPU topologies, and every wrong input."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

from data import workdir
from data.errors import UserError
from experiments import aot, aot_programs, aot_table, gpu_compiler, results_table
from experiments.aot_programs import Settings
from models import chips, decoder, memory, registry, sharding
from models.lora import LoraConfig

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason=f'the TPU compiler is not there: pip install {aot_programs.LIBTPU}')
needs_gpu_compiler = pytest.mark.skipif(
  not gpu_compiler.is_there(), reason='the compiler for GPUs is not there: make gpu-compiler')

TINY = registry.shrink(
  registry.get_config('qwen25_7b', dtype='bfloat16'), vocab_size=512, embed_dim=256, mlp_dim=512,
  num_heads=4, num_kv_heads=2, head_dim=64)
SMALL = Settings(row_len=256, rank=8, slots=8, max_len=256, block_len=16, blocks=8, decode_steps=4)


@needs_libtpu
def test_a_train_step_with_its_kernel_is_compiled_for_v5e(tmp_path):
  text = tmp_path / 'hlo.txt'
  record = aot.check('tiny', 'v5e:2x4', 'train', mesh='2,2,2', settings=SMALL, config=TINY,
                     text_path=text)
  assert record['fits'] and record['remat'] == 'none' and record['devices'] == 8
  # Splash attention is in it, forward and backward.
  assert len(set(re.findall(r'splash_mha_\w+?_segmented', text.read_text()))) >= 3
  parts = record['memory']
  assert sum(parts.values()) == record['need_bytes'] < record['limit_bytes']
  assert parts['weights'] > parts['adapter'] > 0 and parts['optimizer'] == 2 * parts['adapter']
  assert parts['other arguments'] < parts['weights'] and parts['temporaries'] > 0
  # Weights are gathered over fsdp and activations summed over tensor, in both layers.
  assert record['collectives']['all-reduce']['count'] >= 2 * TINY.num_layers
  assert record['seconds']['ici'] > 0 == record['seconds']['dcn']
  assert 0 < record['serial']['mfu'] < record['at_best']['mfu'] <= 1
  shown = aot.table(record)
  assert 'It fits.' in shown and 'of the 15.75 GiB' in shown and 'all-reduce' in shown
  json.dumps(record)


@needs_libtpu
@pytest.mark.parametrize('rows, code', [(8, 0), (4096, 1)])
def test_the_command_prints_a_record_and_exits_with_1_when_it_does_not_fit(rows, code):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.aot', '--model=smollm2_135m', '--topology=v5e:2x2',
     '--program=decode', f'--slots={rows}', '--max_len=1024', '--json'],
    capture_output=True, text=True)
  assert done.returncode == code, done.stderr
  record = json.loads(done.stdout)
  assert record['fits'] == (code == 0) and bool(record.get('would_fit')) == (code == 1)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('program', aot.PROGRAMS)
def test_every_chip_and_program(topology, program):
  record = aot.check('tiny', topology, program, settings=SMALL, config=TINY)
  assert record['fits'] and record['tokens'] > 0
  limit = chips.CHIPS[topology.partition(':')[0]].program_bytes
  assert record['limit_bytes'] == limit and aot.table(record)


@needs_libtpu
@pytest.mark.slow
def test_slices_exchange_gradients_only():
  record = aot.check('tiny', 'v5e:2x2', 'train', slices=2, settings=SMALL, config=TINY)
  assert record['mesh']['slice'] == 2 and record['seconds']['dcn'] > 0
  # The adapter's gradient and a few scalars: at most a few times the adapter, whole.
  assert record['dcn_bytes'] < 4 * record['memory']['adapter'] * record['mesh']['fsdp']


@needs_gpu_compiler
@pytest.mark.parametrize('cache_dtype, numbers', [('', 64 * 2), ('int8', 64 + 2)])
def test_decoding_on_a_gpu_holds_keys_and_values_once(cache_dtype, numbers):
  settings = dataclasses.replace(SMALL, max_len=1024, cache_dtype=cache_dtype)
  record = aot.check('tiny', 'h200', 'decode', settings=settings, config=TINY)
  parts = record['memory']
  cache = 2 * TINY.num_layers * TINY.num_kv_heads * 8 * 1024 * numbers
  assert record['fits'] and record['devices'] == 1 and parts['KV cache'] == cache
  assert record['compiler'] == 'gpu' and parts['temporaries'] > 0
  assert sum(parts.values()) == record['need_bytes'] < record['limit_bytes'] == 141 * 10**9
  assert record['need_bytes'] < 2 * cache + 2 * parts['weights'], 'the cache is held once'


@needs_gpu_compiler
@pytest.mark.parametrize('topology, mesh', [
  ('h200', '1,1,1'),
  pytest.param('h100:8', '2,2,2', marks=pytest.mark.slow),
  pytest.param('a100:2', '1,2,1', marks=pytest.mark.slow)])
def test_a_train_step_with_its_kernel_is_compiled_for_gpus(topology, mesh, tmp_path):
  text = tmp_path / 'hlo.txt'
  record = aot.check('tiny', topology, 'train', mesh=mesh, settings=SMALL, config=TINY,
                     text_path=text)
  assert record['fits'] and record['compiler'] == 'gpu'
  # The kernel forward, and two backward: for queries, and for keys and values.
  assert len(re.findall(r'= .*custom-call\(.*__gpu\$xla.gpu.triton', text.read_text())) >= 3
  assert bool(record['seconds']['ici']) == (record['devices'] > 1)
  assert sum(record['memory'].values()) == record['need_bytes'] < record['limit_bytes']
  assert 0 < record['serial']['mfu'] < record['at_best']['mfu'] <= 1


@needs_libtpu
def test_what_does_not_fit_says_what_would():
  big = Settings(batch_rows=1024, row_len=8192, remat='none')
  record = aot.check('tiny', 'v5e:2x4', 'train', mesh='8,1,1', settings=big, config=TINY)
  assert not record['fits'] and 'exceeds available HBM' in record['refused']['none']
  assert any('--row_len=' in says for says in record['would_fit'])
  assert 'It does NOT fit' in aot.table(record)


@pytest.mark.parametrize('remat', ['auto', 'full'])
def test_what_was_refused_is_not_what_would_fit(remat):
  config = registry.get_config('qwen25_14b', dtype='bfloat16')
  chip, settings = chips.CHIPS['v5e'], Settings(batch_rows=64, row_len=2048, remat=remat)
  model = decoder.abstract(config, LoraConfig(settings.rank, 2.0 * settings.rank))
  first = memory.plans(
    model, num_devices=64, slices=1, memory=chip.program_bytes, batch_rows=64, row_len=2048)[0]
  mesh = ','.join(str(size) for axis, size in first.sizes.items() if axis != 'slice')
  assert first.fits
  says = aot.would_fit(config, 'train', first.sizes, chip, settings)
  assert says and 'on the same devices' in says[0]
  refused = {f'--mesh={mesh} --remat={name} on the same devices'
             for name in ((remat,) if remat == 'full' else decoder.REMAT)}
  assert refused.isdisjoint(says)


@needs_libtpu
@pytest.mark.parametrize('topology, sizes', [
  ('v6e:16x16', (64, 1, 4)), ('v5p:8x8x8', (256, 2, 1)), ('v5e:16x16', (32, 8, 1)),
  ('tpu7x:2x2x1', (2, 2, 2))])
def test_a_mesh_may_split_the_dimensions_of_the_network(topology, sizes):
  devices = aot_programs.find_devices(topology, 1)
  mesh = sharding.make_mesh(*sizes, devices=devices)
  assert mesh.devices.shape == (1, *sizes) and len(set(mesh.devices.flat)) == len(devices)


@needs_libtpu
@pytest.mark.parametrize('options, message', [
  ({'topology': 'v9:2x2'}, "no chip 'v9'"),
  ({'topology': 'v5e:3x5'}, 'v5e:3x5'),
  ({'mesh': '3,1,1'}, '--batch_rows=8 does not divide'),
  ({'mesh': '8,1,2'}, 'does not fit 8 devices'),
  ({'mesh': '3,1,1', 'settings': Settings(batch_rows=3)}, 'form no box'),
  ({'mesh': '2,1,4'}, '2 key-value heads'),
  ({'mesh': 'all'}, 'three sizes'),
  ({'program': 'decode', 'mesh': '3,1,2'}, '--slots=8 does not divide'),
  ({'program': 'prefill', 'mesh': '2,1,1', 'settings': Settings(slots=8, blocks=3)}, 'blocks=3'),
  ({'program': 'decode', 'slices': 2}, 'does not span slices'),
  ({'program': 'serve'}, 'choose from train'),
  ({'topology': 'h200', 'slices': 2}, '--topology=h200 has no slices'),
  ({'topology': 'h200:16'}, '--topology=h200:16: give 1 to 8 GPUs'),
  ({'topology': 'h200:2x2'}, 'give the number of GPUs, as in h200:8'),
  ({'settings': Settings(cache_dtype='int4')}, '--cache_dtype=int4'),
  ({'settings': Settings(remat='some')}, '--remat=some'),
])
def test_bad_input_is_one_sentence(options, message):
  values = {'topology': 'v5e:2x4', 'program': 'train', 'settings': SMALL, 'config': TINY, **options}
  with pytest.raises(UserError, match=re.escape(message)):
    aot.check('tiny', values.pop('topology'), values.pop('program'), **values)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=re.escape(f"pip install '{aot_programs.LIBTPU}'")):
    aot.check('qwen25_7b', 'v5e:2x4', 'train')


def test_without_the_compiler_for_gpus_it_says_how_to_get_it(monkeypatch, tmp_path):
  monkeypatch.setattr(gpu_compiler, 'FOLDER', tmp_path)
  monkeypatch.setattr(gpu_compiler, '_plugin', lambda: None)
  gpu_compiler._register.cache_clear()
  with pytest.raises(UserError, match='make gpu-compiler'):
    aot.check('qwen25_7b', 'h200', 'train')


def test_the_compiler_for_gpus_is_that_of_this_jax():
  with open('requirements-gpu-compiler.txt', encoding='utf-8') as file:
    wanted = [line.partition(';')[0] for line in file if line.startswith('jax')]
  assert len(wanted) == 2
  assert all(line.endswith(f'=={jax.__version__}') for line in wanted)


def test_the_compiler_named_is_the_one_required():
  with open('requirements-dev.txt', encoding='utf-8') as file:
    assert aot_programs.LIBTPU in file.read()


def fake(cell):
  """A record as experiments.aot writes it."""
  devices = 16 * cell.slices
  rate = lambda tokens, mfu: {'tokens_per_s': devices * tokens, 'mfu': mfu}
  return {
    'devices': devices, 'mesh': {'slice': cell.slices, 'data': 1, 'fsdp': 16, 'tensor': 1},
    'remat': 'mlp', 'settings': {'slots': 64, 'cache_dtype': ''}, 'fits': True,
    'need_bytes': 13 * 2**30, 'limit_bytes': 16 * 2**30, 'traffic_bytes': 2**30,
    'seconds': {}, 'bound': 'hbm',
    'collectives': {'all-gather': {'bytes': 2**30, 'count': 1}},
    'serial': rate(100, 0.25), 'at_best': rate(200, 0.5)}


def test_the_table_goes_on_where_it_was_and_shows_what_lacks(tmp_path, monkeypatch):
  done = aot_table.cells()
  assert len({cell.name for cell in done}) == len(done) == 55
  # Two cells are there, one of which was refused.
  one, other = (c for c in done if c.model == 'qwen25_7b' and c.topology == 'v5e:16x16'
                and c.program == 'train' and c.slices < 4)
  for cell, record in ((one, fake(one)), (other, {**fake(other), 'fits': False})):
    (tmp_path / f'{cell.name}.json').write_text(json.dumps(record))
  first = done[0]
  old = {other.name: {}, first.name: fake(first)}
  record = aot_table.collect(tmp_path, old)
  assert list(record['cells']) == [first.name, one.name, other.name]
  assert record['cells'][other.name], 'what is compiled now replaces what is committed'
  record = aot_table.collect(tmp_path, {})
  page = aot_table.section(record)
  assert '| v5e:16x16 x 2 | 32 |' in page and '13.0 of 16.0, does not fit' in page
  assert 'Not compiled yet: ' in page and '2 of 55 cells' in page and aot_table.PLOT.name in page
  drawn = aot_table.plot(record['cells'])
  assert drawn.startswith('<svg') and 'Qwen2.5 7B' in drawn and 'nan' not in drawn
  # What lacks is compiled, what is there is not.
  started = []
  monkeypatch.setattr(aot_table.subprocess, 'run', lambda command, **_: started.append(command) or (
    (tmp_path / 'x.json').write_text('{"fits": false}')))
  assert 'does not fit' in aot_table.run(one, tmp_path / 'x.json')
  assert f'--slices={one.slices}' in started[0]
  with pytest.raises(UserError, match='no cell nothing'):
    aot_table.names(['nothing'])


def test_the_committed_plot_is_that_of_the_committed_cells():
  record = workdir.read_record(aot_table.PATH)
  if record is None:
    pytest.skip('no cell is committed')
  assert (aot_table.PLOT in results_table.pages()) == bool(aot_table.points(record['cells']))
