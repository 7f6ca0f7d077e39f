// The faults: what each does to brokers or nodes, and how it is undone.
//
// Owns: which fault means what on which bus. A fault is `{ what, prepare, begin, end, holdMs }`: `prepare` hurts nobody,
// `begin` hurts, and after `holdMs` comes `end`, where there is one.

import { execFile } from 'node:child_process';
import path from 'node:path';
import { promisify } from 'node:util';

import { until } from '../../e2e/lib/node.js';
import { ROOT } from '../lib/brokers.js';
import { pause } from './wire.js';

const run = promisify(execFile);

const isRedis = (bus) => ['redis', 'valkey', 'sentinel', 'redis-single'].includes(bus);
const hasReplicas = (bus) => ['redis', 'valkey', 'sentinel'].includes(bus);
const isNats = (bus) => bus.startsWith('nats');

/** The broker that is hurt: a Redis master, else the first. */
async function choose(cell) {
  cell.victim = isRedis(cell.bus) ? (await masters(cell.brokers))[0] : cell.brokers.names[0];
}

async function redisCli(brokers, name, ...args) {
  const { stdout } = await run('redis-cli', ['-p', String(brokers.port(name)), ...args], { timeout: 5_000 });
  return stdout.trim();
}

async function masters(brokers) {
  const found = [];
  for (const name of brokers.named('redis-')) {
    const role = brokers.alive(name) ? await redisCli(brokers, name, 'role') : '';
    if (role.startsWith('master')) {
      found.push(name);
    }
  }
  return found;
}

/** The server that leads what our publications go through. */
async function leader(cell) {
  return isNats(cell.bus) ? natsLeader(cell.brokers) : kafkaLeader(cell.brokers);
}

/** The server that leads most streams. */
async function natsLeader(brokers) {
  const response = await fetch(`http://127.0.0.1:${brokers.file(brokers.names[0], 'health')}/jsz?streams=1`);
  const { account_details: accounts = [] } = await response.json();
  const leaders = accounts.flatMap(({ stream_detail: streams = [] }) => streams.map(({ cluster }) => cluster?.leader));
  const count = (name) => leaders.filter((other) => other === name).length;
  const [name] = brokers.names.toSorted((a, b) => count(b) - count(a));
  if (count(name) === 0) {
    throw new Error(`no stream has a leader: ${JSON.stringify(leaders)}`);
  }
  return name;
}

/** The active controller: it leads partitions too, and its death takes longest. */
async function kafkaLeader(brokers) {
  const libs = path.join(process.env.LOCAL_BROKERS ?? path.join(ROOT, 'target', 'brokers'), 'kafka-4.3.1', '*');
  const args = ['-Xmx128m', '-XX:+UseSerialGC', '-XX:TieredStopAtLevel=1', '-Dorg.slf4j.simpleLogger.defaultLogLevel=error'];
  const servers = brokers.names.map((name) => `127.0.0.1:${brokers.port(name)}`).join(',');
  args.push('-cp', libs, 'org.apache.kafka.tools.MetadataQuorumCommand', '--bootstrap-server', servers);
  const { stdout } = await run('java', [...args, 'describe', '--status'], { timeout: 60_000 });
  return `kafka-${/LeaderId:\s+(\d+)/.exec(stdout)[1]}`;
}

/** Replicas of a master stop to follow it: what it acknowledges from now on, they do not have. */
async function stopReplication(brokers, master) {
  const port = String(brokers.port(master));
  const replicas = [];
  for (const name of brokers.named('redis-')) {
    const role = (await redisCli(brokers, name, 'role')).split('\n');
    if (role[0] === 'slave' && role[2] === port) {
      replicas.push(name);
      // The master has no password, so a replica that gives one is refused.
      await redisCli(brokers, name, 'config', 'set', 'masterauth', 'refused');
    }
  }
  await redisCli(brokers, master, 'client', 'kill', 'type', 'replica');
  for (const name of replicas) {
    const down = async () => (await redisCli(brokers, name, 'info', 'replication')).includes('master_link_status:down');
    await until(down, 10_000, () => `${name} to have lost its master`);
  }
  return replicas;
}

