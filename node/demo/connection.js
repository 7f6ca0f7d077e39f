// One connection to the node: the Centrifuge v2 client protocol over JSON, as far as a chat needs it.
//
// Owns the socket, replies by id, pings, and when to connect again. It knows no channel. Every
// connection is a new one to the node: after each, `opened` subscribes anew and recovers.
//
// Commands of one tick leave in one message, so that connect and the first subscribe cost one round trip.

const REQUEST_TIMEOUT_MS = 10_000;
// The node is taken for gone when it is silent for this long beyond its ping interval.
const SILENCE_MS = 10_000;
const BACKOFF_MIN_MS = 300;
const BACKOFF_MAX_MS = 10_000;

/** Why a request has no result: an error reply, or a connection that ended first. */
export class RequestError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** Close codes after which a client stays away; all others are worth another try. */
const isTerminal = (code) => code === 1009 || (code >= 3500 && code < 4000) || (code >= 4500 && code < 5000);

export class Connection {
  /**
   * `handlers`: `opened()` may make requests that leave with connect; `connected(result)`;
   * `pushed(push)`; `changed(state)` with `{ name: 'connecting' | 'connected' | 'waiting' | 'dropped' | 'closed',
   * until?, reason? }`, where `until` is when the next try is made (of `performance.now()`).
   */
  constructor(url, clientName, handlers) {
    this.url = url;
    this.clientName = clientName;
    this.handlers = handlers;
    this.socket = null;
    this.requests = new Map();
    this.outgoing = [];
    this.lastId = 0;
    this.failures = 0;
    this.retry = null;
    this.silence = null;
    this.silenceMs = 30_000;
  }

  /** Connects now, whatever was planned. */
  open() {
    clearTimeout(this.retry);
    this.abandon();
    const socket = new WebSocket(this.url);
    this.socket = socket;
    this.change('connecting');
    socket.onopen = () => this.greet();
    socket.onmessage = ({ data }) => this.receive(data);
    socket.onclose = ({ code, reason }) => this.closed(code, reason);
  }

  /** Ends the connection and comes back after `ms`, as after a tunnel. */
  drop(ms) {
    this.abandon();
    this.comeBack('dropped', ms);
  }

  /** Sends a command; resolves with its result, rejects with a `RequestError`. */
  request(method, params) {
    if (this.socket?.readyState !== WebSocket.OPEN) {
      return Promise.reject(new RequestError(0, 'not connected'));
    }
    const id = ++this.lastId;
    if (this.outgoing.push({ id, [method]: params }) === 1) {
      queueMicrotask(() => this.flush());
    }
    return new Promise((resolve, reject) => {
      const timeout = setTimeout(() => this.lost(), REQUEST_TIMEOUT_MS);
      this.requests.set(id, { method, resolve, reject, timeout });
    });
  }

  flush() {
    const commands = this.outgoing.splice(0);
    if (commands.length > 0 && this.socket?.readyState === WebSocket.OPEN) {
      this.socket.send(commands.map((command) => JSON.stringify(command)).join('\n'));
    }
  }

  greet() {
    this.expectNews();
    const connect = this.request('connect', { name: this.clientName });
    this.handlers.opened();
    connect.then(
      (result) => {
        this.failures = 0;
        if (result.ping) {
          this.silenceMs = result.ping * 1000 + SILENCE_MS;
        }
        this.answersPings = result.pong === true;
        this.handlers.connected(result);
        this.change('connected');
      },
      (error) => error.code !== 0 && this.lost(),
    );
  }

  receive(text) {
    this.expectNews();
    for (const line of text.split('\n')) {
      const message = JSON.parse(line);
      if (message.id) {
        this.settle(message);
      } else if (message.push) {
        this.handlers.pushed(message.push);
      } else if (this.answersPings) {
        this.socket.send('{}');
      }
    }
  }

  settle({ id, error, ...result }) {
    const request = this.requests.get(id);
    if (!request) {
      return;
    }
    this.requests.delete(id);
    clearTimeout(request.timeout);
    if (error) {
      request.reject(new RequestError(error.code, error.message));
    } else {
      request.resolve(result[request.method] ?? {});
    }
  }

  expectNews() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.lost(), this.silenceMs);
  }

  /** The connection is useless: away with it. */
  lost() {
    this.abandon();
    this.comeBack('waiting', this.backoff());
  }

  closed(code, reason) {
    this.abandon();
    if (isTerminal(code)) {
      this.change('closed', { reason: `${reason || 'closed by the node'} (${code})` });
    } else {
      this.comeBack('waiting', this.backoff());
    }
  }

  comeBack(state, ms) {
    clearTimeout(this.retry);
    this.retry = setTimeout(() => this.open(), ms);
    this.change(state, { until: performance.now() + ms });
  }

  backoff() {
    const most = Math.min(BACKOFF_MAX_MS, BACKOFF_MIN_MS * 2 ** this.failures++);
    return BACKOFF_MIN_MS + Math.random() * most;
  }

  /** Forgets the socket; whoever waits for a reply is told. */
  abandon() {
    clearTimeout(this.silence);
    const socket = this.socket;
    this.socket = null;
    this.answersPings = false;
    this.outgoing = [];
    if (socket) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
    }
    for (const { reject, timeout } of this.requests.values()) {
      clearTimeout(timeout);
      reject(new RequestError(0, 'the connection ended'));
    }
    this.requests.clear();
  }

  change(name, detail) {
    this.handlers.changed({ name, ...detail });
  }
}
