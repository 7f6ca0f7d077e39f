// Every command, with the unmodified SDK, and the errors that each can get.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { Node, openNamespace, until } from '../lib/node.js';
import { Raw } from '../lib/raw.js';
import { closeAll, connect, rejection } from '../lib/sdk.js';
import { token } from '../lib/token.js';

const CONFIG = `
${openNamespace('live', { history_size: 0 })}
${openNamespace('asked', { force_push_join_leave: false, force_recovery: false })}
[namespaces.readonly]
allow_subscribe_for_client = true
allow_subscribe_for_anonymous = true

[namespaces.members]
allow_subscribe_for_client = true
allow_publish_for_subscriber = true
allow_history_for_subscriber = true
presence = true
allow_presence_for_subscriber = true
`;

let node;
before(async () => {
  node = await Node.start({ config: CONFIG });
});
after(() => node.stop());
afterEach(closeAll);

let rooms = 0;
const freshRoom = (namespace = 'room') => `${namespace}:commands-${++rooms}`;

test('connect without a token tells the shard to the demo client', async () => {
  const client = await connect(node);
  assert.match(client.id, /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.equal(client.connected.transport, 'websocket');
  assert.equal(client.connected.data.shards, 4);
  assert.ok(client.shard >= 0 && client.shard < 4);
  const other = await connect(node, { name: 'js' });
  assert.equal(other.connected.data, undefined);
  assert.notEqual(other.id, client.id);
});

test('a publication reaches every subscriber with its publisher, offset and data as it was', async () => {
  const channel = freshRoom();
  const [one, two] = [await connect(node), await connect(node)];
  const [mine, theirs] = [await one.subscribe(channel), await two.subscribe(channel)];
  const data = { text: 'größe 👋 "quoted" \\ \n \u0000', n: 1.5, deep: [{ a: [] }, null, true] };
  await one.sdk.publish(channel, data);
  await mine.sdk.publish('second');
  for (const sub of [mine, theirs]) {
    const publications = await sub.publications(2);
    assert.deepEqual(publications.map(({ data, offset }) => [data, offset]), [[data, 1], ['second', 2]]);
    assert.deepEqual(publications[0].info, { client: one.id, user: '' });
  }
});

test('an ephemeral channel has no offsets, no history and no recovery', async () => {
  const channel = freshRoom('live');
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  const subscribed = sub.all('subscribed')[0];
  assert.equal(subscribed.recoverable, false);
  assert.equal(subscribed.positioned, false);
  await sub.sdk.publish(1);
  const [publication] = await sub.publications(1);
  assert.equal(publication.offset, undefined);
  assert.equal((await rejection(sub.sdk.history({ limit: 1 }))).code, 108);
});

test('positioning and recovery are given when asked for', async () => {
  const client = await connect(node);
  const check = async (options, expected) => {
    const sub = await client.subscribe(freshRoom('asked'), options);
    const { positioned, recoverable } = sub.all('subscribed')[0];
    assert.deepEqual({ positioned, recoverable }, expected);
  };
  await check({}, { positioned: false, recoverable: false });
  await check({ positioned: true }, { positioned: true, recoverable: false });
  await check({ recoverable: true }, { positioned: true, recoverable: true });
});

test('presence and its numbers', async () => {
  const channel = freshRoom();
  const [ada, bob] = [
    await connect(node, { token: token({ sub: 'ada', info: { name: 'Ada' } }) }),
    await connect(node, { token: token({ sub: 'bob' }) }),
  ];
  const again = await connect(node, { token: token({ sub: 'ada' }) });
  const sub = await ada.subscribe(channel);
  await bob.subscribe(channel);
  await again.subscribe(channel);
  const { clients } = await sub.sdk.presence();
  assert.deepEqual(Object.keys(clients).sort(), [ada.id, bob.id, again.id].sort());
  const { client, user, connInfo } = clients[ada.id];
  assert.deepEqual({ client, user, connInfo }, { client: ada.id, user: 'ada', connInfo: { name: 'Ada' } });
  assert.deepEqual(await sub.sdk.presenceStats(), { numClients: 3, numUsers: 2 });
  assert.deepEqual(await bob.sdk.presenceStats(channel), { numClients: 3, numUsers: 2 });
  assert.deepEqual(await bob.sdk.presence(freshRoom()), { clients: {} });
});

test('history: limit, since, reverse, and the position alone', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  for (let n = 1; n <= 5; n++) {
    await sub.sdk.publish(n);
  }
  const read = async (options) => {
    const { publications, offset, epoch } = await sub.sdk.history(options);
    assert.equal(offset, 5);
    assert.match(epoch, /^[0-9a-v]{13}$/);
    return publications.map(({ data, offset }) => (assert.equal(data, offset), data));
  };
  const { epoch } = await sub.sdk.history({ limit: 0 });
  assert.deepEqual(await read({ limit: 0 }), []);
  assert.deepEqual(await read({ limit: -1 }), [1, 2, 3, 4, 5]);
  assert.deepEqual(await read({ limit: 2 }), [1, 2]);
  assert.deepEqual(await read({ limit: 2, reverse: true }), [5, 4]);
  assert.deepEqual(await read({ limit: 2, since: { offset: 2, epoch } }), [3, 4]);
  assert.deepEqual(await read({ limit: 10, since: { offset: 3, epoch }, reverse: true }), [2, 1]);
  assert.deepEqual(await read({ limit: 10, since: { offset: 5, epoch } }), []);
  assert.deepEqual(await read({ limit: 10, since: { offset: 4, epoch: '' } }), [5]);
  const wrong = sub.sdk.history({ limit: 1, since: { offset: 1, epoch: 'another' } });
  assert.equal((await rejection(wrong)).code, 112);
});

