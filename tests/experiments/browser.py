"""A headless Chromium for tests, driven over its DevTools pipe: no port, no further package."""

import base64
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from typing import Any

PATH = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
_FLAGS = (
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-dev-shm-usage',
  '--no-first-run', '--disable-background-networking', '--disable-component-update',
  '--disable-sync', '--hide-scrollbars', '--remote-debugging-pipe')
# Chromium reads commands at descriptor 3 and writes answers at 4, whatever numbers the pipes have.
_LAUNCH = '''
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
'''
_KEYS = {'ArrowRight': 39, 'ArrowLeft': 37, 'ArrowDown': 40, 'ArrowUp': 38, 'Tab': 9, 'Enter': 13,
         'Home': 36, 'End': 35}


class Browser:
  """One page of one browser; a context manager that ends the process it started."""

  def __init__(self, profile: str | os.PathLike, timeout_s: float = 90.0):
    """Starts the browser.

    Args:
      profile: a folder for its files, made by it.
      timeout_s: longest wait for one answer.

    Raises:
      TimeoutError: it does not answer; its own words are in the message.
    """
    self._timeout_s = timeout_s
    self._ids = itertools.count(1)
    self._buffer = b''
    self._events: list[dict[str, Any]] = []
    self.console: list[str] = []
    self._log = pathlib.Path(f'{profile}.log')
    child_read, self._write = os.pipe()
    self._read, child_write = os.pipe()
    with self._log.open('wb') as log:
      self._process = subprocess.Popen(
        [sys.executable, '-c', _LAUNCH, str(child_read), str(child_write), PATH, *_FLAGS,
         f'--user-data-dir={profile}', 'about:blank'],
        pass_fds=(child_read, child_write), stdout=log, stderr=log, start_new_session=True)
    os.close(child_read)
    os.close(child_write)
    self._session = ''
    targets = self._call('Target.getTargets')['targetInfos']
    page = next(t['targetId'] for t in targets if t['type'] == 'page')
    self._session = self._call(
      'Target.attachToTarget', targetId=page, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self._call(f'{domain}.enable')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    os.close(self._write)
    os.close(self._read)
    self._process.terminate()
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()

  def open(self, page: pathlib.Path | str) -> None:
    """Opens a file or an address and waits for its load event."""
    self.console.clear()
    self._events.clear()
    self._call('Page.navigate', url=page if isinstance(page, str) else page.as_uri())
    self._wait_for_load()

  def follow(self, script: str) -> None:
    """Runs JavaScript that leads to another page, and waits for that."""
    self._events.clear()
    self.run(script)
    self._wait_for_load()

  def _wait_for_load(self) -> None:
    deadline = time.monotonic() + self._timeout_s
    while not any(e['method'] == 'Page.loadEventFired' for e in self._events):
      self._receive(deadline)

  def show(self, width: int, height: int = 900, dark: bool = False) -> None:
    """Sets the window's size in CSS pixels and the colour scheme that the reader prefers."""
    self._call('Emulation.setDeviceMetricsOverride', width=width, height=height,
               deviceScaleFactor=1, mobile=width < 600)
    scheme = 'dark' if dark else 'light'
    # A page that is still gliding to its place would move under a click.
    self._call('Emulation.setEmulatedMedia', features=[
      {'name': 'prefers-color-scheme', 'value': scheme},
      {'name': 'prefers-reduced-motion', 'value': 'reduce'}])

  def run(self, script: str) -> Any:
    """The value of a JavaScript expression, of JSON's types.

    Raises:
      AssertionError: the expression threw.
    """
    answer = self._call('Runtime.evaluate', expression=script, returnByValue=True,
                        awaitPromise=True)
    if 'exceptionDetails' in answer:
      raise AssertionError(f'{script}: {answer["exceptionDetails"]}')
    return answer['result'].get('value')

  def press(self, key: str, shift: bool = False) -> None:
    """Presses and releases a key where the focus is."""
    for kind in ('keyDown', 'keyUp'):
      self._call('Input.dispatchKeyEvent', type=kind, key=key, code=key,
                 windowsVirtualKeyCode=_KEYS[key], modifiers=8 * shift)

  def click(self, selector: str) -> None:
    """Clicks with the mouse at the middle of the first element of a CSS selector."""
    x, y = self.run(
      f'(() => {{ const e = document.querySelector({json.dumps(selector)});'
      " e.scrollIntoView({block: 'center', behavior: 'instant'});"
      ' const b = e.getBoundingClientRect();'
      ' return [b.x + b.width / 2, b.y + b.height / 2]; })()')
    for kind in ('mousePressed', 'mouseReleased'):
      self._call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

  def screenshot(self, path: pathlib.Path, top: float = 0, height: float | None = None) -> None:
    """Writes a PNG of the page from `top` on, `height` CSS pixels high (None: to its end)."""
    size = self._call('Page.getLayoutMetrics')['cssContentSize']
    clip = {'x': 0, 'y': top, 'width': size['width'], 'scale': 1,
            'height': min(height or size['height'], size['height'] - top)}
    picture = self._call('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)
    path.write_bytes(base64.b64decode(picture['data']))

  def _call(self, method: str, **params) -> dict[str, Any]:
    message = {'id': next(self._ids), 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    deadline = time.monotonic() + self._timeout_s
    while True:
      answer = self._receive(deadline)
      if answer.get('id') == message['id']:
        if 'error' in answer:
          raise AssertionError(f'{method}: {answer["error"]}')
        return answer['result']

  def _receive(self, deadline: float) -> dict[str, Any]:
    """The next message; events are kept, what the console says too."""
    while b'\0' not in self._buffer:
      ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
      chunk = os.read(self._read, 1 << 20) if ready else b''
      if not chunk:
        raise TimeoutError(f'{PATH} does not answer: {self._log.read_text()[-2000:]}')
      self._buffer += chunk
    text, self._buffer = self._buffer.split(b'\0', 1)
    message = json.loads(text)
    if 'method' in message:
      self._events.append(message)
      params = message.get('params', {})
      if message['method'] == 'Runtime.exceptionThrown':
        self.console.append(json.dumps(params['exceptionDetails']))
      elif message['method'] == 'Runtime.consoleAPICalled':
        self.console.append(json.dumps(params['args']))
      elif message['method'] == 'Log.entryAdded':
        self.console.append(params['entry']['text'])
    return message
