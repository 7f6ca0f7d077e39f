// What `deploy/local/test` runs: shows on the cluster that `deploy/local/up` started that its nodes are one system.

import { readFileSync } from 'node:fs';
import path from 'node:path';

import { until } from '../e2e/lib/node.js';
import { Client, closeAll } from '../e2e/lib/sdk.js';
import { Brokers } from './lib/brokers.js';

const WAIT_MS = 20_000;
const READY_MS = 60_000;

const state = process.argv[2];
const processes = new Brokers('', state);
const nodes = processes.named('node-').map((name) => ({
  name,
  url: `ws://127.0.0.1:${processes.file(name, 'direct')}/connection/websocket`,
  admin: `http://127.0.0.1:${processes.file(name, 'admin')}`,
}));
const balancer = { name: 'the balancer', url: `ws://127.0.0.1:${processes.port('haproxy')}/connection/websocket` };
const room = (what) => `room:show-${what}-${process.pid}`;

const connect = (place) => new Client(place).connect();

async function api(node, method, body) {
  const response = await fetch(`${node.admin}/api/${method}`, { method: 'POST', body: JSON.stringify(body) });
  const { result, error } = await response.json();
  if (error) {
    throw new Error(`${method} at ${node.name}: ${JSON.stringify(error)}`);
  }
  return result;
}

const isReady = (node) =>
  fetch(`${node.admin}/ready`, { signal: AbortSignal.timeout(2_000) }).then(({ status }) => status === 200, () => false);

async function ready() {
  for (const node of nodes) {
    await until(() => isReady(node), READY_MS, () => `${node.name} to be ready`);
  }
}

function same(what, found, expected) {
  if (JSON.stringify(found) !== JSON.stringify(expected)) {
    throw new Error(`${what}: ${JSON.stringify(found)} instead of ${JSON.stringify(expected)}`);
  }
}

async function messages() {
  const channel = room('messages');
  const places = [...nodes, balancer];
  const clients = await Promise.all(places.map(connect));
  const subs = await Promise.all(clients.map((client) => client.subscribe(channel)));
  for (const [index, client] of clients.entries()) {
    await client.sdk.publish(channel, `from ${places[index].name}`);
  }
  await api(nodes[0], 'publish', { channel, data: `by the API of ${nodes[0].name}` });
  const expected = [...places.map(({ name }) => `from ${name}`), `by the API of ${nodes[0].name}`];
  const seen = await Promise.all(subs.map((sub) => sub.publications(expected.length, WAIT_MS)));
  for (const [index, publications] of seen.entries()) {
    same(`at ${places[index].name}`, publications.map(({ data }) => data), expected);
    same(`offsets at ${places[index].name}`, publications.map(({ offset }) => offset), seen[0].map(({ offset }) => offset));
  }
  return `${expected.length} messages from everywhere came everywhere, in one order`;
}

async function presence() {
  const channel = room('presence');
  const clients = await Promise.all(nodes.map(connect));
  await Promise.all(clients.map((client) => client.subscribe(channel)));
  const expected = clients.map(({ id }) => id).sort();
  for (const node of nodes) {
    const found = async () => Object.keys((await api(node, 'presence', { channel })).presence).sort();
    await until(async () => String(await found()) === String(expected), WAIT_MS, () => `all to be present at ${node.name}`);
  }
  return `${nodes.length} clients on ${nodes.length} nodes are present on each`;
}

async function recovery() {
  const channel = room('recovery');
  const [first, second] = [nodes[0], nodes[nodes.length - 1]];
  const before = await connect(first);
  const sub = await before.subscribe(channel);
  const writer = await connect(second);
  await writer.sdk.publish(channel, 1);
  const [{ offset }] = await sub.publications(1, WAIT_MS);
  const { epoch } = sub.all('subscribed')[0].streamPosition;
  before.close();
  for (let n = 2; n <= 20; n++) {
    await writer.sdk.publish(channel, n);
  }
  const elsewhere = nodes[1 % nodes.length];
  const after = await connect(elsewhere);
  const again = await after.subscribe(channel, { since: { offset, epoch } });
  await again.publications(19, WAIT_MS);
  same('recovered', again.data, Array.from({ length: 19 }, (_, n) => n + 2));
  return `a client that left ${first.name} had the 19 messages it missed on ${elsewhere.name}`;
}

