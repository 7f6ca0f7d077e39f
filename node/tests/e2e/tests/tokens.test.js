// Tokens: connecting, expiring, refreshing; subscription tokens; server-side subscriptions of a token.

import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import { after, afterEach, before, test } from 'node:test';

import { Node } from '../lib/node.js';
import { Raw } from '../lib/raw.js';
import { Client, closeAll, connect } from '../lib/sdk.js';
import { nowS, signedToken, token } from '../lib/token.js';

const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 });
const ecdsa = generateKeyPairSync('ec', { namedCurve: 'P-256' });
const eddsa = generateKeyPairSync('ed25519');
const pem = ({ publicKey }) => publicKey.export({ type: 'spki', format: 'pem' }).trim();

const CONFIG = `
[client]
expired_close_delay_ms = 1500
expired_sub_close_delay_ms = 1500
stale_close_delay_ms = 1500

[token]
rsa_public_key = """${pem(rsa)}"""
ecdsa_public_key = """${pem(ecdsa)}"""
eddsa_public_key = """${pem(eddsa)}"""

[namespaces.closed]
presence = true
allow_presence_for_subscriber = true
allow_publish_for_subscriber = true
`;

let node;
let strict;
before(async () => {
  node = await Node.start({ config: CONFIG });
  strict = await Node.start({ config: CONFIG, demo: false });
});
after(() => Promise.all([node.stop(), strict.stop()]));
afterEach(closeAll);

/** Waits for the end of a client that tried to connect with this token; gives the code. */
async function refused(target, connectToken) {
  const client = new Client(target, connectToken === null ? {} : { token: connectToken });
  client.sdk.connect();
  return (await client.event('disconnected')).code;
}

test('without a token only where the configuration says so', async () => {
  assert.equal(await refused(strict, null), 3501);
  await connect(strict, { token: token({ sub: 'ada' }) });
});

test('tokens of every kind of key', async () => {
  for (const [alg, { privateKey }] of [['RS256', rsa], ['ES256', ecdsa], ['EdDSA', eddsa]]) {
    const client = await connect(strict, { token: signedToken(alg, privateKey, { sub: alg }) });
    await client.event('subscribed', { where: ({ channel }) => channel === `user:${alg}` });
  }
});

test('bad tokens close with 3500', async () => {
  const good = token({ sub: 'ada' });
  const [head, body, signature] = good.split('.');
  const forged = Buffer.from(JSON.stringify({ sub: 'root' })).toString('base64url');
  const none = Buffer.from(JSON.stringify({ alg: 'none' })).toString('base64url');
  const publicAsSecret = token({ sub: 'ada' }, pem(rsa));
  for (const bad of [
    'nonsense', `${head}.${body}`, `${head}.${forged}.${signature}`, `${none}.${body}.`,
    token({ sub: 'ada' }, 'another secret'), publicAsSecret,
  ]) {
    assert.equal(await refused(node, bad), 3500, bad);
  }
});

test('an expired token is fetched anew before the next try', async () => {
  const asked = [];
  const client = await connect(node, {
    token: token({ sub: 'ada', exp: nowS() - 10 }),
    getToken: async (ctx) => {
      asked.push(ctx);
      return token({ sub: 'ada', exp: nowS() + 60 });
    },
  });
  assert.equal(asked.length, 1);
  assert.ok(client.seen.some(({ event, ctx }) => event === 'error' && ctx.error.code === 109));
});

test('after a failed connect nothing more is answered until 3502', async () => {
  const raw = await Raw.open(node.port);
  raw.send({ id: 1, connect: { token: token({ sub: 'a', nbf: nowS() + 600 }) } }, { id: 2, rpc: {} });
  const { error } = await raw.reply(1);
  assert.equal(error.code, 109);
  raw.send({ id: 3, connect: {} });
  const { code } = await raw.end();
  assert.equal(code, 3502);
  assert.deepEqual(raw.messages.map(({ id }) => id), [1]);
});