test('unsubscribe ends publications; a second subscription recovers what it can', async () => {
  for (const [namespace, expected] of [['live', [1, 3]], ['room', [1, 2, 3]]]) {
    const channel = freshRoom(namespace);
    const [client, other] = [await connect(node), await connect(node)];
    const sub = await client.subscribe(channel);
    await other.sdk.publish(channel, 1);
    await sub.publications(1);
    sub.sdk.unsubscribe();
    await sub.event('unsubscribed');
    await until(async () => (await other.sdk.presenceStats(channel)).numClients === 0);
    await other.sdk.publish(channel, 2);
    sub.sdk.subscribe();
    await sub.event('subscribed', { skip: 1 });
    await other.sdk.publish(channel, 3);
    await sub.publications(expected.length);
    assert.deepEqual(sub.data, expected, namespace);
  }
});

test('what is not allowed is refused, and the connection lives', async () => {
  const client = await connect(node);
  const refused = async (promise, code) => assert.equal((await rejection(promise)).code, code);
  await refused(client.sdk.rpc('anything', {}), 108);
  await refused(client.sdk.publish('nowhere:a', 1), 102);
  await refused(client.sdk.publish('readonly:a', 1), 103);
  await refused(client.sdk.publish('members:a', 1), 103);
  await refused(client.sdk.history('readonly:a', { limit: 1 }), 103);
  await refused(client.sdk.presence('readonly:a'), 108);
  await refused(client.sdk.presenceStats('nowhere:a'), 102);
  for (const [channel, code] of [['nowhere:a', 102], ['members:a', 103], ['plain', 103]]) {
    const sub = client.subscription(channel);
    sub.sdk.subscribe();
    assert.equal((await sub.event('unsubscribed')).code, code, channel);
  }
  assert.equal(client.sockets.length, 1, 'all on one connection');
  await client.sdk.publish(freshRoom(), 'still here');
});

test('rights that come with the subscription', async () => {
  const client = await connect(node, { token: token({ sub: 'ada' }) });
  const refused = async (promise, code) => assert.equal((await rejection(promise)).code, code);
  await refused(client.sdk.publish('members:a', 1), 103);
  const sub = await client.subscribe('members:a');
  await sub.sdk.publish(1);
  assert.equal((await sub.sdk.history({ limit: 5 })).publications.length, 1);
  assert.equal(Object.keys((await sub.sdk.presence()).clients).length, 1);
});

test('send has nobody to take it', async () => {
  const client = await connect(node);
  await client.sdk.send({ hello: 1 });
  const { code, reason } = await client.event('disconnected');
  assert.deepEqual([code, reason], [3508, 'not available']);
});

test('a batch of commands is answered in order', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  client.sdk.startBatching();
  const sub = client.subscription(channel);
  sub.sdk.subscribe();
  const all = Promise.all([
    client.sdk.publish(channel, 'a'),
    client.sdk.publish(channel, 'b'),
    client.sdk.history(channel, { limit: 10 }),
  ]);
  client.sdk.stopBatching();
  const [, , history] = await all;
  assert.deepEqual(history.publications.map(({ data }) => data), ['a', 'b']);
  await sub.publications(2);
  assert.deepEqual(sub.data, ['a', 'b']);
});

