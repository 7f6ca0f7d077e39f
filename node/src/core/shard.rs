//! One shard's core: everything it owns, and its face towards the loop.
//!
//! [`Core`] is plain data. Its behaviour is spread over the modules beside this one: [`super::wire`]
//! (bytes in), [`super::commands`], [`super::connect`] and [`super::subscribe`] (what clients ask),
//! [`super::home`] (channels homed here), [`super::fanout`] (bytes out), [`super::timers`],
//! [`super::calls`] (what the control plane asks). It must not know a socket, a clock or a runtime.

use std::collections::VecDeque;
use std::sync::Arc;

use ringmain_bus::Bus;
use ringmain_proto::close::CloseReason;
use ringmain_proto::http::AllowedOrigins;
use ringmain_proto::time::Now;

use super::api::{ControlAnswer, ControlCommand};
use super::auth::Verifier;
use super::channel::Channels;
use super::config::CoreConfig;
use super::engine::{Effect, Engine, Send, ShardIndex, Slot, Source, TurnBudget};
use super::fanout::LagSend;
use super::gap::Gaps;
use super::infos::Infos;
use super::mesh::{MeshBatch, MeshMessage};
use super::metrics::{Metric, Values};
use super::outbox::Outboxes;
use super::output::Output;
use super::session::{AWAITS_PONG, FINISH_WHEN_FLUSHED, INPUT_ENDED, PublisherCopy, Sessions, Stage};
use super::snapshot::Snapshots;
use super::timer::Wheel;

/// A file that the node serves on its traffic port.
#[derive(Clone, Debug)]
pub struct Asset {
    /// Path, as `/`.
    pub path: &'static str,
    /// `Content-Type`.
    pub content_type: &'static str,
    /// The file.
    pub body: &'static [u8],
}

/// What a core is made of.
#[derive(Clone, Debug)]
pub struct CoreOptions {
    /// This shard.
    pub shard: ShardIndex,
    /// Shards of the node.
    pub shards: u16,
    /// The resolved configuration, shared.
    pub config: Arc<CoreConfig>,
    /// Fresh for every start and shard: client ids and epochs are drawn from it.
    pub seed: u64,
    /// By index of the listener: whether a PROXY header comes first.
    pub proxy_listeners: Vec<bool>,
    /// Version told to clients.
    pub version: Arc<str>,
    /// When the node started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Pages to serve (the demo); empty: none.
    pub assets: Arc<[Asset]>,
}

/// See the module's doc.
pub struct Core {
    pub(crate) shard: ShardIndex,
    pub(crate) shards: u16,
    pub(crate) config: Arc<CoreConfig>,
    pub(crate) verifier: Verifier,
    pub(crate) origins: AllowedOrigins,
    pub(crate) proxy_listeners: Vec<bool>,
    pub(crate) version: Arc<str>,
    pub(crate) started_unix_ms: u64,
    pub(crate) assets: Arc<[Asset]>,
    pub(crate) random: Random,
    pub(crate) bus: Box<dyn Bus + std::marker::Send>,
    pub(crate) sessions: Sessions,
    pub(crate) channels: Channels,
    pub(crate) out: Output,
    pub(crate) mesh: Outboxes,
    pub(crate) wheel: Wheel,
    pub(crate) metrics: Values,
    pub(crate) effects: Vec<Effect>,
    pub(crate) answers: Vec<ControlAnswer>,
    /// Variants whose log has news, by priority.
    pub(crate) dirty_high: VecDeque<u32>,
    pub(crate) dirty: VecDeque<u32>,
    /// Variants whose log may be released when the turn settles.
    pub(crate) served: Vec<u32>,
    pub(crate) lag_sends: Vec<LagSend>,
    /// Channels whose subscribers are to be told of a gap.
    pub(crate) gaps: Gaps,
    /// What users show of themselves, in bytes.
    pub(crate) infos: Infos,
    /// Connections that left as plain data and have not come back.
    pub(crate) snapshots: Snapshots,
    /// Connections that are finished once they are flushed.
    pub(crate) flushing: Vec<Slot>,
    /// Closes per second of a drain, and when it closed last.
    pub(crate) drain: Option<Drain>,
    pub(crate) connections: usize,
    /// What `/ready` says.
    pub(crate) ready: bool,
    pub(crate) partial_bytes: usize,
    pub(crate) pools_checked_ms: u64,
    pub(crate) waiters: super::home::Waiters,
    /// Members of channels on other nodes, and what those are told: nothing outside of a cluster.
    pub(crate) remote: super::home::Remotes,
    pub(crate) news: super::home::NewsQueue,
    pub(crate) scratch: Vec<u8>,
    pub(crate) publisher: Option<Box<PublisherCopy>>,
}

