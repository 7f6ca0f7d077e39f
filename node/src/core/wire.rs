//! Bytes of a connection, from accept to commands: PROXY header, HTTP, WebSocket frames.
//!
//! Owns the order of these stages and what bad input gets at each. It knows no command.

use ringmain_proto::close::CloseReason;
use ringmain_proto::http::{Head, Request, Response, check_upgrade, parse_head};
use ringmain_proto::proxy::{self, ProxyHeader};
use ringmain_proto::time::Now;
use ringmain_proto::ws::{self, Chunk, Event, Opcode, Text};

use super::engine::Slot;
use super::metrics::Metric;
use super::session::{AWAITS_PONG, ENDING, FRAME_PINGS, INPUT_ENDED, Stage};
use super::shard::Core;

/// Where clients connect.
const WEBSOCKET_PATH: &str = "/connection/websocket";
/// How long commands that were parsed before the input ended may take to be answered, in milliseconds.
const ANSWER_AFTER_FIN_MS: u64 = 1_000;

/// What became of the head of a connection or request.
enum HeadOutcome {
    /// More bytes are needed.
    Incomplete,
    /// So many bytes were it; the rest is for the next stage.
    Consumed(usize),
    /// The connection is closing.
    Closed,
}

/// One message of a client.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message<'a> {
    Text(&'a Text<'a>),
    Binary(&'a [u8]),
}

impl<'a> Message<'a> {
    fn bytes(self) -> &'a [u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Binary(bytes) => bytes,
        }
    }
}

impl Core {
    /// A new connection.
    pub(crate) fn connection_opened(&mut self, slot: Slot, listener: u16, now: Now) {
        let client = self.random.uuid();
        let proxied = self.proxy_listeners.get(usize::from(listener)).copied().unwrap_or(false);
        let deadline = now.mono_ms + self.config.client.handshake_timeout_ms;
        let session = self.sessions.open(slot);
        session.client = client;
        session.stage = if proxied { Stage::Proxy } else { Stage::Http };
        session.set_deadline(deadline);
        self.out.open(slot);
        self.wheel.set(slot, deadline);
        self.connections += 1;
        self.metrics.set(Metric::Connections, self.connections as u64);
    }

    /// Bytes of a connection, in the kernel's buffer.
    pub(crate) fn bytes_received(&mut self, slot: Slot, chunk: &mut [u8], now: Now) {
        let mut rest = chunk;
        if self.sessions.get(slot).is(INPUT_ENDED) {
            return;
        }
        while !rest.is_empty() {
            let next = match self.sessions.get(slot).stage {
                Stage::Proxy => self.head_bytes(slot, rest, now, Self::proxy_head),
                Stage::Http => self.head_bytes(slot, rest, now, Self::http_head),
                Stage::Opened | Stage::Refused | Stage::Connecting | Stage::Connected => {
                    return self.frames(slot, rest, now);
                }
                Stage::Closing | Stage::Gone | Stage::Free => return,
            };
            match next {
                Some(remaining) => rest = remaining,
                None => return,
            }
        }
    }

    /// The peer sent FIN: what it asked is answered, within a second.
    pub(crate) fn peer_finished(&mut self, slot: Slot, now: Now) {
        let session = self.sessions.get_mut(slot);
        if matches!(session.stage, Stage::Free | Stage::Closing | Stage::Gone) {
            return;
        }
        session.set(INPUT_ENDED, true);
        if session.pending > 0 {
            let deadline = now.mono_ms + ANSWER_AFTER_FIN_MS;
            session.set_deadline(deadline);
            self.wheel.set(slot, deadline);
            return;
        }
        if !session.is_open() {
            self.metrics.add(Metric::HandshakeFailed, 1);
        }
        self.finish_input(slot, now);
    }

    /// A client broke the protocol, or must go: what it asked before is answered, within a second, and
    /// what it sends from now on is ignored.
    pub(crate) fn end_input(&mut self, slot: Slot, reason: CloseReason, now: Now) {
        let session = self.sessions.get_mut(slot);
        if session.pending == 0 {
            return self.close(slot, reason, now);
        }
        let deadline = now.mono_ms + ANSWER_AFTER_FIN_MS;
        session.set(INPUT_ENDED, true);
        session.set(ENDING, true);
        session.extra().ending = Some(reason);
        session.set_deadline(deadline);
        self.wheel.set(slot, deadline);
    }

    /// Nothing more comes and nothing more is owed: the connection ends.
    pub(crate) fn finish_input(&mut self, slot: Slot, now: Now) {
        let ending = self.sessions.get(slot).extra.as_ref().and_then(|extra| extra.ending);
        if let Some(reason) = ending {
            return self.close(slot, reason, now);
        }
        self.metrics.add(Metric::CloseNormal, 1);
        self.end_session(slot, now);
        self.finish_when_flushed(slot, now);
    }

