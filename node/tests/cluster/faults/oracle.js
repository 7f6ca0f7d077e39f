// Judges what clients saw against what was acknowledged: every gap, double and reordering, and whether it was told.
//
// Owns: the rules. Must not know: sockets, brokers, nodes. Plain data in, numbers out.
//
// A subscriber's log of one channel is what it saw, in order: `{ publisher, n, offset, epoch }` for a publication,
// `{ told }` where it was told that it may have missed something: "not recovered" on a channel with history; on one
// without, every subscription after the first (what ended the one before was said: 2500, or a closed connection).
// Order without history is that of one publisher's connection (`session`): what it sent before it went elsewhere may
// come later. A publisher numbers what it sends to a channel 1, 2, 3, …, in the order of sending. So what is missing lies between
// its neighbours of the same publisher, and it was told if a "told" stands between them. Every publisher's last
// number arrives everywhere (the run waits for that), so there is always a neighbour behind. Where the position that
// was acknowledged is known, or where another subscriber saw it, its neighbours in the stream are taken instead: what a
// client or a node repeats leaves the order of numbers.

const key = ({ publisher, n }) => `${publisher} ${n}`;
const session = ({ publisher, session: number }) => `${publisher} ${number}`;

/**
 * Numbers of one channel at one subscriber. `sent` is what publishers know: `{ publisher, n, outcome }`, and where it
 * was acknowledged so `{ epoch, offset }`. `others` are the logs of the channel's other subscribers.
 */
export function judge(log, sent, others = []) {
  const counts = { delivered: 0, lostTold: 0, lostSilent: 0, doubles: 0, reordered: 0, ghosts: 0, examples: [] };
  const note = (what, entry) => {
    counts[what] += 1;
    if (what !== 'lostTold' && counts.examples.length < 5) {
      counts.examples.push({ what, ...entry });
    }
  };
  const seen = arrivals(log, note);
  counts.delivered = seen.size;
  const byPublisher = neighbours(log);
  const toldBefore = countTold(log);
  const elsewhere = places(others, log);
  for (const publication of sent) {
    const here = seen.has(key(publication));
    if (publication.outcome === 'refused' && here) {
      note('ghosts', publication);
    }
    if (publication.outcome === 'acked' && !here) {
      const place = publication.epoch ? publication : elsewhere.get(key(publication));
      const [from, to] = place
        ? aroundPosition(log, place)
        : around(byPublisher.get(publication.publisher) ?? [], publication, log.length);
      note(toldBefore[to] > toldBefore[from] ? 'lostTold' : 'lostSilent', publication);
    }
  }
  return counts;
}

/** Looks for doubles and reorderings between two words of a loss; gives where each publication stands. */
function arrivals(log, note) {
  const seen = new Map();
  let last = null;
  let newest = new Map();
  let life = 0;
  for (const [index, entry] of log.entries()) {
    if (entry.told) {
      [last, newest, life] = [null, new Map(), life + 1];
      continue;
    }
    const before = seen.get(key(entry));
    if (before && before.life === life) {
      note('doubles', entry);
    }
    seen.set(key(entry), { index, life });
    if (entry.offset > 0) {
      if (last && last.epoch === entry.epoch && entry.offset <= last.offset) {
        note('reordered', entry);
      }
      last = entry;
    } else if (entry.n < (newest.get(session(entry)) ?? 0)) {
      note('reordered', entry);
    }
    newest.set(session(entry), Math.max(entry.n, newest.get(session(entry)) ?? 0));
  }
  return seen;
}

/** Per publisher what arrived, by number. */
function neighbours(log) {
  const found = new Map();
  for (const [index, { told, publisher, n, session: number }] of log.entries()) {
    if (!told) {
      found.set(publisher, found.get(publisher) ?? []);
      found.get(publisher).push({ n, number, index });
    }
  }
  found.forEach((list) => list.sort((a, b) => a.n - b.n));
  return found;
}

/** Where others saw what, in epochs that this log knows; what was seen twice, where it was seen last. */
function places(others, log) {
  const epochs = new Set(log.map(({ epoch }) => epoch).filter(Boolean));
  const positioned = others.flat().filter(({ epoch }) => epochs.has(epoch));
  return new Map(positioned.toSorted((a, b) => a.at - b.at).map((entry) => [key(entry), entry]));
}

/**
 * The part of the log in which a number should stand: before the next one of its connection that came, behind the
 * last lower one before that. What an earlier connection sent may come late, and bounds nothing.
 */
function around(list, { n, session: number }, end) {
  const higher = list.filter((other) => other.n > n);
  const next = higher.find((other) => other.number === number) ?? higher[0];
  const to = next?.index ?? end;
  const lower = list.filter((other) => other.n < n && other.index < to);
  return [Math.max(0, ...lower.map(({ index }) => index)), to];
}

/** The part of the log in which a position should stand: behind the last one below it, before what came next. */
function aroundPosition(log, { epoch, offset }) {
  const from = log.findLastIndex((entry) => entry.epoch === epoch && entry.offset < offset);
  if (from >= 0) {
    const next = log.findIndex((entry, index) => index > from && !entry.told);
    return [from, next < 0 ? log.length : next];
  }
  const to = log.findIndex((entry) => entry.epoch === epoch && entry.offset > offset);
  const before = to < 0 ? -1 : log.findLastIndex((entry, index) => index < to && !entry.told);
  return [Math.max(before, 0), to < 0 ? log.length : to];
}

/** How many words of a loss stand before each index. */
function countTold(log) {
  const before = [0];
  for (const entry of log) {
    before.push(before.at(-1) + (entry.told ? 1 : 0));
  }
  return before;
}

/** Names that stand for two publications: `[epoch, offset, one, other]`. */
export function clashes(logs) {
  const names = new Map();
  const found = [];
  for (const entry of logs.flat()) {
    if (entry.told || !entry.offset) {
      continue;
    }
    const name = `${entry.epoch} ${entry.offset}`;
    const what = key(entry);
    const first = names.get(name);
    if (first === undefined) {
      names.set(name, what);
    } else if (first !== what) {
      found.push([entry.epoch, entry.offset, first, what]);
    }
  }
  return found;
}

/** Adds the numbers of `b` to those of `a`. */
export function add(a, b) {
  for (const [name, value] of Object.entries(b)) {
    a[name] = Array.isArray(value) ? [...(a[name] ?? []), ...value].slice(0, 8) : (a[name] ?? 0) + value;
  }
  return a;
}
