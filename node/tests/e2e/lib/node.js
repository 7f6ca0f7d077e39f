// A node of the real binary: started on free ports, asked over HTTP, stopped by its process id.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../../../..');
const TARGET = process.env.CARGO_TARGET_DIR ?? path.join(ROOT, 'target');
const BINARY = process.env.E2E_BINARY ?? path.join(TARGET, 'release', 'ringmain');

const START_MS = 20_000;
const STOP_MS = 15_000;

export const SECRET = 'a secret of the end-to-end tests, long enough';
export const API_KEY = 'an api key of the end-to-end tests, long enough';

const OPEN = {
  presence: true,
  join_leave: true,
  force_push_join_leave: true,
  allow_subscribe_for_client: true,
  allow_subscribe_for_anonymous: true,
  allow_publish_for_client: true,
  allow_publish_for_anonymous: true,
  allow_history_for_client: true,
  allow_history_for_anonymous: true,
  allow_presence_for_client: true,
  allow_presence_for_anonymous: true,
};

/** The TOML table of a namespace that is as open as the demo's `room:`, with other options. */
export function openNamespace(name, options = {}) {
  const lines = Object.entries({ ...OPEN, ...options }).map(([key, value]) => `${key} = ${JSON.stringify(value)}`);
  return `[namespaces.${name}]\n${lines.join('\n')}\n`;
}

export class Node {
  constructor(child, directory) {
    this.child = child;
    this.directory = directory;
    this.output = '';
    this.exited = new Promise((resolve) => {
      child.once('exit', (code, signal) => resolve({ code, signal }));
    });
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => {
        this.output += text;
      });
    }
  }

  /**
   * Starts a node with 4 shards and `--demo`. `config` is the text of its file; `flags` are added.
   */
  static async start({ config = '', flags = [], shards = 4, demo = true } = {}) {
    const directory = mkdtempSync(path.join(tmpdir(), 'ringmain-e2e-'));
    const file = path.join(directory, 'ringmain.toml');
    writeFileSync(file, config);
    const args = ['serve', '--config', file, '--listen', '127.0.0.1:0', '--admin', '127.0.0.1:0'];
    args.push('--shards', String(shards), ...(demo ? ['--demo'] : []), ...flags);
    const secrets = { RINGMAIN_TOKEN_HMAC_SECRET: SECRET, RINGMAIN_API_KEY: API_KEY };
    const child = spawn(BINARY, args, { env: { ...process.env, ...secrets } });
    const node = new Node(child, directory);
    process.once('exit', () => child.exitCode ?? child.kill('SIGKILL'));
    await node.ready();
    return node;
  }

  get pid() {
    return this.child.pid;
  }

  /** Waits for the block that says where the node listens. */
  async ready() {
    const done = this.exited.then(({ code }) => {
      throw new Error(`the node ended with ${code}:\n${this.output}`);
    });
    await Promise.race([done, until(() => this.output.includes('\n  bus '), START_MS, () => this.output)]);
    done.catch(() => {});
    this.ports = [...this.output.matchAll(/ws:\/\/127\.0\.0\.1:(\d+)\//g)].map(([, port]) => Number(port));
    this.port = this.ports[0];
    this.adminPort = Number(/http:\/\/127\.0\.0\.1:(\d+) {2}\(\/api/.exec(this.output)[1]);
  }

  get url() {
    return `ws://127.0.0.1:${this.port}/connection/websocket`;
  }

  /** Asks the node to drain and waits for its end. */
  async stop(signal = 'SIGTERM') {
    if (this.child.exitCode === null && this.child.signalCode === null) {
      this.child.kill(signal);
    }
    const late = setTimeout(() => this.child.kill('SIGKILL'), STOP_MS);
    const end = await this.exited;
    clearTimeout(late);
    rmSync(this.directory, { recursive: true, force: true });
    return end;
  }

  /** Calls the server API; gives the whole reply. */
  async api(method, body = {}, headers = { 'X-API-Key': API_KEY }) {
    const response = await fetch(`http://127.0.0.1:${this.adminPort}/api/${method}`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', ...headers },
      body: typeof body === 'string' ? body : JSON.stringify(body),
    });
    const text = await response.text();
    if (response.status !== 200) {
      return { status: response.status, text };
    }
    return JSON.parse(text);
  }

  /** Calls the server API; gives the result, or fails. */
  async call(method, body) {
    const reply = await this.api(method, body);
    if (!reply.result) {
      throw new Error(`${method}: ${JSON.stringify(reply)}`);
    }
    return reply.result;
  }

  async get(pathname) {
    const response = await fetch(`http://127.0.0.1:${this.adminPort}${pathname}`);
    return { status: response.status, text: await response.text() };
  }

  /** The sum over all labels of a metric, or over those with a reason. It may be 100 ms old. */
  async metric(name, reason) {
    const { text } = await this.get('/metrics');
    let sum = 0;
    let seen = false;
    for (const [, labels, value] of text.matchAll(new RegExp(`^ringmain_${name}(?:\\{([^}]*)\\})? (\\S+)$`, 'gm'))) {
      if (reason === undefined || labels?.includes(`reason="${reason}"`)) {
        sum += Number(value);
        seen = true;
      }
    }
    if (!seen) {
      throw new Error(`no metric ${name} ${reason ?? ''}`);
    }
    return sum;
  }

  /** A counter that nothing moves just now: shards publish theirs every 100 ms. */
  async counter(name, reason) {
    let [last, same] = [NaN, 0];
    await until(async () => {
      const value = await this.metric(name, reason);
      [last, same] = [value, value === last ? same + 1 : 0];
      await new Promise((resolve) => setTimeout(resolve, 60));
      return same >= 4;
    });
    return last;
  }

  /** Waits until a metric has a value. */
  async settled(name, expected, reason) {
    let last;
    await until(
      async () => {
        last = await this.metric(name, reason);
        return last === expected;
      },
      10_000,
      () => `${name} ${reason ?? ''} is ${last} instead of ${expected}`,
    );
  }
}

/** Waits until `holds()` gives something true, and gives that. It looks again every few milliseconds. */
export async function until(holds, ms = 5_000, explain = () => String(holds)) {
  const end = performance.now() + ms;
  for (;;) {
    const value = await holds();
    if (value) {
      return value;
    }
    if (performance.now() > end) {
      throw new Error(`not within ${ms} ms: ${explain()}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** A port that nobody listens on just now. */
export async function freePort() {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

/** Sends bytes, gives all that comes back until the peer ends the connection. */
export async function exchange(port, bytes) {
  const socket = net.connect(port, '127.0.0.1');
  socket.write(bytes);
  const chunks = [];
  for await (const chunk of socket) {
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString('latin1');
}
