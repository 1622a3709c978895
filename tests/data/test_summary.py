"""Intervals and paired differences against closed forms."""

import os
import types

import numpy as np
import pytest

from data import errors, summary


def _episodes(wins):
  return [types.SimpleNamespace(task_id=str(i), success=bool(w)) for i, w in enumerate(wins)]


def test_wilson_equals_known_values():
  # Brown, Cai and DasGupta (2001): 0 of 10 and 5 of 10.
  assert summary.wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
  assert summary.wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
  assert summary.wilson(0, 0) == [0.0, 1.0]


def test_paired_interval_matches_the_normal_approximation():
  rng = np.random.default_rng(0)
  a, b = rng.random(400) < 0.7, rng.random(400) < 0.5
  result = summary.paired(_episodes(a), _episodes(b), a_id='a', b_id='b')
  difference = a.astype(float) - b
  half = 1.96 * difference.std(ddof=1) / np.sqrt(400)
  assert result['difference'] == pytest.approx(difference.mean())
  assert result['ci95'] == pytest.approx(
    [difference.mean() - half, difference.mean() + half], abs=0.01)


def test_paired_refuses_other_tasks():
  with pytest.raises(errors.UserError, match='different tasks'):
    summary.paired(_episodes([1, 0]), _episodes([1]), a_id='a', b_id='b')


def test_the_engine_s_line_says_what_was_computed_and_what_copied():
  assert summary.engine_line({}) == ''
  stats = {'prefilled': 12345, 'copied': 400, 'generated': 67, 'verified': 0,
           'accepted_per_step': 0.0}
  line = summary.engine_line(stats)
  assert '12,345 tokens prefilled, 400 copied' in line and line.endswith('67 generated')
  line = summary.engine_line(stats | {'verified': 8, 'accepted_per_step': 1.25})
  assert '1.25 of a draft accepted a verifying step' in line


def test_a_machine_is_named_with_what_makes_its_products_fast(tmp_path):
  path = tmp_path / 'cpuinfo'
  path.write_text('model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16\n' * 2)
  said = summary.machine(str(path))
  assert said.startswith(f'{os.cpu_count()} CPU cores') and said.endswith('AMD EPYC, avx512_bf16')
  path.write_text('flags\t\t: fpu avx avx2\n')
  assert summary.machine(str(path)).endswith(', avx2')
  # No Linux.
  assert summary.machine(str(tmp_path / 'none')).startswith(f'{os.cpu_count()} CPU cores, ')
