// The demo page: one connection, one room, and what the visitor does with them.

import { Connection } from '/connection.js';
import { Room } from '/room.js';
import { EntryList, byId, drawMembers, drawRing, drawSpark, milliseconds } from '/view.js';

const LOBBY = 'room:lobby';
const ANNOUNCEMENTS = 'broadcast:global';
const DROP_MS = 5_000;
const PROBE_MS = 2_000;
// The first one does not compete with drawing what just came.
const FIRST_PROBE_MS = 300;
const TRIPS_MAX = 30;
const NAME_KEY = 'ringmain-demo:name';
const TAB_KEY = 'ringmain-demo:tab';

const ADJECTIVES = ['Quiet', 'Copper', 'Brisk', 'Mellow', 'Amber', 'Nimble', 'Lucky', 'Tidy'];
const ANIMALS = ['Otter', 'Heron', 'Lynx', 'Wren', 'Badger', 'Newt', 'Falcon', 'Marten'];
const pick = (list) => list[Math.floor(Math.random() * list.length)];

// --- who this is ---

/** A tab opened "as someone else" keeps its name to itself; otherwise the browser's is used. */
const guest = new URLSearchParams(location.search).has('guest');
const storedName = () => sessionStorage.getItem(NAME_KEY) ?? (guest ? null : localStorage.getItem(NAME_KEY));

function storeName(name) {
  sessionStorage.setItem(NAME_KEY, name);
  if (!guest) {
    localStorage.setItem(NAME_KEY, name);
  }
}

function tabId() {
  const known = sessionStorage.getItem(TAB_KEY) ?? `${Date.now().toString(36)}${Math.random().toString(36).slice(2)}`;
  sessionStorage.setItem(TAB_KEY, known);
  return known;
}

const me = { tab: tabId(), name: storedName(), client: null, shard: null, shards: 0 };

// --- state ---

/** The room that the address names: `#room:tea`, or `#tea` for short. */
function roomOfAddress() {
  let text = '';
  try {
    text = decodeURIComponent(location.hash.slice(1)).trim();
  } catch {
    // A broken escape names no room.
  }
  if (!text) {
    return LOBBY;
  }
  return text.startsWith('room:') ? text : `room:${text}`;
}

let room = null;
let state = { name: 'connecting' };
let hiddenCount = 0;
let trips = [];

const list = new EntryList(byId('entries'), (entry) => room.send(entry));

const connection = new Connection(
  `${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/connection/websocket`,
  'ringmain-demo',
  {
    opened: () => room.subscribe(),
    connected(result) {
      me.client = result.client;
      me.shard = result.data?.shard ?? null;
      me.shards = result.data?.shards ?? 0;
      trips = [];
    },
    pushed(push) {
      if (push.channel === room.channel) {
        hiddenCount += document.hidden && push.pub?.data?.type === 'message' ? 1 : 0;
        room.push(push);
      } else if (push.channel === ANNOUNCEMENTS && push.pub) {
        announce(push.pub.data);
      }
    },
    changed(now) {
      state = now;
      invalidate();
      setTimeout(probe, FIRST_PROBE_MS);
    },
  },
);

function announce(data) {
  const text = typeof data === 'string' ? data : (data?.text ?? JSON.stringify(data));
  room.add('announcement', { text: `To everyone: ${text}` });
  invalidate();
}

/** How long a question to the room's home shard takes. */
function probe() {
  if (state.name !== 'connected' || document.hidden) {
    return;
  }
  const asked = performance.now();
  connection.request('presence_stats', { channel: room.channel }).then(
    () => {
      trips = [...trips, performance.now() - asked].slice(-TRIPS_MAX);
      drawTrips();
    },
    () => {},
  );
}

function enter(channel) {
  const other = room;
  room = new Room(channel, connection, me, invalidate);
  if (other && state.name === 'connected') {
    other.unsubscribe();
    room.subscribe();
  }
  invalidate();
}

// --- drawing ---

const STATES = {
  connecting: 'Connecting…',
  connected: 'Connected',
  waiting: 'Reconnecting…',
  dropped: 'Dropped',
  closed: 'Closed',
};

let stale = false;

/** Draws with the next frame, however much happens before; at once where nobody is looking. */
function invalidate() {
  if (document.hidden) {
    draw();
  } else if (!stale) {
    stale = true;
    requestAnimationFrame(draw);
  }
}

function draw() {
  stale = false;
  const log = byId('log');
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const count = room.entries.length + room.unsent.length;
  list.draw([...room.entries, ...room.unsent]);
  byId('empty').hidden = state.name !== 'connected' || count > 0;
  const grown = count !== Number(log.dataset.count);
  log.dataset.count = count;
  if (atEnd) {
    log.scrollTop = log.scrollHeight;
  }
  byId('to-end').hidden = atEnd || (!grown && byId('to-end').hidden);

  const title = room.channel.slice('room:'.length);
  byId('room-button').textContent = title;
  document.title = `${hiddenCount > 0 ? `(${hiddenCount}) ` : ''}${title} · Ringmain demo`;
  drawPanel();
  drawBanner();
}

