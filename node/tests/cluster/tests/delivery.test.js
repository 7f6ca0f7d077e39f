// Nodes on one bus, clients of the unmodified SDK: what is published on one node reaches all, in one order.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { closeAll } from '../../e2e/lib/sdk.js';
import { token } from '../../e2e/lib/token.js';
import { connect, publish } from '../lib/clients.js';
import { BUS, Cluster, Door, openNamespace, until } from '../lib/cluster.js';

const CONFIG = `
[client]
recovery_publications_max = 2000
history_publications_max = 2000

${openNamespace('long', { history_size: 2_000 })}
${openNamespace('short', { history_size: 5 })}
${openNamespace('ephemeral', { history_size: 0 })}
`;

const WAIT = { ms: 20_000 };
const MANY_MS = 60_000;

let cluster;
before(async () => {
  cluster = await Cluster.start(BUS, { config: CONFIG });
});
after(() => cluster?.stop());
afterEach(closeAll);

/** A test of a broker that does not fail. */
const scenario = (name, run) => test(name, (t) => cluster.undisturbed(t, run));

let rooms = 0;
const freshRoom = (namespace = 'room') => `${namespace}:${BUS}-${++rooms}`;
const upTo = (count) => Array.from({ length: count }, (_, n) => n + 1);
const offsetsOf = (publications) => publications.map(({ offset }) => offset);

/** Offsets say the order; on a broker with one log for many channels they have holes. */
function assertIncreasing(offsets) {
  assert.ok(offsets.every((offset, index) => index === 0 || offset > offsets[index - 1]), offsets.join());
}

const everywhere = (options) => Promise.all(cluster.nodes.map((node) => connect(node, options)));

scenario('a publisher on one node, subscribers on all: the same publications under the same offsets', async () => {
  const channel = freshRoom();
  const clients = await everywhere();
  const subs = await Promise.all(clients.map((client) => client.subscribe(channel)));
  for (const n of upTo(50)) {
    await publish(clients[0], channel, { n });
  }
  const [first, ...others] = await Promise.all(subs.map((sub) => sub.publications(50, MANY_MS)));
  assert.deepEqual(first.map(({ data }) => data.n), upTo(50));
  assertIncreasing(offsetsOf(first));
  for (const other of others) {
    assert.deepEqual(other.map(({ data }) => data.n), upTo(50));
    assert.deepEqual(offsetsOf(other), offsetsOf(first));
  }
  const epochs = subs.map((sub) => sub.all('subscribed')[0].streamPosition.epoch);
  assert.equal(new Set(epochs).size, 1, epochs.join());
});

scenario('publishers on all nodes at once: every subscriber sees one order, nothing twice', async () => {
  const channel = freshRoom('long');
  const clients = await everywhere();
  const subs = await Promise.all(clients.map((client) => client.subscribe(channel)));
  const publishes = clients.flatMap((client, who) => upTo(100).map((n) => publish(client, channel, { who, n })));
  await Promise.all(publishes);
  const [first, ...others] = await Promise.all(subs.map((sub) => sub.publications(300, MANY_MS)));
  const inOrder = (publications) => publications.map(({ offset, data }) => `${offset} ${data.who} ${data.n}`);
  assertIncreasing(offsetsOf(first));
  assert.equal(new Set(first.map(({ data }) => `${data.who} ${data.n}`)).size, 300);
  for (const other of others) {
    assert.deepEqual(inOrder(other), inOrder(first));
  }
  for (const who of [0, 1, 2]) {
    const own = first.filter(({ data }) => data.who === who).map(({ data }) => data.n);
    assert.deepEqual(own, upTo(100), `what node ${who} published, in its order`);
  }
});

scenario('a channel without history: order per publisher on every node', async () => {
  const channel = freshRoom('ephemeral');
  const clients = await everywhere();
  const subs = await Promise.all(clients.map((client) => client.subscribe(channel)));
  await Promise.all(
    clients.map(async (client, who) => {
      for (const n of upTo(50)) {
        await publish(client, channel, { who, n });
      }
    }),
  );
  for (const sub of subs) {
    const publications = await sub.publications(150, MANY_MS);
    for (const who of [0, 1, 2]) {
      assert.deepEqual(publications.filter(({ data }) => data.who === who).map(({ data }) => data.n), upTo(50));
    }
  }
});

scenario('what was missed is recovered on another node, once and in order', async (t) => {
  const channel = freshRoom('long');
  const [a, b, c] = cluster.nodes;
  const door = await Door.to(a);
  t.after(() => door.close());
  const reader = await connect(a, { url: door.url });
  const sub = await reader.subscribe(channel);
  const writer = await connect(b);
  await publish(writer, channel, 1);
  await sub.publications(1, MANY_MS);
  door.shut();
  await sub.event('subscribing', { skip: 1, ...WAIT });
  for (const n of upTo(400).slice(1)) {
    await publish(writer, channel, n);
  }
  // Node C has never had this channel.
  door.leadTo(c);
  await sub.publications(400, MANY_MS);
  const again = await sub.event('subscribed', { skip: 1, ...WAIT });
  assert.deepEqual([again.wasRecovering, again.recovered], [true, true]);
  await publish(writer, channel, 401);
  await sub.publications(401, MANY_MS);
  assert.deepEqual(sub.data, upTo(401));
  assertIncreasing(offsetsOf(sub.all('publication')));
});

