// Clients of the bare protocol that write down everything: a subscriber that comes back and recovers as the SDK
// does, and a publisher that numbers what it sends.
//
// Owns: the connection, its life, and the log. Must not know: what is right.

import { API_KEY } from '../../e2e/lib/node.js';
import { Raw } from '../../e2e/lib/raw.js';

// The node pings every second (see main.js); silence for longer than this is a dead connection, in milliseconds.
const SILENCE_MS = 4_000;

// Time before another attempt, in milliseconds.
const RETRY_MS = 100;

// How long an answer may take, in milliseconds: more than the node's own limit.
const ANSWER_MS = 8_000;

// Publications on their way at the most: beyond it the publisher waits.
const INFLIGHT_MAX = 64;

// How often a publish by the API is tried, while it is not known what became of it.
const API_ATTEMPTS = 5;

/** A connection that upgrades, and hands each message over as it comes. */
class Frames extends Raw {
  constructor(port, onOpen, onMessage) {
    super(port);
    this.onOpen = onOpen;
    this.onMessage = onMessage;
    this.heardAt = performance.now();
    this.answerPings();
    this.write(
      `GET /connection/websocket HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\nUpgrade: websocket\r\n` +
        'Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n',
    );
  }

  take(chunk) {
    const wasOpen = this.head !== null;
    super.take(chunk);
    if (!wasOpen && this.head !== null) {
      this.onOpen(this.head.startsWith('HTTP/1.1 101'));
    }
  }

  takeFrame() {
    const more = super.takeFrame();
    this.heardAt = performance.now();
    while (this.messages.length > 0) {
      this.onMessage(this.messages.shift());
    }
    if (this.frames.length > 4) {
      this.frames.splice(0, this.frames.length - 4);
    }
    return more;
  }
}

/** One client for good: when its connection ends it comes back, to its own node first, else to another. */
class Client {
  constructor(places, home) {
    /** Gives the ports of the nodes now; a node that was started again has another. */
    this.places = places;
    this.at = home;
    this.going = true;
    this.lastId = 0;
    this.waiting = new Map();
    this.ended = this.#live();
  }

  async #live() {
    for (let attempt = 0; this.going; attempt++) {
      const ports = this.places();
      try {
        await this.#connection(ports[(this.at + attempt) % ports.length], () => (attempt = -1));
      } catch {
        // The next attempt is the answer.
      }
      await pause(RETRY_MS);
    }
  }

  /** One connection, from its beginning to its end. */
  async #connection(port, welcomed) {
    const socket = new Frames(
      port,
      (upgraded) => (upgraded ? this.#hello(socket, welcomed) : socket.destroy()),
      (message) => this.#take(message),
    );
    this.socket = socket;
    const closed = new Promise((resolve) => socket.socket.once('close', resolve));
    const watch = setInterval(() => this.#look(socket), 100);
    await closed;
    clearInterval(watch);
    this.socket = null;
    this.open = false;
    this.waiting.forEach(({ resolve }) => resolve({ lost: true }));
    this.waiting.clear();
    this.lost();
  }

  async #hello(socket, welcomed) {
    const reply = await this.#ask({ connect: {} });
    if (reply.connect && this.socket === socket) {
      welcomed();
      this.open = true;
      this.connected();
    } else {
      socket.destroy();
    }
  }

  #look(socket) {
    const now = performance.now();
    if (now - socket.heardAt > SILENCE_MS || !this.going) {
      socket.destroy();
    }
    for (const [id, { since, resolve }] of this.waiting) {
      if (now - since > ANSWER_MS) {
        this.waiting.delete(id);
        resolve({ lost: true });
        this.late();
      }
    }
  }

  #take(message) {
    const waiter = this.waiting.get(message.id);
    if (waiter) {
      this.waiting.delete(message.id);
      waiter.resolve(message);
    } else if (message.push) {
      this.push(message.push);
    }
  }

  /**
   * Sends a command; gives its reply, or `{ lost: true }` when none will come. What `atOnce` returns is given instead:
   * it is called with the reply before the next message is looked at.
   */
  ask(command, atOnce) {
    return this.open ? this.#ask(command, atOnce) : Promise.resolve({ lost: true });
  }

  #ask(command, atOnce = (reply) => reply) {
    const id = ++this.lastId;
    this.socket.send({ id, ...command });
    return new Promise((resolve) => {
      this.waiting.set(id, { since: performance.now(), resolve: (reply) => resolve(atOnce(reply)) });
    });
  }

  connected() {}
  lost() {}
  late() {}
  push() {}

  async stop() {
    this.going = false;
    this.socket?.destroy();
    await this.ended;
  }
}

/** Subscribes to channels, keeps its positions, and writes down what it sees. */
export class Subscriber extends Client {
  constructor(places, home, channels) {
    super(places, home);
    this.channels = new Map(channels.map((channel) => [channel, new Seen(channel)]));
  }

  connected() {
    for (const seen of this.channels.values()) {
      this.#subscribe(seen, this.socket);
    }
  }

  lost() {
    for (const seen of this.channels.values()) {
      seen.live = false;
    }
  }

  /** Whether it is subscribed is not known now: a new connection knows. */
  late() {
    this.socket?.destroy();
  }

