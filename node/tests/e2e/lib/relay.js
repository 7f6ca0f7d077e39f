// A relay between clients and a node that can be cut: for browsers, whose sockets a test cannot reach.

import { once } from 'node:events';
import net from 'node:net';

export class Relay {
  constructor(target) {
    this.pairs = new Set();
    this.server = net.createServer((client) => {
      const upstream = net.connect(target, '127.0.0.1');
      const pair = [client, upstream];
      this.pairs.add(pair);
      for (const [one, other] of [pair, [upstream, client]]) {
        one.pipe(other);
        one.on('error', () => other.destroy());
        one.on('close', () => {
          other.destroy();
          this.pairs.delete(pair);
        });
      }
    });
  }

  static async start(target) {
    const relay = new Relay(target);
    relay.server.listen(0, '127.0.0.1');
    await once(relay.server, 'listening');
    return relay;
  }

  get port() {
    return this.server.address().port;
  }

  /** Every connection is gone without a word. */
  cut() {
    for (const sockets of this.pairs) {
      sockets.forEach((socket) => socket.resetAndDestroy());
    }
  }

  stop() {
    this.server.close();
    this.cut();
  }
}