scenario('moving from node to node while all publish: nothing lost, doubled or reordered', async (t) => {
  const channel = freshRoom('long');
  const door = await Door.to(cluster.nodes[0]);
  t.after(() => door.close());
  const reader = await connect(cluster.nodes[0], { url: door.url });
  const sub = await reader.subscribe(channel);
  const writers = await everywhere();
  let going = true;
  const acknowledged = [0, 0, 0];
  const write = async (writer, who) => {
    while (going) {
      await publish(writer, channel, { who, n: acknowledged[who] + 1 });
      acknowledged[who] += 1;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  const written = Promise.all(writers.map(write));
  written.catch(() => {}); // Awaited below, when the reader has moved.
  for (const move of upTo(6)) {
    const before = sub.data.length;
    await until(() => sub.data.length >= before + 10, MANY_MS, () => `${sub.data.length} after ${before}`);
    door.leadTo(cluster.nodes[move % 3]);
    await sub.event('subscribed', { skip: move, ...WAIT });
  }
  going = false;
  await written;
  const all = acknowledged.reduce((sum, count) => sum + count);
  await until(() => sub.data.length >= all, MANY_MS, () => `${sub.data.length} of ${all}`);
  assertIncreasing(offsetsOf(sub.all('publication')));
  for (const who of [0, 1, 2]) {
    assert.deepEqual(sub.data.filter((data) => data.who === who).map(({ n }) => n), upTo(acknowledged[who]));
  }
  assert.ok(sub.all('subscribed').slice(1).every(({ recovered }) => recovered));
});

scenario('more missed than the channel keeps: not recovered on another node, never a part', async (t) => {
  const channel = freshRoom('short');
  const [a, b, c] = cluster.nodes;
  const door = await Door.to(a);
  t.after(() => door.close());
  const reader = await connect(a, { url: door.url });
  const sub = await reader.subscribe(channel);
  const writer = await connect(b);
  await publish(writer, channel, 0);
  await sub.publications(1, MANY_MS);
  door.shut();
  await sub.event('subscribing', { skip: 1, ...WAIT });
  for (const n of upTo(20)) {
    await publish(writer, channel, n);
  }
  door.leadTo(c);
  const again = await sub.event('subscribed', { skip: 1, ...WAIT });
  assert.deepEqual([again.wasRecovering, again.recovered], [true, false]);
  await publish(writer, channel, 21);
  await sub.publications(2, MANY_MS);
  assert.deepEqual(sub.data, [0, 21]);
});

scenario('history is one, whichever node is asked', async () => {
  const channel = freshRoom();
  const clients = await everywhere();
  for (const n of upTo(12)) {
    await publish(clients[n % 3], channel, n);
  }
  const pages = await Promise.all(clients.map((client) => client.sdk.history(channel, { limit: 100 })));
  for (const page of pages) {
    assert.deepEqual(page.publications.map(({ data }) => data), upTo(12));
    assertIncreasing(offsetsOf(page.publications));
    assert.deepEqual([page.offset, page.epoch], [page.publications[11].offset, pages[0].epoch]);
    assert.deepEqual(offsetsOf(page.publications), offsetsOf(pages[0].publications));
  }
  const newest = await clients[1].sdk.history(channel, { limit: 3, reverse: true });
  assert.deepEqual(newest.publications.map(({ data }) => data), [12, 11, 10]);
  await cluster.nodes[2].call('history_remove', { channel });
  const empty = await clients[0].sdk.history(channel, { limit: 100 });
  assert.deepEqual([empty.publications, empty.epoch], [[], pages[0].epoch]);
  assert.ok(empty.offset >= pages[0].offset, 'offsets go on');
});

scenario('an idempotency key counts on every node', async () => {
  const channel = freshRoom();
  const reader = await connect(cluster.nodes[0]);
  const sub = await reader.subscribe(channel);
  const body = { channel, data: 'once', idempotency_key: 'order-1' };
  const offsets = [];
  for (const node of [...cluster.nodes, cluster.nodes[0]]) {
    offsets.push((await node.call('publish', body)).offset);
  }
  assert.equal(new Set(offsets).size, 1, offsets.join());
  await cluster.nodes[1].call('publish', { channel, data: 'next' });
  await sub.publications(2, MANY_MS);
  assert.deepEqual(sub.data, ['once', 'next']);
});

scenario('messages to a user and to everybody reach connections of all nodes', async () => {
  const mine = await everywhere({ token: token({ sub: `user-${BUS}` }) });
  const other = await connect(cluster.nodes[1], { token: token({ sub: 'somebody-else' }) });
  await cluster.nodes[0].call('publish', { channel: `user:user-${BUS}`, data: 'to you' });
  await cluster.nodes[2].call('publish', { channel: 'broadcast:global', data: 'to all' });
  const got = (client) => client.seen.filter(({ event }) => event === 'publication').map(({ ctx }) => ctx.data);
  for (const client of mine) {
    await until(() => got(client).length === 2, MANY_MS, () => JSON.stringify(got(client)));
    assert.deepEqual(got(client).sort(), ['to all', 'to you']);
  }
  await until(() => got(other).length === 1, MANY_MS, () => JSON.stringify(got(other)));
  assert.deepEqual(got(other), ['to all']);
});
