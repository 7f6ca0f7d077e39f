// The SDK's own browser build on a page of another origin: two tabs on two shards.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createReadStream } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { after, before, test } from 'node:test';

import { Browser } from '../lib/browser.js';
import { Node, until } from '../lib/node.js';
import { Relay } from '../lib/relay.js';
import { token } from '../lib/token.js';

const SDK = createRequire(import.meta.url).resolve('centrifuge').replace(/build[^]*$/, 'dist/centrifuge.js');

const PAGE = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>The SDK in a browser</title>
<link rel="icon" href="data:,">
<h1>The SDK in a browser</h1>
<p>Shard <output id="shard"></output>, <output id="state"></output>, <output id="online"></output> online</p>
<ol id="log"></ol>
<script src="/centrifuge.js"></script>
<script>
  const query = new URLSearchParams(location.search);
  const show = (id, text) => { document.getElementById(id).textContent = text; };
  const add = (text) => {
    const item = document.createElement('li');
    item.textContent = text;
    document.getElementById('log').append(item);
  };
  const client = new Centrifuge(query.get('url'), {
    token: query.get('token'), name: 'ringmain-demo', minReconnectDelay: 300,
  });
  client.on('connected', (ctx) => show('shard', ctx.data.shard));
  client.on('state', (ctx) => show('state', ctx.newState));
  const sub = client.newSubscription('room:sdk', { joinLeave: true });
  const count = async () => show('online', (await sub.presenceStats()).numClients);
  sub.on('subscribed', (ctx) => {
    add(ctx.wasRecovering ? (ctx.recovered ? 'recovered' : 'not recovered') : 'subscribed');
    count();
  });
  sub.on('publication', (ctx) => add(ctx.info.user + ': ' + ctx.data));
  sub.on('join', count);
  sub.on('leave', count);
  sub.subscribe();
  client.connect();
</script>
`;

let node;
let relay;
let browser;
let server;
before(async () => {
  node = await Node.start({ config: '[client]\nallowed_origins = ["http://127.0.0.1:*"]\n' });
  relay = await Relay.start(node.port);
  browser = await Browser.start();
  server = createServer((request, response) => {
    if (request.url === '/centrifuge.js') {
      response.setHeader('Content-Type', 'text/javascript');
      createReadStream(SDK).pipe(response);
    } else {
      response.setHeader('Content-Type', 'text/html').end(PAGE);
    }
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
});
after(async () => {
  await browser.stop();
  relay.stop();
  server.close();
  await node.stop();
});

async function tab(user, port) {
  const page = await browser.visitor();
  const query = new URLSearchParams({
    url: `ws://127.0.0.1:${port}/connection/websocket`,
    token: token({ sub: user }),
  });
  await page.goto(`http://127.0.0.1:${server.address().port}/?${query}`);
  await page.locator('#log li').first().waitFor();
  return page;
}

const log = (page) => page.locator('#log li').allTextContents();
const shardOf = (page) => page.locator('#shard').textContent();

async function shows(page, expected) {
  let last;
  const same = async () => {
    last = await log(page);
    return JSON.stringify(last) === JSON.stringify(expected);
  };
  await until(same, 10_000, () => `${JSON.stringify(last)} instead of ${JSON.stringify(expected)}`);
}

test('the SDK in two tabs on two shards: chat, presence, recovery after a cut', async () => {
  const ada = await tab('ada', relay.port);
  let bob = await tab('bob', node.port);
  for (let attempt = 0; (await shardOf(bob)) === (await shardOf(ada)); attempt++) {
    assert.ok(attempt < 100);
    await bob.close();
    bob = await tab('bob', node.port);
  }
  const online = (page) => page.locator('#online').textContent();
  await until(async () => (await online(ada)) === '2' && (await online(bob)) === '2');
  await ada.evaluate(() => sub.publish('hello'));
  await bob.evaluate(() => sub.publish('hello yourself'));
  for (const page of [ada, bob]) {
    await shows(page, ['subscribed', 'ada: hello', 'bob: hello yourself']);
  }
  relay.cut();
  await until(async () => (await ada.locator('#state').textContent()) === 'connecting');
  for (const text of ['one', 'two', 'three']) {
    await bob.evaluate((said) => sub.publish(said), text);
  }
  const missed = ['bob: one', 'bob: two', 'bob: three'];
  await shows(ada, ['subscribed', 'ada: hello', 'bob: hello yourself', 'recovered', ...missed]);
  await shows(bob, ['subscribed', 'ada: hello', 'bob: hello yourself', ...missed]);
  const { publications } = await ada.evaluate(() => sub.history({ limit: 2, reverse: true }));
  assert.deepEqual(publications.map(({ data, offset }) => [data, offset]), [['three', 5], ['two', 4]]);
  // Chromium notes the cut itself.
  assert.deepEqual(browser.complaints.filter((text) => !text.includes('ERR_CONNECTION_RESET')), []);
});
