// Clients on different shards: chat, presence, joins; recovery after a killed connection.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { Node, openNamespace, until } from '../lib/node.js';
import { closeAll, connect, onDifferentShards } from '../lib/sdk.js';

const CONFIG = `
[client]
recovery_publications_max = 10000

${openNamespace('short', { history_size: 5 })}
${openNamespace('long', { history_size: 10_000 })}
${openNamespace('cache', { force_recovery_mode: 'cache' })}
`;

let node;
before(async () => {
  node = await Node.start({ config: CONFIG });
});
after(() => node.stop());
afterEach(closeAll);

let rooms = 0;
const freshRoom = (namespace = 'room') => `${namespace}:shards-${++rooms}`;

test('four shards chat in order', async () => {
  const channel = freshRoom();
  const clients = await onDifferentShards(node, 4);
  const subs = await Promise.all(clients.map((client) => client.subscribe(channel)));
  const texts = [];
  for (let round = 0; round < 10; round++) {
    for (const client of clients) {
      texts.push(`${round} from shard ${client.shard}`);
      await client.sdk.publish(channel, texts.at(-1));
    }
  }
  for (const sub of subs) {
    const publications = await sub.publications(texts.length);
    assert.deepEqual(publications.map(({ data }) => data), texts);
    assert.deepEqual(publications.map(({ offset }) => offset), texts.map((_, index) => index + 1));
  }
});

test('publishers at once: every subscriber sees one order, nothing twice', async () => {
  const channel = freshRoom();
  const clients = await onDifferentShards(node, 4);
  const subs = await Promise.all(clients.map((client) => client.subscribe(channel)));
  const all = clients.flatMap((client) =>
    Array.from({ length: 50 }, (_, n) => client.sdk.publish(channel, `${client.shard}/${n}`)),
  );
  await Promise.all(all);
  const [first, ...others] = await Promise.all(subs.map((sub) => sub.publications(200)));
  const order = first.map(({ data, offset }) => `${offset} ${data}`);
  assert.equal(new Set(order).size, 200);
  for (const other of others) {
    assert.deepEqual(other.map(({ data, offset }) => `${offset} ${data}`), order);
  }
  for (const { shard } of clients) {
    const own = first.map(({ data }) => data).filter((data) => data.startsWith(`${shard}/`));
    assert.deepEqual(own, Array.from({ length: 50 }, (_, n) => `${shard}/${n}`));
  }
});

test('presence, joins and leaves across shards', async () => {
  const channel = freshRoom();
  const [watcher, ...others] = await onDifferentShards(node, 4);
  const watching = await watcher.subscribe(channel, { joinLeave: true });
  for (const other of others) {
    await other.subscribe(channel);
    await watching.event('join', { where: ({ info }) => info.client === other.id });
  }
  assert.equal((await watching.sdk.presenceStats()).numClients, 4);
  assert.equal(Object.keys((await others[2].sdk.presence(channel)).clients).length, 4);
  others[0].close();
  others[1].cut();
  for (const other of [others[0], others[1]]) {
    await watching.event('leave', { where: ({ info }) => info.client === other.id });
  }
});

test('what was missed during a cut comes once and in order', async () => {
  const channel = freshRoom();
  const [reader, writer] = await onDifferentShards(node, 2);
  const sub = await reader.subscribe(channel);
  await writer.sdk.publish(channel, 1);
  await sub.publications(1);
  reader.cut();
  for (let n = 2; n <= 30; n++) {
    await writer.sdk.publish(channel, n);
  }
  await sub.publications(30);
  await writer.sdk.publish(channel, 31);
  await sub.publications(31);
  assert.deepEqual(sub.data, Array.from({ length: 31 }, (_, n) => n + 1));
  const again = sub.all('subscribed')[1];
  assert.deepEqual([again.wasRecovering, again.recovered], [true, true]);
});