  /** Tries until it is subscribed. What follows the reply in the same bytes comes after it here, too. */
  async #subscribe(seen, socket) {
    const begin = ({ subscribe, error }) => {
      if (subscribe) {
        seen.begin(subscribe, request.recover);
      } else if (error && !error.temporary && error.code !== 100) {
        seen.refusals.push(error);
        this.late();
      }
      return Boolean(subscribe);
    };
    let request;
    do {
      request = { channel: seen.channel, recoverable: true, positioned: true };
      if (seen.epoch) {
        Object.assign(request, { recover: true, epoch: seen.epoch, offset: seen.offset });
      }
      if (await this.ask({ subscribe: request }, begin)) {
        return;
      }
      await pause(RETRY_MS);
    } while (this.going && this.socket === socket && this.open);
  }

  push({ channel, pub, unsubscribe, disconnect }) {
    const seen = this.channels.get(channel);
    if (pub && seen) {
      seen.take(pub);
    } else if (unsubscribe && seen?.live) {
      seen.live = false;
      seen.ends.push(unsubscribe.code);
      this.#subscribe(seen, this.socket);
    } else if (disconnect) {
      this.socket?.destroy();
    }
  }
}

/** What one subscriber saw of one channel. */
class Seen {
  constructor(channel) {
    this.channel = channel;
    this.log = [];
    this.times = [];
    this.ends = [];
    this.refusals = [];
    this.newest = new Map();
    this.subscriptions = 0;
    this.offset = 0;
    this.live = false;
  }

  begin({ epoch, offset = 0, publications = [], recovered }, asked) {
    this.subscriptions += 1;
    const again = this.subscriptions > 1;
    if (again && !(asked && recovered)) {
      this.log.push({ told: epoch ? 'not recovered' : 'subscribed anew', top: { epoch, offset }, at: performance.now() });
    }
    // A recovered position may be named in a later epoch: its offsets go on.
    this.offset = again && asked && recovered ? this.offset : 0;
    this.epoch = epoch;
    publications.forEach((publication) => this.take(publication));
    this.offset = Math.max(this.offset, offset);
    this.live = true;
  }

  take({ data, offset = 0 }) {
    const [publisher, n, session] = data;
    const at = performance.now();
    this.log.push({ publisher, n, session, offset, epoch: this.epoch, at });
    this.times.push(at);
    this.offset = offset || this.offset;
    this.newest.set(publisher, Math.max(n, this.newest.get(publisher) ?? 0));
  }
}

/** Sends numbered publications to channels in turn, and keeps what became of each. */
export class Publisher extends Client {
  constructor(places, home, name, channels) {
    super(places, home);
    this.name = name;
    this.sent = new Map(channels.map((channel) => [channel, []]));
    this.order = [...channels];
    this.next = 0;
    this.inflight = 0;
    this.codes = new Map();
    this.sessions = 0;
  }

  connected() {
    this.sessions += 1;
  }

  /** Publishes to the next channel, unless too much is on its way. */
  tick() {
    if (this.open && this.inflight < INFLIGHT_MAX) {
      this.publish(this.order[this.next++ % this.order.length]);
    }
  }

  /** Publishes the channel's next number; gives what became of it. */
  async publish(channel) {
    const list = this.sent.get(channel);
    const entry = { publisher: this.name, n: list.length + 1, session: this.sessions, outcome: 'unknown', at: performance.now() };
    list.push(entry);
    this.inflight += 1;
    const { publish, error } = await this.ask({ publish: { channel, data: [this.name, entry.n, entry.session] } });
    this.inflight -= 1;
    if (publish) {
      entry.outcome = 'acked';
    } else if (error) {
      // Error 100 that is not temporary: what became of it is not known. Everything else was not accepted.
      entry.outcome = error.code === 100 && !error.temporary ? 'unknown' : 'refused';
      const what = `${error.code}${error.temporary ? ' temporary' : ''}`;
      this.codes.set(what, (this.codes.get(what) ?? 0) + 1);
    }
    entry.settledAt = performance.now();
    return entry.outcome;
  }
}

/** Publishes by a node's API, and repeats what it does not know under the same idempotency key. */
export class ApiPublisher {
  /** `node` gives the node now. */
  constructor(node, name, channels) {
    this.node = node;
    this.name = name;
    this.sent = new Map(channels.map((channel) => [channel, []]));
    this.order = [...channels];
    this.next = 0;
    this.inflight = 0;
    this.open = true;
    this.codes = new Map();
  }

  tick() {
    if (this.inflight < INFLIGHT_MAX) {
      this.publish(this.order[this.next++ % this.order.length]);
    }
  }

  async publish(channel) {
    const list = this.sent.get(channel);
    const entry = { publisher: this.name, n: list.length + 1, outcome: 'unknown', at: performance.now() };
    list.push(entry);
    this.inflight += 1;
    const body = { channel, data: [this.name, entry.n], idempotency_key: `${this.name}-${entry.n}` };
    for (let attempt = 0; attempt < API_ATTEMPTS && entry.outcome === 'unknown'; attempt++) {
      // Once it may have been accepted, a refusal of a repeat says nothing about the first attempt.
      Object.assign(entry, await this.#try(body, attempt > 0));
      await pause(entry.outcome === 'unknown' ? RETRY_MS : 0);
    }
    this.inflight -= 1;
    return entry.outcome;
  }

  async #try(body, wasUnknown) {
    try {
      const { adminPort } = this.node();
      const response = await fetch(`http://127.0.0.1:${adminPort}/api/publish`, {
        method: 'POST',
        headers: { 'X-API-Key': API_KEY },
        body: JSON.stringify(body),
        signal: AbortSignal.timeout(ANSWER_MS),
      });
      const { result, error } = response.status === 200 ? await response.json() : { error: { code: response.status } };
      if (result) {
        return { outcome: 'acked', offset: result.offset, epoch: result.epoch };
      }
      this.codes.set(error.code, (this.codes.get(error.code) ?? 0) + 1);
      return { outcome: error.code === 100 || wasUnknown ? 'unknown' : 'refused' };
    } catch {
      return { outcome: 'unknown' };
    }
  }

  async stop() {
    this.open = false;
  }
}

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
