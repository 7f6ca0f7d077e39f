// One cell of the matrix: a fresh cluster, traffic on every node, one fault, and what the clients make of it.
//
// Owns: the course of a cell and its measurements. Must not know: how faults are made, what is right.

import { writeFileSync } from 'node:fs';
import path from 'node:path';

import { Cluster, openNamespace, until } from '../lib/cluster.js';
import { FAULTS } from './list.js';
import { add, clashes, judge } from './oracle.js';
import { ApiPublisher, pause, Publisher, Subscriber } from './wire.js';

// Channels with history and without. So many that every master and several partitions have some.
const POSITIONED = Array.from({ length: 8 }, (_, n) => `kept:f${n}`);
const EPHEMERAL = Array.from({ length: 4 }, (_, n) => `passing:f${n}`);
const CHANNELS = [...POSITIONED, ...EPHEMERAL];

// History must outlast the longest fault at every rate that is sane here.
const CONFIG = `
[client]
allow_anonymous_connect_without_token = true
personal_channel = false
broadcast_channel = false
ping_interval_ms = 2000
pong_timeout_ms = 1900
recovery_publications_max = 10000

${openNamespace('kept', { history_size: 20_000, presence: false, join_leave: false, force_push_join_leave: false })}
${openNamespace('passing', { history_size: 0, presence: false, join_leave: false, force_push_join_leave: false })}
`;

// Milliseconds: before the fault, after it is healed, and how long healing and the end may take.
const WARM_UP_MS = 1_500;
const AFTERWARDS_MS = 1_500;
const START_MS = 60_000;
const HEAL_MS = 90_000;
const END_MS = 60_000;
const TICK_MS = 10;

export async function runCell(bus, fault, { rate = 50, keep = false, verbose = false, flags = [], say = () => {} } = {}) {
  const { begin, end, prepare, holdMs, doors } = FAULTS[fault];
  const cluster = await Cluster.start(bus, { config: CONFIG, flags, shards: 1, doors: doors ? 3 : 0 });
  const cell = { bus, cluster, brokers: cluster.brokers };
  const run = new Run(cluster, rate);
  try {
    await run.begin();
    await pause(WARM_UP_MS);
    await prepare?.(cell);
    run.hurtAt = performance.now();
    await begin(cell);
    await pause(holdMs);
    await end?.(cell);
    run.mendedAt = performance.now();
    await run.healed();
    await pause(AFTERWARDS_MS);
    await run.finish();
  } catch (error) {
    run.failure = error.message;
    say(`${bus} ${fault}: ${error.message}`);
  }
  const result = run.result();
  const wrong = isWrong(result);
  if (wrong) {
    cluster.nodes.forEach((node, index) => say(`node-${index + 1} said:\n${node.output.slice(-1_500)}`));
    result.examples.forEach((example) => say(`${bus} ${fault}: ${JSON.stringify(example)}`));
  }
  if (wrong || verbose) {
    result.readiness.forEach((changes, index) => say(`  node-${index + 1}: ${changes} (seconds from the fault)`));
    say(`  mended after ${result.mendedAfterMs / 1_000} s; errors: ${JSON.stringify(result.codes)}`);
  }
  await run.stop();
  if (wrong && keep) {
    writeFileSync(path.join(cluster.brokers.state, 'clients.json'), JSON.stringify(run.story(), null, 1));
    say(`kept: ${cluster.brokers.state}, with all that clients sent and saw in clients.json`);
    await Promise.all(cluster.nodes.map((node) => node.stop('SIGKILL')));
  } else {
    await cluster.stop();
  }
  return { bus, fault, ...result };
}

/** Whether a cell is what it must not be. Times are shown, not judged: this may be a slow machine. */
export const isWrong = ({ failure, lostSilent, doubles, reordered, ghosts, clashes }) =>
  Boolean(failure) || lostSilent + doubles + reordered + ghosts + clashes > 0;

const lastAcked = (list) => list.findLast(({ outcome }) => outcome === 'acked').n;

