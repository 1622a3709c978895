// The episode reader. Everything in `data` was said by a model, an environment or a hint writer, so
// it goes into the page as text nodes only: no markup is ever made from it.
(function () {
  'use strict';

  window.addEventListener('error', function (event) {
    const note = document.createElement('p');
    note.className = 'failed-script';
    note.textContent = 'The episode reader failed: ' + event.message;
    document.body.prepend(note);
    document.documentElement.dataset.failed = '1';
  });

  const data = JSON.parse(document.getElementById('data').textContent);
  const byId = (id) => document.getElementById(id);
  const css = (policy) => 'p-' + policy.replace(/[^A-Za-z0-9]/g, '-');

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Which games are listed.

  const won = (game, policy) => game.episodes[policy].won;
  const T = data.teacher;
  const S = data.student;
  const filters = [
    ['all games', () => true],
    ['teacher and student part', (g) => g.parting !== null],
    ['student solves, teacher does not', (g) => won(g, S) && !won(g, T)],
    ['teacher solves, student does not', (g) => won(g, T) && !won(g, S)],
    ['student solves, base does not', (g) => won(g, S) && !won(g, 0)],
    ['base solves, student does not', (g) => won(g, 0) && !won(g, S)],
    ['solved by all', (g) => g.episodes.every((e) => e.won)],
    ['solved by none', (g) => g.episodes.every((e) => !e.won)],
  ];
  let listed = data.games.map((_, i) => i);
  let current = -1;
  let tab = S;
  let promptOpen = true;

  const cells = data.games.map(function (game, index) {
    const cell = make('button');
    cell.type = 'button';
    cell.tabIndex = -1;
    const solvers = data.policies.filter((_, p) => won(game, p));
    cell.title = game.instruction + ' Solved by: ' + (solvers.join(', ') || 'none') + '.';
    cell.setAttribute('aria-label', cell.title);
    data.policies.forEach(function (policy, p) {
      cell.append(make('i', css(policy) + (won(game, p) ? ' won' : '')));
    });
    cell.addEventListener('click', () => choose(index));
    return cell;
  });
  byId('game-map').append(...cells);

  filters.forEach(function (filter, i) {
    const count = data.games.filter(filter[1]).length;
    const option = make('option', '', filter[0] + ' (' + count + ')');
    option.value = i;
    option.disabled = count === 0;
    byId('game-filter').append(option);
  });

  function applyFilter() {
    const keep = filters[byId('game-filter').value || 0][1];
    listed = data.games.map((_, i) => i).filter((i) => keep(data.games[i]));
    cells.forEach((cell, i) => { cell.hidden = !keep(data.games[i]); });
    byId('game-choice').replaceChildren(...listed.map(function (i) {
      const option = make('option', '', data.games[i].instruction + '  —  ' + data.games[i].task);
      option.value = i;
      return option;
    }));
    if (listed.length && !listed.includes(current)) choose(listed[0]);
    else byId('game-choice').value = current;
  }

  // One episode.

  function promptView(episode) {
    const details = make('details', 'prompt-box');
    const tokens = episode.prompt.reduce((sum, part) => sum + part[3], 0);
    const memory = episode.prompt.reduce(
      (sum, part) => sum + (part[0] === 'memory' ? part[3] : 0), 0);
    const summary = make('summary', '', 'prompt, ' + tokens + ' tokens');
    if (memory) {
      summary.append(', ');
      summary.append(make('span', 'legend-memory', memory + ' of them hints'));
    }
    const text = make('div', 'prompt');
    for (const [kind, place, control] of episode.prompt) {
      const part = make('span', kind + (control ? ' control' : ''), data.texts[place]);
      part.title = kind === 'memory' ? 'memory block: removed for the student' : kind;
      text.append(part);
    }
    details.append(summary, text);
    details.open = promptOpen;
    details.addEventListener('toggle', function () {
      if (details.open === promptOpen) return;
      promptOpen = details.open;
      document.querySelectorAll('.prompt-box').forEach((box) => { box.open = promptOpen; });
    });
    return details;
  }

  function retrievedView(episode) {
    const box = make('div', 'retrieved');
    box.append(make('p', '', 'retrieved hints, with their similarity'));
    const list = make('ul');
    for (const hint of episode.hints) {
      const item = make('li');
      item.append(make('span', 'score', hint.score === null ? '–' : hint.score.toFixed(3)));
      const text = make(hint.bank === null ? 'span' : 'a', '', hint.text);
      if (hint.bank !== null) text.href = '#hint-' + Number(hint.bank);
      item.append(text);
      list.append(item);
    }
    box.append(list);
    return box;
  }

  const flagTexts = {
    unchanged: 'nothing changed',
    cut: 'cut at the token limit',
  };

  function stepView(step) {
    const item = make('li');
    if (step.thought) item.append(make('p', 'thought', step.thought));
    if (step.action) item.append(make('p', 'action', step.action));
    if (step.reply) item.append(make('p', 'reply', step.reply));
    // Thoughts and invalid replies never reach the environment: the agent itself answers them.
    const asked = step.parsed === 'action';
    const answer = make('p', 'answer' + (asked ? '' : ' agent'), step.observation);
    answer.title = asked ? 'what the environment answered' : 'the agent answered itself';
    item.append(answer);
    const flags = make('div', 'flags');
    if (step.parsed === 'invalid') flags.append(make('span', '', 'not a command'));
    for (const name of Object.keys(flagTexts)) {
      if (step[name] && (name !== 'unchanged' || asked)) {
        flags.append(make('span', '', flagTexts[name]));
      }
    }
    if (step.reward) flags.append(make('span', 'reward', 'reward ' + step.reward));
    if (flags.childNodes.length) item.append(flags);
    return item;
  }

  function partText(game, policy) {
    const other = policy === T ? 'student' : 'teacher';
    const theirs = game.parting[policy === T ? 1 : 0];
    return theirs === null
      ? 'here they part: the ' + other + ' had ended'
      : 'here they part: the ' + other + ' sent another command';
  }

  function episodeView(game, policy) {
    const name = data.policies[policy];
    const episode = game.episodes[policy];
    const view = make('article', 'episode ' + css(name) + (policy === tab ? ' chosen' : ''));
    view.dataset.policy = policy;
    const head = make('h4');
    const role = policy === T ? ' (teacher)' : policy === S ? ' (student)' : '';
    head.append(make('span', 'name', name + role));
    head.append(make('span', 'tag' + (episode.won ? ' yes' : ''),
      data.endings[episode.termination]));
    const counts = episode.tokens.map((n) => n.toLocaleString('en'));
    view.append(head, make('small', '', episode.env_steps + ' environment steps, '
      + episode.calls + ' calls; tokens: ' + counts[0] + ' prompt, ' + counts[1] + ' computed, '
      + counts[2] + ' generated'));
    if (episode.hints.length) view.append(retrievedView(episode));
    if (episode.prompt) view.append(promptView(episode));
    const steps = make('ol', 'steps');
    const side = policy === T ? 0 : policy === S ? 1 : -1;
    const mark = side >= 0 && game.parting ? game.parting[side] : undefined;
    episode.steps.forEach(function (step, i) {
      const item = stepView(step);
      if (i === mark) {
        item.classList.add('part');
        item.prepend(make('div', 'part-note', partText(game, policy)));
      }
      steps.append(item);
    });
    const end = make('li', 'end' + (episode.won ? ' won' : ''),
      'End: ' + data.endings[episode.termination] + '.');
    if (mark === null) {
      end.classList.add('part');
      end.prepend(make('div', 'part-note', 'here they part: no command was left to send'));
    }
    steps.append(end);
    view.append(steps);
    return view;
  }

  // Choosing a game and, on a narrow screen, a policy.

  function chooseTab(policy) {
    tab = policy;
    [...byId('policy-tabs').children].forEach(function (button, p) {
      button.setAttribute('aria-selected', String(p === policy));
      button.tabIndex = p === policy ? 0 : -1;
    });
    document.querySelectorAll('.episode').forEach(function (view) {
      view.classList.toggle('chosen', Number(view.dataset.policy) === policy);
    });
  }

  data.policies.forEach(function (policy, p) {
    const button = make('button', css(policy), policy);
    button.type = 'button';
    button.setAttribute('role', 'tab');
    button.addEventListener('click', () => chooseTab(p));
    byId('policy-tabs').append(button);
  });
  byId('policy-tabs').addEventListener('keydown', function (event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const count = data.policies.length;
    chooseTab((tab + move + count) % count);
    byId('policy-tabs').children[tab].focus();
    event.preventDefault();
  });

  function choose(index) {
    if (current >= 0) {
      cells[current].removeAttribute('aria-current');
      cells[current].tabIndex = -1;
    }
    current = index;
    const game = data.games[index];
    cells[index].setAttribute('aria-current', 'true');
    cells[index].tabIndex = 0;
    byId('game-choice').value = index;
    const parts = game.parting === null
      ? 'Teacher and student send the same commands to the end.'
      : 'Teacher and student part: the place is marked in both.';
    byId('game-head').replaceChildren(
      make('h3', '', game.instruction), make('small', '', game.task + ' · ' + parts));
    byId('episodes').replaceChildren(...data.policies.map((_, p) => episodeView(game, p)));
    const place = listed.indexOf(index);
    byId('game-before').disabled = place <= 0;
    byId('game-next').disabled = place < 0 || place === listed.length - 1;
  }

  function go(by) {
    const next = listed[listed.indexOf(current) + by];
    if (next !== undefined) choose(next);
  }

  byId('game-filter').addEventListener('change', applyFilter);
  byId('game-choice').addEventListener('change', (event) => choose(Number(event.target.value)));
  byId('game-before').addEventListener('click', () => go(-1));
  byId('game-next').addEventListener('click', () => go(1));
  byId('game-map').addEventListener('keydown', function (event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    go(move);
    cells[current].focus();
    event.preventDefault();
  });

  byId('hint-filter').addEventListener('input', function (event) {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    document.querySelectorAll('.hints > li').forEach(function (item) {
      const text = item.firstElementChild.textContent.toLowerCase();
      item.hidden = !words.every((word) => text.includes(word));
    });
  });

  // The first game to see is one that tells the story: the student learnt what base cannot do.
  const telling = [(g) => won(g, S) && !won(g, 0) && g.parting, (g) => g.parting, () => true]
    .map((test) => data.games.findIndex(test)).find((i) => i >= 0);
  applyFilter();
  choose(telling);
  chooseTab(S);
  document.documentElement.dataset.ready = '1';
})();
