// Bad input: each closes only its own connection, with the right code, and is counted with its reason.
//
// A second, well-behaved connection lives through the whole file on the same node.

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { Node, exchange, openNamespace, until } from '../lib/node.js';
import { BINARY, CLOSE, PING, PONG, Raw, TEXT, frame } from '../lib/raw.js';
import { connect } from '../lib/sdk.js';

const CONFIG = `
[client]
handshake_timeout_ms = 1000
stale_close_delay_ms = 1000
frame_timeout_ms = 1000
ping_interval_ms = 2000
pong_timeout_ms = 1000
channel_limit = 5000
channel_bytes_max = 100
allowed_origins = ["https://*.example.com"]

${openNamespace('many')}
`;

let node;
let witness;
before(async () => {
  node = await Node.start({ config: CONFIG });
  witness = await connect(node);
});
after(async () => {
  assert.equal(witness.sockets.length, 1, 'the other connection was disturbed');
  await witness.sdk.publish('room:witness', 'still here');
  witness.close();
  await node.stop();
});

/** Sends bytes on an upgraded connection; gives how it ended. */
async function after101(...chunks) {
  const raw = await Raw.open(node.port);
  for (const chunk of chunks) {
    raw.write(chunk);
  }
  return raw.end();
}

/** Sends bytes on a connection that has connected; gives how it ended. */
async function afterConnect(...chunks) {
  const raw = await Raw.connected(node.port);
  for (const chunk of chunks) {
    raw.write(chunk);
  }
  return raw.end();
}

// --- HTTP ---

test('malformed and oversized heads', async () => {
  const head = (lines) => `GET /connection/websocket HTTP/1.1\r\n${lines}\r\n`;
  const upgrade = 'Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n';
  const key = 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n';
  for (const [request, status] of [
    ['\x16\x03\x01\x02\x00\x01\x00', 400],
    ['get / HTTP/1.1\r\n\r\n', 400],
    ['GET / HTTP/2.0\r\n\r\n', 400],
    ['GET /\r\n\r\n', 400],
    [head('bad header\r\n'), 400],
    [head(`X: ${'a'.repeat(9_000)}\r\n`), 431],
    [head('X: a\r\n'.repeat(70)), 431],
    [head(upgrade), 426],
    [head(`${upgrade}Sec-WebSocket-Version: 8\r\n${key}`), 426],
    [head(`${upgrade}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n`), 400],
    [head(`${upgrade}Sec-WebSocket-Version: 13\r\n${key}Origin: http://evil.example\r\n`), 403],
    ['POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n', 405],
    ['GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n', 404],
  ]) {
    const answer = await exchange(node.port, request);
    assert.equal(answer.split(' ')[1], String(status), `${request.slice(0, 60)} -> ${answer.slice(0, 80)}`);
  }
});

test('an oversized head without an end', async () => {
  const answer = await exchange(node.port, `GET / HTTP/1.1\r\nX: ${'a'.repeat(20_000)}`);
  assert.match(answer, /^HTTP\/1\.1 431 /);
});

test('allowed origins connect', async () => {
  for (const origin of ['https://app.example.com', `http://127.0.0.1:${node.port}`]) {
    const raw = await Raw.open(node.port, { headers: `Origin: ${origin}\r\n` });
    assert.match(raw.head, /^HTTP\/1\.1 101 /);
    raw.destroy();
  }
});

test('a slow handshake is cut', async () => {
  const failed = await node.counter('handshake_failed_total');
  const raw = new Raw(node.port);
  raw.write('GET /connection/websocket HTTP/1.1\r\nHost: x\r\n');
  await raw.end(5_000);
  // Shards publish every 100 ms: what the tests before this one did may still be on its way.
  await until(async () => (await node.metric('handshake_failed_total')) > failed);
});

