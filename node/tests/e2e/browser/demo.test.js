// The demo page as visitors see it, in headless Chromium: tabs on different shards.

import assert from 'node:assert/strict';
import { after, afterEach, before, test } from 'node:test';

import { Browser, SCREENSHOTS } from '../lib/browser.js';
import { Node, until } from '../lib/node.js';

let node;
let browser;
before(async () => {
  node = await Node.start();
  browser = await Browser.start();
  console.log(`screenshots: ${SCREENSHOTS}`);
});
after(async () => {
  await browser.stop();
  await node.stop();
});

const open = [];
afterEach(async () => {
  const complaints = browser.complaints.splice(0);
  await Promise.all(open.splice(0).map((page) => page.context().close()));
  assert.deepEqual(complaints, []);
});

let rooms = 0;
const freshRoom = () => `room:demo-${++rooms}`;

/** Opens the page in a room and joins it under a name. */
async function join(name, room, options) {
  const page = await browser.visitor(options);
  open.push(page);
  await page.goto(`http://127.0.0.1:${node.port}/#${room}`);
  await page.getByLabel('Name').fill(name);
  await page.getByRole('button', { name: 'Join the room' }).click();
  await connected(page);
  return page;
}

const connected = (page) => page.locator('#state[data-state=connected]').waitFor();
const shardOf = async (page) => Number((await page.locator('#shard').textContent()).match(/^shard (\d+)$/)[1]);

/** The same on a shard that nobody of `others` is on. */
async function joinElsewhere(name, room, others, options) {
  const taken = await Promise.all(others.map(shardOf));
  for (let attempt = 0; attempt < 100; attempt++) {
    const page = await join(name, room, options);
    if (!taken.includes(await shardOf(page))) {
      return page;
    }
    open.splice(open.indexOf(page), 1);
    await page.context().close();
  }
  throw new Error(`100 visitors reached only shards ${taken}`);
}

async function say(page, text) {
  await page.getByLabel('Message', { exact: true }).fill(text);
  await page.getByRole('button', { name: 'Send' }).click();
}

/** What stands in the log, in order: the texts of messages, marks and events. */
const lines = (page) => page.locator('#entries .text, #entries .missed, #entries .event, #entries .lost').allTextContents();
const texts = (page) => page.locator('#entries .message:not(.pending) .text').allTextContents();
const members = (page) => page.locator('#members .name').allTextContents();

/** Waits until something read off a page is as expected. */
async function shows(read, expected) {
  let last;
  const same = async () => {
    last = await read();
    return JSON.stringify(last) === JSON.stringify(expected);
  };
  await until(same, 10_000, () => `${JSON.stringify(last)} instead of ${JSON.stringify(expected)}`);
}

test('two visitors on two shards chat, and see each other', async () => {
  const room = freshRoom();
  const ada = await join('Ada', room);
  const bob = await joinElsewhere('Bob', room, [ada], { colorScheme: 'light' });
  await shows(() => members(ada), ['Ada you', 'Bob']);
  await shows(() => members(bob), ['Bob you', 'Ada']);
  const chips = await ada.locator('#members .chip').allTextContents();
  assert.deepEqual(chips, [`shard ${await shardOf(ada)}`, `shard ${await shardOf(bob)}`]);
  assert.equal(await ada.locator('#shards').textContent(), 'of 4');

  await say(ada, 'Is anyone on another shard?');
  await shows(() => texts(bob), ['Is anyone on another shard?']);
  await say(bob, 'Yes: look at the ring on the right.\nEvery outlet is a core of its own.');
  await say(bob, '<img src=x onerror=alert(1)> & <b>markup</b> is text');
  const said = [
    'Is anyone on another shard?', 'Yes: look at the ring on the right.\nEvery outlet is a core of its own.',
    '<img src=x onerror=alert(1)> & <b>markup</b> is text',
  ];
  await shows(() => texts(ada), said);
  await shows(() => texts(bob), said);
  assert.equal(await ada.locator('.message.mine').count(), 1);
  assert.equal(await bob.locator('.message.mine').count(), 2);
  assert.match(await ada.locator('.mine .trip').textContent(), /^\d+(\.\d)? m?s$/);
  await until(async () => /^\d+(\.\d)? m?s$/.test(await ada.locator('#latency').textContent()));

  await bob.context().close();
  open.splice(open.indexOf(bob), 1);
  await shows(() => members(ada), ['Ada you']);
  assert.equal((await lines(ada)).at(-1), 'Bob left');
});