function drawPanel() {
  const online = state.name === 'connected';
  const members = online ? room.members : new Map();
  const taken = new Set([...members.values()].map(({ shard }) => shard));
  drawMembers(byId('members'), members, me);
  byId('count').textContent = online ? members.size : '–';
  byId('panel-toggle').textContent = online ? `${members.size} online` : 'Offline';
  drawRing(byId('ring'), { shards: me.shards || 1, mine: online ? me.shard : null, taken });
  byId('shard').textContent = online && me.shard !== null ? `shard ${me.shard}` : '–';
  byId('shards').textContent = online ? `of ${me.shards}` : 'not connected';
  byId('drop').disabled = !online;
  const pill = byId('state');
  pill.dataset.state = state.name;
  if (pill.textContent !== STATES[state.name]) {
    pill.textContent = STATES[state.name];
  }
  drawTrips();
}

function drawTrips() {
  const online = state.name === 'connected' && trips.length > 0;
  const sorted = [...trips].sort((a, b) => a - b);
  byId('latency').textContent = online ? milliseconds(trips.at(-1)) : '–';
  byId('median').textContent = online ? milliseconds(sorted[Math.floor(sorted.length / 2)]) : '–';
  drawSpark(byId('spark'), online ? trips : [], TRIPS_MAX);
}

function bannerText() {
  const left = Math.max(0, Math.ceil(((state.until ?? 0) - performance.now()) / 1000));
  if (state.name === 'dropped') {
    return `You pulled the plug. Back in ${left} s; what is said meanwhile will be recovered.`;
  }
  if (state.name === 'waiting') {
    return `No connection to the node. Next try in ${left} s.`;
  }
  if (state.name === 'closed') {
    return `The node closed the connection: ${state.reason}.`;
  }
  return room.refusal ? `The room cannot be entered: ${room.refusal}.` : null;
}

function drawBanner() {
  const text = bannerText();
  byId('banner').hidden = text === null;
  byId('banner-text').textContent = text ?? '';
  byId('banner-button').hidden = !['dropped', 'waiting', 'closed'].includes(state.name);
}

// --- what the visitor does ---

const composer = byId('composer');
const text = byId('text');

composer.addEventListener('submit', (event) => {
  event.preventDefault();
  const said = text.value.trim();
  if (said) {
    byId('log').scrollTop = byId('log').scrollHeight;
    room.say(said);
    text.value = '';
    fitText();
  }
  text.focus();
});

text.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    composer.requestSubmit();
  }
});

/** The field grows with what is written (the style sheet has its largest height). */
function fitText() {
  text.style.height = 'auto';
  text.style.height = `${text.scrollHeight}px`;
}
text.addEventListener('input', fitText);

byId('drop').addEventListener('click', () => connection.drop(DROP_MS));
byId('banner-button').addEventListener('click', () => connection.open());

const log = byId('log');
byId('to-end').addEventListener('click', () => log.scrollTo({ top: log.scrollHeight }));
log.addEventListener('scroll', () => {
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) {
    byId('to-end').hidden = true;
  }
});

byId('panel-toggle').addEventListener('click', () => {
  const open = document.body.classList.toggle('panel-open');
  byId('panel-toggle').setAttribute('aria-expanded', String(open));
});

const nameDialog = byId('name-dialog');

function askName(proposal) {
  byId('name').value = proposal;
  nameDialog.showModal();
  byId('name').select();
  byId('name-button').textContent = me.name === null ? 'Join the room' : 'Change it';
}
// Without a name there is no way in; a change may be given up.
nameDialog.addEventListener('cancel', (event) => me.name === null && event.preventDefault());
byId('rename').addEventListener('click', () => askName(me.name));
byId('name-form').addEventListener('submit', () => {
  const name = byId('name').value.trim();
  if (!name) {
    return askName(`${pick(ADJECTIVES)} ${pick(ANIMALS)}`);
  }
  const first = me.name === null;
  me.name = name;
  storeName(name);
  text.focus();
  return first ? connection.open() : rename();
});

function rename() {
  if (state.name === 'connected') {
    room.sayHello();
  }
  invalidate();
}

byId('room-button').addEventListener('click', () => {
  byId('room').value = room.channel.slice('room:'.length);
  byId('room-dialog').showModal();
  byId('room').select();
});
byId('room-form').addEventListener('submit', () => {
  const name = byId('room').value.trim();
  if (name) {
    location.hash = `#room:${encodeURIComponent(name)}`;
  }
});

addEventListener('hashchange', () => {
  if (roomOfAddress() !== room.channel) {
    enter(roomOfAddress());
  }
  byId('second-tab').href = `/?guest${location.hash}`;
});

document.addEventListener('visibilitychange', () => {
  if (!document.hidden) {
    hiddenCount = 0;
    room.looked();
    room.remember();
  }
  draw();
});

addEventListener('online', () => state.name === 'waiting' && connection.open());
setInterval(probe, PROBE_MS);
setInterval(drawBanner, 250);

byId('second-tab').href = `/?guest${location.hash}`;
enter(roomOfAddress());
if (me.name) {
  connection.open();
} else {
  askName(`${pick(ADJECTIVES)} ${pick(ANIMALS)}`);
}