test('a handshake in single bytes, with frames right behind it', async () => {
  const raw = new Raw(node.port);
  raw.socket.setNoDelay(true);
  const request =
    'GET /connection/websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n' +
    'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n';
  for (const byte of Buffer.concat([Buffer.from(request), frame(TEXT, '{"id":1,"connect":{}}')])) {
    await new Promise((resolve) => raw.socket.write(Buffer.of(byte), resolve));
  }
  assert.ok((await raw.reply(1)).connect);
  assert.match(raw.head, /sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK\+xOo=/i);
  raw.destroy();
});

test('several requests on one connection, then an upgrade', async () => {
  const before = 'GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n';
  const raw = await Raw.open(node.port, { before });
  await until(() => raw.head && raw.received.includes('101 Switching'), 5_000, () => raw.received.toString());
  const text = `${raw.head}${raw.received}`;
  assert.match(text, /^HTTP\/1\.1 200 [^]*HTTP\/1\.1 404 [^]*HTTP\/1\.1 101 /);
  raw.destroy();
});

// --- frames ---

test('frames that break RFC 6455 close with 1002', async () => {
  const closed = await node.counter('closed_total', 'protocol_error');
  const bad = [
    [frame(TEXT, '{}', { mask: false })],
    [frame(TEXT, '{}', { rsv: 4 })],
    [frame(3, '{}')],
    [frame(PING, 'x'.repeat(126))],
    [frame(PING, 'x', { fin: false })],
    [frame(0, 'continues nothing')],
    [frame(TEXT, '{', { fin: false }), frame(TEXT, '}')],
    [frame(CLOSE, 'x')],
    [frame(CLOSE, Buffer.of(0x03, 0xed))],
  ];
  for (const chunks of bad) {
    const end = await after101(...chunks);
    assert.deepEqual([end.code, end.ended], [1002, 'fin'], chunks.map((chunk) => chunk.toString('hex')).join());
  }
  await node.settled('closed_total', closed + bad.length, 'protocol_error');
});

test('text that is no UTF-8 closes with 1007, also across fragments', async () => {
  const half = Buffer.from('"é"');
  for (const chunks of [
    [frame(TEXT, Buffer.of(0x22, 0xff, 0x22))],
    [frame(TEXT, Buffer.of(0xc3))],
    [frame(TEXT, half.subarray(0, 2), { fin: false }), frame(0, Buffer.of(0x22))],
    [frame(TEXT, Buffer.of(0xed, 0xa0, 0x80))],
  ]) {
    assert.equal((await after101(...chunks)).code, 1007);
  }
  assert.equal((await after101(frame(CLOSE, Buffer.of(0x03, 0xe8, 0xff)))).code, 1007);
});

test('binary on a JSON connection is read as JSON, as Centrifugo does', async () => {
  const raw = await Raw.connected(node.port);
  raw.write(frame(BINARY, '{"id":2,"rpc":{}}'));
  assert.equal((await raw.reply(2)).error.code, 108);
  raw.destroy();
  const end = await afterConnect(frame(BINARY, Buffer.of(0xff, 0xfe)));
  assert.equal(end.code, 3501);
});

test('fragments with control frames between them are one message', async () => {
  const raw = await Raw.connected(node.port);
  raw.write(frame(TEXT, '{"id":2,"publish":{"channel":"room:fragments","data":"é', { fin: false }));
  raw.write(frame(PING, 'between'));
  raw.write(frame(0, '', { fin: false }));
  raw.write(frame(0, '"}}'));
  assert.deepEqual((await raw.reply(2)).publish, {});
  const pong = raw.frames.find(({ opcode }) => opcode === PONG);
  assert.equal(pong.payload.toString(), 'between');
  assert.ok(raw.frames.every(({ masked }) => !masked));
  raw.destroy();
});

test('a close frame is answered with its code', async () => {
  const end = await afterConnect(frame(CLOSE, Buffer.concat([Buffer.of(0x0f, 0xa0), Buffer.from('bye')])));
  assert.deepEqual([end.code, end.ended], [4000, 'fin']);
  const empty = await afterConnect(frame(CLOSE, ''));
  assert.deepEqual([empty.code, empty.ended], [1005, 'fin']);
});

