//! One connection's state, as plain data, and the table of all connections of a shard.
//!
//! Owns what is remembered of a connection between events: stage, identity, subscriptions, deadlines.
//! Behaviour lives beside it: [`super::wire`] parses, [`super::commands`] acts. What is empty most of
//! the time lives behind [`Session::extra`], which is null when idle.
//!
//! Invariant: every subscription of a session is counted in its channel's `subs`, from the moment it
//! is asked of the home until it is removed or refused.

use std::collections::BTreeSet;
use std::sync::Arc;

use hashbrown::HashTable;
use ringmain_proto::client::ClientId;
use ringmain_proto::close::CloseReason;
use ringmain_proto::codec::Codec;
use ringmain_proto::message::ClientInfo;
use ringmain_proto::ws::Reader;
use smallvec::SmallVec;

use super::api::hash_name;
use super::cluster::{SLOTS, slot_of};
use super::engine::Slot;
use super::mesh::Identity;
use super::subscribe::NewSub;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No connection.
    #[default]
    Free,
    /// A PROXY header is expected.
    Proxy,
    /// An HTTP request is expected.
    Http,
    /// WebSocket is open, the connect command is expected.
    Opened,
    /// The connect command failed: nothing is answered until the client is closed as stale.
    Refused,
    /// The connect command waits for server-side subscriptions.
    Connecting,
    /// Connected.
    Connected,
    /// The last bytes are queued; input is ignored.
    Closing,
    /// The loop was told to finish or abort; only `released` is expected.
    Gone,
}

/// How a subscription receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SubState {
    /// The home has not answered yet.
    Joining,
    /// Caught up, in the variant's members.
    Member,
    /// Behind, with a cursor in the log.
    Lagging,
    /// Behind the log's tail, waiting for the home to read history.
    Replaying,
}

/// Made by the server, not by a subscribe command.
pub(crate) const SUB_SERVER_SIDE: u8 = 1;
/// The client was told that it may recover.
pub(crate) const SUB_RECOVERABLE: u8 = 2;
/// The client was told a position.
pub(crate) const SUB_POSITIONED: u8 = 4;
/// In presence.
pub(crate) const SUB_PRESENCE: u8 = 8;
/// Join announced, leave to be announced.
pub(crate) const SUB_ANNOUNCED: u8 = 16;
/// Named by the connection token: a refreshed token must name it too.
pub(crate) const SUB_OF_TOKEN: u8 = 32;
/// Every connection, or every user, has it: it does not count against the channel limit.
pub(crate) const SUB_AUTOMATIC: u8 = 64;

/// One subscription.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sub {
    pub(crate) channel: u32,
    /// Index in the variant's members, or in its log's laggards; their cursors are in the output.
    pub(crate) index: u32,
    pub(crate) state: SubState,
    pub(crate) variant: u8,
    pub(crate) flags: u8,
}

/// What few subscriptions have.
#[derive(Clone, Debug, Default)]
pub(crate) struct SubExtra {
    pub(crate) channel: u32,
    /// When it expires, in seconds since the epoch.
    pub(crate) expire_at: Option<u64>,
    /// `info` of the subscription token.
    pub(crate) chan_info: Option<Box<[u8]>>,
    /// The subscribe reply that waits for the home.
    pub(crate) joining: Option<Box<Joining>>,
}

/// A subscribe command that waits for the home.
#[derive(Clone, Debug, Default)]
pub(crate) struct Joining {
    /// The command's id; 0: part of connect, or made by the server.
    pub(crate) id: u32,
    pub(crate) recover: bool,
    pub(crate) since_offset: u64,
    /// Answer 112 where the position cannot be recovered.
    pub(crate) strict: bool,
    /// JSON told with the subscription.
    pub(crate) data: Option<Box<[u8]>>,
    /// Commands about this channel that came meanwhile, in order.
    pub(crate) then: Vec<Follow>,
}

/// A command that waits for the subscription before it.
#[derive(Clone, Debug)]
pub(crate) enum Follow {
    /// Unsubscribe, under this id.
    Unsubscribe(u32),
    /// The server ends the subscription.
    Revoke,
    /// Subscribe again: permitted when it came.
    Subscribe(Box<NewSub>),
}