test('a dropped connection recovers what it missed, once and in order', async () => {
  const room = freshRoom();
  const ada = await join('Ada', room, { colorScheme: 'dark' });
  const bob = await joinElsewhere('Bob', room, [ada], { colorScheme: 'light' });
  await shows(() => members(ada), ['Ada you', 'Bob']);
  await say(bob, 'Before');
  await shows(() => texts(ada), ['Before']);

  await ada.getByRole('button', { name: 'Drop my connection for 5 s' }).click();
  await shows(() => members(bob), ['Bob you']);
  for (const text of ['One', 'Two', 'Three']) {
    await say(bob, text);
  }
  await say(ada, 'Said without a connection');
  assert.match(await ada.locator('#banner-text').textContent(), /^You pulled the plug\. Back in \d s/);
  assert.equal(await ada.locator('.pending .foot').textContent(), 'waiting for the connection');
  await browser.shot(ada, 'demo-dropped');
  assert.deepEqual(await texts(ada), ['Before']);

  await connected(ada);
  const everything = ['Before', 'One', 'Two', 'Three', 'Said without a connection'];
  await shows(() => texts(ada), everything);
  await shows(() => texts(bob), everything);
  await shows(() => members(ada), ['Ada you', 'Bob']);
  const seen = (await lines(ada)).filter((line) => !line.includes('joined') && !line.includes('left'));
  assert.deepEqual(seen, [
    'Before', '3 messages while you were away', 'One', 'Two', 'Three', 'Said without a connection',
  ]);
  await say(bob, 'Welcome back');
  await shows(() => texts(ada), [...everything, 'Welcome back']);
  await browser.shot(ada, 'demo-recovered-dark');
  await browser.shot(bob, 'demo-chat-light');
});

test('reconnecting at once', async () => {
  const ada = await join('Ada', freshRoom());
  await say(ada, 'Here');
  await shows(() => texts(ada), ['Here']);
  await ada.getByRole('button', { name: 'Drop my connection for 5 s' }).click();
  await ada.getByRole('button', { name: 'Reconnect now' }).click();
  await shows(() => lines(ada), ['Here', 'Reconnected, nothing missed']);
});

test('a node that goes away and comes back', async () => {
  const other = await Node.start();
  const page = await browser.visitor();
  open.push(page);
  await page.goto(`http://127.0.0.1:${other.port}/`);
  await page.getByLabel('Name').fill('Ada');
  await page.getByRole('button', { name: 'Join the room' }).click();
  await connected(page);
  await say(page, 'Before the restart');
  await shows(() => texts(page), ['Before the restart']);
  await other.stop();
  await page.locator('#banner', { hasText: 'No connection to the node' }).waitFor();
  const again = await Node.start({ flags: [`--server.listen=127.0.0.1:${other.port}`] });
  await connected(page);
  await until(async () => (await lines(page)).some((line) => line.startsWith('Too much was missed')));
  await say(page, 'After the restart');
  await shows(() => texts(page), ['Before the restart', 'After the restart']);
  await page.context().close();
  open.splice(open.indexOf(page), 1);
  await again.stop();
  // The browser itself notes the tries that found nobody.
  browser.complaints = browser.complaints.filter((text) => !text.includes('ERR_CONNECTION_REFUSED'));
});

test('history, the name and what was missed outlive a visit', async () => {
  const room = freshRoom();
  const ada = await join('Ada', room);
  const bob = await join('Bob', room);
  await say(bob, 'First');
  await say(ada, 'Second');
  await shows(() => texts(ada), ['First', 'Second']);
  await ada.goto('about:blank');
  await shows(() => members(bob), ['Bob you']);
  await say(bob, 'Third');
  await shows(() => texts(bob), ['First', 'Second', 'Third']);
  await ada.goto(`http://127.0.0.1:${node.port}/#${room}`);
  await connected(ada);
  await shows(() => lines(ada), ['First', 'Second', '1 message while you were away', 'Third']);
  await shows(() => members(ada), ['Ada you', 'Bob']);
  assert.deepEqual(await ada.locator('.mine .text').allTextContents(), ['Second']);
});

test('rooms: by address, by the button, each with its own messages', async () => {
  const ada = await join('Ada', 'room:tea');
  await say(ada, 'Tea');
  await shows(() => texts(ada), ['Tea']);
  await ada.getByRole('button', { name: 'tea' }).click();
  await ada.getByRole('textbox', { name: 'Room' }).fill('coffee & cake');
  await ada.getByRole('button', { name: 'Go', exact: true }).click();
  await shows(() => ada.locator('#room-button').textContent(), 'coffee & cake');
  await shows(() => texts(ada), []);
  await say(ada, 'Coffee');
  await shows(() => texts(ada), ['Coffee']);
  assert.deepEqual(Object.keys((await node.call('channels', { pattern: 'room:*' })).channels), ['room:coffee & cake']);
  await ada.goBack();
  await shows(() => texts(ada), ['Tea']);
  assert.equal(await ada.title(), 'tea · Ringmain demo');
});

