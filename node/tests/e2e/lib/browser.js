// Headless Chromium of the machine, with an eye on everything that a page complains about.

import { existsSync, mkdirSync, mkdtempSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';

import { chromium } from 'playwright-core';

const PLACES = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'];
const EXECUTABLE = process.env.E2E_CHROMIUM ?? PLACES.find((place) => existsSync(place));
const FLAGS = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
];

/** Where screenshots are put. */
export const SCREENSHOTS = process.env.E2E_SCREENSHOTS ?? mkdtempSync(path.join(tmpdir(), 'ringmain-shots-'));
mkdirSync(SCREENSHOTS, { recursive: true });

export class Browser {
  static async start() {
    const browser = new Browser();
    browser.chromium = await chromium.launch({ executablePath: EXECUTABLE, headless: true, args: FLAGS });
    browser.complaints = [];
    return browser;
  }

  /** A tab of a visitor of its own: nothing stored, nothing shared. */
  async visitor(options = {}) {
    const context = await this.chromium.newContext({ viewport: { width: 1180, height: 760 }, ...options });
    const page = await context.newPage();
    page.setDefaultTimeout(10_000);
    this.watch(page);
    return page;
  }

  /** Notes console errors, failed requests, error answers. */
  watch(page) {
    const note = (text) => this.complaints.push(text);
    page.on('console', (message) => ['error', 'warning'].includes(message.type()) && note(message.text()));
    page.on('pageerror', (error) => note(String(error)));
    page.on('requestfailed', (request) => note(`${request.url()} ${request.failure()?.errorText}`));
    page.on('response', (response) => response.status() >= 400 && note(`${response.status()} ${response.url()}`));
  }

  shot(page, name) {
    return page.screenshot({ path: path.join(SCREENSHOTS, `${name}.png`) });
  }

  stop() {
    return this.chromium.close();
  }
}