/// What a connection rarely has.
#[derive(Debug, Default)]
pub(crate) struct Extra {
    /// An HTTP head or PROXY header that is not complete.
    pub(crate) head: Vec<u8>,
    /// `info` of the connection token.
    pub(crate) conn_info: Option<Box<[u8]>>,
    /// What few subscriptions have.
    pub(crate) subs: Vec<SubExtra>,
    /// A connect command that waits for its subscriptions.
    pub(crate) connecting: Option<Box<Connecting>>,
    /// Since when a frame or message is unfinished, in monotonic milliseconds.
    pub(crate) partial_since_ms: Option<u64>,
    /// Bytes of partial input accounted for.
    pub(crate) partial_bytes: usize,
    /// Input has ended because of this; the connection closes when what came before is answered.
    pub(crate) ending: Option<CloseReason>,
}

impl Extra {
    fn is_empty(&self) -> bool {
        self.head.is_empty()
            && self.conn_info.is_none()
            && self.subs.is_empty()
            && self.connecting.is_none()
            && self.partial_since_ms.is_none()
            && self.partial_bytes == 0
            && self.ending.is_none()
    }
}

/// A connect reply under construction.
#[derive(Debug, Default)]
pub(crate) struct Connecting {
    pub(crate) id: u32,
    /// Subscriptions that have not been answered.
    pub(crate) waiting: u32,
    /// Those that have.
    pub(crate) subs: Vec<ConnectedSub>,
    /// The client is the demo page.
    pub(crate) demo: bool,
    /// Messages that came behind the connect command.
    pub(crate) backlog: Vec<Vec<u8>>,
}

/// A server-side subscription of a connect reply.
#[derive(Debug)]
pub(crate) struct ConnectedSub {
    pub(crate) channel: Arc<str>,
    pub(crate) recoverable: bool,
    pub(crate) positioned: bool,
    pub(crate) epoch: u64,
    pub(crate) offset: u64,
    pub(crate) records: Vec<u8>,
    pub(crate) recovered: bool,
    pub(crate) was_recovering: bool,
    pub(crate) data: Option<Box<[u8]>>,
}

/// One connection.
#[derive(Debug, Default)]
pub(crate) struct Session {
    pub(crate) client: u128,
    pub(crate) user: Box<str>,
    pub(crate) subs: SmallVec<[Sub; 3]>,
    pub(crate) reader: Reader,
    pub(crate) extra: Option<Box<Extra>>,
    pub(crate) serial: u32,
    /// Commands that wait for an answer of a home or the bus: connect and subscribe among them.
    pub(crate) pending: u32,
    /// When the next ping is due, in ticks of monotonic time.
    pub(crate) ping_tick: u32,
    /// The latest moment for what the stage waits for, in the same ticks; 0: none.
    pub(crate) deadline_tick: u32,
    /// When the connection's token expires, in seconds since the epoch (0: never).
    pub(crate) expire_at: u32,
    pub(crate) stage: Stage,
    pub(crate) codec: Codec,
    marks: u8,
}

/// What is so or not of a session, as a bit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u8);

/// A ping is out and unanswered.
pub(crate) const AWAITS_PONG: Mark = Mark(1);
/// WebSocket pings instead of the protocol's.
pub(crate) const FRAME_PINGS: Mark = Mark(2);
/// The peer has sent FIN, or broke the protocol: what it sends is ignored.
pub(crate) const INPUT_ENDED: Mark = Mark(4);
/// Everything queued is to be flushed, then the socket finished.
pub(crate) const FINISH_WHEN_FLUSHED: Mark = Mark(8);
/// Only answers are still owed before it closes for a breach of the protocol ([`Extra::ending`]).
pub(crate) const ENDING: Mark = Mark(16);

/// The wheel's tick, in milliseconds: 32 bits of it are two years.
pub(crate) use super::timer::TICK_MS;

