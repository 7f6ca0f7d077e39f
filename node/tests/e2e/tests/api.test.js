// The server API on the admin port, seen from the callers' side and from the clients'.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { Node, openNamespace, until } from '../lib/node.js';
import { Raw } from '../lib/raw.js';
import { closeAll, connect, onDifferentShards } from '../lib/sdk.js';
import { nowS, token } from '../lib/token.js';

const CONFIG = `
[client]
expired_close_delay_ms = 1500

${openNamespace('live', { history_size: 0 })}

[namespaces.quiet]
`;

let node;
before(async () => {
  node = await Node.start({ config: CONFIG });
});
after(() => node.stop());
afterEach(closeAll);

let rooms = 0;
const freshRoom = () => `room:api-${++rooms}`;
const asUser = (sub) => ({ token: token({ sub }) });

test('the key is asked for', async () => {
  for (const headers of [{}, { 'X-API-Key': 'wrong' }, { Authorization: 'apikey wrong' }]) {
    assert.equal((await node.api('info', {}, headers)).status, 401);
  }
  assert.equal((await node.api('nonsense')).status, 404);
  assert.equal((await node.api('publish', '{')).status, 400);
});

test('publish: offset and epoch, data byte for byte, tags', async () => {
  const channel = freshRoom();
  const raw = await Raw.connected(node.port);
  raw.send({ id: 2, subscribe: { channel } });
  const { subscribe } = await raw.reply(2);
  const data = '{"a" : 1.50, "u":"\\u00e9" }';
  const reply = await node.api('publish', `{"channel":"${channel}","data":${data},"tags":{"key":"value"}}`);
  assert.deepEqual(reply, { result: { offset: 1, epoch: subscribe.epoch } });
  const [publication] = await until(() => raw.publications(channel).length && raw.publications(channel));
  // The first publication of an epoch names it.
  const expected = { data: { a: 1.5, u: 'é' }, offset: 1, tags: { key: 'value' }, epoch: subscribe.epoch };
  assert.deepEqual(publication, expected);
  assert.ok(raw.frames.some(({ payload }) => payload.includes(data)));
  raw.destroy();
});

test('publish: errors', async () => {
  const error = async (body, code) => assert.equal((await node.api('publish', body)).error?.code, code);
  await error({ channel: 'nowhere:a', data: 1 }, 102);
  await error({ channel: '', data: 1 }, 107);
  await error({ channel: 'room:a' }, 107);
  await error({ channel: `room:${'x'.repeat(300)}`, data: 1 }, 107);
});

test('publish: the same idempotency key is one publication', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  const body = { channel, data: 'once', idempotency_key: 'k' };
  const first = await node.call('publish', body);
  assert.deepEqual(await node.call('publish', body), first);
  await node.call('publish', { channel, data: 'end' });
  await sub.publications(2);
  assert.deepEqual(sub.data, ['once', 'end']);
});

test('publish without history', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  await node.call('publish', { channel, data: 1 });
  await node.call('publish', { channel, data: 'fleeting', skip_history: true });
  await node.call('publish', { channel, data: 2 });
  const publications = await sub.publications(3);
  assert.deepEqual(publications.map(({ data, offset }) => [data, offset]), [[1, 1], ['fleeting', undefined], [2, 2]]);
  const { publications: kept } = await node.call('history', { channel, limit: 10 });
  assert.deepEqual(kept.map(({ data }) => data), [1, 2]);
});

test('broadcast: one response a channel', async () => {
  const channels = [freshRoom(), freshRoom(), 'live:a', 'nowhere:a'];
  const clients = await onDifferentShards(node, 2);
  const subs = [];
  for (const [index, client] of clients.entries()) {
    subs.push(await client.subscribe(channels[index]));
  }
  const { responses } = await node.call('broadcast', { channels, data: { n: 1 } });
  assert.deepEqual(responses.map(({ result, error }) => result?.offset ?? error?.code ?? 0), [1, 1, 0, 102]);
  for (const sub of subs) {
    await sub.publications(1);
    assert.deepEqual(sub.data, [{ n: 1 }]);
  }
});

test('subscribe and unsubscribe a user on every shard', async () => {
  const channel = 'quiet:pushed';
  const clients = await onDifferentShards(node, 3, () => asUser('sam'));
  const stranger = await connect(node, asUser('other'));
  await node.call('subscribe', { user: 'sam', channel, data: { hi: 1 } });
  const here = (ctx) => ctx.channel === channel;
  for (const client of clients) {
    const subscribed = await client.event('subscribed', { where: here });
    assert.deepEqual([subscribed.data, subscribed.recoverable], [{ hi: 1 }, true]);
  }
  await node.call('publish', { channel, data: 'x' });
  for (const client of clients) {
    await client.event('publication', { where: here });
  }
  await node.call('unsubscribe', { user: 'sam', channel });
  for (const client of clients) {
    await client.event('unsubscribed', { where: here });
  }
  await node.call('publish', { channel, data: 'y' });
  await node.call('publish', { channel: 'broadcast:global', data: 'flush' });
  for (const client of [...clients, stranger]) {
    await client.event('publication', { where: ({ data }) => data === 'flush' });
    const got = client.seen.filter(({ event, ctx }) => event === 'publication' && here(ctx));
    assert.deepEqual(got.map(({ ctx }) => ctx.data), client === stranger ? [] : ['x']);
  }
});