/// A drain under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drain {
    pub(crate) closes_per_second: u32,
    pub(crate) begun_ms: u64,
    pub(crate) closed: u64,
    pub(crate) next_slot: Slot,
    pub(crate) told: bool,
}

/// A small deterministic generator (SplitMix64): the seed is drawn outside.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A version 4 UUID (RFC 9562 section 5.4).
    pub(crate) fn uuid(&mut self) -> u128 {
        let random = u128::from(self.next()) << 64 | u128::from(self.next());
        (random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62)
    }
}

impl Core {
    /// A core without connections. Errors name the key of the configuration that cannot be used.
    pub fn new(options: CoreOptions, now: Now) -> Result<Self, super::auth::KeyError> {
        let CoreOptions { shard, shards, config, seed, proxy_listeners, version, started_unix_ms, assets } =
            options;
        let mut random = Random(seed);
        let bus =
            ringmain_bus::memory::EmbeddedBus::new(&super::home::memory_options(&config, random.next()));
        Ok(Self {
            shard,
            shards,
            verifier: Verifier::new(&config)?,
            origins: AllowedOrigins::new(&config.client.allowed_origins),
            proxy_listeners,
            version,
            started_unix_ms,
            assets,
            random,
            bus: Box::new(bus),
            sessions: Sessions::default(),
            channels: Channels::new(&config, shards),
            out: Output::default(),
            mesh: Outboxes::new(shards, &config.limits),
            wheel: Wheel::new(now.mono_ms),
            metrics: Values::default(),
            effects: Vec::new(),
            answers: Vec::new(),
            dirty_high: VecDeque::new(),
            dirty: VecDeque::new(),
            served: Vec::new(),
            lag_sends: Vec::new(),
            gaps: Gaps::default(),
            infos: Infos::new(config.limits.info_pool_bytes),
            snapshots: Snapshots::default(),
            flushing: Vec::new(),
            drain: None,
            connections: 0,
            ready: true,
            partial_bytes: 0,
            pools_checked_ms: now.mono_ms,
            waiters: super::home::Waiters::default(),
            remote: super::home::Remotes::default(),
            news: super::home::NewsQueue::default(),
            scratch: Vec::new(),
            publisher: None,
            config,
        })
    }

    /// Begins the close handshake: close frame, subscriptions ended, then FIN once flushed.
    pub(crate) fn close(&mut self, slot: Slot, reason: CloseReason, now: Now) {
        self.close_with(slot, reason.code(), reason.text(), close_metric(reason), now);
    }

    /// The same with any code and text.
    pub(crate) fn close_with(&mut self, slot: Slot, code: u16, text: &str, metric: Metric, now: Now) {
        let session = self.sessions.get(slot);
        if matches!(session.stage, Stage::Free | Stage::Closing | Stage::Gone) {
            return;
        }
        let open = session.is_open();
        self.end_session(slot, now);
        self.metrics.add(metric, 1);
        if open {
            self.out.raw(slot, |out| ringmain_proto::ws::write_close(out, Some(code), text));
        }
        self.finish_when_flushed(slot, now);
    }

    /// Ends everything that the session took part in; what is queued for it stays.
    pub(crate) fn end_session(&mut self, slot: Slot, now: Now) {
        self.unsubscribe_all(slot, now);
        let session = self.sessions.get(slot);
        if matches!(session.stage, Stage::Connected | Stage::Connecting) {
            if session.stage == Stage::Connected {
                self.metrics.sub(Metric::Sessions, 1);
            }
            self.sessions.remove_user(slot);
        }
        self.account_partial(slot, 0);
        self.drop_extra(slot);
        let session = self.sessions.get_mut(slot);
        session.stage = Stage::Closing;
        session.reader = ringmain_proto::ws::Reader::default();
    }

