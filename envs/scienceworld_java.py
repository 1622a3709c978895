"""What is added to ScienceWorld's simulator in its Java process, so that a step takes milliseconds.

  python -m envs.scienceworld_java    # compiles envs/java anew; needs a JDK (javac)

fast_game.jar holds envs/java/hintsight/FastGame.java, compiled for Java 8: steps without the
logging of all names, and a parser that spells out only the names that an input begins with. And
EnvObject gets a hash of its own (`with_hash`), as it has an equality of its own: without one, its
sets are searched one by one, or go through their objects in another order in every run.
"""

import hashlib
import pathlib
import struct
import subprocess
import sys
import tempfile
import zipfile

from data.errors import UserError

SOURCE = pathlib.Path(__file__).parent / 'java' / 'hintsight' / 'FastGame.java'
JAR = SOURCE.parents[1] / 'fast_game.jar'
OBJECT_CLASS = 'scienceworld/struct/EnvObject.class'
_DIGEST = 'META-INF/source.sha256'
# Sizes of the entries of a class file's constant pool by tag, the tag included (Java Virtual
# Machine Specification, 4.4); texts (1) say theirs.
_ENTRY_SIZES = {3: 5, 4: 5, 5: 9, 6: 9, 7: 3, 8: 3, 9: 5, 10: 5, 11: 5, 12: 5, 15: 4, 16: 3, 17: 5,
                18: 5, 19: 3, 20: 3}
_TEXT, _LONG, _DOUBLE, _METHOD, _NAME_AND_TYPE = 1, 5, 6, 10, 12
_PUBLIC = 1


def _u2(data: bytes, at: int) -> int:
  return struct.unpack_from('>H', data, at)[0]


def _entry(tag: int, *numbers: int) -> bytes:
  return struct.pack(f'>B{len(numbers)}H', tag, *numbers)


def _text(value: bytes) -> bytes:
  return _entry(_TEXT, len(value)) + value


def _pool_end(data: bytes) -> int:
  """Where the constant pool of a class file ends."""
  at, index, count = 10, 1, _u2(data, 8)
  while index < count:
    tag = data[at]
    at += 3 + _u2(data, at + 1) if tag == _TEXT else _ENTRY_SIZES[tag]
    index += 2 if tag in (_LONG, _DOUBLE) else 1
  return at


def _members_end(data: bytes, at: int) -> int:
  """Where a table of fields or methods ends that begins at `at`."""
  count, at = _u2(data, at), at + 2
  for _ in range(count):
    attributes, at = _u2(data, at + 6), at + 8
    for _ in range(attributes):
      at += 6 + struct.unpack_from('>I', data, at + 2)[0]
  return at


def with_hash(data: bytes) -> bytes:
  """A class that has `long uuid()` with `public int hashCode() { return (int) uuid(); }` added.

  Args:
    data: a class file without a hashCode of its own.

  Returns:
    The class file with the method.

  Raises:
    ValueError: it is none such.
  """
  if data[:4] != b'\xca\xfe\xba\xbe' or _text(b'uuid') not in data:
    raise ValueError('not a class with uuid()')
  if _text(b'hashCode') in data:
    raise ValueError('it has a hashCode already')
  count, end = _u2(data, 8), _pool_end(data)
  # The pool is followed by access flags, this class, its parent and its interfaces.
  this, fields = _u2(data, end + 2), end + 8 + 2 * _u2(data, end + 6)
  methods = _members_end(data, fields)
  after = _members_end(data, methods)
  added = [
    _text(b'hashCode'), _text(b'()I'), _text(b'Code'), _text(b'uuid'), _text(b'()J'),
    _entry(_NAME_AND_TYPE, count + 3, count + 4), _entry(_METHOD, this, count + 5)]
  # aload_0, invokevirtual uuid, l2i, ireturn: two words of stack, one local variable.
  code = b'\x2a\xb6' + struct.pack('>H', count + 6) + b'\x88\xac'
  body = struct.pack('>HHI', 2, 1, len(code)) + code + struct.pack('>HH', 0, 0)
  method = struct.pack('>HHHHHI', _PUBLIC, count, count + 1, 1, count + 2, len(body)) + body
  return b''.join((
    data[:8], struct.pack('>H', count + len(added)), data[10:end], *added, data[end:methods],
    struct.pack('>H', _u2(data, methods) + 1), data[methods + 2:after], method, data[after:]))


def classpath(simulator: str | pathlib.Path, folder: str | pathlib.Path) -> list[str]:
  """What stands before the simulator in the class path.

  Args:
    simulator: its jar.
    folder: where the changed class is written to.

  Raises:
    UserError: the jar is not the one that this is made for, or ours is missing.
  """
  if not JAR.exists():
    raise UserError(
      f'{JAR} is missing; check it out again, or make it: `python -m envs.scienceworld_java`.')
  try:
    with zipfile.ZipFile(simulator) as archive:
      changed = with_hash(archive.read(OBJECT_CLASS))
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(
      f'{simulator} is not the simulator that is known here ({error}); install the version of '
      'requirements.txt.') from error
  path = pathlib.Path(folder) / OBJECT_CLASS
  path.parent.mkdir(parents=True)
  path.write_bytes(changed)
  return [str(folder), str(JAR)]


def source_digest() -> str:
  return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def built_digest() -> str:
  """Of the source that the jar was made from."""
  with zipfile.ZipFile(JAR) as archive:
    return archive.read(_DIGEST).decode()


def build() -> None:
  """Compiles the jar.

  Raises:
    UserError: there is no javac, or it refuses.
  """
  from scienceworld import constants

  with tempfile.TemporaryDirectory() as folder:
    command = [
      'javac', '--release', '8', '-Xlint:-options', '-cp', constants.JAR_PATH, '-d', folder,
      str(SOURCE)]
    try:
      done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
      raise UserError('There is no javac on the PATH; install a JDK, 9 or later.') from None
    if done.returncode:
      raise UserError(f'javac refuses {SOURCE.name}: {done.stderr.strip()}')
    files = {_DIGEST: source_digest().encode()}
    for path in sorted(pathlib.Path(folder).rglob('*.class')):
      files[path.relative_to(folder).as_posix()] = path.read_bytes()
  with zipfile.ZipFile(JAR, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in files.items():
      # The same classes always make the same file.
      archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)


if __name__ == '__main__':
  try:
    build()
  except UserError as problem:
    sys.exit(f'Error: {problem}')
