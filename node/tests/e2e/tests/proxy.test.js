// PROXY protocol v1 and v2 where a listener is told to expect them, and health checks as proxies make them.

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { Node, exchange, freePort } from '../lib/node.js';
import { Raw } from '../lib/raw.js';

const SIGNATURE = Buffer.from('0d0a0d0a000d0a515549540a', 'hex');

/** A v2 header: `command` 0 is LOCAL, 1 is PROXY; `family` 0x11 is TCP over IPv4. */
function v2(command, family, addresses = Buffer.alloc(0)) {
  const head = Buffer.of(0x20 | command, family, addresses.length >> 8, addresses.length & 255);
  return Buffer.concat([SIGNATURE, head, addresses]);
}

const V1 = 'PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n';
const IPV4 = Buffer.from('c0000201c0000202dc0401bb', 'hex');
const LOCAL = v2(0, 0);
const HEALTH = 'GET /health HTTP/1.0\r\n\r\n';

let node;
let plain;
let proxied;
before(async () => {
  proxied = await freePort();
  const flags = ['--listen', `127.0.0.1:${proxied} proxy_protocol`];
  node = await Node.start({ flags, config: '[client]\nhandshake_timeout_ms = 1000\n' });
  plain = node.port;
});
after(() => node.stop());

test('connections behind each kind of header', async () => {
  const tlv = Buffer.concat([IPV4, Buffer.from('03000401020304', 'hex')]);
  for (const header of [
    V1,
    'PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n',
    'PROXY UNKNOWN\r\n',
    v2(1, 0x11, IPV4),
    v2(1, 0x11, tlv),
    v2(1, 0x21, Buffer.alloc(36, 1)),
    LOCAL,
  ]) {
    const raw = await Raw.connected(proxied, { before: header });
    raw.send({ id: 2, publish: { channel: 'room:proxy', data: 1 } });
    assert.deepEqual((await raw.reply(2)).publish, {}, JSON.stringify(header.toString('latin1')));
    raw.destroy();
  }
});

test('a header in single bytes', async () => {
  for (const header of [Buffer.from(V1), v2(1, 0x11, IPV4)]) {
    const raw = new Raw(proxied);
    raw.socket.setNoDelay(true);
    for (const byte of Buffer.concat([header, Buffer.from(HEALTH)])) {
      await new Promise((resolve) => raw.socket.write(Buffer.of(byte), resolve));
    }
    await raw.end();
    assert.match(raw.head, /^HTTP\/1\.1 200 /);
  }
});

test('health over HTTP/1.0 without Host', async () => {
  for (const [port, before] of [[plain, ''], [proxied, V1], [proxied, LOCAL]]) {
    const answer = await exchange(port, Buffer.concat([Buffer.from(before), Buffer.from(HEALTH)]));
    const [head, body] = answer.split('\r\n\r\n');
    assert.match(head, /^HTTP\/1\.1 200 OK\r\n/);
    const health = JSON.parse(body);
    assert.deepEqual(Object.keys(health).sort(), ['status', 'timestamp', 'uptime', 'version']);
    assert.equal(health.status, 'ok');
  }
  assert.match(await exchange(plain, 'GET /ready HTTP/1.0\r\n\r\n'), /^HTTP\/1\.1 200 /);
  assert.match(await exchange(plain, 'HEAD /health HTTP/1.0\r\n\r\n'), /^HTTP\/1\.1 200 [^]*\r\n\r\n$/);
});

test('without a header, or with a bad one, there is no answer', async () => {
  const failed = await node.counter('handshake_failed_total');
  const bad = [
    HEALTH,
    'PROXY TCP4 nonsense\r\n',
    `PROXY ${'x'.repeat(200)}`,
    Buffer.concat([SIGNATURE, Buffer.of(0x31, 0x11, 0, 0)]),
    v2(1, 0x11, Buffer.alloc(4)),
    Buffer.concat([SIGNATURE, Buffer.of(0x21, 0x11, 0xff, 0xff)]),
  ];
  for (const header of bad) {
    const end = await exchange(proxied, header).catch(({ code }) => code);
    assert.ok(end === '' || end === 'ECONNRESET', `${header.toString('latin1')} -> ${end}`);
  }
  await node.settled('handshake_failed_total', failed + bad.length);
});

test('a header on a listener that expects none', async () => {
  assert.match(await exchange(plain, LOCAL), /^HTTP\/1\.1 400 /);
  assert.match(await exchange(plain, `${V1}${HEALTH}`), /^HTTP\/1\.1 400 /);
});