test('a connection is refreshed before its token runs out and goes on', async () => {
  let fetched = 0;
  const client = await connect(node, {
    token: token({ sub: 'ada', exp: nowS() + 2 }),
    getToken: async () => {
      fetched += 1;
      return token({ sub: 'ada', exp: nowS() + (fetched === 1 ? 2 : 3600) });
    },
  });
  const sub = await client.subscribe('room:refreshed');
  await new Promise((resolve) => setTimeout(resolve, 5_000));
  assert.equal(fetched, 2);
  await sub.sdk.publish('alive');
  await sub.publications(1);
  assert.equal(client.sockets.length, 1);
  assert.equal(client.seen.filter(({ event }) => event === 'connected').length, 1);
});

test('a connection that is not refreshed closes with 3005', async () => {
  const raw = await Raw.connected(node.port, { connect: { token: token({ sub: 'ada', exp: nowS() + 1 }) } });
  const { connect: result } = await raw.reply(1);
  assert.equal(result.expires, true);
  assert.ok(result.ttl >= 0 && result.ttl <= 1);
  const { code, reason } = await raw.end();
  assert.deepEqual([code, reason], [3005, 'connection expired']);
});

test('refresh: expired 3005, bad or of another user 3500', async () => {
  for (const [refresh, code] of [
    [token({ sub: 'ada', exp: nowS() - 5 }), 3005],
    ['nonsense', 3500],
    [token({ sub: 'bob' }), 3500],
  ]) {
    const raw = await Raw.connected(node.port, { connect: { token: token({ sub: 'ada', exp: nowS() + 60 }) } });
    raw.send({ id: 2, refresh: { token: refresh } });
    assert.equal((await raw.end()).code, code);
  }
  const raw = await Raw.connected(node.port, { connect: { token: token({ sub: 'ada', exp: nowS() + 60 }) } });
  raw.send({ id: 2, refresh: { token: token({ sub: 'ada', exp: nowS() + 600 }) } });
  const { refresh } = await raw.reply(2);
  assert.equal(refresh.expires, true);
  assert.ok(refresh.ttl > 590);
  raw.destroy();
});

test('a subscription token opens a closed channel', async () => {
  const client = await connect(node, { token: token({ sub: 'ada' }) });
  const plain = client.subscription('closed:none');
  plain.sdk.subscribe();
  assert.equal((await plain.event('unsubscribed')).code, 103);
  const sub = await client.subscribe('closed:one', {
    token: token({ sub: 'ada', channel: 'closed:one', info: { role: 'host' } }),
  });
  await sub.sdk.publish('in');
  const [publication] = await sub.publications(1);
  assert.deepEqual(publication.info.chanInfo, { role: 'host' });
  const { clients } = await sub.sdk.presence();
  assert.deepEqual(clients[client.id].chanInfo, { role: 'host' });
});

test('a bad subscription token is 103 even on an open channel, a foreign one 3500', async () => {
  const client = await connect(node, { token: token({ sub: 'ada' }) });
  const sub = client.subscription('room:open', { token: 'nonsense' });
  sub.sdk.subscribe();
  assert.equal((await sub.event('unsubscribed')).code, 103);
  for (const claims of [{ sub: 'ada', channel: 'closed:other' }, { sub: 'bob', channel: 'closed:two' }]) {
    const other = await connect(node, { token: token({ sub: 'ada' }) });
    other.subscription('closed:two', { token: token(claims) }).sdk.subscribe();
    assert.equal((await other.event('disconnected')).code, 3500);
  }
});

test('a subscription is refreshed and goes on', async () => {
  let fetched = 0;
  const client = await connect(node, { token: token({ sub: 'ada' }) });
  const sub = await client.subscribe('closed:refreshed', {
    getToken: async ({ channel }) => {
      fetched += 1;
      return token({ sub: 'ada', channel, exp: nowS() + (fetched < 3 ? 2 : 3600) });
    },
  });
  await new Promise((resolve) => setTimeout(resolve, 5_000));
  assert.equal(fetched, 3);
  await sub.sdk.publish('alive');
  await sub.publications(1);
  assert.equal(sub.all('subscribed').length, 1);
});

