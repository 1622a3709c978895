"""The shop as plain pages for a person with a browser: `python -m envs.webshop --serve`.

The same environment that an agent plays: a page shows the same elements, a button posts the same
action. Sessions live in this process; the pages are for this machine only.
"""

from __future__ import annotations

import collections
import secrets
from typing import Any

from data.errors import UserError
from envs.base import Task

HOST = '127.0.0.1'
_MAX_SESSIONS = 100
_MAX_ACTION = 500  # characters

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>WebShop</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
#goal { border-left: 4px solid #2a6fb0; padding-left: 1rem; }
form { display: inline; }
button { font: inherit; margin: .2rem .2rem .2rem 0; padding: .25rem .7rem; }
button.chosen { outline: 3px solid #2a6fb0; font-weight: bold; }
input { font: inherit; width: 60%; padding: .25rem; }
p.note { color: #a33; }
</style></head><body>
<p id="goal"><strong>Instruction:</strong> {{ goal }}</p>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% if score is not none %}
<h1>Thank you for shopping with us!</h1>
<p id="score">Your score (0 to 1): <strong>{{ '%.4f'|format(score) }}</strong></p>
<p><a href="/">Another goal</a></p>
{% else %}
{% for element in elements %}
{% if element.kind == 'text' %}<p>{{ element.text }}</p>
{% elif element.text == 'Search' %}
<form method="post"><input name="keywords" aria-label="Keywords" autofocus required maxlength="400">
<button>Search</button></form>
{% else %}
<form method="post"><input type="hidden" name="action" value="click[{{ element.text }}]">
<button{% if element.chosen %} class="chosen"{% endif %}>{{ element.text }}</button></form>
{% endif %}{% endfor %}{% endif %}
</body></html>"""


def make_app(suite: Any, split: str):
  """A Flask application in which each visit to '/' is a shopping trip for the split's next goal.

  Args:
    suite: a `webshop.WebShopSuite`.
    split: whose goals.

  Raises:
    UserError: Flask is not installed, or the split has no goals.
  """
  try:
    import flask
  except ImportError:
    raise UserError('The pages need Flask; install it with: pip install flask') from None
  tasks: list[Task] = suite.tasks(split)
  app = flask.Flask('webshop')
  app.config['MAX_CONTENT_LENGTH'] = 16 * 1024
  sessions: collections.OrderedDict[str, tuple[Task, Any]] = collections.OrderedDict()
  started = 0

  @app.get('/')
  def start():
    nonlocal started
    task = tasks[started % len(tasks)]
    started += 1
    environment = suite.make(task)
    environment.reset()
    key = secrets.token_urlsafe(8)
    sessions[key] = (task, environment)
    while len(sessions) > _MAX_SESSIONS:
      sessions.popitem(last=False)
    return flask.redirect(f'/{key}')

  @app.route('/<key>', methods=['GET', 'POST'])
  def page(key: str):
    if key not in sessions:
      return flask.redirect('/')
    task, environment = sessions[key]
    note = ''
    if flask.request.method == 'POST':
      keywords = flask.request.form.get('keywords', '').strip()
      action = f'search[{keywords}]' if keywords else flask.request.form.get('action', '')
      if not environment.step(action[:_MAX_ACTION]).valid:
        note = 'That is not possible here.'
    reward = environment.reward
    return flask.render_template_string(
      _PAGE, goal=task.instruction, note=note, elements=environment.elements(),
      score=None if reward is None else reward.total)

  return app


def serve(suite: Any, split: str, port: int) -> None:
  """Serves the pages on this machine until it is stopped."""
  app = make_app(suite, split)
  print(f'The shop is open at http://{HOST}:{port}/ (Ctrl-C closes it).', flush=True)
  try:
    app.run(host=HOST, port=port)
  except OSError as error:
    raise UserError(
      f'Port {port} cannot be opened ({error.strerror}); choose another one with --port.') from None
