"""What is added to ScienceWorld's simulator in its Java process, so that a step takes milliseconds.

fast_game.jar holds envs/java/hintsight/FastGame.java, compiled for Java 8 (`make java` does it
anew, with the javac of a JDK): steps without the logging of all names, and a parser that spells
out only the names that an input begins with. And the class of all objects is changed as it is
read from the package (`with_ours`). It gets a hash of its own, as it has an equality of its
own: without one, its sets are searched one by one, or go through their objects in another order
in every run. What lies within an object, which goals ask for at every step, is collected in one
set and not copied at every level. And where nothing lies in it, as in most objects, nothing is
copied either.
"""

import hashlib
import pathlib
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator

from data.errors import UserError

SOURCE = pathlib.Path(__file__).parent / 'java' / 'hintsight' / 'FastGame.java'
JAR = SOURCE.parents[1] / 'fast_game.jar'
OBJECT_CLASS = 'scienceworld/struct/EnvObject.class'
_DIGEST = 'META-INF/source.sha256'
# Sizes of the entries of a class file's constant pool by tag, the tag included (Java Virtual
# Machine Specification, 4.4); texts (1) say theirs.
_ENTRY_SIZES = {3: 5, 4: 5, 5: 9, 6: 9, 7: 3, 8: 3, 9: 5, 10: 5, 11: 5, 12: 5, 15: 4, 16: 3, 17: 5,
                18: 5, 19: 3, 20: 3}
_TEXT, _LONG, _DOUBLE, _CLASS, _METHOD, _NAME_AND_TYPE = 1, 5, 6, 7, 10, 12
_PUBLIC = 1
_VIRTUAL, _SPECIAL, _STATIC = 0xb6, 0xb7, 0xb8  # calls
_WITHIN = b'getContainedObjectsAndPortalsRecursive', b'(ZZ)Lscala/collection/immutable/Set;'
# Methods that copy a set, and the private one that returns it.
_COPIES = {
  (b'getContainedObjects', b'(Z)Lscala/collection/immutable/Set;'): b'containedObjects',
  (b'getPortals', b'(Z)Lscala/collection/immutable/Set;'): b'portals'}


def _u2(data: bytes, at: int) -> int:
  return struct.unpack_from('>H', data, at)[0]


def _entry(tag: int, *numbers: int) -> bytes:
  return struct.pack(f'>B{len(numbers)}H', tag, *numbers)


def _text(value: bytes) -> bytes:
  return _entry(_TEXT, len(value)) + value


def _pool(data: bytes) -> Iterator[tuple[int, int]]:
  """(index, where it is) of the entries of a class file's constant pool, and of its end."""
  at, index, count = 10, 1, _u2(data, 8)
  while index < count:
    yield index, at
    tag = data[at]
    at += 3 + _u2(data, at + 1) if tag == _TEXT else _ENTRY_SIZES[tag]
    index += 2 if tag in (_LONG, _DOUBLE) else 1
  yield count, at


def _pool_end(data: bytes) -> int:
  return [at for _, at in _pool(data)][-1]


def _texts(data: bytes) -> dict[int, bytes]:
  """The pool's texts by index."""
  *entries, _ = _pool(data)
  return {index: data[at + 3:at + 3 + _u2(data, at + 1)]
          for index, at in entries if data[at] == _TEXT}


def _member_end(data: bytes, at: int) -> int:
  """Where a field or method ends that begins at `at`."""
  attributes, at = _u2(data, at + 6), at + 8
  for _ in range(attributes):
    at += 6 + struct.unpack_from('>I', data, at + 2)[0]
  return at


def _members_end(data: bytes, at: int) -> int:
  """Where a table of fields or methods ends that begins at `at`."""
  count, at = _u2(data, at), at + 2
  for _ in range(count):
    at = _member_end(data, at)
  return at


