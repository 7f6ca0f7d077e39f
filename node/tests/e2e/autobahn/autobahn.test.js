// The Autobahn test suite against the node's handshake, frame reader and writer (node/examples/autobahn_echo.rs).
// Sections 12 and 13 are about compression, which is declined.

import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const E2E = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');
const TARGET = process.env.CARGO_TARGET_DIR ?? path.join(E2E, '../../../target');
const ECHO = process.env.AUTOBAHN_ECHO ?? path.join(TARGET, 'debug', 'examples', 'autobahn_echo');
const SUITE = path.join(E2E, '.venv', 'bin', 'kosoku');

const CASES = 301;
/** What the suite counts as passed. NON-STRICT is not among it: nothing here needs that. */
const PASSED = ['OK', 'INFORMATIONAL'];

test(`the Autobahn test suite, ${CASES} cases`, { timeout: 300_000 }, async () => {
  const echo = spawn(ECHO, { stdio: ['pipe', 'pipe', 'inherit'] });
  const directory = mkdtempSync(path.join(tmpdir(), 'ringmain-autobahn-'));
  try {
    const [line] = await once(echo.stdout.setEncoding('utf8'), 'data');
    const args = [line.trim(), '--exclude', '12.*', '--exclude', '13.*', '--outdir', directory];
    // It ends with 1 where a case failed; the report says which.
    await promisify(execFile)(SUITE, args).catch((error) => assert.equal(error.code, 1, error.message));
    const [results] = Object.values(JSON.parse(readFileSync(path.join(directory, 'index.json'), 'utf8')));
    const cases = Object.entries(results);
    assert.equal(cases.length, CASES);
    const passed = ({ behavior, behaviorClose }) => PASSED.includes(behavior) && PASSED.includes(behaviorClose);
    const failed = cases.filter(([, result]) => !passed(result));
    assert.deepEqual(failed.map(([id, { behavior, behaviorClose }]) => `${id}: ${behavior}, ${behaviorClose}`), []);
  } finally {
    echo.stdin.end();
    await once(echo, 'exit');
    rmSync(directory, { recursive: true, force: true });
  }
  assert.equal(echo.exitCode, 0);
});