test('a message of 65,536 bytes passes, one byte more closes with 1009', async () => {
  const message = (bytes, channel) => {
    const start = `{"id":2,"publish":{"channel":"${channel}","data":"`;
    return `${start}${'x'.repeat(bytes - start.length - 3)}"}}`;
  };
  for (const fragments of [1, 3]) {
    const send = (text) => {
      const size = Math.ceil(text.length / fragments);
      return Array.from({ length: fragments }, (_, n) =>
        frame(n === 0 ? TEXT : 0, text.slice(n * size, (n + 1) * size), { fin: n === fragments - 1 }),
      );
    };
    const raw = await Raw.connected(node.port);
    send(message(65_536, 'room:size')).forEach((chunk) => raw.write(chunk));
    assert.deepEqual((await raw.reply(2)).publish, {});
    send(message(65_537, 'room:size')).forEach((chunk) => raw.write(chunk));
    const end = await raw.end();
    assert.deepEqual([end.code, end.ended], [1009, 'fin'], `${fragments} fragments`);
  }
  // Announced is enough: nobody waits for a gigabyte.
  const end = await afterConnect(frame(TEXT, 'x', { length: 2 ** 30 }));
  assert.equal(end.code, 1009);
  assert.equal((await afterConnect(frame(TEXT, 'x', { length: 2 ** 53 }))).code, 1009);
});

test('the close frame arrives although much input is on its way', async () => {
  const raw = await Raw.connected(node.port);
  raw.text('not json');
  raw.write(frame(TEXT, 'x'.repeat(60_000)));
  const end = await raw.end();
  assert.deepEqual([end.code, end.ended], [3501, 'fin']);
});

test('a frame that never ends closes with 1008', async () => {
  const end = await afterConnect(frame(TEXT, 'x'.repeat(1_000), { length: 2_000 }));
  assert.deepEqual([end.code, end.reason], [1008, 'slow frame']);
});

// --- commands ---

test('malformed commands close with 3501, after the answers to those before them', async () => {
  const closed = await node.counter('closed_total', 'bad_request');
  const bad = [
    '', '\n', 'x', '[]', '"x"', 'null', '{', '{"id":2', '{"id":-1,"rpc":{}}', '{"id":4294967296,"rpc":{}}',
    '{"id":2,\n"rpc":{}}', '{"id":2}', '{"id":2,"nonsense":{}}', '{"id":2,"ping":{}}', '{"id":2,"connect":{}}',
    '{"id":2,"subscribe":{"channel":""}}', '{"id":2,"publish":[]}', '{"id":2,"publish":{"channel":1}}', '{}',
    '{"rpc":{}}', `{"id":2,"rpc":{"data":${'['.repeat(200)}${']'.repeat(200)}}}`, '\u0000',
    '{"id":2,"subscribe":{"channel":"room:a","delta":"unknown"}}',
  ];
  for (const text of bad) {
    const end = await afterConnect(frame(TEXT, text));
    assert.deepEqual([end.code, end.reason, end.ended], [3501, 'bad request', 'fin'], JSON.stringify(text));
  }
  await node.settled('closed_total', closed + bad.length, 'bad_request');
  const raw = await Raw.connected(node.port);
  raw.text('{"id":2,"rpc":{}}\n{"id":3,"rpc":{}}\nnonsense\n{"id":4,"rpc":{}}');
  assert.equal((await raw.end()).code, 3501);
  assert.deepEqual(raw.messages.slice(1).map(({ id, error }) => [id, error.code]), [[2, 108], [3, 108]]);
});

test('commands before connect close with 3501', async () => {
  for (const command of ['subscribe":{"channel":"room:a"}', 'publish":{"channel":"room:a","data":1}', 'rpc":{}']) {
    assert.equal((await after101(frame(TEXT, `{"id":1,"${command}}`))).code, 3501);
  }
  assert.equal((await after101(frame(TEXT, '{}'))).code, 3501);
});

