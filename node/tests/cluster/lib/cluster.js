// Several nodes of the real binary on one real bus.

import { AssertionError } from 'node:assert';
import { readFileSync } from 'node:fs';
import net from 'node:net';

import { Node, openNamespace, until } from '../../e2e/lib/node.js';
import { closeAll } from '../../e2e/lib/sdk.js';
import { Brokers } from './brokers.js';

// How often a scenario is tried that the broker was lost in.
const ROUNDS_MAX = 3;

// How long nodes may take to be ready, and how long they must have been, in milliseconds.
const READY_MS = 90_000;
const STEADY_MS = 1_500;

/** The bus that these tests use: `BUS=nats npm test`. */
export const BUS = process.env.BUS ?? 'redis';

/** How nodes subscribe there: `INTEREST=slots npm test`. */
const INTEREST = process.env.INTEREST;

/** The CPUs that this process may use: nodes of one shard are spread over them. */
const CPUS = /^Cpus_allowed_list:\s*(\S+)/m
  .exec(readFileSync('/proc/self/status', 'latin1'))[1]
  .split(',')
  .flatMap((part) => {
    const [first, last = first] = part.split('-').map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  });

export class Cluster {
  /** Brokers and `count` nodes. `config` is the text of each node's file, `flags` are added. */
  static async start(bus = BUS, { count = 3, config = '', flags = [], shards = 2, doors = 0 } = {}) {
    const cluster = new Cluster();
    cluster.brokers = await Brokers.start(bus, { doors });
    cluster.options = { config, flags, shards };
    try {
      const starts = Array.from({ length: count }, (_, index) => cluster.#node(index));
      cluster.nodes = await Promise.all(starts);
      await cluster.ready();
    } catch (error) {
      await cluster.stop();
      throw error;
    }
    return cluster;
  }

  nodes = [];

  #node(index) {
    const { config, flags, shards } = this.options;
    const own = ['--server.name', `node-${index + 1}`];
    if (INTEREST) {
      own.push(`--bus.interest=${INTEREST}`);
    }
    if (shards === 1) {
      own.push(`--server.cpus=${CPUS[index % CPUS.length]}`);
    }
    return Node.start({ config, shards, flags: [...this.brokers.flags(index), ...own, ...flags] });
  }

  /** Starts the node of that number again, on other ports. */
  async again(index) {
    this.nodes[index] = await this.#node(index);
  }

  /** Waits until every node has been ready for a while: brokers that were just started still elect leaders. */
  async ready(ms = READY_MS) {
    let since = performance.now();
    const steady = async () => {
      const answers = await Promise.all(this.nodes.map((node) => node.get('/ready')));
      if (answers.some(({ status }) => status !== 200)) {
        since = performance.now();
      }
      return performance.now() - since > STEADY_MS;
    };
    await until(steady, ms, () => `${this.nodes.map(({ output }) => output.slice(-2_000)).join('\n')}\nto be ready`);
  }

  /**
   * Runs a scenario of a broker that does not fail. On a machine that is too busy a node may lose it for a moment, and
   * says so: then publishes are unknown, and the scenario is run again. What it asserts holds either way.
   */
  async undisturbed(t, scenario) {
    for (let round = 1; ; round++) {
      const losses = await this.#losses();
      try {
        return await scenario(t);
      } catch (error) {
        if (error instanceof AssertionError || round === ROUNDS_MAX || (await this.#losses()) === losses) {
          throw error;
        }
        t.diagnostic(`run again, for the broker was lost: ${error.message}`);
        closeAll();
        await this.ready();
      }
    }
  }

  async #losses() {
    const counts = await Promise.all(this.nodes.map((node) => node.metric('bus_losses_total')));
    return counts.reduce((sum, count) => sum + count);
  }

  async stop() {
    await Promise.all(this.nodes.map((node) => node.stop('SIGKILL')));
    await this.brokers.stop();
  }
}

export { openNamespace, until };

/** One address that leads to a node, and can be led to another. */
export class Door {
  constructor(port) {
    this.target = port;
    this.sockets = new Set();
    this.server = net.createServer((client) => {
      const upstream = net.connect(this.target, '127.0.0.1');
      for (const [one, other] of [[client, upstream], [upstream, client]]) {
        this.sockets.add(one);
        one.pipe(other);
        one.on('error', () => other.destroy());
        one.on('close', () => {
          this.sockets.delete(one);
          other.destroy();
        });
      }
    });
  }

  static async to(node) {
    const door = new Door(node.port);
    await new Promise((resolve) => door.server.listen(0, '127.0.0.1', resolve));
    return door;
  }

  get url() {
    return `ws://127.0.0.1:${this.server.address().port}/connection/websocket`;
  }

  /** From now on it leads there, and who was connected is cut. */
  leadTo(node) {
    this.target = node.port;
    this.cut();
  }

  /** Nobody gets through until it leads somewhere. */
  shut() {
    this.target = 1;
    this.cut();
  }

  cut() {
    for (const socket of this.sockets) {
      socket.destroy();
    }
  }

  close() {
    this.server.close();
    this.cut();
  }
}