impl Session {
    /// Whether the mark is set.
    #[inline]
    pub(crate) fn is(&self, mark: Mark) -> bool {
        self.marks & mark.0 != 0
    }

    /// Sets or clears a mark.
    #[inline]
    pub(crate) fn set(&mut self, mark: Mark, on: bool) {
        self.marks = if on { self.marks | mark.0 } else { self.marks & !mark.0 };
    }

    /// What a connection rarely has, made if need be.
    pub(crate) fn extra(&mut self) -> &mut Extra {
        self.extra.get_or_insert_default()
    }

    /// Gives the box back if nothing is in it.
    pub(crate) fn trim_extra(&mut self) {
        if self.extra.as_ref().is_some_and(|extra| extra.is_empty()) {
            self.extra = None;
        }
    }

    /// The latest moment for what the stage waits for, in monotonic milliseconds.
    pub(crate) fn deadline_ms(&self) -> Option<u64> {
        (self.deadline_tick != 0).then(|| u64::from(self.deadline_tick) * TICK_MS)
    }

    /// Sets it.
    pub(crate) fn set_deadline(&mut self, at_ms: u64) {
        self.deadline_tick = at_ms.div_ceil(TICK_MS).max(1) as u32;
    }

    pub(crate) fn sub_extra(&self, channel: u32) -> Option<&SubExtra> {
        self.extra.as_ref()?.subs.iter().find(|extra| extra.channel == channel)
    }

    pub(crate) fn sub_extra_mut(&mut self, channel: u32) -> &mut SubExtra {
        let subs = &mut self.extra().subs;
        let position = subs.iter().position(|extra| extra.channel == channel).unwrap_or_else(|| {
            subs.push(SubExtra { channel, ..SubExtra::default() });
            subs.len() - 1
        });
        &mut subs[position]
    }

    pub(crate) fn take_joining(&mut self, channel: u32) -> Option<Box<Joining>> {
        let subs = &mut self.extra.as_mut()?.subs;
        let position = subs.iter().position(|extra| extra.channel == channel)?;
        let joining = subs[position].joining.take();
        if subs[position].expire_at.is_none() && subs[position].chan_info.is_none() {
            subs.swap_remove(position);
            if subs.is_empty() {
                *subs = Vec::new();
            }
        }
        self.trim_extra();
        joining
    }

    pub(crate) fn drop_sub_extra(&mut self, channel: u32) {
        if let Some(extra) = &mut self.extra {
            extra.subs.retain(|sub| sub.channel != channel);
            if extra.subs.is_empty() {
                extra.subs = Vec::new();
            }
            self.trim_extra();
        }
    }

    /// This session's identity in a channel.
    pub(crate) fn identity(&self, channel: u32) -> Identity {
        let conn_info = self.extra.as_ref().and_then(|extra| extra.conn_info.as_deref());
        let chan_info = self.sub_extra(channel).and_then(|sub| sub.chan_info.as_deref());
        Identity::new(ClientId(self.client), &self.user, conn_info, chan_info)
    }

    /// Whether it is subscribed, or will be, as far as the commands until now go.
    pub(crate) fn holds(&self, channel: u32) -> bool {
        let Some(sub) = self.subs.iter().find(|sub| sub.channel == channel) else { return false };
        if sub.state != SubState::Joining {
            return true;
        }
        let joining = self.sub_extra(channel).and_then(|sub| sub.joining.as_ref());
        let last = joining.and_then(|joining| joining.then.last());
        !matches!(last, Some(Follow::Unsubscribe(_) | Follow::Revoke))
    }

    /// Subscriptions that count against the channel limit.
    pub(crate) fn counted_subs(&self) -> usize {
        self.subs.iter().filter(|sub| sub.flags & SUB_AUTOMATIC == 0).count()
    }

    /// Whether WebSocket frames may be sent.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Opened | Stage::Refused | Stage::Connecting | Stage::Connected)
    }
}

/// Who publishes, copied out of a session into buffers that are used again and again.
#[derive(Debug, Default)]
pub(crate) struct PublisherCopy {
    client: ClientId,
    user: String,
    /// Empty: none.
    conn_info: Vec<u8>,
    chan_info: Vec<u8>,
}

