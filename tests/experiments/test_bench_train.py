"""The measurement of our training against PyTorch: its batches, its sums, one small run."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers

from experiments.bench import train as bench
from models import registry
from tests.agents import fakes
from tests.models import torch_reference
from training import packing


def _examples(lengths):
  return [
    packing.Example(np.arange(1, n + 1, dtype=np.int32), np.arange(n) % 2 == 0, str(i))
    for i, n in enumerate(lengths)]


def test_padded_batches_hold_every_example_once_and_no_loss_on_padding():
  examples = _examples([3, 9, 5, 7, 4, 6])
  batches = bench.padded_batches(examples, 2)
  assert len(batches) == 3
  seen = []
  for batch in batches:
    lengths = batch['mask'].sum(1)
    assert batch['tokens'].shape == (2, lengths.max())
    for row, length in enumerate(lengths):
      assert batch['tokens'][row, :length].tolist() == list(range(1, length + 1))
      assert not batch['tokens'][row, length:].any()
      # The first token has nothing that predicts it.
      assert batch['loss_mask'][row].sum() == (length - 1) // 2
    seen += lengths.tolist()
  assert sorted(seen) == [3, 4, 5, 6, 7, 9]


def test_random_tokens_keep_lengths_and_masks():
  examples = _examples([30] * 16)
  found = bench.with_random_tokens(examples, 50, 4096)
  assert [len(e.tokens) for e in found] == [240, 240]
  assert sum(e.loss_mask.sum() for e in found) == sum(e.loss_mask.sum() for e in examples)
  assert all(e.tokens.min() >= 0 and e.tokens.max() < 50 for e in found)


def test_household_episodes_fill_rows_of_the_chosen_length():
  examples = bench.household_examples('smollm2_135m', 160)
  lengths = [len(e.tokens) for e in examples]
  row_len = packing.choose_row_len(lengths, 8192)
  rows = packing.pack(examples, row_len)
  assert rows.efficiency >= 0.95 and not rows.too_long and rows.num_examples == 160
  # Short enough that the step's memory and attention do not grow for it.
  assert row_len <= 4 * max(lengths)


def _record(tokens, seconds, **more):
  return {'tokens': tokens, 'seconds': seconds, 'peak_bytes': 2**30, **more}


def test_the_best_setting_of_the_peer_counts_and_a_failed_one_is_shown():
  ours = [_record([100, 100], [1.0, 1.0], flops_per_token=1e6, efficiency=0.9,
                  product_rates={'float32': 2e8},
                  attention='kernel', losses=[2.0, 1.0]),
          _record([100, 100], [0.5, 0.5], flops_per_token=1e6, efficiency=0.9,
                  product_rates={'float32': 1e8, 'bfloat16': 4e8},
                  attention='kernel', losses=[2.0, 1.0])]
  names = ('dtype', 'layout', 'compile')
  peers = [
    dict(zip(names, ('float32', 'padded', False))) | {'record': _record([50], [1.0])},
    dict(zip(names, ('bfloat16', 'packed', False))) | {'record': _record([80], [1.0])},
    dict(zip(names, ('bfloat16', 'packed', True))) | {'record': {'error': 'no compiler'}}]
  others = [
    {'attention': 'blocks', **_record([60], [1.0], losses=[2.0, 1.02])},
    {'attention': 'auto', 'error': 'no memory'}]
  found = bench.summarise(ours, peers, {'ours': [2.0, 1.0], 'peer': [2.0, 1.01]}, others)
  assert found['ours']['tokens_per_s'] == pytest.approx(400 / 3)
  assert found['ours']['by_run'] == [100.0, 200.0]
  assert found['best_peer']['tokens_per_s'] == 80
  assert found['ratio_to_best_peer'] == pytest.approx(400 / 3 / 80)
  assert found['ours']['product_dtype'] == 'bfloat16'
  assert found['ours']['share_of_product_rate'] == pytest.approx(400 / 3 * 1e6 / 4e8)
  assert found['losses']['largest_relative_gap'] == pytest.approx(0.01 / 1.01)
  text = bench.table({**found, 'setting': {'dtype': 'bfloat16'}})
  assert 'failed: no compiler' in text and '1.67 times' in text
  assert found['other_attention'][0]['tokens_per_s'] == 60
  assert found['other_attention'][0]['largest_loss_gap'] == pytest.approx(0.02)
  rows = {line.split(', bfloat16, ')[1].split()[0]: line
          for line in text.splitlines() if line.startswith('ours, packed, bfloat16, ')}
  assert rows.keys() == {'kernel', 'blocks', 'auto'} and 'no memory' in rows['auto']
  assert '2.0e-02' in text


def test_a_setting_is_left_out_whose_products_alone_take_twice_what_another_does():
  tried = [{'record': {'error': 'none'}}, {'record': _record([100], [1.0])}]
  rates = {'float32': 1e9, 'bfloat16': 49e6}
  assert 'allow 49.0 tokens/s' in bench.left_out(rates, 'bfloat16', 1e6, tried)['error']
  assert bench.left_out(rates, 'float32', 1e6, tried) is None
  assert bench.left_out({'bfloat16': 51e6}, 'bfloat16', 1e6, tried) is None
  # With nothing to compare with, and on a GPU.
  assert bench.left_out(rates, 'bfloat16', 1e6, tried[:1]) is None
  assert bench.left_out({}, 'bfloat16', 1e6, tried) is None


def test_the_peer_s_products_are_timed_in_a_process_of_their_own(tmp_path):
  job = {'kind': 'product_rate', 'dtype': 'float32'}
  record = bench.run_job('experiments.bench.train_torch', job, tmp_path)
  assert record['flops_per_s'] > 1e9


@pytest.mark.slow
def test_both_sides_train_alike_on_a_small_model(tmp_path):
  folder = tmp_path / 'model'
  fakes.tokenizer_folder(folder)
  config = registry.shrink(
    torch_reference.CONFIGS['qwen2_untied'], max_position=2048,
    vocab_size=fakes.make_tokenizer(folder).vocab_size)
  torch.manual_seed(0)
  transformers.AutoModelForCausalLM.from_config(
    torch_reference.hf_config(config)).save_pretrained(folder)
  out = tmp_path / 'out.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.train', f'--model={folder}', '--row_len=2048',
     '--batch_rows=1', '--episodes=12', '--steps=3', '--attention=blocks,auto', f'--out={out}',
     '--peer_settings=padded-bfloat16-eager,packed-float32-eager'],
    capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  record = json.loads(out.read_text())
  assert record['losses']['largest_relative_gap'] < 1e-4
  assert len(record['losses']['ours']) == 5
  assert len(record['peers']) == 2 and not any('error' in row for row in record['peers'])
  assert record['ratio_to_best_peer'] > 0 and record['ours']['steps'] == 6
  # On a CPU both are the blocks.
  assert [row['largest_loss_gap'] for row in record['other_attention']] == [0]


def test_a_setting_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
  slow, child = tmp_path / 'python', tmp_path / 'child'
  slow.write_text(f'#!/bin/sh\nsleep 600 &\necho $! > {child}\nwait\n')
  slow.chmod(0o755)
  record = bench.run_job('any', {}, tmp_path, python=str(slow), limit_s=1.0)
  assert record == {'error': 'not done after 1 s'}
  state = pathlib.Path(f'/proc/{child.read_text().strip()}/stat')

  def ended():
    """Gone, or a zombie that nobody has read yet."""
    try:
      return state.read_text().split()[2] == 'Z'
    except (FileNotFoundError, ProcessLookupError):
      return True

  # It has been killed, which takes a moment: it would live for ten minutes.
  deadline = time.monotonic() + 30
  while not ended():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_an_unknown_setting_is_one_sentence(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.train', '--model=nonsense'],
    capture_output=True, text=True)
  assert done.returncode == 1 and 'Traceback' not in done.stderr
