// The demo page and a page with the SDK, in headless Chromium.

import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import { existsSync, readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

import { chromium } from 'playwright-core';

import { Node } from '../lib/node.js';

const CHROMIUM = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find(existsSync);
const ARGS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
const SHOTS = process.env.E2E_SCREENSHOTS ?? tmpdir();
const SDK = fileURLToPath(new URL('../node_modules/centrifuge/dist/centrifuge.js', import.meta.url));

let node;
let browser;

before(async () => {
  // Pages come from a server of the tests' own, too: the second page's origin is another one.
  node = await Node.start({ shards: 2, flags: ['--client.allowed_origins=http://127.0.0.1:*'] });
  browser = await chromium.launch({ executablePath: CHROMIUM, args: ARGS });
});

after(async () => {
  await browser?.close();
  await node?.stop();
});

/** A tab of the demo, named, on the wanted shard. */
async function demoTab(name, shard, room) {
  for (let attempt = 0; attempt < 40; attempt += 1) {
    const context = await browser.newContext({ viewport: { width: 1100, height: 720 } });
    const page = await context.newPage();
    page.setDefaultTimeout(15_000);
    const problems = [];
    page.on('console', (message) => message.type() === 'error' && problems.push(message.text()));
    page.on('pageerror', (error) => problems.push(String(error)));
    await page.goto(`http://127.0.0.1:${node.port}/#${room}`);
    await page.fill('#name', name);
    await page.click('#name-button');
    await page.waitForFunction(() => /^shard \d+$/.test(document.querySelector('#shard').textContent));
    if ((await page.textContent('#shard')) === `shard ${shard}`) return { page, context, problems };
    await context.close();
  }
  throw new Error(`no connection landed on shard ${shard}`);
}

const say = async (page, text) => {
  await page.fill('#text', text);
  await page.press('#text', 'Enter');
};
const sees = (page, text) => page.waitForFunction((t) => document.querySelector('#entries').textContent.includes(t), text);

test('two tabs on two shards chat, see each other, and one recovers what it missed', async () => {
  const room = `room:browser-${Date.now()}`;
  const ada = await demoTab('Ada', 0, room);
  const bob = await demoTab('Bob', 1, room);
  for (const tab of [ada, bob]) {
    await tab.page.waitForFunction(() => document.querySelector('#count').textContent === '2');
    await tab.page.waitForFunction(() => /Ada[\s\S]*Bob|Bob[\s\S]*Ada/.test(document.querySelector('#members').textContent));
  }
  await say(ada.page, 'hello from shard 0');
  await sees(bob.page, 'hello from shard 0');
  await say(bob.page, 'hello from shard 1');
  await sees(ada.page, 'hello from shard 1');
  await ada.page.waitForFunction(() => /\d/.test(document.querySelector('#latency').textContent));

  await bob.page.click('#drop');
  await bob.page.waitForFunction(() => document.querySelector('#state').dataset.state !== 'connected');
  for (let n = 1; n <= 3; n += 1) await say(ada.page, `missed ${n}`);
  await sees(ada.page, 'missed 3');
  await bob.page.screenshot({ path: path.join(SHOTS, 'demo-dropped.png') });
  await sees(bob.page, 'missed 3');
  const entries = await bob.page.textContent('#entries');
  for (let n = 1; n <= 3; n += 1) assert.equal(entries.split(`missed ${n}`).length, 2, `"missed ${n}" once:\n${entries}`);
  assert.match(entries, /3 messages/, 'what was missed is marked');
  await ada.page.screenshot({ path: path.join(SHOTS, 'demo-ada.png') });
  await bob.page.screenshot({ path: path.join(SHOTS, 'demo-bob.png') });
  assert.deepEqual(ada.problems, [], 'nothing on the console');
  await ada.context.close();
  await bob.context.close();
});

test('a page with the SDK from npm subscribes, publishes and recovers', async () => {
  const html = '<!doctype html><title>SDK</title><script src="/centrifuge.js"></script>';
  const server = createServer((request, response) => {
    const script = request.url === '/centrifuge.js';
    response.setHeader('Content-Type', script ? 'text/javascript' : 'text/html');
    response.end(script ? readFileSync(SDK) : html);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  try {
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    const got = await page.evaluate(async (url) => {
      const client = new globalThis.Centrifuge(url, { minReconnectDelay: 100 });
      const sub = client.newSubscription('room:sdk-page');
      const seen = [];
      sub.on('publication', ({ data, offset }) => seen.push([data, offset]));
      sub.subscribe();
      client.connect();
      await sub.ready(10_000);
      await sub.publish('one');
      const again = new Promise((resolve) => sub.once('subscribed', resolve));
      client.disconnect();
      const other = new globalThis.Centrifuge(url);
      const second = other.newSubscription('room:sdk-page');
      second.subscribe();
      other.connect();
      await second.ready(10_000);
      await second.publish('two');
      client.connect();
      const { recovered } = await again;
      await new Promise((resolve) => setTimeout(resolve, 50));
      client.disconnect();
      other.disconnect();
      return { seen, recovered };
    }, node.url);
    assert.deepEqual(got, { seen: [['one', 1], ['two', 2]], recovered: true });
  } finally {
    server.close();
  }
});