    /// Finishes the socket once nothing waits for it, and at the latest after `close_timeout_ms`.
    pub(crate) fn finish_when_flushed(&mut self, slot: Slot, now: Now) {
        let deadline = now.mono_ms + self.config.client.close_timeout_ms;
        let session = self.sessions.get_mut(slot);
        if session.is(FINISH_WHEN_FLUSHED) {
            return;
        }
        session.set(FINISH_WHEN_FLUSHED, true);
        session.stage = Stage::Closing;
        session.set_deadline(deadline);
        self.wheel.set(slot, deadline);
        self.flushing.push(slot);
    }

    /// Tells the loop to finish those that are flushed.
    pub(crate) fn finish_flushed(&mut self) {
        let mut position = 0;
        while position < self.flushing.len() {
            let slot = self.flushing[position];
            if self.sessions.get(slot).stage == Stage::Closing && !self.out.is_idle(slot) {
                position += 1;
                continue;
            }
            self.flushing.swap_remove(position);
            if self.sessions.get(slot).stage == Stage::Closing {
                // A peer that has said its last word needs no FIN in advance and sends nothing to discard,
                // but for the pong to a ping that its close frame has crossed.
                let session = self.sessions.get(slot);
                let ended = session.is(INPUT_ENDED) && !session.is(AWAITS_PONG);
                self.leave_loop(slot, if ended { Effect::Close(slot) } else { Effect::Finish(slot) });
            }
        }
    }

    /// Gives the socket up without ceremony.
    pub(crate) fn abort(&mut self, slot: Slot, now: Now) {
        if matches!(self.sessions.get(slot).stage, Stage::Free | Stage::Gone) {
            return;
        }
        self.end_session(slot, now);
        self.flushing.retain(|flushing| *flushing != slot);
        self.leave_loop(slot, Effect::Abort(slot));
    }

    fn leave_loop(&mut self, slot: Slot, effect: Effect) {
        self.out.kill(slot);
        self.wheel.cancel(slot);
        self.drop_extra(slot);
        self.sessions.get_mut(slot).stage = Stage::Gone;
        self.effects.push(effect);
    }

    /// Keeps account of the bytes of unfinished input.
    pub(crate) fn account_partial(&mut self, slot: Slot, bytes: usize) {
        let session = self.sessions.get_mut(slot);
        let known = session.extra.as_ref().map_or(0, |extra| extra.partial_bytes);
        if known != bytes {
            session.extra().partial_bytes = bytes;
            session.trim_extra();
            self.partial_bytes = self.partial_bytes + bytes - known;
            self.metrics.set(Metric::PartialBytes, self.partial_bytes as u64);
        }
    }
}

/// Which counter a close belongs to.
pub(crate) fn close_metric(reason: CloseReason) -> Metric {
    match reason {
        CloseReason::Normal | CloseReason::ConnectionClosed => Metric::CloseNormal,
        CloseReason::BadRequest => Metric::CloseBadRequest,
        CloseReason::WsProtocol | CloseReason::UnsupportedData => Metric::CloseProtocol,
        CloseReason::InvalidUtf8 => Metric::CloseInvalidUtf8,
        CloseReason::SlowFrame => Metric::CloseSlowFrame,
        CloseReason::MessageTooBig => Metric::CloseTooBig,
        CloseReason::Shutdown => Metric::CloseShutdown,
        CloseReason::Expired | CloseReason::SubscriptionExpired => Metric::CloseExpired,
        CloseReason::Slow => Metric::CloseSlow,
        CloseReason::InsufficientState => Metric::CloseLost,
        CloseReason::NoPong => Metric::CloseNoPong,
        CloseReason::InvalidToken => Metric::CloseInvalidToken,
        CloseReason::Stale => Metric::CloseStale,
        CloseReason::ForceDisconnect | CloseReason::ForceReconnect => Metric::CloseForced,
        CloseReason::ConnectionLimit | CloseReason::ChannelLimit | CloseReason::TooManyRequests => {
            Metric::CloseLimit
        }
        _ => Metric::CloseOther,
    }
}