    /// Collects a head that may come in pieces. Returns what follows it.
    fn head_bytes<'c>(
        &mut self,
        slot: Slot,
        rest: &'c mut [u8],
        now: Now,
        parse: fn(&mut Self, Slot, &[u8], Now) -> HeadOutcome,
    ) -> Option<&'c mut [u8]> {
        let mut head = self
            .sessions
            .get_mut(slot)
            .extra
            .as_mut()
            .map_or_else(Vec::new, |extra| std::mem::take(&mut extra.head));
        let buffered = head.len();
        let outcome = if buffered == 0 {
            parse(self, slot, rest, now)
        } else {
            head.extend_from_slice(rest);
            parse(self, slot, &head, now)
        };
        match outcome {
            HeadOutcome::Incomplete => {
                if buffered == 0 {
                    head = rest.to_vec();
                }
                self.account_partial(slot, head.len());
                self.sessions.get_mut(slot).extra().head = head;
                None
            }
            HeadOutcome::Consumed(consumed) => {
                self.account_partial(slot, 0);
                self.sessions.get_mut(slot).trim_extra();
                debug_assert!(consumed >= buffered, "what was kept was incomplete");
                Some(&mut rest[consumed.saturating_sub(buffered)..])
            }
            HeadOutcome::Closed => None,
        }
    }

    fn proxy_head(&mut self, slot: Slot, bytes: &[u8], now: Now) -> HeadOutcome {
        match proxy::parse(bytes) {
            Ok(ProxyHeader::Incomplete) => HeadOutcome::Incomplete,
            Ok(ProxyHeader::Done { consumed, .. }) => {
                self.sessions.get_mut(slot).stage = Stage::Http;
                HeadOutcome::Consumed(consumed)
            }
            Err(_) => {
                self.metrics.add(Metric::HandshakeFailed, 1);
                self.abort(slot, now);
                HeadOutcome::Closed
            }
        }
    }

    fn http_head(&mut self, slot: Slot, bytes: &[u8], now: Now) -> HeadOutcome {
        match parse_head(bytes) {
            Ok(Head::Incomplete) => HeadOutcome::Incomplete,
            Ok(Head::Done { consumed, request }) => {
                if self.http_request(slot, &request, now) {
                    HeadOutcome::Consumed(consumed)
                } else {
                    HeadOutcome::Closed
                }
            }
            Err(error) => {
                self.metrics.add(Metric::HandshakeFailed, 1);
                self.respond(slot, &Response::closing(error.status()), now);
                HeadOutcome::Closed
            }
        }
    }

    /// Answers a request. Returns whether the connection goes on.
    fn http_request(&mut self, slot: Slot, request: &Request<'_>, now: Now) -> bool {
        if request.path() == WEBSOCKET_PATH {
            return self.upgrade(slot, request, now);
        }
        self.metrics.add(Metric::HttpRequests, 1);
        let readable = matches!(request.method(), "GET" | "HEAD");
        let (keep_alive, head_only) = (request.keep_alive(), request.method() == "HEAD");
        let asset = self.assets.iter().find(|asset| asset.path == request.path()).cloned();
        let uptime = now.unix_ms.saturating_sub(self.started_unix_ms) / 1000;
        let (status, content_type, body) = match (request.path(), asset) {
            _ if !readable => (405, TEXT, b"only GET and HEAD\n".to_vec()),
            ("/health", _) => {
                let body = format!(
                    r#"{{"status":"ok","timestamp":{},"version":"{}","uptime":{uptime}}}"#,
                    now.unix_s(),
                    self.version
                );
                (200, JSON, body.into_bytes())
            }
            ("/ready", _) => {
                let (status, word) = if self.ready { (200, "ready") } else { (503, "draining") };
                (status, JSON, format!(r#"{{"status":"{word}"}}"#).into_bytes())
            }
            (_, Some(asset)) => (200, asset.content_type, asset.body.to_vec()),
            _ => (404, TEXT, b"not found; WebSocket clients connect to /connection/websocket\n".to_vec()),
        };
        let headers = [("Content-Type", content_type), ("Cache-Control", "no-cache")];
        let response = Response { status, headers: &headers, body: &body, keep_alive, head_only };
        self.respond(slot, &response, now)
    }

    /// Queues a response. Returns whether the connection goes on.
    fn respond(&mut self, slot: Slot, response: &Response<'_>, now: Now) -> bool {
        self.out.raw(slot, |out| response.write(out));
        if response.keep_alive {
            let deadline = now.mono_ms + self.config.client.handshake_timeout_ms;
            self.sessions.get_mut(slot).set_deadline(deadline);
            self.wheel.set(slot, deadline);
            return true;
        }
        self.end_session(slot, now);
        self.finish_when_flushed(slot, now);
        false
    }

    fn upgrade(&mut self, slot: Slot, request: &Request<'_>, now: Now) -> bool {
        let upgrade = match check_upgrade(request, &self.origins) {
            Ok(upgrade) => upgrade,
            Err(error) => {
                self.metrics.add(Metric::HandshakeFailed, 1);
                self.out.raw(slot, |out| error.write_response(out));
                self.end_session(slot, now);
                self.finish_when_flushed(slot, now);
                return false;
            }
        };
        self.out.raw(slot, |out| upgrade.write_response(out));
        let deadline = now.mono_ms + self.config.client.stale_close_delay_ms;
        let session = self.sessions.get_mut(slot);
        session.codec = upgrade.codec;
        session.set(FRAME_PINGS, upgrade.frame_ping_pong);
        session.stage = Stage::Opened;
        session.set_deadline(deadline);
        self.wheel.set(slot, deadline);
        true
    }

    // --- frames ---

    fn frames(&mut self, slot: Slot, bytes: &mut [u8], now: Now) {
        let message_bytes_max = self.config.client.message_bytes_max as usize;
        let serial = self.sessions.get(slot).serial;
        let mut reader = std::mem::take(&mut self.sessions.get_mut(slot).reader);
        let mut chunk = Chunk::new(bytes);
        loop {
            match reader.next(&mut chunk, message_bytes_max) {
                Ok(None) => break,
                Ok(Some(event)) => {
                    if !self.frame_event(slot, serial, event, now) {
                        return;
                    }
                }
                Err(error) => return self.close(slot, error.close_reason(), now),
            }
        }
        let buffered = reader.buffered_bytes();
        self.sessions.get_mut(slot).reader = reader;
        let known = self.sessions.get(slot).extra.as_ref().map_or(0, |extra| extra.partial_bytes);
        if buffered != known {
            self.note_partial(slot, buffered, now);
        }
    }

    /// Keeps account of an unfinished frame, and since when it is unfinished.
    fn note_partial(&mut self, slot: Slot, buffered: usize, now: Now) {
        self.account_partial(slot, buffered);
        let session = self.sessions.get_mut(slot);
        if buffered == 0 {
            session.extra().partial_since_ms = None;
            session.trim_extra();
        } else if session.extra().partial_since_ms.is_none() {
            session.extra().partial_since_ms = Some(now.mono_ms);
            self.arm_timer(slot, now);
        }
    }

    /// Returns whether the connection goes on reading.
    fn frame_event(&mut self, slot: Slot, serial: u32, event: Event<'_>, now: Now) -> bool {
        match event {
            // Text or binary: as Centrifugo, it is taken for what the codec makes of it.
            Event::Text(text) => {
                self.metrics.add(Metric::MessagesIn, 1);
                self.message(slot, serial, Message::Text(&text), now)
            }
            Event::Binary(payload) => {
                self.metrics.add(Metric::MessagesIn, 1);
                self.message(slot, serial, Message::Binary(&payload), now)
            }
            Event::Ping(payload) => {
                self.out.raw(slot, |out| ws::write_frame(out, Opcode::Pong, &payload));
                self.check_own_queue(slot, now);
                self.goes_on(slot, serial)
            }
            Event::Pong(_) => {
                let session = self.sessions.get_mut(slot);
                if session.is(FRAME_PINGS) {
                    session.set(AWAITS_PONG, false);
                }
                true
            }
            Event::Close { code, .. } => {
                self.metrics.add(Metric::CloseNormal, 1);
                self.end_session(slot, now);
                self.sessions.get_mut(slot).set(INPUT_ENDED, true);
                self.out.raw(slot, |out| ws::write_close(out, code, ""));
                self.finish_when_flushed(slot, now);
                false
            }
        }
    }

    /// Whether the connection with this serial still reads.
    #[inline]
    fn goes_on(&self, slot: Slot, serial: u32) -> bool {
        let session = self.sessions.get(slot);
        session.serial == serial && session.is_open() && !session.is(ENDING)
    }

    /// One message of a client: its commands in order, up to the first malformed line. Returns whether the
    /// connection goes on reading.
    pub(crate) fn message(&mut self, slot: Slot, serial: u32, message: Message<'_>, now: Now) -> bool {
        let session = self.sessions.get(slot);
        match session.stage {
            Stage::Connecting => {
                self.keep_for_connected(slot, message.bytes(), now);
                return self.goes_on(slot, serial);
            }
            Stage::Refused => return true,
            _ => {}
        }
        let mut commands = match message {
            Message::Text(text) => session.codec.decode_text(text),
            Message::Binary(bytes) => session.codec.decode(bytes),
        };
        loop {
            if self.sessions.get(slot).stage == Stage::Connected
                && let Some(publish) = commands.next_publish()
            {
                self.metrics.add(Metric::Commands, 1);
                self.publish_command(slot, publish.id, publish.channel, publish.data, now);
            } else {
                match commands.next() {
                    None => break,
                    Some(Ok(command)) => self.command(slot, command, now),
                    Some(Err(_)) => {
                        self.end_input(slot, CloseReason::BadRequest, now);
                        return false;
                    }
                }
            }
            if !self.goes_on(slot, serial) {
                return false;
            }
            match self.sessions.get(slot).stage {
                Stage::Refused => return true,
                Stage::Connecting => {
                    let rest = commands.rest();
                    if !rest.is_empty() {
                        self.keep_for_connected(slot, rest, now);
                    }
                    return self.goes_on(slot, serial);
                }
                _ => {}
            }
        }
        self.check_own_queue(slot, now);
        self.goes_on(slot, serial)
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