test('who does not connect in time is closed with 3502', async () => {
  const end = await after101();
  assert.deepEqual([end.code, end.reason], [3502, 'stale']);
});

test('who does not answer a ping is closed with 3012', async () => {
  const raw = await Raw.connected(node.port);
  const end = await raw.end();
  assert.deepEqual([end.code, end.reason], [3012, 'no pong']);
  assert.deepEqual(raw.messages.at(-1), {});
  const good = (await Raw.connected(node.port)).answerPings();
  await until(() => good.messages.filter((message) => Object.keys(message).length === 0).length >= 2, 8_000);
  good.send({ id: 2, rpc: {} });
  assert.equal((await good.reply(2)).error.code, 108);
  good.text('{}');
  assert.equal((await good.end()).code, 3501, 'a second answer to one ping');
});

test('WebSocket pings for those who ask for them', async () => {
  const raw = await Raw.connected(node.port, { path: '/connection/websocket?cf_ws_frame_ping_pong=true' });
  const { connect: result } = await raw.reply(1);
  assert.deepEqual([result.ping, result.pong], [undefined, undefined]);
  await until(() => raw.frames.some(({ opcode }) => opcode === PING), 5_000);
  raw.write(frame(PONG, ''));
  raw.send({ id: 2, rpc: {} });
  await raw.reply(2);
  raw.destroy();
});

test('a duplicate subscription is 105', async () => {
  const raw = await Raw.connected(node.port);
  raw.send({ id: 2, subscribe: { channel: 'room:twice' } }, { id: 3, subscribe: { channel: 'room:twice' } });
  assert.equal((await raw.reply(3)).error.code, 105);
  assert.ok((await raw.reply(2)).subscribe);
  raw.destroy();
});

test('names beyond the limit are 107', async () => {
  const raw = await Raw.connected(node.port);
  const name = (bytes) => `room:${'x'.repeat(bytes - 5)}`;
  raw.send({ id: 2, subscribe: { channel: name(100) } }, { id: 3, subscribe: { channel: name(101) } });
  assert.ok((await raw.reply(2)).subscribe);
  assert.equal((await raw.reply(3)).error.code, 107);
  raw.destroy();
});

test('thousands of subscriptions, up to the limit, and gone with the connection', async () => {
  const before = await node.counter('subscriptions');
  const raw = (await Raw.connected(node.port)).answerPings();
  const count = 5_000;
  for (let id = 2; id < count + 10; id++) {
    raw.send({ id, subscribe: { channel: `many:${id}` } });
  }
  const answers = () => raw.messages.filter(({ id }) => id > 1);
  await until(() => answers().length >= count + 8, 20_000, () => `${answers().length} replies`);
  const replies = answers();
  const refused = replies.filter(({ error }) => error);
  assert.equal(replies.length, count + 8);
  assert.deepEqual([...new Set(refused.map(({ error }) => error.code))], [106]);
  assert.equal(refused.length, 8);
  // The connection is in `broadcast:global` too, which does not count.
  await node.settled('subscriptions', before + count + 1);
  const channels = await node.call('channels', { pattern: 'many:*' });
  assert.equal(Object.keys(channels.channels).length, count);
  raw.destroy();
  await node.settled('subscriptions', before);
  assert.deepEqual(await node.call('channels', { pattern: 'many:*' }), { channels: {} });
});

test('a peer that sends FIN is answered first', async () => {
  const raw = await Raw.connected(node.port);
  raw.send({ id: 2, publish: { channel: 'room:fin', data: 1 } }, { id: 3, history: { channel: 'room:fin', limit: 1 } });
  raw.socket.end();
  assert.equal((await raw.reply(3)).history.offset, 1);
  assert.equal((await raw.end()).ended, 'fin');
});