test('a second tab as someone else; a new name', async () => {
  const room = freshRoom();
  const ada = await join('Ada', room);
  const [second] = await Promise.all([
    ada.context().waitForEvent('page'),
    ada.getByRole('link', { name: 'Open a tab as someone else' }).click(),
  ]);
  browser.watch(second);
  await second.getByLabel('Name').fill('Zoe');
  await second.getByRole('button', { name: 'Join the room' }).click();
  await shows(() => members(ada), ['Ada you', 'Zoe']);
  await second.getByRole('button', { name: 'Change my name' }).click();
  await second.getByLabel('Name').fill('Zelda');
  await second.getByRole('button', { name: 'Change it' }).click();
  await shows(() => members(ada), ['Ada you', 'Zelda']);
  assert.ok((await lines(ada)).includes('Zoe is now called Zelda'));
});

test('an announcement to everyone', async () => {
  const ada = await join('Ada', freshRoom());
  await node.call('publish', { channel: 'broadcast:global', data: { text: 'Maintenance at noon' } });
  await ada.getByText('To everyone: Maintenance at noon').waitFor();
});

test('on a phone: no sideways scrolling, the panel on demand', async () => {
  const room = freshRoom();
  const phone = { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true };
  const ada = await join('Ada', room, { ...phone, colorScheme: 'dark' });
  const bob = await join('Bob', room, { ...phone, colorScheme: 'light' });
  await say(bob, 'A message that is longer than the screen is wide, and so it has to wrap at least once.');
  await say(bob, `And one without a place to break: ${'a'.repeat(80)}`);
  await say(ada, 'Fits.');
  await until(async () => (await texts(ada)).length === 3);
  assert.equal(await ada.evaluate('document.documentElement.scrollWidth'), 360);
  assert.equal(await ada.locator('#panel').isVisible(), false);
  await browser.shot(ada, 'demo-phone-dark');
  await browser.shot(bob, 'demo-phone-light');
  await ada.getByRole('button', { name: '2 online' }).click();
  await ada.locator('#members').waitFor({ state: 'visible' });
  await browser.shot(ada, 'demo-phone-panel');
  assert.equal(await ada.evaluate('document.documentElement.scrollWidth'), 360);
});

test('everything has a name, and text stands out from its ground', async () => {
  for (const colorScheme of ['dark', 'light']) {
    const room = freshRoom();
    const ada = await join('Ada', room, { colorScheme });
    const bob = await join('Bob', room);
    await say(ada, 'Hello');
    await say(bob, 'Hello');
    await until(async () => (await texts(ada)).length === 2);
    const unnamed = await ada.$$eval('button, a, input, textarea, dialog, [role=log], aside', (nodes) =>
      nodes
        .filter((node) => {
          const labels = [...(node.labels ?? [])].map((label) => label.textContent).join('');
          const by = document.getElementById(node.getAttribute('aria-labelledby') ?? '')?.textContent;
          return !(node.getAttribute('aria-label') || by || labels || node.textContent).trim();
        })
        .map((node) => node.outerHTML.slice(0, 100)),
    );
    assert.deepEqual(unnamed, []);
    const selectors = [
      '.warning span', '.warning strong', '.brand', '.room button', '.state', '.mine .text', '.message:not(.mine) .text',
      '.foot time', '.head b', '.event span', '#drop', '.hint', '.figures dt', '.figures dd', '.members .name',
      '.you', '.chip', '#rename', '#second-tab', '.avatar', '#shards',
    ];
    const poor = await ada.evaluate(contrasts, selectors);
    assert.deepEqual(poor, [], colorScheme);
    await browser.shot(ada, `demo-${colorScheme}`);
  }
});

/** In the page: selectors whose text stands out by less than 4.5 to 1 (WCAG 2.2, 1.4.3), or are missing. */
function contrasts(selectors) {
  const parse = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) {
        return color;
      }
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const selector of selectors) {
    const node = document.querySelector(selector);
    if (!node) {
      poor.push(`${selector} is missing`);
      continue;
    }
    const [one, other] = [parse(getComputedStyle(node).color), ground(node)].map(luminance).sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) {
      poor.push(`${selector} ${ratio.toFixed(2)}`);
    }
  }
  return poor;
}
