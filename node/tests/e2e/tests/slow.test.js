// Readers that stop reading, under each policy of a namespace. Nothing that was acknowledged may be lost,
// doubled or reordered for a recoverable subscriber, and nobody else may notice.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { Node, openNamespace, until } from '../lib/node.js';
import { Raw } from '../lib/raw.js';
import { closeAll, connect } from '../lib/sdk.js';

// Small buffers, so that a reader falls behind soon.
const small = { log_bytes_max: 262_144, presence: false, join_leave: false, force_push_join_leave: false };
const CONFIG = `
[server]
send_buffer_bytes = 4096
tcp_notsent_lowat_bytes = 4096

[client]
recovery_publications_max = 2000
close_timeout_ms = 1000

${openNamespace('replay', { ...small, history_size: 2000 })}
${openNamespace('short', { ...small, history_size: 20 })}
${openNamespace('latest', { ...small, history_size: 2000, slow_consumer: 'latest' })}
${openNamespace('close', { ...small, history_size: 2000, slow_consumer: 'close', stall_ms: 1500 })}
`;

// Far more than both kernels' buffers and the log hold.
const COUNT = 400;
const PADDING = 'x'.repeat(8_000);
const BATCH = 10;

let node;
before(async () => {
  node = await Node.start({ config: CONFIG });
});
after(() => node.stop());
afterEach(() => {
  closeAll();
  Raw.destroyAll();
});

const upTo = (count) => Array.from({ length: count }, (_, n) => n + 1);

/**
 * Publishes `from` to `to`, every one acknowledged. A subscriber that reads all the time sees each batch
 * before the next one leaves, whatever others do.
 */
async function publish(channel, from, to, tags = () => undefined) {
  const witness = await connect(node);
  const sub = await witness.subscribe(channel);
  const command = (n) => ({ publish: { channel, data: { n, PADDING }, tags: tags(n) } });
  for (let n = from; n <= to; n += BATCH) {
    const commands = upTo(Math.min(BATCH, to - n + 1)).map((step) => command(n + step - 1));
    const { replies } = await node.api('batch', { commands });
    assert.ok(replies.every((reply) => reply.publish), JSON.stringify(replies.find((reply) => reply.error)));
    await sub.publications(Math.min(n + BATCH, to + 1) - from);
  }
  assert.deepEqual(sub.data.map(({ n }) => n), upTo(to).slice(from - 1));
  witness.close();
}

async function stoppedRaw(channel) {
  const raw = await Raw.connected(node.port);
  raw.send({ id: 2, subscribe: { channel } });
  assert.equal((await raw.reply(2)).subscribe.recoverable, true);
  raw.stopReading();
  return raw;
}

test('replay: a stopped reader catches up from history', async () => {
  const raw = await stoppedRaw('replay:a');
  await publish('replay:a', 1, COUNT);
  assert.ok(raw.publications('replay:a').length < COUNT);
  raw.goOnReading();
  await until(() => raw.publications('replay:a').length >= COUNT, 10_000, () => raw.publications('replay:a').length);
  await publish('replay:a', COUNT + 1, COUNT + 10);
  await until(() => raw.publications('replay:a').length >= COUNT + 10, 10_000);
  const publications = raw.publications('replay:a');
  assert.deepEqual(publications.map(({ offset }) => offset), upTo(COUNT + 10));
  assert.deepEqual(publications.map(({ data }) => data.n), upTo(COUNT + 10));
  assert.ok(publications.every(({ data }) => data.PADDING === PADDING));
  raw.destroy();
});

test('replay: stops and goes again and again while publications go on', async () => {
  const channel = 'replay:b';
  const raw = await stoppedRaw(channel);
  let published = 0;
  for (let round = 0; round < 12; round++) {
    await publish(channel, published + 1, published + 60);
    published += 60;
    raw.goOnReading();
    const enough = published - 30 - round;
    await until(() => raw.publications(channel).length >= enough, 10_000, () => raw.publications(channel).length);
    raw.stopReading();
  }
  raw.goOnReading();
  await until(() => raw.publications(channel).length >= published, 10_000, () => raw.publications(channel).length);
  assert.deepEqual(raw.publications(channel).map(({ offset }) => offset), upTo(published));
  raw.destroy();
});

test('replay: other commands of a stopped reader are answered in their place', async () => {
  const channel = 'replay:c';
  const raw = await stoppedRaw(channel);
  await publish(channel, 1, COUNT);
  raw.send({ id: 3, publish: { channel, data: { n: COUNT + 1 } } }, { id: 4, unsubscribe: { channel } });
  await until(async () => (await node.call('history', { channel, limit: 0 })).offset === COUNT + 1);
  raw.goOnReading();
  await raw.reply(4, 10_000);
  const offsets = raw.publications(channel).map(({ offset }) => offset);
  assert.deepEqual(offsets, upTo(offsets.length), 'a part without holes up to the unsubscribe');
  const end = raw.messages.findIndex(({ id }) => id === 4);
  await publish(channel, COUNT + 2, COUNT + 3);
  raw.send({ id: 5, rpc: {} });
  await raw.reply(5);
  assert.ok(raw.messages.slice(end + 1).every(({ push }) => push?.channel !== channel));
  raw.destroy();
});

