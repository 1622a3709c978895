"""Which way of computing attention a run takes, and what it says of it."""

import functools

import pytest

from data.errors import UserError
from models import flash, platform, registry
from training import attention_path

CONFIG = registry.shrink(registry.get_config('qwen25_7b'), vocab_size=96, num_layers=2)


@pytest.fixture
def interpreted(monkeypatch):
  """A GPU whose programs are interpreted."""
  attend = functools.partial(flash.flash_attention, interpret=True)
  monkeypatch.setattr(
    flash, 'flash_attention', lambda *args, interpret, **kwargs: attend(*args, **kwargs))
  with platform.compiling_for('gpu'):
    yield


def test_every_platform_says_its_choice_once(capsys):
  for where, request_, path, says in (
      ('cpu', 'auto', 'blocks', 'for GPUs and TPUs'), ('cpu', 'blocks', 'blocks', 'config'),
      ('tpu', 'auto', 'kernel', 'splash'), ('tpu', 'kernel', 'kernel', 'splash'),
      ('tpu', 'blocks', 'blocks', 'config'), ('gpu', 'blocks', 'blocks', 'config')):
    with platform.compiling_for(where):
      assert attention_path.choose(request_, CONFIG) == path
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'attention={path}: ') and says in lines[0]


def test_a_kernel_that_does_not_compile_gives_way_to_blocks(capsys):
  # Nothing compiles it for this machine's CPU.
  with platform.compiling_for('gpu'):
    assert attention_path.choose('auto', CONFIG) == 'blocks'
    assert 'because on this' in (line := capsys.readouterr().err) and 'does not run (' in line
    with pytest.raises(UserError, match=r'attention=kernel cannot be had.*use attention=blocks'):
      attention_path.choose('kernel', CONFIG)


@pytest.mark.slow
def test_a_kernel_that_equals_plain_attention_is_taken(interpreted, capsys):
  assert attention_path.choose('auto', CONFIG) == 'kernel'
  assert 'equals plain attention on this' in capsys.readouterr().err
  gemma = registry.shrink(registry.get_config('gemma3_4b', dtype='bfloat16'))
  assert gemma.sliding_window
  assert attention_path.disagreement(gemma) < 0.01


@pytest.mark.slow
def test_a_kernel_that_leaks_gives_way_to_blocks(interpreted, monkeypatch, capsys):
  intervals = flash._intervals

  def leaky(segment_ids, window):
    low, high = intervals(segment_ids, window)
    return (low - 1).clip(0), high

  monkeypatch.setattr(flash, '_intervals', leaky)
  assert attention_path.choose('auto', CONFIG) == 'blocks'
  assert 'the kernel is wrong by' in capsys.readouterr().err


def test_where_there_is_no_kernel_asking_for_it_is_an_error():
  with pytest.raises(UserError, match='attention=kernel needs a GPU or a TPU'):
    attention_path.choose('kernel', CONFIG)
