// Presence, joins, and commands of the API, across nodes; and a node that ends.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { closeAll } from '../../e2e/lib/sdk.js';
import { token } from '../../e2e/lib/token.js';
import { connect, publish } from '../lib/clients.js';
import { BUS, Cluster, Door, until } from '../lib/cluster.js';

const WAIT = { ms: 20_000 };

let cluster;
before(async () => {
  cluster = await Cluster.start(BUS, {});
});
after(() => cluster?.stop());
afterEach(closeAll);

/** A test of a broker that does not fail. */
const scenario = (name, run) => test(name, (t) => cluster.undisturbed(t, run));

let rooms = 0;
const freshRoom = () => `room:services-${BUS}-${++rooms}`;
const everywhere = (options = () => ({})) =>
  Promise.all(cluster.nodes.map((node, index) => connect(node, options(index))));
const user = (name) => ({ token: token({ sub: name }) });

/** Waits until every node names exactly these clients as present. */
async function present(channel, clients) {
  const expected = clients.map(({ id }) => id).sort();
  for (const node of cluster.nodes) {
    let last;
    const same = async () => {
      last = Object.keys((await node.call('presence', { channel })).presence).sort();
      return JSON.stringify(last) === JSON.stringify(expected);
    };
    await until(same, WAIT.ms, () => `${last} instead of ${expected}`);
  }
}

scenario('presence, its numbers, joins and leaves across nodes', async () => {
  const channel = freshRoom();
  const [watcher, ...others] = await everywhere((index) => user(`p${index % 2}`));
  const watching = await watcher.subscribe(channel, { joinLeave: true });
  for (const other of others) {
    await other.subscribe(channel);
    await watching.event('join', { where: ({ info }) => info.client === other.id, ...WAIT });
  }
  await present(channel, [watcher, ...others]);
  for (const node of cluster.nodes) {
    assert.deepEqual(await node.call('presence_stats', { channel }), { num_clients: 3, num_users: 2 });
  }
  // The one that is cut comes back under another id.
  const ids = others.map(({ id }) => id);
  others[0].close();
  others[1].cut();
  for (const id of ids) {
    await watching.event('leave', { where: ({ info }) => info.client === id, ...WAIT });
  }
  // It was announced again.
  await watching.event('join', { where: ({ info }) => info.user === 'p0' && ![...ids, watcher.id].includes(info.client), ...WAIT });
});

scenario('the API of one node reaches a user on the others', async () => {
  const channel = freshRoom();
  const name = `u-${BUS}-${rooms}`;
  const mine = await everywhere(() => user(name));
  const bystander = await connect(cluster.nodes[0], user('bystander'));
  const subs = await Promise.all([...mine, bystander].map((client) => client.subscribe(channel)));
  await cluster.nodes[1].call('unsubscribe', { user: name, channel });
  for (const sub of subs.slice(0, 3)) {
    const told = await sub.event('unsubscribed', WAIT);
    assert.equal(told.code, 2000);
  }
  await cluster.nodes[2].call('subscribe', { user: name, channel: `${channel}-forced` });
  for (const client of mine) {
    await client.event('subscribed', { where: (ctx) => ctx.channel === `${channel}-forced`, ...WAIT });
  }
  await cluster.nodes[0].call('disconnect', { user: name });
  for (const client of mine) {
    const told = await client.event('disconnected', WAIT);
    assert.equal(told.code, 3503);
  }
  assert.deepEqual(subs[3].all('unsubscribed'), []);
  assert.equal(bystander.last('disconnected'), undefined);
  await publish(bystander, channel, 'still here');
  await subs[3].publications(1, WAIT.ms);
});

test('a node that is killed: its members leave, its clients go on elsewhere, nothing is lost', async (t) => {
  const channel = freshRoom();
  const [a, b, c] = cluster.nodes;
  const door = await Door.to(c);
  t.after(() => door.close());
  const watcher = await connect(a);
  const watching = await watcher.subscribe(channel, { joinLeave: true });
  const stranded = await connect(c);
  await stranded.subscribe(channel);
  const moving = await connect(c, { url: door.url });
  const sub = await moving.subscribe(channel);
  await watching.event('join', { where: ({ info }) => info.client === moving.id, ...WAIT });
  await publish(watcher, channel, 1);
  await sub.publications(1, WAIT.ms);
  const gone = stranded.id;
  await c.stop('SIGKILL');
  door.shut();
  await watching.event('leave', { where: ({ info }) => info.client === gone, ...WAIT });
  stranded.close();
  for (const n of [2, 3, 4]) {
    await publish(watcher, channel, n);
  }
  door.leadTo(b);
  await sub.publications(4, WAIT.ms);
  assert.deepEqual(sub.data, [1, 2, 3, 4]);
  assert.equal(sub.all('subscribed')[1].recovered, true);
  await cluster.again(2);
  await cluster.ready();
  const late = await connect(cluster.nodes[2]);
  const again = await late.subscribe(channel);
  await publish(watcher, channel, 5);
  await again.publications(1, WAIT.ms);
  await present(channel, [watcher, moving, late]);
});