test('replay beyond what history holds: the reader is told, and nothing comes twice', async () => {
  const channel = 'short:a';
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  await publish(channel, 1, 1);
  await sub.publications(1);
  client.sockets[0]._socket.pause();
  await publish(channel, 2, COUNT);
  client.sockets[0]._socket.resume();
  const told = await sub.event('subscribing', { skip: 1, ms: 10_000 });
  assert.deepEqual([told.code, told.reason], [2500, 'insufficient state']);
  const again = await sub.event('subscribed', { skip: 1 });
  assert.equal(again.wasRecovering, true);
  await publish(channel, COUNT + 1, COUNT + 5);
  await until(() => sub.data.at(-1).n === COUNT + 5, 10_000, () => sub.data.at(-1).n);
  const offsets = sub.all('publication').map(({ offset }) => offset);
  const gaps = offsets.slice(1).map((offset, index) => offset - offsets[index]);
  assert.ok(gaps.every((gap) => gap > 0), 'in order, nothing twice');
  // Where the first answer says "not recovered", one hole is announced; otherwise there is none.
  assert.equal(gaps.filter((gap) => gap > 1).length, again.recovered ? 0 : 1);
  assert.equal(client.sockets.length, 1, 'the connection stays');
});

test('latest: a stopped reader goes on with the newest of every key', async () => {
  const channel = 'latest:a';
  const raw = await stoppedRaw(channel);
  const key = (n) => ({ key: `k${n % 5}` });
  await publish(channel, 1, COUNT, key);
  raw.goOnReading();
  const newest = () => new Map(raw.publications(channel).map(({ data, tags }) => [tags.key, data.n]));
  const last = upTo(COUNT).slice(-5);
  await until(() => last.every((n) => newest().get(`k${n % 5}`) === n), 10_000, () => JSON.stringify([...newest()]));
  await publish(channel, COUNT + 1, COUNT + 1, key);
  await until(() => raw.publications(channel).at(-1).data.n === COUNT + 1);
  const offsets = raw.publications(channel).map(({ offset }) => offset);
  assert.ok(offsets.length < COUNT, 'something was skipped');
  assert.ok(offsets.every((offset, index) => index === 0 || offset > offsets[index - 1]), offsets.join());
  await until(async () => (await node.metric('dropped_total', 'skipped')) > 0);
  raw.destroy();
});

test('close: a stopped reader is closed with 3008', async () => {
  const channel = 'close:a';
  const slow = await node.counter('closed_total', 'slow');
  const raw = await stoppedRaw(channel);
  await publish(channel, 1, COUNT);
  await node.settled('closed_total', slow + 1, 'slow');
  raw.goOnReading();
  const { code, reason } = await raw.end();
  const offsets = raw.publications(channel).map(({ offset }) => offset);
  assert.deepEqual(offsets, upTo(offsets.length));
  // The frame waits behind what was sent; a peer that does not take that in time sees no more than the end.
  if (code !== undefined) {
    assert.deepEqual([code, reason], [3008, 'slow']);
  }
});

test('close: the SDK comes back and recovers everything', async () => {
  const channel = 'close:b';
  const slow = await node.counter('closed_total', 'slow');
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  await publish(channel, 1, 3);
  await sub.publications(3);
  client.sockets[0]._socket.pause();
  await publish(channel, 4, COUNT);
  await node.settled('closed_total', slow + 1, 'slow');
  client.sockets[0]._socket.resume();
  await sub.publications(COUNT);
  await publish(channel, COUNT + 1, COUNT + 5);
  await sub.publications(COUNT + 5);
  assert.deepEqual(sub.data.map(({ n }) => n), upTo(COUNT + 5));
  assert.equal(sub.all('subscribed').at(-1).recovered, true);
  assert.ok(client.sockets.length > 1);
});

test('who asks without reading is closed, and leaves nothing behind', async () => {
  const channel = 'replay:asked';
  await publish(channel, 1, 100);
  const slow = await node.counter('closed_total', 'slow');
  const raw = await Raw.connected(node.port);
  raw.stopReading();
  for (let id = 2; id < 60; id++) {
    raw.send({ id, history: { channel, limit: 100 } });
  }
  await node.settled('closed_total', slow + 1, 'slow');
  // The peer never reads: its close is given up after a while, and the socket is gone.
  await node.settled('connections', 0);
  await node.settled('own_queue_bytes', 0);
  raw.destroy();
});
