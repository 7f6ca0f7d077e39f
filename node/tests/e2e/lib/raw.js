// A WebSocket client of bare bytes: for what no proper client would send, and for readers that stop.

import { randomBytes } from 'node:crypto';
import net from 'node:net';

import { until } from './node.js';

export const TEXT = 1;
export const BINARY = 2;
export const CLOSE = 8;
export const PING = 9;
export const PONG = 10;

/** One frame of a client. `options` bend it: `fin`, `mask` (false: none), `rsv`, `length` (as claimed). */
export function frame(opcode, payload, { fin = true, mask = true, rsv = 0, length } = {}) {
  const body = Buffer.from(payload);
  const claimed = length ?? body.length;
  const head = [(fin ? 0x80 : 0) | (rsv << 4) | opcode];
  const bit = mask ? 0x80 : 0;
  if (claimed < 126) {
    head.push(bit | claimed);
  } else if (claimed < 65_536) {
    head.push(bit | 126, claimed >> 8, claimed & 255);
  } else {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(BigInt(claimed));
    head.push(bit | 127, ...bytes);
  }
  if (!mask) {
    return Buffer.concat([Buffer.from(head), body]);
  }
  const key = randomBytes(4);
  for (let index = 0; index < body.length; index++) {
    body[index] ^= key[index & 3];
  }
  return Buffer.concat([Buffer.from(head), key, body]);
}

/** Those of this file that a failed test may have left open. */
const open = new Set();

export class Raw {
  constructor(port) {
    open.add(this);
    this.received = Buffer.alloc(0);
    /** Frames in order: `{ opcode, payload }`. */
    this.frames = [];
    /** The JSON of the text frames. */
    this.messages = [];
    this.head = null;
    this.ended = null;
    this.socket = net.connect(port, '127.0.0.1');
    this.socket.on('data', (chunk) => this.take(chunk));
    this.socket.on('end', () => (this.ended ??= 'fin'));
    this.socket.on('error', (error) => (this.ended ??= error.code));
    this.socket.on('close', () => (this.ended ??= 'closed'));
  }

  /** Connects and upgrades. */
  static async open(port, { path = '/connection/websocket', before = '', headers = '' } = {}) {
    const raw = new Raw(port);
    raw.socket.write(before);
    raw.socket.write(
      `GET ${path} HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n` +
        `Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n${headers}\r\n`,
    );
    await until(() => raw.head !== null || raw.ended, 5_000, () => 'an answer to the handshake');
    return raw;
  }

  /** Connects, upgrades and sends connect; gives the client once it is answered. */
  static async connected(port, { connect = {}, ...options } = {}) {
    const raw = await Raw.open(port, options);
    raw.send({ id: 1, connect });
    await raw.reply(1);
    return raw;
  }

  take(chunk) {
    this.received = this.received.length === 0 ? chunk : Buffer.concat([this.received, chunk]);
    if (this.head === null) {
      const end = this.received.indexOf('\r\n\r\n');
      if (end < 0) {
        return;
      }
      this.head = this.received.subarray(0, end).toString('latin1');
      this.received = this.received.subarray(end + 4);
    }
    if (this.head.startsWith('HTTP/1.1 101')) {
      while (this.takeFrame());
    }
  }

  takeFrame() {
    const bytes = this.received;
    if (bytes.length < 2) {
      return false;
    }
    let [size, at] = [bytes[1] & 127, 2];
    if (size === 126) {
      [size, at] = bytes.length < 4 ? [Infinity, 4] : [bytes.readUInt16BE(2), 4];
    } else if (size === 127) {
      [size, at] = bytes.length < 10 ? [Infinity, 10] : [Number(bytes.readBigUInt64BE(2)), 10];
    }
    if (bytes.length < at + size) {
      return false;
    }
    const opcode = bytes[0] & 15;
    const payload = Buffer.from(bytes.subarray(at, at + size));
    this.received = bytes.subarray(at + size);
    this.frames.push({ opcode, payload, masked: (bytes[1] & 128) !== 0, fin: (bytes[0] & 128) !== 0 });
    if (opcode === TEXT) {
      this.messages.push(JSON.parse(payload.toString()));
      if (this.pongs && payload.length === 2) {
        this.text('{}');
      }
    }
    return true;
  }

  /** Answers the protocol's pings from now on. */
  answerPings() {
    this.pongs = true;
    return this;
  }

  write(bytes) {
    return this.socket.write(bytes);
  }

  text(text) {
    return this.write(frame(TEXT, text));
  }

  /** Sends commands in one message. */
  send(...commands) {
    return this.text(commands.map((command) => JSON.stringify(command)).join('\n'));
  }

  /** Waits for the reply to a command. */
  async reply(id, ms = 5_000) {
    const find = () => this.messages.find((message) => message.id === id);
    await until(() => find() || this.ended, ms, () => `a reply to ${id} in ${JSON.stringify(this.messages.slice(-5))}`);
    return find() ?? { closed: this.closing };
  }

  /** Publications of a channel so far, in order. */
  publications(channel) {
    return this.messages.filter(({ push }) => push?.channel === channel && push.pub).map(({ push }) => push.pub);
  }

  /** The node's close frame: `{ code, reason }`. */
  get closing() {
    const close = this.frames.find(({ opcode }) => opcode === CLOSE);
    if (!close) {
      return null;
    }
    const code = close.payload.length > 1 ? close.payload.readUInt16BE(0) : 1005;
    return { code, reason: close.payload.subarray(2).toString() };
  }

  /** Waits for the end of the connection; gives the close frame (or null) and how it ended. */
  async end(ms = 10_000) {
    await until(() => this.ended, ms, () => `the end, after ${JSON.stringify(this.messages.slice(-3))}`);
    return { ...this.closing, ended: this.ended };
  }

  /** Stops reading: the kernel's buffers fill, then the node's. */
  stopReading() {
    this.socket.pause();
  }

  goOnReading() {
    this.socket.resume();
  }

  destroy() {
    open.delete(this);
    this.socket.destroy();
  }

  /** For the end of a test, so that one that failed spoils no other. */
  static destroyAll() {
    for (const raw of open) {
      raw.destroy();
    }
  }
}