function pauseBroker(ms) {
  return {
    what: `a broker is stopped for ${ms / 1000} s (SIGSTOP) and goes on`,
    holdMs: ms,
    prepare: choose,
    begin: ({ brokers, victim }) => brokers.signal(victim, 'SIGSTOP'),
    end: ({ brokers, victim }) => brokers.signal(victim, 'SIGCONT'),
  };
}

export const FAULTS = {
  kill: {
    what: 'a broker (a Redis master) is killed, and started again after 5 s with its data',
    holdMs: 5_000,
    prepare: choose,
    begin: ({ brokers, victim }) => brokers.kill(victim),
    end: ({ brokers, victim }) => brokers.again(victim),
  },
  leader: {
    what: "the leader of JetStream's streams, or of Kafka's cluster, is killed, and started again after 8 s",
    buses: ['nats', 'kafka'],
    holdMs: 8_000,
    async prepare(cell) {
      cell.victim = await leader(cell);
    },
    begin: ({ brokers, victim }) => brokers.kill(victim),
    end: ({ brokers, victim }) => brokers.again(victim),
  },
  restart: {
    what: 'a broker ends as it is asked to, and is started again at once',
    holdMs: 0,
    prepare: choose,
    async begin({ brokers, victim }) {
      await brokers.end(victim);
      brokers.again(victim);
    },
  },
  pause3: pauseBroker(3_000),
  pause15: pauseBroker(15_000),
  cut: {
    what: 'what one node says to its brokers and hears from them goes nowhere for 5 s; with replicas on Redis: what all say to a master',
    doors: true,
    holdMs: 5_000,
    prepare: choose,
    begin: ({ brokers, bus, victim }) => brokers.cut(hasReplicas(bus) ? victim : 1),
    end: ({ brokers, bus, victim }) => brokers.heal(hasReplicas(bus) ? victim : 1),
  },
  all: {
    what: 'all brokers are killed at once, and started again after 3 s with their data',
    holdMs: 3_000,
    begin: ({ brokers }) => brokers.kill(...brokers.names),
    end: ({ brokers }) => brokers.again(...brokers.names),
  },
  wipe: {
    what: 'the data is gone: FLUSHALL on Redis, else all brokers are killed and started again with empty disks',
    holdMs: 0,
    async prepare(cell) {
      cell.masters = isRedis(cell.bus) ? await masters(cell.brokers) : [];
    },
    async begin({ bus, brokers, masters: all }) {
      if (isRedis(bus)) {
        await Promise.all(all.map((name) => redisCli(brokers, name, 'flushall')));
        return;
      }
      await brokers.kill(...brokers.names);
      brokers.forget(...brokers.names);
      brokers.again(...brokers.names);
    },
  },
  stale: {
    what: 'a Redis master dies whose replica has not followed it for 2 s; the replica is promoted',
    buses: ['redis', 'valkey', 'sentinel'],
    holdMs: 6_000,
    async prepare(cell) {
      await choose(cell);
      cell.replicas = await stopReplication(cell.brokers, cell.victim);
      await pause(2_000);
    },
    begin: ({ brokers, victim }) => brokers.kill(victim),
    async end({ brokers, victim, replicas }) {
      for (const name of replicas) {
        await redisCli(brokers, name, 'config', 'set', 'masterauth', '');
      }
      brokers.again(victim);
    },
  },
  'node-kill': {
    what: 'a Ringmain node is killed, and started again after 3 s',
    holdMs: 3_000,
    begin: ({ cluster }) => cluster.nodes[0].stop('SIGKILL'),
    end: ({ cluster }) => cluster.again(0),
  },
  'node-pause': {
    what: 'a Ringmain node is stopped for 10 s (SIGSTOP) and goes on',
    holdMs: 10_000,
    begin: ({ cluster }) => cluster.nodes[0].child.kill('SIGSTOP'),
    end: ({ cluster }) => cluster.nodes[0].child.kill('SIGCONT'),
  },
};

/** Whether the fault can happen on this bus. */
export const applies = (fault, bus) => (FAULTS[fault].buses ?? [bus]).includes(bus);