test('cuts while others publish without a pause: nothing lost, doubled or reordered', async () => {
  const channel = freshRoom('long');
  const [reader, ...writers] = await onDifferentShards(node, 3);
  const sub = await reader.subscribe(channel);
  let acknowledged = 0;
  let going = true;
  const write = async (writer) => {
    while (going) {
      await writer.sdk.publish(channel, 'x');
      acknowledged += 1;
    }
  };
  const writing = writers.map(write);
  for (let cut = 1; cut <= 8; cut++) {
    const before = sub.data.length;
    await until(() => sub.data.length >= before + 20, 10_000, () => `${sub.data.length} after ${before}`);
    reader.cut();
    await sub.event('subscribed', { skip: cut });
  }
  going = false;
  await Promise.all(writing);
  await until(() => sub.data.length >= acknowledged, 10_000, () => `${sub.data.length} of ${acknowledged}`);
  const offsets = sub.all('publication').map(({ offset }) => offset);
  assert.deepEqual(offsets, Array.from({ length: acknowledged }, (_, n) => n + 1));
  assert.ok(sub.all('subscribed').slice(1).every(({ recovered }) => recovered));
});

test('more missed than the channel keeps: not recovered, never a part', async () => {
  const channel = freshRoom('short');
  const [reader, writer] = await onDifferentShards(node, 2);
  const sub = await reader.subscribe(channel);
  await writer.sdk.publish(channel, 0);
  await sub.publications(1);
  reader.sdk.disconnect();
  for (let n = 1; n <= 20; n++) {
    await writer.sdk.publish(channel, n);
  }
  reader.sdk.connect();
  const again = await sub.event('subscribed', { skip: 1 });
  assert.deepEqual([again.wasRecovering, again.recovered], [true, false]);
  assert.equal(again.streamPosition.offset, 21);
  await writer.sdk.publish(channel, 21);
  await sub.publications(2);
  assert.deepEqual(sub.data, [0, 21]);
});

test('exactly as much missed as the channel keeps is recovered', async () => {
  const channel = freshRoom('short');
  const [reader, writer] = await onDifferentShards(node, 2);
  const sub = await reader.subscribe(channel);
  await writer.sdk.publish(channel, 0);
  await sub.publications(1);
  reader.sdk.disconnect();
  for (let n = 1; n <= 5; n++) {
    await writer.sdk.publish(channel, n);
  }
  reader.sdk.connect();
  await sub.publications(6);
  assert.deepEqual(sub.data, [0, 1, 2, 3, 4, 5]);
});

test('a position of another epoch is not recovered', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  await client.sdk.publish(channel, 1);
  const sub = await client.subscribe(channel, { since: { offset: 1, epoch: 'elsewhere' } });
  const { wasRecovering, recovered } = sub.all('subscribed')[0];
  assert.deepEqual([wasRecovering, recovered], [true, false]);
});

test('a subscription from a known position', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  for (let n = 1; n <= 4; n++) {
    await client.sdk.publish(channel, n);
  }
  const { epoch } = await client.sdk.history(channel, { limit: 0 });
  const sub = await client.subscribe(channel, { since: { offset: 2, epoch } });
  await sub.publications(2);
  assert.deepEqual(sub.data, [3, 4]);
});

test('cache recovery gives the latest publication', async () => {
  const channel = freshRoom('cache');
  const [reader, writer] = await onDifferentShards(node, 2);
  const sub = await reader.subscribe(channel);
  await writer.sdk.publish(channel, 1);
  await sub.publications(1);
  reader.sdk.disconnect();
  for (let n = 2; n <= 6; n++) {
    await writer.sdk.publish(channel, n);
  }
  reader.sdk.connect();
  const again = await sub.event('subscribed', { skip: 1 });
  assert.equal(again.recovered, true);
  await sub.publications(2);
  await writer.sdk.publish(channel, 7);
  await sub.publications(3);
  assert.deepEqual(sub.data, [1, 6, 7]);
});
