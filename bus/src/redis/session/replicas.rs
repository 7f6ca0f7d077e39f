//! Asking replicas what they have: `WAIT`, on a connection of its own.
//!
//! Owns: when replicas are asked, and which acks an answer is about. Must not know: what becomes of an ack.
//!
//! WAIT holds its connection up until enough replicas have answered, and counts those that have what was written before
//! that connection's last write. So it stands alone behind a write that changes nothing, made once the answers that it is
//! about have come: all that they tell of, written over whichever connection, lies before that write. A replica that is
//! far away or hangs holds up nothing else.
//!
//! Invariant: an answer counts only if the write was made in the session's life of the server.

use std::time::{Duration, Instant};

use redis::{Cmd, Value};

use super::{CANARY, Ending, SILENT_TURNS, Session, TURN_MAX, UNHEARD};
use crate::redis::options::Durability;
use crate::redis::script::{Answer, answers};
use crate::redis::wire::{Connection, WireError};
use crate::types::PublishError;

/// How long the server waits for its replicas.
const WAIT_MS: u64 = 300;

/// How often the connection says something when nothing is asked: servers and what lies between close those that are quiet.
const PING: Duration = Duration::from_secs(1);

/// Age of a question without an answer after which the server counts as silent.
const ANSWER_MAX: Duration = UNHEARD.saturating_add(Duration::from_millis(WAIT_MS));

/// What was asked.
struct Question {
    since: Instant,
    /// How many replicas are wanted.
    wanted: usize,
    /// It is about the kept acks up to this number, and about the first so many of those that wait.
    kept_up_to: u64,
    waiting: usize,
    /// The write's answer: whether it was made.
    is_written: Option<bool>,
}

impl Question {
    /// About nothing: a PING, without a write.
    fn ping(since: Instant) -> Question {
        Question { since, wanted: 0, kept_up_to: 0, waiting: 0, is_written: Some(false) }
    }
}

/// The connection, and the one question that is asked there at a time.
pub(super) struct Replicas {
    link: Connection,
    asked: Option<Question>,
    due: Instant,
    ping_due: Instant,
    late_turns: u32,
}

impl Replicas {
    pub(super) fn new(link: Connection) -> Replicas {
        let now = Instant::now();
        Replicas { link, asked: None, due: now, ping_due: now + PING, late_turns: 0 }
    }

    /// The next answer. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Value, WireError> {
        self.link.next().await
    }

    fn send(&self, command: &Cmd) -> Result<(), Ending> {
        self.link.send(command).then_some(()).ok_or(Ending::because("outgoing"))
    }
}

impl Session {
    /// Asks, if nothing is asked yet and there is something to ask about.
    pub(super) fn ask_replicas(&mut self, now: Instant) -> Result<(), Ending> {
        if self.confirmer.asked.is_some() {
            return Ok(());
        }
        let wanted = match self.context.options.durability {
            Durability::Master if !self.kept.is_empty() && now >= self.confirmer.due => self.replicas.get(),
            Durability::Replicas(replicas) if !self.confirming.is_empty() => replicas,
            _ => return self.ping_replicas(now),
        };
        self.confirmer.ping_due = now + PING;
        let script = &self.context.script;
        let write = script.call(&self.sha, &[script.write(&self.canary_key, self.context.nonce())]);
        let mut wait = redis::cmd("WAIT");
        wait.arg(wanted).arg(WAIT_MS);
        self.confirmer.send(&write)?;
        self.confirmer.send(&wait)?;
        self.confirmer.asked = Some(Question {
            since: now,
            wanted,
            kept_up_to: self.kept_from + self.kept.len() as u64,
            waiting: self.confirming.len(),
            is_written: None,
        });
        Ok(())
    }

    fn ping_replicas(&mut self, now: Instant) -> Result<(), Ending> {
        if now < self.confirmer.ping_due {
            return Ok(());
        }
        self.confirmer.ping_due = now + PING;
        self.confirmer.asked = Some(Question::ping(now));
        self.confirmer.send(&redis::cmd("PING"))
    }

    /// Listens for the silence of the connection.
    pub(super) async fn watch_replicas(&mut self, now: Instant) -> Result<(), Ending> {
        let asked = self.confirmer.asked.as_ref();
        let is_late = asked.is_some_and(|question| now.duration_since(question.since) >= ANSWER_MAX);
        self.confirmer.late_turns = if is_late { self.confirmer.late_turns + 1 } else { 0 };
        if self.confirmer.late_turns > SILENT_TURNS {
            return Err(Ending::because("silent about its replicas"));
        }
        for _ in 0..if is_late { TURN_MAX } else { 0 } {
            let Some(value) = self.confirmer.link.next_now() else { break };
            self.replicas_answered(value?).await?;
        }
        Ok(())
    }

    /// An answer: to the write, then to WAIT.
    pub(super) async fn replicas_answered(&mut self, value: Value) -> Result<(), Ending> {
        if let Value::Push { .. } = value {
            return Ok(());
        }
        let question = self.confirmer.asked.as_mut().ok_or(Ending::because("protocol"))?;
        let Some(is_written) = question.is_written else {
            question.is_written = Some(match answers(value).as_deref() {
                Some([Answer::Canary(life, _)]) if *life == self.life => true,
                Some([Answer::Canary(..)]) => return Err(Ending::because("another life")),
                // It may refuse to write while too few replicas follow.
                Some([Answer::Failed(_)]) => false,
                _ => return Err(Ending::because("refused to be asked about its replicas")),
            });
            return Ok(());
        };
        let has = |count| usize::try_from(count).is_ok_and(|count| count >= question.wanted);
        let confirmed = is_written && matches!(value, Value::Int(count) if has(count));
        let (kept_up_to, waiting) = (question.kept_up_to, question.waiting);
        self.confirmer.asked = None;
        self.confirmer.due = Instant::now() + CANARY;
        if confirmed {
            self.let_go(kept_up_to);
        }
        for _ in 0..waiting {
            let Some((publication, accepted)) = self.confirming.pop_front() else { break };
            let result = if confirmed { Ok(accepted) } else { Err(PublishError::Unknown) };
            self.context.answer(&publication, result).await;
        }
        Ok(())
    }
}
