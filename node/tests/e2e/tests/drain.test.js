// The end of a node: readiness red first, then no new connections and 3001 for those there, then exit 0.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Node, until } from '../lib/node.js';
import { Raw } from '../lib/raw.js';
import { Client, closeAll, connect, onDifferentShards } from '../lib/sdk.js';

const CONFIG = `
[server]
drain_delay_ms = 700
drain_timeout_ms = 6000
`;

test('SIGTERM drains in its order', async () => {
  const node = await Node.start({ config: CONFIG });
  const clients = await onDifferentShards(node, 4);
  const raw = await Raw.connected(node.port);
  const started = performance.now();
  const stopped = node.stop();
  await until(async () => (await node.get('/ready')).status === 503, 2_000, () => 'readiness to be red');
  assert.ok(performance.now() - started < 700, 'red before the delay is over');
  const late = await connect(node);
  await late.sdk.publish('room:drain', 'accepted during the delay');
  for (const client of [...clients, late]) {
    await client.event('connecting', { where: ({ code }) => code === 3001 });
  }
  assert.deepEqual({ ...(await raw.end()) }, { code: 3001, reason: 'shutdown', ended: 'fin' });
  assert.ok(performance.now() - started >= 700, 'nobody was sent away before the delay was over');
  const refused = new Client(node);
  refused.sdk.connect();
  assert.deepEqual(await stopped, { code: 0, signal: null });
  assert.ok(performance.now() - started < 6_000);
  assert.equal(refused.last('connected'), undefined);
  closeAll();
});

test('the demo ends at once', async () => {
  const node = await Node.start();
  const raw = await Raw.connected(node.port);
  const started = performance.now();
  assert.deepEqual(await node.stop(), { code: 0, signal: null });
  assert.ok(performance.now() - started < 3_000);
  assert.equal((await raw.end()).code, 3001);
});

test('SIGINT drains too', async () => {
  const node = await Node.start();
  assert.deepEqual(await node.stop('SIGINT'), { code: 0, signal: null });
});

test('connections that never take leave hold the end no longer than the timeout', async () => {
  const node = await Node.start({ flags: ['--server.drain_timeout_ms=1500', '--client.close_timeout_ms=60000'] });
  const raw = await Raw.connected(node.port);
  raw.send({ id: 2, subscribe: { channel: 'room:stopped' } });
  await raw.reply(2);
  raw.stopReading();
  const data = 'x'.repeat(50_000);
  const commands = Array.from({ length: 60 }, () => ({ publish: { channel: 'room:stopped', data } }));
  await node.api('batch', { commands });
  const started = performance.now();
  assert.deepEqual(await node.stop(), { code: 0, signal: null });
  assert.ok(performance.now() - started < 4_000);
  raw.destroy();
});

test('a port that is held is named with its holder', async () => {
  const node = await Node.start();
  const held = Node.start({ flags: ['--listen', `127.0.0.1:${node.port}`] });
  await assert.rejects(held, new RegExp(`already in use by process ${node.pid} `));
  await node.stop();
});
