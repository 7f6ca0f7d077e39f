// One room: its messages, who is in it, and what was missed.
//
// Owns the room's state and the meaning of its publications; it draws nothing. A publication's data is
//   { type: 'message', id, from, name, text, at }   something said; `from` is a tab, `at` in ms since 1970
//   { type: 'hello', name, shard }                  how to call the client that published it
// The demo's users are anonymous to the node: the hello is what gives a client id its name.
//
// Invariant: entries are in the order of the channel; `position` is that of the last one seen.

const ENTRIES_MAX = 400;
const HISTORY_MAX = 100;

const isText = (value, max) => typeof value === 'string' && value.length > 0 && value.length <= max;

export class Room {
  /** `me`: `{ tab, name, shard, client }`, kept up to date by the caller. `changed()` is told of every news. */
  constructor(channel, connection, me, changed) {
    this.channel = channel;
    this.connection = connection;
    this.me = me;
    this.changed = changed;
    /** `{ key, kind: 'message' | 'event' | 'missed' | 'lost', … }` */
    this.entries = [];
    /** Said, but not yet seen in the channel. */
    this.unsent = [];
    /** By client id: `{ name, shard }`. */
    this.members = new Map();
    this.names = new Map();
    this.seen = new Set();
    this.position = null;
    this.held = null;
    this.keys = 0;
    this.lastOffset = 0;
    this.refusal = null;
    this.lastSeen = this.loadLastSeen();
  }

  // --- joining and leaving ---

  /** Subscribes; after a break it recovers from the last position. */
  async subscribe() {
    this.held = [];
    const recover = this.position && { recover: true, ...this.position };
    const { channel } = this;
    const options = { channel, recoverable: true, join_leave: true, ...recover };
    const subscribed = this.connection.request('subscribe', options);
    // Joins and leaves that come after the answer change it: it is taken at once.
    const members = this.connection.request('presence', { channel }).then((result) => this.setMembers(result));
    const history = recover ? null : this.requestHistory();
    try {
      const [result, page] = await Promise.all([subscribed, history, members]);
      this.refusal = null;
      await this.subscribed(result, page);
      this.sayHello();
      this.resend();
    } catch (error) {
      if (error.code) {
        this.refusal = `${error.message} (${error.code})`;
      }
    }
    this.changed();
  }

  unsubscribe() {
    this.connection.request('unsubscribe', { channel: this.channel }).catch(() => {});
  }

  requestHistory() {
    return this.connection.request('history', { channel: this.channel, limit: HISTORY_MAX, reverse: true });
  }

  async subscribed(result, history) {
    const fresh = !this.position;
    const epoch = result.epoch ?? '';
    this.lastOffset = 0;
    if (result.recovered) {
      if (this.catchUp(result.publications ?? [], () => true) === 0) {
        this.add('event', { text: 'Reconnected, nothing missed' });
      }
    } else {
      if (!fresh) {
        this.add('lost', { text: 'Too much was missed to recover all of it. This is what the node still has.' });
        history = await this.requestHistory();
      }
      const since = fresh ? this.lastSeen : this.position;
      const isNews = ({ offset }) => since?.epoch === epoch && offset > since.offset;
      this.catchUp((history.publications ?? []).reverse(), isNews);
    }
    this.position = { epoch, offset: Math.max(result.offset ?? 0, this.lastOffset) };
    const held = this.held ?? [];
    this.held = null;
    for (const publication of held) {
      this.publication(publication);
    }
    this.remember();
  }

  /** Takes publications that came in one answer; those that are news are counted under a mark. */
  catchUp(publications, isNews) {
    const added = publications.map((publication) => ({ news: isNews(publication), entry: this.take(publication) }));
    const missed = added.filter(({ news, entry }) => news && entry && !entry.mine);
    if (missed.length > 0) {
      const mark = { key: `mark-${++this.keys}`, kind: 'missed', count: missed.length };
      this.entries.splice(this.entries.indexOf(missed[0].entry), 0, mark);
    }
    return missed.length;
  }

  // --- pushes ---

  /** A push of this channel. */
  push(push) {
    if (push.pub) {
      if (this.held) {
        this.held.push(push.pub);
      } else {
        this.publication(push.pub);
      }
    } else if (push.join) {
      this.joined(push.join.info.client);
    } else if (push.leave) {
      this.left(push.leave.info.client);
    } else if (push.unsubscribe) {
      this.unsubscribed(push.unsubscribe);
    }
    this.changed();
  }

  publication(publication) {
    if (publication.offset && this.position && publication.offset <= this.position.offset) {
      return;
    }
    const entry = this.take(publication, true);
    if (entry && !entry.mine && document.hidden) {
      this.countUnseen(entry);
    }
    this.position = { epoch: publication.epoch ?? this.position?.epoch ?? '', offset: publication.offset ?? 0 };
    this.remember();
  }

