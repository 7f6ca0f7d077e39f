// After every way in which a connection can end, the kernel holds exactly the sockets of live sessions.

import assert from 'node:assert/strict';
import { readFileSync, readdirSync, readlinkSync } from 'node:fs';
import { after, before, test } from 'node:test';

import { Node, until } from '../lib/node.js';
import { CLOSE, Raw, TEXT, frame } from '../lib/raw.js';

const CONFIG = `
[client]
handshake_timeout_ms = 1000
stale_close_delay_ms = 1000
close_timeout_ms = 1000
`;
const ROUNDS = 6;
const AT_ONCE = 40;

let node;
before(async () => {
  node = await Node.start({ config: CONFIG });
});
after(() => node.stop());

const LISTEN = '0A';
const TIME_WAIT = '06';

/** Sockets of the node on its traffic port in the kernel's table (proc(5)), by state. */
function sockets(port) {
  const local = `:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  const lines = readFileSync('/proc/net/tcp', 'utf8').trim().split('\n').slice(1);
  const states = lines.map((line) => line.trim().split(/\s+/)).filter(([, address]) => address.endsWith(local));
  return states.map(([, , , state]) => state).filter((state) => state !== LISTEN && state !== TIME_WAIT);
}

/** The process's descriptors but for sockets, of which the admin port has a changing number. */
function descriptors() {
  const folder = `/proc/${node.pid}/fd`;
  return readdirSync(folder).filter((fd) => !readlinkSync(`${folder}/${fd}`).startsWith('socket:')).length;
}

/** Every way in which a connection can end. Each gives once its own side is done. */
const ENDINGS = {
  closeFrame: async () => {
    const raw = await Raw.connected(node.port);
    raw.write(frame(CLOSE, Buffer.of(0x03, 0xe8)));
    await raw.end();
  },
  fin: async () => {
    const raw = await Raw.connected(node.port);
    raw.socket.end();
    await raw.end();
  },
  reset: async () => {
    const raw = await Raw.connected(node.port);
    raw.socket.resetAndDestroy();
  },
  resetUnread: async () => {
    const raw = await Raw.connected(node.port);
    raw.send({ id: 2, subscribe: { channel: 'room:churn' } }, { id: 3, history: { channel: 'room:churn', limit: 9 } });
    raw.socket.resetAndDestroy();
  },
  badCommand: async () => {
    const raw = await Raw.connected(node.port);
    raw.send({ id: 2, subscribe: { channel: 'room:churn' } });
    raw.text('nonsense');
    await raw.end();
  },
  badFrame: async () => {
    const raw = await Raw.connected(node.port);
    raw.write(frame(TEXT, 'x', { mask: false }));
    await raw.end();
  },
  halfHead: async () => {
    const raw = new Raw(node.port);
    raw.write('GET /connection/websocket HTTP/1.1\r\n');
    raw.socket.end();
    await raw.end();
  },
  silent: async () => {
    await new Raw(node.port).end();
  },
  neverConnects: async () => {
    await (await Raw.open(node.port)).end();
  },
  closedUnread: async () => {
    const raw = await Raw.connected(node.port);
    raw.stopReading();
    raw.text('nonsense');
    await until(() => raw.socket.destroyed || raw.socket.writableEnded === false, 100);
    setTimeout(() => raw.destroy(), 1_500);
  },
  http: async () => {
    const raw = new Raw(node.port);
    raw.write('GET /health HTTP/1.0\r\n\r\n');
    await raw.end();
  },
};

test('churn of every kind, from many at once', { timeout: 120_000 }, async () => {
  const staying = [];
  for (let count = 0; count < 25; count++) {
    const raw = (await Raw.connected(node.port)).answerPings();
    raw.send({ id: 2, subscribe: { channel: 'room:churn' } });
    await raw.reply(2);
    staying.push(raw);
  }
  await node.settled('connections', staying.length);
  const before = descriptors();
  const endings = Object.values(ENDINGS);
  let accepted = staying.length;
  for (let round = 0; round < ROUNDS; round++) {
    const some = Array.from({ length: AT_ONCE }, (_, n) => endings[(n + round) % endings.length]);
    await Promise.all(some.map((ending) => ending()));
    accepted += some.length;
  }
  await until(() => sockets(node.port).length === staying.length, 15_000, () => sockets(node.port).join(' '));
  assert.deepEqual([...new Set(sockets(node.port))], ['01'], 'all are established');
  await node.settled('connections', staying.length);
  await node.settled('sessions', staying.length);
  await node.settled('subscriptions', 2 * staying.length);
  await node.settled('partial_bytes', 0);
  await node.settled('accepted_total', accepted);
  assert.equal(descriptors(), before);
  const { presence } = await node.call('presence', { channel: 'room:churn' });
  assert.equal(Object.keys(presence).length, staying.length);

  await node.call('publish', { channel: 'room:churn', data: 'end' });
  for (const raw of staying) {
    await until(() => raw.publications('room:churn').length === 1);
    raw.destroy();
  }
  await until(() => sockets(node.port).length === 0, 15_000, () => sockets(node.port).join(' '));
  await node.settled('connections', 0);
  await node.settled('subscriptions', 0);
  // The positions of `room:churn` and `broadcast:global` live on, at their homes alone.
  await until(async () => (await node.metric('channels')) <= 2);
});
