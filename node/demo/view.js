// What the page shows: entries, members, the ring of shards, the round trip.
//
// Owns DOM nodes only. Text of others is set as text, never as markup.

const SVG = 'http://www.w3.org/2000/svg';
// Messages of one person within this time stand together.
const GROUP_MS = 3 * 60_000;

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; `text` is its text. */
function element(name, { text, ...attributes } = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) {
      node.setAttribute(key, value === true ? '' : value);
    }
  }
  if (text !== undefined) {
    node.textContent = text;
  }
  node.append(...children);
  return node;
}

function svg(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  return node;
}

/** One of eight hues (see the style sheet) for a name. */
function tone(name) {
  let hash = 7;
  for (const char of name) {
    hash = (hash * 31 + char.codePointAt(0)) >>> 0;
  }
  return hash % 8;
}

const avatar = (name) =>
  element('span', { class: `avatar tone-${tone(name)}`, 'aria-hidden': 'true', text: [...name][0]?.toUpperCase() ?? '?' });

const clock = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit' });

export const milliseconds = (ms) => {
  if (ms < 10) {
    return `${ms.toFixed(1)} ms`;
  }
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
};

// --- entries ---

/** Draws the entries into `list`, touching only what changed. `retry(entry)` sends a refused one again. */
export class EntryList {
  constructor(list, retry) {
    this.list = list;
    this.retry = retry;
    this.drawn = new Map();
  }

  draw(entries) {
    const before = this.drawn;
    this.drawn = new Map();
    let previous = null;
    let place = this.list.firstChild;
    for (const entry of entries) {
      const follows = this.follows(previous, entry);
      const look = JSON.stringify([entry, follows]);
      const known = before.get(entry.key);
      const node = known?.look === look ? known.node : this.entry(entry, follows);
      if (known && known.node !== node) {
        if (known.node === place) {
          place = place.nextSibling;
        }
        known.node.remove();
      }
      before.delete(entry.key);
      this.drawn.set(entry.key, { look, node });
      if (node === place) {
        place = place.nextSibling;
      } else {
        this.list.insertBefore(node, place);
      }
      previous = entry;
    }
    for (const { node } of before.values()) {
      node.remove();
    }
  }

  follows(previous, entry) {
    return (
      previous?.kind === 'message' &&
      entry.kind === 'message' &&
      previous.mine === entry.mine &&
      previous.name === entry.name &&
      previous.client === entry.client &&
      entry.at - previous.at < GROUP_MS
    );
  }

  entry(entry, follows) {
    if (entry.kind === 'message') {
      return this.message(entry, follows);
    }
    if (entry.kind === 'missed') {
      const text = `${entry.count} ${entry.count === 1 ? 'message' : 'messages'} while you were away`;
      return element('li', { class: 'missed' }, element('span', { text }));
    }
    return element('li', { class: entry.kind }, element('span', { text: entry.text }));
  }

  message(entry, follows) {
    const { name, text, mine, at, shard, pending } = entry;
    const kind = `message${mine ? ' mine' : ''}${follows ? ' follows' : ''}${pending ? ' pending' : ''}`;
    const head = element('p', { class: 'head' }, element('b', { text: mine ? 'You' : name }));
    if (!mine && shard !== undefined) {
      head.append(element('span', { class: 'chip', text: `shard ${shard}` }));
    }
    const bubble = element('div', { class: 'bubble' }, element('p', { class: 'text', text }));
    const content = element('div', { class: 'content' }, head, bubble, this.foot(entry, at));
    return element('li', { class: kind }, ...(mine ? [] : [avatar(name)]), content);
  }

  foot(entry, at) {
    const foot = element('p', { class: 'foot' });
    if (entry.error) {
      const retry = element('button', { type: 'button', class: 'link', text: 'Send again' });
      retry.addEventListener('click', () => this.retry(entry));
      foot.append(element('span', { class: 'error', text: `Not sent: ${entry.error}. ` }), retry);
    } else if (entry.pending) {
      foot.append(element('span', { text: entry.waited ? 'waiting for the connection' : 'sending' }));
    } else if (Number.isFinite(at)) {
      const date = new Date(at);
      foot.append(element('time', { datetime: date.toISOString(), text: clock.format(date) }));
      if (entry.trip != null) {
        const title = 'From sending it to seeing it in the room';
        foot.append(element('span', { class: 'trip', title, text: milliseconds(entry.trip) }));
      }
    }
    return foot;
  }
}

// --- members ---

/** Lists who is there, this client first. */
export function drawMembers(list, members, me) {
  const sorted = [...members].sort(
    ([a, { name: x = '~' }], [b, { name: y = '~' }]) => (b === me.client) - (a === me.client) || x.localeCompare(y),
  );
  list.replaceChildren(
    ...sorted.map(([client, { name, shard }]) => {
      const called = client === me.client ? me.name : (name ?? `guest ${client.slice(0, 4)}`);
      const label = element('span', { class: 'name', text: called });
      if (client === me.client) {
        label.append(element('span', { class: 'you', text: ' you' }));
      }
      const chip = shard === undefined ? [] : [element('span', { class: 'chip', text: `shard ${shard}` })];
      return element('li', {}, avatar(called), label, ...chip);
    }),
  );
}

// --- the ring ---

/** Draws the shards as outlets on a ring: mine is lit, those of other members glow. */
export function drawRing(root, { shards, mine, taken }) {
  const radius = 46;
  const size = Math.max(1.2, Math.min(7, (Math.PI * radius) / Math.max(shards, 1) / 1.6));
  const nodes = [svg('circle', { class: 'track', cx: 60, cy: 60, r: radius })];
  for (let shard = 0; shard < shards; shard++) {
    const angle = (shard / shards) * 2 * Math.PI - Math.PI / 2;
    const [cx, cy] = [60 + radius * Math.cos(angle), 60 + radius * Math.sin(angle)];
    if (shard === mine) {
      nodes.push(svg('circle', { class: 'glow', cx, cy, r: size * 1.9 }));
    }
    const state = shard === mine ? 'outlet mine' : taken.has(shard) ? 'outlet taken' : 'outlet';
    nodes.push(svg('circle', { class: state, cx, cy, r: shard === mine ? size * 1.15 : size }));
  }
  root.replaceChildren(...nodes);
}

// --- the round trip ---

/** Draws the last round trips as a line from old to new. */
export function drawSpark(root, trips, most) {
  if (trips.length < 2) {
    root.replaceChildren();
    return;
  }
  const top = Math.max(...trips, 1);
  const step = 120 / (most - 1);
  const start = 120 - (trips.length - 1) * step;
  const points = trips.map((trip, at) => `${(start + at * step).toFixed(1)},${(26 - (trip / top) * 22).toFixed(1)}`);
  root.replaceChildren(
    svg('polygon', { class: 'area', points: `${start.toFixed(1)},28 ${points.join(' ')} 120,28` }),
    svg('polyline', { class: 'line', points: points.join(' '), 'vector-effect': 'non-scaling-stroke' }),
  );
}
