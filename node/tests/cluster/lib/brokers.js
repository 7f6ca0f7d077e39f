// Real brokers, started by deploy/local/up in a directory of their own, and what a test does to them.

import { execFile, execFileSync, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdtempSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { until } from '../../e2e/lib/node.js';

export const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../../../..');
const LOCAL = path.join(ROOT, 'deploy', 'local');

/** The buses that a test may be told to use. */
export const BUSES = ['redis', 'valkey', 'sentinel', 'redis-single', 'nats', 'nats-single', 'kafka', 'kafka-small'];

const START_MS = 300_000;

const run = promisify(execFile);

export class Brokers {
  /**
   * Starts the brokers of a bus. `doors`: ways to the brokers that can be cut, for so many nodes.
   */
  static async start(bus, { doors = 0 } = {}) {
    if (!BUSES.includes(bus)) {
      throw new Error(`no bus ${bus}; there are ${BUSES.join(', ')}`);
    }
    const brokers = new Brokers(bus, mkdtempSync(path.join(tmpdir(), 'ringmain-bus-')));
    const args = [bus.replace('-small', ''), '--bus-only', '--state', brokers.state, '--doors', String(doors)];
    if (bus === 'kafka-small') {
      args.push('--small');
    }
    process.once('exit', brokers.#atExit);
    try {
      const { stdout } = await run(path.join(LOCAL, 'up'), args, { timeout: START_MS });
      brokers.url = stdout.trim();
    } catch (error) {
      throw new Error(`${bus} did not start: ${error.stderr ?? error}`);
    }
    return brokers;
  }

  constructor(bus, state) {
    this.bus = bus;
    this.state = state;
  }

  /** What `--bus` and its companions are for one node (0, 1, …); a node of its own door where there are doors. */
  flags(node) {
    const own = path.join(this.state, 'doors', String(node + 1));
    return existsSync(own) ? readFileSync(own, 'utf8').split('\n').filter(Boolean) : ['--bus', this.url];
  }

  /** Names of the brokers' processes, in the order of their start: `redis-1`, `nats-2`, … */
  get names() {
    const all = readFileSync(path.join(this.state, 'order'), 'utf8').split('\n');
    return all.filter((name) => name && name !== 'doors');
  }

  /** Those whose name begins so. */
  named(prefix) {
    return this.names.filter((name) => name.startsWith(prefix));
  }

  file(name, file) {
    return readFileSync(path.join(this.state, 'procs', name, file), 'utf8').trim();
  }

  port(name) {
    return Number(this.file(name, 'port'));
  }

  pid(name) {
    return Number(this.file(name, 'pid').split(' ')[0]);
  }

  alive(name) {
    return startTime(this.pid(name)) === this.file(name, 'pid').split(' ')[1];
  }

  /** Sends a signal, if the process is still the one that was started. */
  signal(name, signal) {
    if (this.alive(name)) {
      process.kill(this.pid(name), signal);
    }
  }

  /** Kills without a word, and waits until it is gone. */
  async kill(...names) {
    names.forEach((name) => this.signal(name, 'SIGKILL'));
    for (const name of names) {
      await until(() => !this.alive(name), 10_000, () => `${name} to be gone`);
    }
  }

  /** Asks to end, and waits until it has. */
  async end(name) {
    this.signal(name, 'SIGTERM');
    await until(() => !this.alive(name), 30_000, () => `${name} to end`);
  }

  /** Starts a process again as it was started first, with the data it left. */
  again(...names) {
    for (const name of names) {
      const at = path.join(this.state, 'procs', name);
      const log = openSync(path.join(at, 'log'), 'a');
      const child = spawn('bash', [path.join(at, 'run')], { detached: true, stdio: ['ignore', log, log] });
      closeSync(log);
      child.unref();
      writeFileSync(path.join(at, 'pid'), `${child.pid} ${startTime(child.pid)}\n`);
    }
  }

  /** Removes what processes that have ended had stored. */
  forget(...names) {
    for (const name of names) {
      const data = path.join(this.state, 'procs', name, 'data');
      for (const entry of existsSync(data) ? readdirSync(data) : []) {
        rmSync(path.join(data, entry), { recursive: true, force: true });
      }
    }
  }

  /** From now on what is said through the doors of this name goes nowhere: a node's number, or a server's name. */
  async cut(name) {
    await fetch(`http://127.0.0.1:${this.port('doors')}/cut/${name}`, { method: 'POST' });
  }

  /** It goes through again, and what was said meanwhile too. */
  async heal(name) {
    await fetch(`http://127.0.0.1:${this.port('doors')}/heal/${name}`, { method: 'POST' });
  }

  /** Ends all of them and removes what they wrote. */
  async stop() {
    process.off('exit', this.#atExit);
    await run(path.join(LOCAL, 'down'), ['--state', this.state, '--now', '--wipe']);
    rmSync(this.state, { recursive: true, force: true });
  }

  #atExit = () => execFileSync(path.join(LOCAL, 'down'), ['--state', this.state, '--now', '--wipe'], { stdio: 'ignore' });
}

/** When a process began, in the kernel's ticks; nothing when it has ended. */
function startTime(pid) {
  try {
    const fields = readFileSync(`/proc/${pid}/stat`, 'latin1').replace(/^.*\) /s, '').split(' ');
    return fields[0] === 'Z' ? undefined : fields[19];
  } catch {
    return undefined;
  }
}