test('one message with connect, subscribe, publish and a question', async () => {
  const channel = freshRoom();
  const raw = await Raw.open(node.port);
  raw.send(
    { id: 1, connect: {} },
    { id: 2, subscribe: { channel } },
    { id: 3, publish: { channel, data: 'x' } },
    { id: 4, history: { channel, limit: 5 } },
  );
  const { history } = await raw.reply(4);
  assert.deepEqual(history.publications.map(({ data }) => data), ['x']);
  const order = raw.messages.filter(({ push }) => !push).map(({ id }) => id);
  assert.deepEqual(order, [1, 2, 3, 4]);
  assert.equal(raw.publications(channel).length, 1);
  raw.destroy();
});

test('a personal channel reaches every connection of a user', async () => {
  const options = { token: token({ sub: 'greta' }) };
  const clients = [await connect(node, options), await connect(node, options)];
  const stranger = await connect(node, { token: token({ sub: 'gregor' }) });
  for (const client of clients) {
    await client.event('subscribed', { where: ({ channel }) => channel === 'user:greta' });
  }
  await node.call('publish', { channel: 'user:greta', data: 'for you' });
  for (const client of clients) {
    const { data } = await client.event('publication', { where: ({ channel }) => channel === 'user:greta' });
    assert.equal(data, 'for you');
  }
  await stranger.sdk.publish(freshRoom(), 1);
  assert.equal(stranger.last('publication'), undefined);
  const sub = stranger.subscription('user:greta');
  sub.sdk.subscribe();
  assert.equal((await sub.event('unsubscribed')).code, 103);
});

test('broadcast:global reaches everyone', async () => {
  const clients = [await connect(node), await connect(node, { token: token({ sub: 'x' }) }), await connect(node)];
  await node.call('publish', { channel: 'broadcast:global', data: { text: 'all' } });
  for (const client of clients) {
    const { data } = await client.event('publication', { where: ({ channel }) => channel === 'broadcast:global' });
    assert.deepEqual(data, { text: 'all' });
  }
  assert.equal((await rejection(clients[0].sdk.publish('broadcast:global', 1))).code, 103);
});

test('joins and leaves', async () => {
  const channel = freshRoom();
  const [one, two] = [await connect(node), await connect(node, { token: token({ sub: 'two' }) })];
  const watching = await one.subscribe(channel, { joinLeave: true });
  const own = await watching.event('join');
  assert.equal(own.info.client, one.id, 'a client sees its own join');
  const sub = await two.subscribe(channel);
  const join = await watching.event('join', { skip: 1 });
  assert.deepEqual([join.info.client, join.info.user], [two.id, 'two']);
  sub.sdk.unsubscribe();
  assert.equal((await watching.event('leave')).info.client, two.id);
  sub.sdk.subscribe();
  await watching.event('join', { skip: 2 });
  two.cut();
  assert.equal((await watching.event('leave', { skip: 1 })).info.client, two.id);
});

test('joins and leaves only on request', async () => {
  const channel = freshRoom('asked');
  const [one, two, three] = [await connect(node), await connect(node), await connect(node)];
  const asking = await one.subscribe(channel, { joinLeave: true });
  const quiet = await two.subscribe(channel);
  await three.subscribe(channel);
  await asking.event('join', { where: ({ info }) => info.client === three.id });
  await three.sdk.publish(channel, 1);
  await quiet.publications(1);
  assert.deepEqual(quiet.all('join'), []);
});

test('a tag filter and a delta are refused or declined honestly', async () => {
  const client = await connect(node);
  const filtered = client.subscription(freshRoom(), { tagsFilter: { key: 'a', cmp: 'eq', val: 'b' } });
  filtered.sdk.subscribe();
  assert.equal((await filtered.event('unsubscribed')).code, 107);
  const sub = await client.subscribe(freshRoom(), { delta: 'fossil' });
  await sub.sdk.publish({ a: 1 });
  await sub.sdk.publish({ a: 2 });
  await sub.publications(2);
  assert.deepEqual(sub.data, [{ a: 1 }, { a: 2 }]);
});

test('the JSON of a publication passes byte for byte', async () => {
  const channel = freshRoom();
  const raw = await Raw.connected(node.port);
  raw.send({ id: 2, subscribe: { channel } });
  await raw.reply(2);
  const data = '{"a" : 1.50, "u":"\\u00e9\\/", "big":123456789012345678901234567890, "e":1E+2 }';
  raw.text(`{"id":3,"publish":{"channel":"${channel}","data":${data}}}`);
  await raw.reply(3);
  const frame = raw.frames.map(({ payload }) => payload.toString()).find((text) => text.includes('"pub"'));
  assert.ok(frame.includes(`"data":${data}`), frame);
  raw.destroy();
});
