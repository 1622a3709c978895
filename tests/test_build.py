"""BUILD says what the code imports, and its test targets run their tests."""

import ast
import collections
import shutil
import subprocess
import sys

import pytest

from tests import build_file
from tests.build_file import ROOT

needs_build = pytest.mark.skipif(
  not build_file.PATH.exists(), reason='BUILD is not among the files of a Bazel test')


@pytest.mark.parametrize('body, code', [
  ('from data import errors\n\n\ndef test_it():\n  assert errors.UserError\n', 0),
  ('def test_it():\n  assert False\n', 1),
  ('', 5),
])
def test_the_runner_s_exit_code_is_pytest_s(tmp_path, body, code):
  path = tmp_path / 'test_it.py'
  path.write_text(body)
  done = subprocess.run(
    [sys.executable, 'tests/run_pytest.py', str(path)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == code, done.stdout + done.stderr


def is_main_guard(node):
  return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(nodes):
  """Dotted names that statements import, also those inside functions."""
  for node in (n for top in nodes for n in ast.walk(top)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports name the whole path'
      # Of `from a import b`, b is a module or something in a.
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def file_of(name):
  """The first-party file that an imported dotted name comes from; None for a package."""
  parts = name.split('.')
  for end in range(len(parts), 0, -1):
    path = '/'.join(parts[:end])
    for candidate in (f'{path}.py', f'{path}/__init__.py'):
      if (ROOT / candidate).is_file():
        return candidate
  return None


def first_party(path, *, guard):
  """Files that a file imports as a module, or (`guard`) by what it does as a program alone."""
  body = ast.parse((ROOT / path).read_text(encoding='utf-8')).body
  chosen = [node for node in body if is_main_guard(node) == guard]
  return {found for name in imported(chosen) if (found := file_of(name))}


def has_guard(path):
  return any(map(is_main_guard, ast.parse((ROOT / path).read_text(encoding='utf-8')).body))


def owners():
  """Python file -> the library that holds it."""
  owner = {}
  for target in build_file.targets('py_library'):
    for path in target['srcs']:
      assert path not in owner, f'{path} is in {owner[path]} and in {target["name"]}'
      owner[path] = target['name']
  return owner


def deps(target):
  listed = target.get('deps', [])
  assert listed == sorted(set(listed)), f'deps of {target["name"]} are sorted, each once'
  return {label.removeprefix(':') for label in listed}


@needs_build
def test_every_python_file_is_in_one_target():
  listed = subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py'],
    cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip('not a git checkout')
  files = {path for path in listed.stdout.split() if (ROOT / path).exists()}
  tests = {path for target in build_file.targets('py_test') for path in target['args']}
  assert files == tests | set(owners())


@needs_build
@pytest.mark.parametrize(
  'target', build_file.targets('py_library') if build_file.PATH.exists() else (),
  ids=lambda target: target['name'])
def test_a_library_depends_on_what_it_imports(target):
  owner, name = owners(), target['name']
  sources = list(target['srcs'])
  if name == 'testing':
    # The tests have the dependencies of the library that all of them depend on.
    sources += [path for test in build_file.targets('py_test') for path in test['args']]
  users = collections.defaultdict(list)
  for path in sources:
    for found in first_party(path, guard=False):
      users[owner.get(found, found)].append(f'{path} imports {found}')
  users.pop(name, None)
  missing = {library: users[library][0] for library in users.keys() - deps(target)}
  assert not missing, f'{name} lacks deps'
  assert not deps(target) - users.keys(), f'{name} has deps that nothing in it imports'


@needs_build
def test_a_test_file_that_others_import_is_in_their_library():
  shared = {path for path, name in owners().items() if name == 'testing' and '/test_' in path}
  everywhere = build_file.glob(['tests/**/*.py'])
  imported_ones = {
    found for path in everywhere for found in first_party(path, guard=False)
    if '/test_' in found and found != path}
  assert shared == imported_ones


@needs_build
def test_libraries_have_no_circle():
  left = {target['name']: deps(target) for target in build_file.targets('py_library')}
  while ready := {name for name, wanted in left.items() if not wanted & left.keys()}:
    left = {name: wanted for name, wanted in left.items() if name not in ready}
  assert not left, 'these depend on one another, or on such'


@needs_build
def test_every_program_is_a_binary():
  binaries = {target['main']: target for target in build_file.targets('py_binary')}
  owner = owners()
  assert set(binaries) == {
    path for path in owner if has_guard(path) and path != 'tests/run_pytest.py'}
  for path, target in binaries.items():
    assert target['srcs'] == [path]
    started = {owner[found] for found in first_party(path, guard=True)} | {owner[path]}
    assert deps(target) == started, f'{target["name"]} depends on its library and on what it starts'


@needs_build
def test_every_test_file_is_a_target_of_the_runner():
  tests = build_file.targets('py_test')
  assert sorted(path for target in tests for path in target['args']) == build_file.glob(
    ['tests/**/test_*.py'])
  for target in tests:
    assert target['main'] == 'tests/run_pytest.py'
    assert target['srcs'] == [target['main'], *target['args']] or (
      target['srcs'] == [*target['args'], target['main']])
    assert deps(target) == {'testing'}


@needs_build
def test_what_is_read_at_run_time_is_data():
  # Files of the repository that are neither Python nor documentation nor of the tool chain.
  listed = subprocess.run(
    ['git', 'ls-files', 'agents', 'configs', 'data', 'envs', 'experiments', 'inference', 'models',
     'retrieval', 'training'], cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip('not a git checkout')
  wanted = {path for path in listed.stdout.split() if not path.endswith(('.py', '.md'))}
  data = {path for target in build_file.targets('py_library') for path in target.get('data', ())}
  assert wanted and wanted <= data, wanted - data


@needs_build
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('bazel'), reason='no bazel is installed')
def test_bazel_loads_every_target(tmp_path):
  done = subprocess.run(
    ['bazel', '--batch', f'--output_user_root={tmp_path}', 'query', 'kind(rule, //...)',
     '--output=label_kind'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  kinds = ('py_library', 'py_binary', 'py_test')
  assert sorted(done.stdout.splitlines()) == sorted(
    f'{kind} rule //:{target["name"]}' for kind in kinds for target in build_file.targets(kind))


# A small repository: every kind of mistake is found in it.
_FILES = {
  'low/__init__.py': '', 'low/a.py': 'import numpy\n',
  'mid/__init__.py': '', 'mid/b.py': 'def f():\n  from low import a\n  return a\n',
  'top.py': "from mid import b\nif __name__ == '__main__':\n  import low.a\n",
}


def test_imports_are_found_where_they_are(tmp_path, monkeypatch):
  for path, text in _FILES.items():
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
  monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
  assert first_party('low/a.py', guard=False) == set()
  assert first_party('mid/b.py', guard=False) == {'low/a.py'}
  assert first_party('top.py', guard=False) == {'mid/b.py'}
  assert first_party('top.py', guard=True) == {'low/a.py'}
  assert has_guard('top.py') and not has_guard('mid/b.py')
  assert file_of('low') == 'low/__init__.py' and file_of('numpy.linalg') is None