test('unsubscribe: a client-side subscription ends with 2000; an empty channel is one push without channel', async () => {
  const channel = freshRoom();
  const client = await connect(node, asUser('uma'));
  const sub = await client.subscribe(channel);
  await node.call('unsubscribe', { user: 'uma', channel });
  const { code, reason } = await sub.event('unsubscribed');
  assert.deepEqual([code, reason], [2000, 'server unsubscribe']);
  const raw = await Raw.connected(node.port, { connect: asUser('una') });
  await node.call('unsubscribe', { user: 'una', channel: '' });
  const push = await until(() => raw.messages.find((message) => message.push?.unsubscribe)?.push);
  assert.deepEqual(push, { unsubscribe: { code: 2000, reason: 'server unsubscribe' } });
  raw.destroy();
});

test('disconnect: with the default, with a code, all but the whitelisted', async () => {
  const [one, two] = await onDifferentShards(node, 2, () => asUser('dan'));
  await node.call('disconnect', { user: 'dan', whitelist: [two.id] });
  assert.deepEqual(await one.event('disconnected'), { code: 3503, reason: 'force disconnect' });
  await node.call('disconnect', { user: 'dan', disconnect: { code: 4501, reason: 'go away' } });
  assert.deepEqual(await two.event('disconnected'), { code: 4501, reason: 'go away' });
  const three = await connect(node, asUser('dan'));
  await node.call('disconnect', { user: 'dan', client: three.id, disconnect: { code: 4000, reason: 'again' } });
  await three.event('connected', { skip: 1 });
});

test('refresh: a new expiry, or the end', async () => {
  const raw = await Raw.connected(node.port, { connect: asUser('ron') });
  await node.call('refresh', { user: 'ron', expire_at: nowS() + 100 });
  const { refresh } = await until(() => raw.messages.find((message) => message.push?.refresh)?.push);
  assert.equal(refresh.expires, true);
  assert.ok(refresh.ttl >= 98 && refresh.ttl <= 100);
  await node.call('refresh', { user: 'ron', expired: true });
  assert.equal((await raw.end()).code, 3005);
});

test('presence and history', async () => {
  const channel = freshRoom();
  const clients = await onDifferentShards(node, 3, (n) => asUser(`p${n % 2}`));
  for (const client of clients) {
    await client.subscribe(channel);
  }
  const { presence } = await node.call('presence', { channel });
  assert.deepEqual(Object.keys(presence).sort(), clients.map(({ id }) => id).sort());
  assert.deepEqual(presence[clients[0].id], { client: clients[0].id, user: 'p0' });
  assert.deepEqual(await node.call('presence_stats', { channel }), { num_clients: 3, num_users: 2 });
  assert.equal((await node.api('presence', { channel: 'quiet:a' })).error.code, 108);
  for (let n = 1; n <= 4; n++) {
    await clients[n % 3].sdk.publish(channel, n);
  }
  const all = await node.call('history', { channel, limit: -1 });
  assert.deepEqual(all.publications.map(({ data, offset }) => [data, offset]), [[1, 1], [2, 2], [3, 3], [4, 4]]);
  assert.equal(all.offset, 4);
  const page = await node.call('history', { channel, limit: 2, since: { offset: 4, epoch: all.epoch }, reverse: true });
  assert.deepEqual(page.publications.map(({ data }) => data), [3, 2]);
  assert.equal((await node.api('history', { channel: 'live:a' })).error.code, 108);
});

test('history_remove: offsets go on in the same epoch', async () => {
  const channel = freshRoom();
  const client = await connect(node);
  const sub = await client.subscribe(channel);
  const { epoch } = await node.call('publish', { channel, data: 1 });
  await node.call('history_remove', { channel });
  assert.deepEqual(await node.call('history', { channel, limit: -1 }), { publications: [], offset: 1, epoch });
  assert.deepEqual(await node.call('publish', { channel, data: 2 }), { offset: 2, epoch });
  await sub.publications(2);
  assert.deepEqual(sub.data, [1, 2]);
});

test('channels and info add up all shards', async () => {
  const clients = await onDifferentShards(node, 3, () => asUser('ivy'));
  const mark = `room:info-${process.pid}`;
  for (const [index, client] of clients.entries()) {
    await client.subscribe(`${mark}-${index % 2}`);
  }
  const { channels } = await node.call('channels', { pattern: `${mark}-*` });
  assert.deepEqual(channels, { [`${mark}-0`]: { num_clients: 2 }, [`${mark}-1`]: { num_clients: 1 } });
  const { nodes } = await node.call('info', {});
  assert.equal(nodes.length, 1);
  const { num_clients, num_users, num_subs, num_channels, version, uptime } = nodes[0];
  assert.deepEqual([num_clients, num_users], [3, 1]);
  // Each has its room, `user:ivy` and `broadcast:global`.
  assert.deepEqual([num_subs, num_channels], [9, 4]);
  assert.match(version, /^\d+\.\d+\.\d+$/);
  assert.ok(uptime >= 0);
});

test('a batch: in order, replies not wrapped', async () => {
  const channel = freshRoom();
  for (const parallel of [false, true]) {
    const { replies } = await node.api('batch', {
      parallel,
      commands: [
        { publish: { channel, data: 1 } },
        { publish: { channel: 'nowhere:a', data: 1 } },
        { presence_stats: { channel } },
      ],
    });
    assert.equal(replies[0].publish.offset, parallel ? 2 : 1);
    assert.equal(replies[1].error.code, 102);
    assert.deepEqual(replies[2].presence_stats, { num_clients: 0, num_users: 0 });
  }
});

test('health, readiness and metrics', async () => {
  const health = JSON.parse((await node.get('/health')).text);
  assert.equal(health.status, 'ok');
  assert.ok(Math.abs(health.timestamp - nowS()) <= 2);
  assert.match(health.version, /^\d+\.\d+\.\d+$/);
  assert.ok(Number.isInteger(health.uptime));
  assert.equal((await node.get('/ready')).status, 200);
  await until(async () => (await node.metric('publications_total')) > 0);
  await until(async () => (await node.metric('messages_in_total')) > 0);
});