/** Clients on every node, and what they measured. */
class Run {
  constructor(cluster, rate) {
    this.cluster = cluster;
    const places = () => cluster.nodes.map(({ port }) => port);
    this.subscribers = cluster.nodes.map((_, home) => new Subscriber(places, home, CHANNELS));
    this.publishers = cluster.nodes.map((_, home) => new Publisher(places, home, `p${home}`, CHANNELS));
    const last = cluster.nodes.length - 1;
    this.publishers.push(new ApiPublisher(() => cluster.nodes[last], 'api', POSITIONED));
    this.readiness = cluster.nodes.map(() => []);
    this.rate = rate;
  }

  async begin() {
    const live = () => this.everySeen((seen) => seen.live) && this.publishers.every(({ open }) => open);
    await until(live, START_MS, () => 'all clients to be subscribed');
    this.going = true;
    this.watches = this.cluster.nodes.map((_, index) => this.watch(index));
    this.traffic = this.tick();
    const flowing = () =>
      this.everySeen(({ channel, newest }) => this.publishers.every(({ name, sent }) => !sent.has(channel) || newest.has(name)));
    await until(flowing, START_MS, () => 'everything to flow before the fault');
  }

  /** An even pace; what could not be sent on time is not made up for. */
  async tick() {
    let [due, last] = [0, performance.now()];
    while (this.going) {
      await pause(TICK_MS);
      const now = performance.now();
      due = Math.min(due + ((now - last) / 1_000) * this.rate, this.rate / 4);
      last = now;
      for (; due >= 1; due -= 1) {
        this.publishers.forEach((publisher) => publisher.tick());
      }
    }
  }

  /** Writes down when a node's readiness changed. */
  async watch(index) {
    let last;
    while (this.going) {
      const { adminPort } = this.cluster.nodes[index];
      const ready = await fetch(`http://127.0.0.1:${adminPort}/ready`, { signal: AbortSignal.timeout(1_000) }).then(
        ({ status }) => status === 200,
        () => false,
      );
      if (ready !== last) {
        this.readiness[index].push({ ready, at: performance.now() });
        last = ready;
      }
      await pause(25);
    }
  }

  everySeen(holds) {
    return this.subscribers.every(({ channels }) => [...channels.values()].every(holds));
  }

  /** Waits until all nodes are ready and what was sent since the repair arrives everywhere. */
  async healed() {
    let why;
    const well = () => {
      why = this.#unwell();
      return !why;
    };
    await until(well, HEAL_MS, () => why);
    this.healedAt = performance.now();
  }