  /** Gives an entry if the publication is a message that is new. `live`: it was published just now. */
  take({ data, info, offset }, live = false) {
    this.lastOffset = offset ?? this.lastOffset;
    const client = info?.client;
    if (data?.type === 'hello' && isText(data.name, 24)) {
      this.introduced(client, data, live);
    } else if (data?.type === 'message' && isText(data.text, 2000) && isText(data.name, 24)) {
      this.introduce(client, data.name, this.names.get(client)?.shard);
      return this.said(data, client);
    }
    return null;
  }

  said(data, client) {
    const { id, from, name, text, at } = data;
    if (this.seen.has(id)) {
      return null;
    }
    this.seen.add(id);
    const mine = from === this.me.tab;
    const waiting = this.unsent.findIndex((entry) => entry.id === id);
    const [sent] = waiting < 0 ? [] : this.unsent.splice(waiting, 1);
    // A message that had to wait for the connection says nothing about the round trip.
    const trip = sent && !sent.waited ? performance.now() - sent.sentAt : null;
    const shard = this.names.get(client)?.shard;
    return this.add('message', { id, name, text, at, mine, client, shard, trip });
  }

  add(kind, fields) {
    const entry = { key: fields.id ?? `entry-${++this.keys}`, kind, ...fields };
    this.entries.push(entry);
    if (this.entries.length > ENTRIES_MAX) {
      this.entries.splice(0, this.entries.length - ENTRIES_MAX);
    }
    return entry;
  }

  countUnseen(entry) {
    if (!this.unseen) {
      this.unseen = { key: `mark-${++this.keys}`, kind: 'missed', count: 0 };
      this.entries.splice(this.entries.indexOf(entry), 0, this.unseen);
    }
    this.unseen.count += 1;
  }

  /** The page is looked at again: what comes next is not missed. */
  looked() {
    this.unseen = null;
  }

  unsubscribed({ code, reason }) {
    if (code >= 2500) {
      this.subscribe();
    } else {
      this.refusal = `${reason} (${code})`;
    }
  }

  // --- members ---

  setMembers({ presence = {} }) {
    this.members = new Map(Object.keys(presence).map((client) => [client, this.names.get(client) ?? {}]));
  }

  joined(client) {
    this.members.set(client, this.names.get(client) ?? {});
  }

  left(client) {
    const { name } = this.members.get(client) ?? {};
    this.members.delete(client);
    if (client !== this.me.client && name) {
      this.add('event', { text: `${name} left` });
    }
  }

  introduce(client, name, shard) {
    if (!client) {
      return;
    }
    this.names.set(client, { name, shard });
    if (this.members.has(client)) {
      this.members.set(client, { name, shard });
    }
  }

  introduced(client, { name, shard }, live) {
    const known = this.names.get(client)?.name;
    this.introduce(client, name, Number.isInteger(shard) ? shard : undefined);
    if (!live || !this.members.has(client) || client === this.me.client || known === name) {
      return;
    }
    this.add('event', { text: known ? `${known} is now called ${name}` : `${name} joined on shard ${shard}` });
  }

  /** Tells the room how this client is called. */
  sayHello() {
    const { name, shard, client } = this.me;
    this.introduce(client, name, shard);
    const data = { type: 'hello', name, shard };
    this.connection.request('publish', { channel: this.channel, data }).catch(() => {});
  }

  // --- saying something ---

  /** Says `text`, now or when there is a connection again. */
  say(text) {
    const id = crypto.randomUUID?.() ?? `${Math.random()}`.slice(2);
    const entry = { key: id, id, kind: 'message', name: this.me.name, text, at: Date.now(), mine: true, pending: true };
    this.unsent.push(entry);
    this.send(entry);
    this.changed();
  }

  async send(entry) {
    const { id, name, text, at } = entry;
    const data = { type: 'message', id, from: this.me.tab, name, text, at };
    entry.sentAt = performance.now();
    entry.error = null;
    try {
      await this.connection.request('publish', { channel: this.channel, data });
    } catch (error) {
      // Without a connection it waits; the id keeps a repeat from showing twice.
      entry.waited = true;
      entry.error = error.code ? `${error.message} (${error.code})` : null;
      this.changed();
    }
  }

  /** After recovery: what is still unsent did not get through. */
  resend() {
    for (const entry of this.unsent) {
      this.send(entry);
    }
  }

  // --- what was seen last, across visits ---

  remember() {
    if (!document.hidden) {
      localStorage.setItem(this.storageKey, JSON.stringify(this.position));
    }
  }

  loadLastSeen() {
    try {
      return JSON.parse(localStorage.getItem(this.storageKey));
    } catch {
      return null;
    }
  }

  get storageKey() {
    return `ringmain-demo:seen:${this.channel}`;
  }
}
