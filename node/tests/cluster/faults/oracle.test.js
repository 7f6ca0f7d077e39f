// The oracle itself: it must see what is wrong, and only that.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { clashes, judge } from './oracle.js';

const told = { told: 'not recovered' };
const at = (n, offset = n, epoch = 'e', publisher = 'p') => ({ publisher, n, offset, epoch });
const plain = (n, publisher = 'p') => ({ publisher, n, offset: 0 });
const sent = (...outcomes) => outcomes.map((outcome, index) => ({ publisher: 'p', n: index + 1, outcome }));
const acked = (count) => sent(...Array(count).fill('acked'));

function check(name, log, published, expected, others) {
  test(name, () => {
    const { examples, ...counts } = judge(log, published, others);
    const nothing = { lostTold: 0, lostSilent: 0, doubles: 0, reordered: 0, ghosts: 0 };
    assert.deepEqual(counts, { delivered: counts.delivered, ...nothing, ...expected });
    const { lostTold: _, ...bad } = expected;
    const wrong = Object.values(bad).reduce((sum, value) => sum + value, 0);
    assert.equal(examples.length, Math.min(wrong, 5));
  });
}

check('all is well', [at(1), at(2), at(3)], acked(3), {});
check('a hole without a word', [at(1), at(3)], acked(3), { lostSilent: 1 });
check('a hole with a word in it', [at(1), told, at(3)], acked(3), { lostTold: 1 });
check('a word before the hole does not count', [at(1), told, at(2), at(4)], acked(4), { lostSilent: 1 });
check('a word behind the hole does not count', [at(1), at(3), told, at(4)], acked(4), { lostSilent: 1 });
check('the first is missing', [at(2)], acked(2), { lostSilent: 1 });
check('the last is missing', [at(1)], acked(2), { lostSilent: 1 });
check('the last is missing and it was told', [at(1), told], acked(2), { lostTold: 1 });
check('nothing came', [], acked(2), { lostSilent: 2 });
check('of two publishers the other is whole', [at(1), at(1, 2, 'e', 'q'), at(3, 3)], acked(3), { lostSilent: 1 });
check('twice', [at(1), at(2), at(2, 3)], acked(2), { doubles: 1 });
check('twice, with a word between', [at(1), at(2), told, at(2, 1, 'f')], acked(2), {});
check('an offset that goes back', [at(1, 2), at(2, 1)], acked(2), { reordered: 1 });
check('an offset that stays', [at(1, 1), at(2, 1)], acked(2), { reordered: 1 });
check('offsets of another epoch begin anew', [at(1, 7), at(2, 1, 'f')], acked(2), {});
check('without offsets a publisher keeps its order', [plain(2), plain(1)], acked(2), { reordered: 1 });
const passing = (n, session) => ({ publisher: 'p', n, session, offset: 0 });
check('without offsets a connection keeps its order', [passing(2, 1), passing(1, 1)], acked(2), { reordered: 1 });
check('an earlier connection may come later', [passing(1, 1), passing(3, 2), passing(2, 1)], acked(3), {});
check('without offsets publishers are free of each other', [plain(2), plain(1, 'q')], sent('unknown', 'acked'), {});
check('an unknown one may be missing', [at(1), at(3)], sent('acked', 'unknown', 'acked'), {});
check('an unknown one may come', [at(1), at(2)], sent('acked', 'unknown'), {});
check('a refused one may not come', [at(1), at(2)], sent('acked', 'refused'), { ghosts: 1 });

const moved = [1, 1, 2, 2].map((number, index) => ({ publisher: 'p', n: index + 1, session: number, outcome: index === 1 ? 'unknown' : 'acked' }));
check('lost and told, while what was sent before the move comes late',
  [passing(1, 1), told, passing(4, 2), passing(2, 1)], moved, { lostTold: 1 });
check('lost in silence, while what was sent before the move comes late',
  [passing(1, 1), passing(4, 2), told, passing(2, 1)], moved, { lostSilent: 1 });

const placed = (...offsets) => offsets.map((offset, n) => ({ publisher: 'p', n: n + 1, outcome: 'acked', offset, epoch: 'e' }));
check('a position without a word', [at(1), at(3)], placed(1, 2, 3), { lostSilent: 1 });
check('a position with a word', [at(1), told, at(3)], placed(1, 2, 3), { lostTold: 1 });
check('a position, the word later', [at(1), at(3), told], placed(1, 2, 3), { lostSilent: 1 });
check('the first position', [told, at(2)], placed(1, 2), { lostTold: 1 });
check('the first position without a word', [at(2), told], placed(1, 2), { lostSilent: 1 });
check('a position in the order of a repeat', [told, at(2, 1), at(1, 2), at(4, 4)], placed(2, 1, 3, 4), { lostSilent: 1 });
check('a position of a lost epoch', [at(1), told, at(3, 2, 'f')], placed(1, 2), { lostTold: 1 });
check('a position of a lost epoch without a word', [at(1), at(3, 2, 'f'), told], placed(1, 2), { lostSilent: 1 });
check('a position of an epoch never seen', [at(3, 1, 'f'), told], placed(1), { lostTold: 1 });

const repeated = [[at(1), at(3, 2), at(2, 3), at(4)]];
check('lost and told, where others saw it before a repeat', [at(1), told, at(2, 3), at(4)], acked(4), { lostTold: 1 }, repeated);
check('lost in silence, where others saw it before a repeat', [at(1), at(2, 3), told, at(4)], acked(4), { lostSilent: 1 }, repeated);
check('others saw it in an epoch that is not known here', [at(1), told, at(2), at(4)], acked(4), { lostSilent: 1 }, [[at(3, 3, 'f')]]);

test('a name that stands for two publications', () => {
  assert.deepEqual(clashes([[at(1), at(2)], [at(1), told, at(3, 2)]]), [['e', 2, 'p 2', 'p 3']]);
  assert.deepEqual(clashes([[at(1), at(2)], [at(1), at(2)], [plain(1), plain(2)]]), []);
});