impl PublisherCopy {
    /// The identity of `session` in `channel`.
    pub(crate) fn copy_from(&mut self, session: &Session, channel: u32) {
        self.client = ClientId(session.client);
        self.user.clear();
        self.user.push_str(&session.user);
        self.conn_info.clear();
        self.chan_info.clear();
        if let Some(extra) = &session.extra {
            self.conn_info.extend_from_slice(extra.conn_info.as_deref().unwrap_or_default());
            let sub = extra.subs.iter().find(|sub| sub.channel == channel);
            self.chan_info
                .extend_from_slice(sub.and_then(|sub| sub.chan_info.as_deref()).unwrap_or_default());
        }
    }

    /// As a publication shows it.
    pub(crate) fn as_client_info(&self) -> ClientInfo<'_> {
        fn some(json: &[u8]) -> Option<&[u8]> {
            (!json.is_empty()).then_some(json)
        }
        ClientInfo {
            user: &self.user,
            client: self.client,
            conn_info: some(&self.conn_info),
            chan_info: some(&self.chan_info),
        }
    }
}

/// Sessions per page: the table grows by pages, so that it never copies and never doubles.
const PAGE: usize = 256;

// A connection that waits costs its session, and little besides.
const _: () = assert!(size_of::<Session>() <= 128);

/// All sessions of a shard, by slot, and the index of users.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    pages: Vec<Box<[Session]>>,
    users: HashTable<Slot>,
    serial: u32,
    /// Kept in a cluster only.
    slots: Option<Box<UserSlots>>,
}

/// Sessions of listed users by slot, and the slots where somebody was the first or the last.
#[derive(Debug)]
struct UserSlots {
    counts: [u32; SLOTS as usize],
    changed: BTreeSet<u16>,
}

impl UserSlots {
    fn add(&mut self, user: &str) {
        let slot = slot_of(user);
        let count = &mut self.counts[usize::from(slot)];
        *count += 1;
        if *count == 1 {
            self.changed.insert(slot);
        }
    }

    fn remove(&mut self, user: &str) {
        let slot = slot_of(user);
        let count = &mut self.counts[usize::from(slot)];
        *count -= 1;
        if *count == 0 {
            self.changed.insert(slot);
        }
    }
}

impl Sessions {
    /// Prepares a slot for a new connection.
    pub(crate) fn open(&mut self, slot: Slot) -> &mut Session {
        let page = slot as usize / PAGE;
        while self.pages.len() <= page {
            self.pages.push((0..PAGE).map(|_| Session::default()).collect());
        }
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let session = self.get_mut(slot);
        *session = Session { serial, ..Session::default() };
        session
    }

    /// The session of a slot that was opened.
    #[inline]
    pub(crate) fn get(&self, slot: Slot) -> &Session {
        &self.pages[slot as usize / PAGE][slot as usize % PAGE]
    }

    /// Whether a slot holds no connection.
    pub(crate) fn is_free(&self, slot: Slot) -> bool {
        let page = self.pages.get(slot as usize / PAGE);
        page.is_none_or(|page| page[slot as usize % PAGE].stage == Stage::Free)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, slot: Slot) -> &mut Session {
        &mut self.pages[slot as usize / PAGE][slot as usize % PAGE]
    }

    /// The session that a serial names, if it is still that one.
    pub(crate) fn by_serial(&mut self, slot: Slot, serial: u32) -> Option<&mut Session> {
        let session = self.pages.get_mut(slot as usize / PAGE)?.get_mut(slot as usize % PAGE)?;
        (session.serial == serial && !matches!(session.stage, Stage::Free | Stage::Gone | Stage::Closing))
            .then_some(session)
    }

    /// A subscription, if the slot has it.
    #[inline]
    pub(crate) fn sub(&self, slot: Slot, channel: u32) -> Option<&Sub> {
        self.get(slot).subs.iter().find(|sub| sub.channel == channel)
    }

