// The unmodified `centrifuge` SDK against a node, with its sockets within reach.

import { Centrifuge } from 'centrifuge';
import WebSocket from 'ws';

import { until } from './node.js';

const open = new Set();

/** A client of the SDK that keeps what happened to it. */
export class Client {
  constructor(node, options = {}) {
    this.sockets = [];
    this.seen = [];
    const { sockets } = this;
    class Tracked extends WebSocket {
      constructor(...args) {
        super(...args);
        sockets.push(this);
      }
    }
    const url = options.url ?? node.url;
    const fast = { minReconnectDelay: 20, maxReconnectDelay: 100 };
    // The demo's name is answered with the shard.
    this.sdk = new Centrifuge(url, { websocket: Tracked, name: 'ringmain-demo', ...fast, ...options });
    record(this.sdk, this.seen, [
      'connecting', 'connected', 'disconnected', 'error', 'message',
      'subscribed', 'subscribing', 'unsubscribed', 'publication', 'join', 'leave',
    ]);
    open.add(this);
  }

  /** Connects and waits for the reply. */
  async connect() {
    this.sdk.connect();
    this.connected = await this.event('connected');
    return this;
  }

  get id() {
    return this.last('connected').client;
  }

  get shard() {
    return this.last('connected').data.shard;
  }

  last(event) {
    return this.seen.findLast((entry) => entry.event === event)?.ctx;
  }

  /** Waits for the first such event after the first `skip` ones, past or future. */
  event(event, { skip = 0, where = () => true, ms = 5_000 } = {}) {
    return nextEvent(this.seen, event, skip, where, ms);
  }

  /** A subscription that keeps what happened to it. */
  subscription(channel, options = {}) {
    return new Sub(this, channel, options);
  }

  /** Subscribes and waits for the reply. */
  async subscribe(channel, options = {}) {
    const sub = this.subscription(channel, options);
    sub.sdk.subscribe();
    await sub.event('subscribed');
    return sub;
  }

  /** The connection is gone without a word, as when a cable is cut. */
  cut() {
    this.sockets.at(-1)._socket.destroy();
  }

  close() {
    open.delete(this);
    this.sdk.disconnect();
  }
}

export class Sub {
  constructor(client, channel, options) {
    this.seen = [];
    this.channel = channel;
    this.sdk = client.sdk.newSubscription(channel, options);
    record(this.sdk, this.seen, [
      'subscribing', 'subscribed', 'unsubscribed', 'publication', 'join', 'leave', 'error',
    ]);
  }

  event(event, { skip = 0, where = () => true, ms = 5_000 } = {}) {
    return nextEvent(this.seen, event, skip, where, ms);
  }

  all(event) {
    return this.seen.filter((entry) => entry.event === event).map((entry) => entry.ctx);
  }

  /** What was published, in order. */
  get data() {
    return this.all('publication').map(({ data }) => data);
  }

  /** Waits until `count` publications came. */
  publications(count, ms = 10_000) {
    const explain = () => `${this.data.length} of ${count} publications in ${this.channel}`;
    return until(() => this.data.length >= count && this.all('publication'), ms, explain);
  }
}

function record(emitter, seen, events) {
  for (const event of events) {
    emitter.on(event, (ctx) => seen.push({ event, ctx }));
  }
}

function nextEvent(seen, event, skip, where, ms) {
  const find = () => seen.filter((entry) => entry.event === event && where(entry.ctx))[skip]?.ctx;
  const explain = () => `${event} in ${JSON.stringify(seen.slice(-12))}`;
  return until(find, ms, explain);
}

/** A connected client. */
export const connect = (node, options) => new Client(node, options).connect();

/** Closes every client that is still open: for `afterEach`. */
export function closeAll() {
  for (const client of open) {
    client.close();
  }
}

/** Connected clients on `count` different shards. */
export async function onDifferentShards(node, count, options = () => ({})) {
  const found = new Map();
  for (let attempt = 0; attempt < 200 && found.size < count; attempt++) {
    const client = await connect(node, options(found.size));
    if (found.has(client.shard)) {
      client.close();
    } else {
      found.set(client.shard, client);
    }
  }
  if (found.size < count) {
    throw new Error(`200 connections reached only shards ${[...found.keys()]}`);
  }
  return [...found.values()];
}

/** The error that a promise rejects with. */
export async function rejection(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error('it was expected to be refused');
}