impl Engine for Core {
    type Mesh = MeshBatch;
    type Control = ControlCommand;
    type Answer = ControlAnswer;

    fn accept(&mut self, slot: Slot, listener: u16, now: Now) {
        self.connection_opened(slot, listener, now);
    }

    fn input(&mut self, slot: Slot, chunk: &mut [u8], now: Now) {
        self.bytes_received(slot, chunk, now);
    }

    fn input_ended(&mut self, slot: Slot, now: Now) {
        self.peer_finished(slot, now);
    }

    fn broken(&mut self, slot: Slot, _errno: i32, now: Now) {
        if !matches!(self.sessions.get(slot).stage, Stage::Free | Stage::Gone | Stage::Closing) {
            self.metrics.add(Metric::CloseBroken, 1);
        }
        self.abort(slot, now);
    }

    fn released(&mut self, slot: Slot) {
        let session = self.sessions.get_mut(slot);
        debug_assert_eq!(session.stage, Stage::Gone, "only what was given up is released");
        *session = super::session::Session::default();
        self.connections -= 1;
        self.metrics.set(Metric::Connections, self.connections as u64);
    }

    fn inbox(&mut self, from: ShardIndex, mut batch: MeshBatch, now: Now) {
        let messages = batch.take();
        self.metrics.add(Metric::MeshMessages, messages.len() as u64);
        for message in messages {
            match message {
                MeshMessage::Home(message) => self.at_home(from, message, now),
                MeshMessage::Member(message) => self.at_member(message, now),
            }
        }
    }

    fn control(&mut self, command: ControlCommand, now: Now) {
        self.call(command, now);
    }

    fn tick(&mut self, now: Now) {
        self.run_timers(now);
    }

    fn next_deadline_ms(&self) -> Option<u64> {
        self.next_timer_ms()
    }

    fn prepare(&mut self, now: Now, budget: TurnBudget) -> bool {
        self.prepare_turn(now, budget)
    }

    fn sends(&self) -> &[Send] {
        &self.out.sends
    }

    #[inline]
    fn bytes(&self, send: &Send) -> &[u8] {
        match send.source {
            Source::Log(id, from) => self.channels.log_bytes_of(id, from, send.len),
            Source::Arena(_) | Source::Own => self.out.bytes(send),
        }
    }

    fn short(&mut self, slot: Slot, accepted: u32, now: Now) {
        self.short_send(slot, accepted, now);
    }

    fn settle(&mut self, now: Now) {
        self.settle_turn(now);
    }

    fn writable(&mut self, slot: Slot, _now: Now) {
        if !matches!(self.sessions.get(slot).stage, Stage::Free | Stage::Gone) {
            self.out.unblock(slot);
        }
    }

    fn mesh_targets(&self) -> &[ShardIndex] {
        self.mesh.targets()
    }

    fn take_mesh(&mut self, to: ShardIndex, now: Now) -> Option<MeshBatch> {
        self.relay_moved(to, now);
        self.mesh.take(to)
    }

    fn take_effects(&mut self, into: &mut Vec<Effect>) {
        into.append(&mut self.effects);
    }

    fn take_answers(&mut self, into: &mut Vec<ControlAnswer>) {
        into.append(&mut self.answers);
        // The last step of a turn.
        self.bus.flush();
    }

    fn metrics(&mut self) -> &mut Values {
        self.metrics.set(Metric::Channels, self.channels.len() as u64);
        self.metrics.set(Metric::HistoryBytes, self.bus.history_bytes() as u64);
        self.metrics.set(Metric::LogBytes, self.channels.log_bytes() as u64);
        self.metrics.set(Metric::InfoBytes, self.infos.bytes() as u64);
        self.metrics.set(Metric::MeshBytes, self.mesh.bytes() as u64);
        self.metrics.set(Metric::MeshPending, self.mesh.pending() as u64);
        &mut self.metrics
    }

    fn connections(&self) -> usize {
        self.connections
    }
}