    /// A subscription that is listed in its channel, so the session has it.
    #[inline]
    pub(crate) fn sub_mut(&mut self, slot: Slot, channel: u32) -> &mut Sub {
        let subs = &mut self.get_mut(slot).subs;
        subs.iter_mut().find(|sub| sub.channel == channel).expect("a listed subscriber has its subscription")
    }

    /// Lists a session under its user. Those without one are not listed: entries of one hash stand in one
    /// row of the table, and to walk past a crowd of anonymous sessions for each that comes and goes would
    /// cost the more the more there are.
    pub(crate) fn add_user(&mut self, slot: Slot) {
        if self.get(slot).user.is_empty() {
            return;
        }
        if let Some(slots) = &mut self.slots {
            slots.add(&self.pages[slot as usize / PAGE][slot as usize % PAGE].user);
        }
        let hash = hash_name(&self.get(slot).user);
        let pages = &self.pages;
        self.users.insert_unique(hash, slot, |slot| {
            hash_name(&pages[*slot as usize / PAGE][*slot as usize % PAGE].user)
        });
    }

    /// Removes it from that list.
    pub(crate) fn remove_user(&mut self, slot: Slot) {
        if self.get(slot).user.is_empty() {
            return;
        }
        let hash = hash_name(&self.get(slot).user);
        if let Ok(entry) = self.users.find_entry(hash, |listed| *listed == slot) {
            entry.remove();
            if let Some(slots) = &mut self.slots {
                slots.remove(&self.pages[slot as usize / PAGE][slot as usize % PAGE].user);
            }
        }
        if self.users.capacity() > 4 * (self.users.len() + 64) {
            let pages = &self.pages;
            let hasher = |slot: &Slot| hash_name(&pages[*slot as usize / PAGE][*slot as usize % PAGE].user);
            self.users.shrink_to_fit(hasher);
        }
    }

    /// The slots of a user's connected sessions. For no user (the empty name) every session is looked at.
    pub(crate) fn of_user(&self, user: &str) -> Vec<Slot> {
        if user.is_empty() {
            return self.anonymous().collect();
        }
        let hash = hash_name(user);
        self.users.iter_hash(hash).copied().filter(|slot| *self.get(*slot).user == *user).collect()
    }

    /// Connected sessions without a user.
    fn anonymous(&self) -> impl Iterator<Item = Slot> + '_ {
        self.live().filter(|slot| {
            let session = self.get(*slot);
            matches!(session.stage, Stage::Connected | Stage::Connecting) && session.user.is_empty()
        })
    }

    /// Hashes of the users that are listed, each once; those without a user are one.
    pub(crate) fn user_hashes(&self) -> Vec<u64> {
        let anonymous = self.anonymous().next().map(|_| hash_name(""));
        let listed = self.users.iter().map(|slot| hash_name(&self.get(*slot).user));
        let mut hashes: Vec<u64> = listed.chain(anonymous).collect();
        hashes.sort_unstable();
        hashes.dedup();
        hashes
    }

    /// Keeps account of users' slots from now on; all that are in use have changed.
    pub(crate) fn start_slots(&mut self) {
        let mut slots = Box::new(UserSlots { counts: [0; SLOTS as usize], changed: BTreeSet::new() });
        self.users.iter().for_each(|slot| slots.add(&self.get(*slot).user));
        self.slots = Some(slots);
    }

    /// Whether there are changes of users' slots to take.
    pub(crate) fn slots_changed(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| !slots.changed.is_empty())
    }

    /// The slots that changed since the last look, and whether a user of theirs is here.
    pub(crate) fn take_slots(&mut self) -> Vec<(u16, bool)> {
        let Some(slots) = &mut self.slots else { return Vec::new() };
        let changed = std::mem::take(&mut slots.changed);
        changed.into_iter().map(|slot| (slot, slots.counts[usize::from(slot)] > 0)).collect()
    }

    /// Every slot that holds a connection.
    pub(crate) fn live(&self) -> impl Iterator<Item = Slot> + '_ {
        let sessions = self.pages.iter().flat_map(|page| page.iter());
        sessions.enumerate().filter(|(_, session)| session.stage != Stage::Free).map(|(slot, _)| slot as Slot)
    }
}
