// The matrix of buses and faults: runs the cells that were asked for and prints the table.

import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

import { BUSES } from '../lib/brokers.js';
import { isWrong, runCell } from './cell.js';
import { applies, FAULTS } from './list.js';

// What `./test` runs: one bus of each kind, what differs most, in about three minutes.
const SUBSET = [
  ['redis', 'kill'], ['redis', 'pause3'], ['redis', 'stale'], ['redis', 'node-kill'],
  ['nats', 'leader'], ['nats', 'all'],
  ['kafka', 'kill'],
];

const HELP = `Breaks a cluster in many ways, and shows what clients lost and whether they were told.

  deploy/local/faults [--bus NAME[,NAME]] [--fault NAME[,NAME]] [flags] [-- ARGUMENT...]

  --bus      ${BUSES.join(', ')}  (redis, sentinel, nats, kafka)
  --fault    which; without it all that the bus knows:
${Object.entries(FAULTS).map(([name, { what }]) => `               ${name.padEnd(12)}${what}`).join('\n')}
  --subset   what ./test runs
  --rate N   publications a second of each of three publishers (50)
  --times N  how often each (1)
  --verbose  when each node was red and green, and the errors that publishers got
  --keep     keep the brokers, their data, and all that clients sent and saw, where a cell went wrong
  --json F   the results, to a file
  --help     this text
  ARGUMENT   more arguments for the nodes

Examples: deploy/local/faults --bus nats --fault leader,pause15
          deploy/local/faults --bus sentinel --fault kill -- --bus.durability=replica

Every cell has brokers and three nodes of its own, on free ports, and stops them. A subscriber and a publisher on each
node speak the bare protocol: 8 channels with history, 4 without. Counted are deliveries, over all subscribers.
  told         how often a subscriber of a channel was told that it may have missed something
  lost/told    acknowledged, not delivered, and it was told so there: with history; passing: the same without history
  lost/silent  the same without a word: must be 0
  double, reordered, ghost (refused but delivered), clash (one offset for two publications): must be 0
  red          from the fault to the first node that is not ready; healed: from the repair (or the fault, where
               nothing is repaired) until all is ready and flows; silence: the longest a channel said nothing
The exit code is 1 if a cell is wrong.`;

function refuse(what) {
  console.error(`error: ${what}\n  try: deploy/local/faults --help`);
  process.exit(2);
}

const options = {
  bus: { type: 'string' },
  fault: { type: 'string' },
  subset: { type: 'boolean' },
  rate: { type: 'string', default: '50' },
  times: { type: 'string', default: '1' },
  verbose: { type: 'boolean' },
  keep: { type: 'boolean' },
  json: { type: 'string' },
  help: { type: 'boolean' },
};

const given = process.argv.slice(2);
const own = given.includes('--') ? given.slice(0, given.indexOf('--')) : given;
const nodeFlags = given.slice(own.length + 1);

function flags() {
  try {
    const { values } = parseArgs({ options, args: own });
    for (const name of ['rate', 'times']) {
      if (!(Number(values[name]) >= 1)) {
        refuse(`--${name} ${values[name]} is not at least 1`);
      }
    }
    return values;
  } catch (error) {
    return refuse(error.message);
  }
}

const values = flags();

const COLUMNS = [
  ['bus', 'bus'], ['fault', 'fault'], ['published', 'published'], ['acked', 'acked'], ['refused', 'refused'],
  ['unknown', 'unknown'], ['delivered', 'delivered'], ['told', 'told'], ['lost/told', 'lostKept'], ['passing', 'lostPassing'],
  ['lost/silent', 'lostSilent'], ['double', 'doubles'], ['reordered', 'reordered'], ['ghost', 'ghosts'],
  ['clash', 'clashes'], ['red', 'redMs'], ['silence', 'silenceMs'], ['healed', 'healedMs'],
];

const seconds = (ms) => (ms === null || ms === undefined ? '-' : `${(ms / 1_000).toFixed(2)} s`);
const cellText = (result, name) => (name.endsWith('Ms') ? seconds(result[name]) : String(result[name] ?? '-'));

function table(results) {
  const rows = [[...COLUMNS.map(([title]) => title), '']];
  for (const result of results) {
    rows.push([...COLUMNS.map(([, name]) => cellText(result, name)), isWrong(result) ? `WRONG ${result.failure ?? ''}` : 'ok']);
  }
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  const line = (row) =>
    row.map((text, column) => (column < 2 || column === row.length - 1 ? text.padEnd(widths[column]) : text.padStart(widths[column])));
  return rows.map((row) => line(row).join('  ').trimEnd()).join('\n');
}

function wanted() {
  if (values.subset) {
    return SUBSET;
  }
  const buses = values.bus?.split(',') ?? ['redis', 'sentinel', 'nats', 'kafka'];
  const faults = values.fault?.split(',') ?? Object.keys(FAULTS);
  const unknown = [...buses.filter((bus) => !BUSES.includes(bus)), ...faults.filter((fault) => !FAULTS[fault])];
  if (unknown.length > 0) {
    refuse(`unknown: ${unknown.join(', ')}`);
  }
  return buses.flatMap((bus) => faults.filter((fault) => applies(fault, bus)).map((fault) => [bus, fault]));
}

// Each node that a cell starts is killed should this process end.
process.setMaxListeners(0);
if (values.help) {
  console.log(HELP);
  process.exit(0);
}
const results = [];
const say = (text) => console.error(text);
for (const [bus, fault] of wanted()) {
  for (let time = 0; time < Number(values.times); time++) {
    say(`${bus} ${fault}: ${FAULTS[fault].what}`);
    const began = performance.now();
    const failed = (error) => ({ bus, fault, failure: error.message });
    const cell = { rate: Number(values.rate), keep: values.keep, verbose: values.verbose, flags: nodeFlags, say };
    const result = await runCell(bus, fault, cell).catch(failed);
    results.push(result);
    say(`  ${isWrong(result) ? 'WRONG' : 'ok'} after ${Math.round((performance.now() - began) / 1_000)} s`);
  }
}
if (values.json) {
  writeFileSync(values.json, `${JSON.stringify(results, null, 2)}\n`);
}
const wrong = results.filter(isWrong).length;
console.log(`\n${table(results)}\n`);
console.log(`# pass ${results.length - wrong}\n# fail ${wrong}`);
process.exit(wrong === 0 ? 0 : 1);