  #unwell() {
    const red = this.readiness.findIndex((changes) => !changes.at(-1)?.ready);
    if (red >= 0) {
      return `node-${red + 1} is not ready`;
    }
    for (const { name, sent } of this.publishers) {
      for (const [channel, list] of sent) {
        const first = list.find(({ outcome, at }) => outcome === 'acked' && at >= this.mendedAt);
        if (!first) {
          return `${name} has nothing acknowledged in ${channel}`;
        }
        const late = this.subscribers.findIndex(({ channels }) => (channels.get(channel).newest.get(name) ?? 0) < first.n);
        if (late >= 0) {
          return `the subscriber of node-${late + 1} is without ${channel} of ${name}`;
        }
      }
    }
    return null;
  }

  /** Ends the traffic: each publisher's last publication of each channel must arrive everywhere. */
  async finish() {
    this.going = false;
    await this.traffic;
    await until(() => this.publishers.every(({ inflight }) => inflight === 0), END_MS, () => 'answers to all publishes');
    const lasts = await Promise.all(
      this.publishers.flatMap((publisher) => [...publisher.sent.keys()].map((channel) => this.#last(publisher, channel))),
    );
    for (const { name, channel, n } of lasts) {
      const there = () => this.subscribers.every(({ channels }) => channels.get(channel).newest.get(name) >= n);
      await until(there, END_MS, () => `the last publication of ${name} in ${channel}`);
    }
  }

  async #last(publisher, channel) {
    const end = performance.now() + END_MS;
    while ((await publisher.publish(channel)) !== 'acked') {
      if (performance.now() > end) {
        throw new Error(`${publisher.name} cannot publish to ${channel} at the end`);
      }
      await pause(100);
    }
    return { name: publisher.name, channel, n: lastAcked(publisher.sent.get(channel)) };
  }

  async stop() {
    this.going = false;
    await Promise.all([this.traffic, ...(this.watches ?? [])]);
    await Promise.all([...this.subscribers, ...this.publishers].map((client) => client.stop()));
  }

  result() {
    const total = { delivered: 0, lostKept: 0, lostPassing: 0, lostTold: 0, lostSilent: 0, doubles: 0, reordered: 0, ghosts: 0, clashes: 0, examples: [] };
    for (const channel of CHANNELS) {
      const sent = this.publishers.flatMap((publisher) => publisher.sent.get(channel) ?? []);
      const logs = this.subscribers.map(({ channels }) => channels.get(channel).log);
      for (const [index, log] of logs.entries()) {
        const judged = judge(log, sent, logs.filter((other) => other !== log));
        judged.examples = judged.examples.map((example) => ({ channel, subscriber: index + 1, ...example }));
        const lost = { [channel.startsWith('kept') ? 'lostKept' : 'lostPassing']: judged.lostTold };
        add(total, { ...judged, ...lost });
      }
      const double = clashes([...logs, sent.filter(({ epoch }) => epoch)]);
      add(total, { clashes: double.length, examples: double.map(([epoch, offset, ...what]) => ({ channel, epoch, offset, what })) });
    }
    const sent = this.publishers.flatMap((publisher) => [...publisher.sent.values()].flat());
    const count = (outcome) => sent.filter((entry) => entry.outcome === outcome).length;
    return {
      ...total,
      published: sent.length,
      acked: count('acked'),
      refused: count('refused'),
      unknown: count('unknown'),
      told: this.#told(),
      redMs: this.#red(),
      silenceMs: this.#silence(),
      healedMs: this.healedAt && Math.round(this.healedAt - this.mendedAt),
      failure: this.failure,
      codes: Object.fromEntries(this.publishers.map(({ name, codes }) => [name, Object.fromEntries(codes)])),
      mendedAfterMs: this.#since(this.mendedAt),
      readiness: this.readiness.map((changes) =>
        changes.map(({ ready, at }) => `${ready ? 'green' : 'red'} ${this.#since(at) / 1_000}`).join(', ')),
    };
  }

  /** All that was sent and seen. */
  story() {
    return {
      publishers: Object.fromEntries(this.publishers.map(({ name, sent }) => [name, Object.fromEntries(sent)])),
      subscribers: this.subscribers.map(({ channels }) => Object.fromEntries(channels)),
    };
  }

  #since(at) {
    return at && Math.round(at - this.hurtAt);
  }

  /** How often subscribers were told. */
  #told() {
    const seen = this.subscribers.flatMap(({ channels }) => [...channels.values()]);
    return seen.reduce((sum, { log }) => sum + log.filter(({ told }) => told).length, 0);
  }

  /** From the fault to the first node that says so. */
  #red() {
    const times = this.readiness.flat().filter(({ ready, at }) => !ready && at >= this.hurtAt).map(({ at }) => at);
    return times.length > 0 ? Math.round(Math.min(...times) - this.hurtAt) : null;
  }

  /** The longest time that a subscriber had nothing of a channel, from the fault on. */
  #silence() {
    let longest = 0;
    for (const { times } of this.subscribers.flatMap(({ channels }) => [...channels.values()])) {
      for (let index = 1; index < times.length; index++) {
        if (times[index] > this.hurtAt) {
          longest = Math.max(longest, times[index] - times[index - 1]);
        }
      }
    }
    return Math.round(longest);
  }
}
