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
  const B = data.base;
  const filters = [
    ['all games', () => true],
    ['teacher and student part', (g) => g.parting !== null, T, S],
    ['student solves, teacher does not', (g) => won(g, S) && !won(g, T), T, S],
    ['teacher solves, student does not', (g) => won(g, T) && !won(g, S), T, S],
    ['student solves, base does not', (g) => won(g, S) && !won(g, B), B, S],
    ['base solves, student does not', (g) => won(g, B) && !won(g, S), B, S],
    ['solved by all', (g) => g.episodes.every((e) => e.won)],
    ['solved by none', (g) => g.episodes.every((e) => !e.won)],
  ].filter((filter) => filter.slice(2).every((policy) => policy >= 0));
  let listed = data.games.map((_, i) => i);
  let current = -1;
  let tab = Math.max(S, 0);
  let step = -1;
  // On a telephone the first step should be in sight, beside each other prompts are compared.
  let promptOpen = window.innerWidth > 1000;
  // Which policies stand side by side: all of four, else those of the method's story.
  const story = [B, T, data.policies.indexOf('sft'), S].filter((p) => p >= 0);
  const shown = new Set(
    data.policies.length <= 4 || !story.length ? data.policies.keys() : story);

  const cells = data.games.map(function (game, index) {
    const cell = make('button');
    cell.type = 'button';
    cell.tabIndex = -1;
    const solvers = data.policies.filter((_, p) => won(game, p));
    cell.title = game.instruction + ' Solved by: ' + (solvers.join(', ') || 'none') + '.';
    cell.setAttribute('aria-label', cell.title);
    data.policies.forEach(function (policy, p) {
      cell.append(make('i', data.looks[p] + (won(game, p) ? ' won' : '')));
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
      summary.append(make('span', 'legend-memory', memory + ' of them ' + data.memory));
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

  // An experience: outcome and provenance first, the whole of it on demand.
  function experienceView(found) {
    const details = make('details');
    const summary = make('summary');
    summary.append(make('span', 'tag' + (found.outcome === 'success' ? ' yes' : ''),
      found.outcome === 'success' ? 'solved' : 'failed'));
    summary.append(' ' + found.provenance);
    details.append(summary, make('div', 'prompt', found.text));
    return details;
  }

  function retrievedView(episode) {
    const box = make('div', 'retrieved');
    let from = null;
    let list = null;
    for (const found of episode.retrieved) {
      // A memory that changes is shown block by block.
      if (list === null || found.step !== from) {
        from = found.step;
        box.append(make('p', '', 'retrieved ' + data.memory + ', with their similarity'
          + (from ? ', from call ' + (from + 1) + ' on' : '')));
        list = make('ul');
        box.append(list);
      }
      const item = make('li');
      item.append(make('span', 'score', found.score === null ? '–' : found.score.toFixed(3)));
      if (found.outcome) {
        item.append(experienceView(found));
      } else {
        const text = make(found.bank === null ? 'span' : 'a', '', found.text);
        if (found.bank !== null) text.href = '#hint-' + Number(found.bank);
        item.append(text);
      }
      list.append(item);
    }
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
    const view = make('article', 'episode ' + data.looks[policy]);
    view.dataset.policy = policy;
    view.setAttribute('aria-label', name + ', ' + data.endings[episode.termination]);
    const head = make('h4');
    const role = policy === T ? ' (teacher)' : policy === S ? ' (student)' : '';
    head.append(make('span', 'name', name + role));
    head.append(make('span', 'tag' + (episode.won ? ' yes' : ''),
      data.endings[episode.termination]));
    const counts = episode.tokens.map((n) => n.toLocaleString('en'));
    const top = make('header');
    top.append(head, make('small', '', episode.env_steps + ' environment steps, '
      + episode.calls + ' calls; tokens: ' + counts[0] + ' prompt, ' + counts[1] + ' computed, '
      + counts[2] + ' generated'));
    view.append(top);
    const context = make('div', 'context');
    if (episode.retrieved.length) context.append(retrievedView(episode));
    if (episode.prompt) context.append(promptView(episode));
    view.append(context);
    const steps = make('ol', 'steps');
    const side = policy === T ? 0 : policy === S ? 1 : -1;
    const mark = side >= 0 && game.parting ? game.parting[side] : undefined;
    episode.steps.forEach(function (step, i) {
      const item = stepView(step);
      item.tabIndex = i === 0 ? 0 : -1;
      item.addEventListener('focus', () => chooseStep(policy, i));
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

  // Choosing policies: columns to compare, and on a narrow screen the one to read.

  function showPolicies() {
    document.querySelectorAll('.episode').forEach(function (view) {
      const policy = Number(view.dataset.policy);
      view.classList.toggle('chosen', policy === tab);
      view.classList.toggle('compared', shown.has(policy));
    });
    [...byId('policy-tabs').children].forEach(function (button, p) {
      button.setAttribute('aria-selected', String(p === tab));
      button.tabIndex = p === tab ? 0 : -1;
    });
    [...byId('policy-columns').children].forEach(function (button, p) {
      button.setAttribute('aria-pressed', String(shown.has(p)));
    });
    byId('episodes').style.setProperty('--columns', Math.min(4, shown.size));
  }

  data.policies.forEach(function (policy, p) {
    const button = make('button', data.looks[p], policy);
    button.type = 'button';
    button.addEventListener('click', function () {
      if (!shown.delete(p)) shown.add(p);
      if (!shown.size) shown.add(p);
      showPolicies();
    });
    byId('policy-columns').append(button);
    const label = make('button', data.looks[p], policy);
    label.type = 'button';
    label.setAttribute('role', 'tab');
    label.addEventListener('click', function () { tab = p; showPolicies(); });
    byId('policy-tabs').append(label);
  });
  byId('policy-tabs').addEventListener('keydown', function (event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const count = data.policies.length;
    tab = (tab + move + count) % count;
    showPolicies();
    byId('policy-tabs').children[tab].focus();
    event.preventDefault();
    event.stopPropagation();
  });

  // Step by step: the chosen step of one episode, and the same step of the others beside it.

  const stepsOf = (policy) => [...document.querySelectorAll(
    '.episode[data-policy="' + policy + '"] .steps > li[tabindex]')];

  function chooseStep(policy, index) {
    step = index;
    data.policies.forEach(function (_, p) {
      stepsOf(p).forEach(function (item, i) {
        item.classList.toggle('now', i === index);
        if (p === policy) {
          item.tabIndex = i === index ? 0 : -1;
          if (i === index) item.setAttribute('aria-current', 'step');
          else item.removeAttribute('aria-current');
        } else {
          item.removeAttribute('aria-current');
        }
      });
    });
  }

  function goStep(policy, index) {
    const items = stepsOf(policy);
    const item = items[Math.max(0, Math.min(index, items.length - 1))];
    if (item) item.focus({ preventScroll: true });
    if (item) item.scrollIntoView({ block: 'nearest' });
  }

  byId('reader').addEventListener('keydown', function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest('select, input, summary, .prompt')) return;
    const game = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const view = event.target.closest('.episode');
    if (game) {
      const inMap = event.target.closest('#game-map');
      const policy = view ? Number(view.dataset.policy) : -1;
      if (!go(game)) return;
      if (inMap) cells[current].focus();
      else if (policy >= 0) goStep(policy, 0);
    } else if (move && (view || event.target.closest('#game-map'))) {
      const first = tabsInUse() ? tab : Math.min(...shown);
      goStep(view ? Number(view.dataset.policy) : first, view ? step + move : 0);
    } else {
      return;
    }
    event.preventDefault();
  });

  const tabsInUse = () => getComputedStyle(byId('policy-tabs')).display !== 'none';

  function choose(index) {
    if (current >= 0) {
      cells[current].removeAttribute('aria-current');
      cells[current].tabIndex = -1;
    }
    current = index;
    step = -1;
    const game = data.games[index];
    cells[index].setAttribute('aria-current', 'true');
    cells[index].tabIndex = 0;
    byId('game-choice').value = index;
    const head = make('small', '', game.task);
    byId('game-head').replaceChildren(make('h3', '', game.instruction), head);
    if (game.parting === null && T >= 0 && S >= 0) {
      head.append(' · Teacher and student send the same commands to the end.');
    } else if (game.parting !== null) {
      const jump = make('button', 'jump', 'Show where teacher and student part');
      jump.type = 'button';
      jump.addEventListener('click', showParting);
      byId('game-head').append(jump);
    }
    byId('episodes').replaceChildren(...data.policies.map((_, p) => episodeView(game, p)));
    showPolicies();
    const place = listed.indexOf(index);
    byId('game-before').disabled = place <= 0;
    byId('game-next').disabled = place < 0 || place === listed.length - 1;
  }

  function showParting() {
    const sides = data.games[current].parting;
    // Of the two, the one that goes on is the one to see; both, where both do.
    const side = sides[1] === null ? 0 : 1;
    shown.add(T).add(S);
    tab = side === 0 ? T : S;
    showPolicies();
    goStep(tab, sides[side]);
    stepsOf(tab)[sides[side]].scrollIntoView({ block: 'center' });
  }

  function go(by) {
    const next = listed[listed.indexOf(current) + by];
    if (next !== undefined) choose(next);
    return next !== undefined;
  }

  byId('game-filter').addEventListener('change', applyFilter);
  byId('game-choice').addEventListener('change', (event) => choose(Number(event.target.value)));
  byId('game-before').addEventListener('click', () => go(-1));
  byId('game-next').addEventListener('click', () => go(1));
  // Only a page with a bank of hints has the field.
  if (byId('hint-filter')) {
    byId('hint-filter').addEventListener('input', function (event) {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      document.querySelectorAll('.hints > li').forEach(function (item) {
        const text = item.firstElementChild.textContent.toLowerCase();
        item.hidden = !words.every((word) => text.includes(word));
      });
    });
  }

  // The first game to see is one that tells the story: the student learnt what base cannot do.
  const telling = [
    (g) => S >= 0 && B >= 0 && won(g, S) && !won(g, B) && g.parting, (g) => g.parting, () => true]
    .map((test) => data.games.findIndex(test)).find((i) => i >= 0);
  applyFilter();
  choose(telling);
  document.documentElement.dataset.ready = '1';
})();