test('a subscription that expires ends with 2501, and the connection stays', async () => {
  const raw = await Raw.connected(node.port, { connect: { token: token({ sub: 'ada' }) } });
  const channel = 'closed:expiring';
  raw.send({ id: 2, subscribe: { channel, token: token({ sub: 'ada', channel, exp: nowS() + 1 }) } });
  const { subscribe } = await raw.reply(2);
  assert.equal(subscribe.expires, true);
  raw.send({ id: 3, sub_refresh: { channel, token: token({ sub: 'ada', channel, exp: nowS() - 1 }) } });
  assert.deepEqual((await raw.reply(3)).sub_refresh, {}, 'an expired refresh is answered with nothing');
  const push = await nextPush(raw, 'unsubscribe');
  assert.deepEqual(push, { channel, unsubscribe: { code: 2501, reason: 'subscription expired' } });
  raw.send({ id: 4, sub_refresh: { channel, token: token({ sub: 'ada', channel }) } });
  assert.equal((await raw.reply(4)).error.code, 103, 'no longer subscribed');
  raw.destroy();
});

async function nextPush(raw, kind) {
  const { until } = await import('../lib/node.js');
  return until(() => raw.messages.find(({ push }) => push?.[kind])?.push, 5_000, () => `a push ${kind}`);
}

test('server-side subscriptions of the token', async () => {
  // `subs` stands in for `channels`.
  const subs = { 'closed:talk': {}, 'closed:with': { info: { a: 1 } } };
  const claims = { sub: 'ada', channels: ['closed:news'], subs };
  const client = await connect(node, { token: token(claims) });
  for (const channel of ['closed:talk', 'closed:with', 'user:ada', 'broadcast:global']) {
    await client.event('subscribed', { where: (ctx) => ctx.channel === channel });
  }
  assert.equal(client.seen.filter(({ event }) => event === 'subscribed').length, 4);
  await node.call('publish', { channel: 'closed:talk', data: 7 });
  const publication = await client.event('publication', { where: ({ channel }) => channel === 'closed:talk' });
  assert.deepEqual([publication.data, publication.offset], [7, 1]);
  const { presence } = await node.call('presence', { channel: 'closed:with' });
  assert.deepEqual(presence[client.id].chan_info, { a: 1 });
});

test('server-side subscriptions are recovered after a cut', async () => {
  const client = await connect(node, { token: token({ sub: 'ada', channels: ['closed:kept'] }) });
  await node.call('publish', { channel: 'closed:kept', data: 1 });
  await client.event('publication', { where: ({ data }) => data === 1 });
  client.cut();
  for (const data of [2, 3]) {
    await node.call('publish', { channel: 'closed:kept', data });
  }
  const subscribed = await client.event('subscribed', { skip: 1, where: ({ channel }) => channel === 'closed:kept' });
  assert.deepEqual([subscribed.wasRecovering, subscribed.recovered], [true, true]);
  await client.event('publication', { where: ({ data }) => data === 3 });
  const data = client.seen.filter(({ event }) => event === 'publication').map(({ ctx }) => ctx.data);
  assert.deepEqual(data, [1, 2, 3]);
});

test('an unknown namespace among the token\'s channels fails connect with 102', async () => {
  const raw = await Raw.connected(node.port, { connect: { token: token({ sub: 'a', channels: ['nowhere:a'] }) } });
  assert.equal((await raw.reply(1)).error.code, 102);
  raw.destroy();
});

test('too many channels in the token close with 3505', async () => {
  const channels = Array.from({ length: 200 }, (_, n) => `closed:many-${n}`);
  const raw = await Raw.open(node.port);
  raw.send({ id: 1, connect: { token: token({ sub: 'a', channels }) } });
  assert.equal((await raw.end()).code, 3505);
});