async function placement() {
  const places = new Map();
  for (let user = 1; user <= 30; user++) {
    const answers = await Promise.all(nodes.map((node) => place(node, user)));
    same(`where nodes place user ${user}`, answers.map(({ node }) => node), nodes.map(() => answers[0].node));
    places.set(answers[0].node, answers[0]);
  }
  for (const [name, { address }] of places) {
    const node = nodes.find((other) => other.name === name);
    const before = await clientsOf(node);
    const client = await connect({ url: address });
    await until(async () => (await clientsOf(node)) > before, WAIT_MS, () => `a client of ${address} on ${name}`);
    client.close();
  }
  return `30 users belong to ${places.size} nodes, all nodes agree on it, and each has its address at the balancer`;
}

async function place(node, user) {
  const response = await fetch(`${node.admin}/v1/place?user=${user}`);
  if (response.status !== 200) {
    throw new Error(`/v1/place at ${node.name}: ${response.status} ${await response.text()}`);
  }
  return response.json();
}

/** Connections of one node alone. */
async function clientsOf(node) {
  const response = await fetch(`${node.admin}/metrics`);
  const counts = [...(await response.text()).matchAll(/^ringmain_connections(?:\{[^}]*\})? (\d+)/gm)];
  return counts.reduce((sum, [, count]) => sum + Number(count), 0);
}

async function killed() {
  const channel = room('killed');
  const victim = nodes[nodes.length - 1].name;
  const [writer, ...readers] = await Promise.all([connect(nodes[0]), ...Array.from({ length: 6 }, () => connect(balancer))]);
  const subs = await Promise.all(readers.map((reader) => reader.subscribe(channel)));
  await writer.sdk.publish(channel, 1);
  await Promise.all(subs.map((sub) => sub.publications(1, WAIT_MS)));
  await processes.kill(victim);
  try {
    return await afterwards(channel, victim, writer, readers, subs);
  } finally {
    if (!processes.alive(victim)) {
      processes.again(victim);
      await ready();
    }
  }
}

async function afterwards(channel, victim, writer, readers, subs) {
  const began = performance.now();
  for (let n = 2; n <= 10; n++) {
    await writer.sdk.publish(channel, n);
  }
  await Promise.all(subs.map((sub) => sub.publications(10, WAIT_MS)));
  const took = ((performance.now() - began) / 1_000).toFixed(1);
  const expected = Array.from({ length: 10 }, (_, n) => n + 1);
  subs.forEach((sub, index) => same(`client ${index + 1} of the balancer`, sub.data, expected));
  const moved = readers.filter(({ sockets }) => sockets.length > 1).length;
  processes.again(victim);
  await ready();
  const late = await connect(nodes[nodes.length - 1]);
  const sub = await late.subscribe(channel);
  await writer.sdk.publish(channel, 11);
  await sub.publications(1, WAIT_MS);
  return `${victim} was killed: after ${took} s ${moved} clients were elsewhere, all had all 10 messages; it is back`;
}

const url = readFileSync(path.join(state, 'url'), 'utf8').trim();
console.log(`${nodes.length} nodes on ${url}`);
let failed = 0;
for (const show of [messages, presence, recovery, placement, killed]) {
  try {
    await ready();
    console.log(`ok      ${await show()}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${show.name}: ${error.message}`);
  }
  closeAll();
}
if (failed > 0) {
  console.log(`\nwhat the nodes said last, in ${state}/procs:`);
  for (const { name } of nodes) {
    console.log(`${name}:\n${processes.file(name, 'log').split('\n').slice(-8).join('\n')}`);
  }
}
process.exit(failed === 0 ? 0 : 1);