def with_ours(data: bytes) -> bytes:
  """The class of the simulator's objects with four methods of ours.

  `public int hashCode()` is added and returns (int) uuid(). The body of
  `getContainedObjectsAndPortalsRecursive` becomes a call of FastGame.within, those of
  `getContainedObjects` and `getPortals` become calls of FastGame.copy.

  Args:
    data: EnvObject's class file.

  Returns:
    The changed class file.

  Raises:
    ValueError: it is not the class that is known.
  """
  if data[:4] != b'\xca\xfe\xba\xbe':
    raise ValueError('not a class file')
  if _text(b'hashCode') in data:
    raise ValueError('EnvObject has a hashCode already')
  first, end = _u2(data, 8), _pool_end(data)  # Entries are added from the first free index on.
  # The pool is followed by access flags, this class, its parent and its interfaces.
  this, fields = _u2(data, end + 2), end + 8 + 2 * _u2(data, end + 6)
  methods = _members_end(data, fields)
  after = _members_end(data, methods)
  added: list[bytes] = []

  def add(entry: bytes) -> int:
    """An entry's index."""
    added.append(entry)
    return first + len(added) - 1

  def method(owner: int, name: bytes, descriptor: bytes) -> int:
    return add(_entry(_METHOD, owner, add(_entry(
      _NAME_AND_TYPE, add(_text(name)), add(_text(descriptor))))))

  code_name = add(_text(b'Code'))
  ours = add(_entry(_CLASS, add(_text(b'hintsight/FastGame'))))

  def body(code: bytes, stack: int, local: int) -> bytes:
    """The attributes of a method: one, its code, without handlers or attributes."""
    content = struct.pack('>HHI', stack, local, len(code)) + code + struct.pack('>HH', 0, 0)
    return struct.pack('>HHI', 1, code_name, len(content)) + content

  def call(code: int, index: int) -> bytes:
    return struct.pack('>BH', code, index)

  # aload_0, invokevirtual uuid, l2i, ireturn: a long is two words.
  hashed = struct.pack('>HHH', _PUBLIC, add(_text(b'hashCode')), add(_text(b'()I'))) + body(
    b'\x2a' + call(_VIRTUAL, method(this, b'uuid', b'()J')) + b'\x88\xac', 2, 1)
  # aload_0, iload_1, iload_2, invokestatic within, areturn.
  within = method(ours, b'within', b'(Lscienceworld/struct/EnvObject;' + _WITHIN[1][1:])
  bodies = {_WITHIN: body(b'\x2a\x1b\x1c' + call(_STATIC, within) + b'\xb0', 3, 3)}
  copy = method(
    ours, b'copy', b'(Lscala/collection/mutable/Set;Z)Lscala/collection/immutable/Set;')
  for known, own in _COPIES.items():
    # aload_0, invokespecial the set, iload_1, invokestatic copy, areturn.
    inner = method(this, own, b'()Lscala/collection/mutable/Set;')
    bodies[known] = body(
      b'\x2a' + call(_SPECIAL, inner) + b'\x1b' + call(_STATIC, copy) + b'\xb0', 2, 2)
  texts = _texts(data)
  kept, names, at = [], set(), methods + 2
  for _ in range(_u2(data, methods)):
    stop = _member_end(data, at)
    own = tuple(texts[_u2(data, at + offset)] for offset in (2, 4))
    kept.append(data[at:at + 6] + bodies[own] if own in bodies else data[at:stop])
    names.add(own)
    at = stop
  needed = {*bodies, (b'uuid', b'()J'),
            *((own, b'()Lscala/collection/mutable/Set;') for own in _COPIES.values())}
  if not needed <= names:
    raise ValueError('EnvObject has other methods')
  return b''.join((
    data[:8], struct.pack('>H', first + len(added)), data[10:end], *added, data[end:methods],
    struct.pack('>H', len(kept) + 1), *kept, hashed, data[after:]))


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
      f'{JAR} is missing; check it out again, or make it: `make java`.')
  try:
    with zipfile.ZipFile(simulator) as archive:
      changed = with_ours(archive.read(OBJECT_CLASS))
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
