// Ways from nodes to brokers that can be cut: what is said on a cut way goes nowhere, and nothing is closed.
//
//   node doors.mjs CONTROL-PORT TABLE      TABLE: lines of "NAME LISTEN-PORT TARGET-PORT"
//   POST /cut/NAME, POST /heal/NAME        on the control port; GET / gives the names whose ways are cut
//
// As on a network that comes back, what was sent meanwhile arrives late.

import { readFileSync } from 'node:fs';
import http from 'node:http';
import net from 'node:net';

// Connections at the most; more are refused.
const CONNECTIONS_MAX = 4_096;

const [control, table] = process.argv.slice(2);
const cut = new Set();
const ways = new Set();

function open(node, target, client) {
  const broker = net.connect(target, '127.0.0.1');
  const way = { node, sockets: [client, broker] };
  ways.add(way);
  for (const [from, to] of [[client, broker], [broker, client]]) {
    from.setNoDelay(true);
    from.pipe(to);
    from.on('error', () => to.destroy());
    from.on('close', () => {
      to.destroy();
      ways.delete(way);
    });
  }
}

function accept(node, target, client) {
  client.on('error', () => client.destroy());
  if (!cut.has(node)) {
    open(node, target, client);
    return;
  }
  // A connection that is begun on a cut way stands there, as if its first bytes were lost.
  const held = { node, sockets: [client], target };
  ways.add(held);
  client.on('close', () => ways.delete(held));
}

function setCut(node, isCut) {
  if (isCut) {
    cut.add(node);
  } else {
    cut.delete(node);
  }
  for (const way of [...ways].filter((other) => other.node === node)) {
    if (way.sockets.length === 2) {
      const [client, broker] = way.sockets;
      for (const [from, to] of [[client, broker], [broker, client]]) {
        if (isCut) {
          from.unpipe(to);
          from.pause();
        } else {
          from.pipe(to);
        }
      }
    } else if (!isCut) {
      ways.delete(way);
      way.sockets[0].removeAllListeners('close');
      open(node, way.target, way.sockets[0]);
    }
  }
}

for (const line of readFileSync(table, 'utf8').split('\n').filter(Boolean)) {
  const [node, port, target] = line.split(' ');
  const server = net.createServer((client) => accept(node, Number(target), client));
  server.maxConnections = CONNECTIONS_MAX;
  server.listen(Number(port), '127.0.0.1');
}

http
  .createServer((request, response) => {
    const [, verb, node] = request.url.split('/');
    if (request.method === 'POST' && (verb === 'cut' || verb === 'heal')) {
      setCut(node, verb === 'cut');
    }
    response.end(`${[...cut].join('\n')}\n`);
  })
  .listen(Number(control), '127.0.0.1');
