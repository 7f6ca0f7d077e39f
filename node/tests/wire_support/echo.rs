//! A WebSocket echo: the node's own handshake, reader and writer behind the real ring, and every message
//! sent back as it came. The node itself speaks commands and cannot echo.

use std::collections::HashMap;

use ringmain::core::engine::Slot;
use ringmain_proto::http::{AllowedOrigins, Head, check_upgrade, parse_head};
use ringmain_proto::time::Now;
use ringmain_proto::ws::{Chunk, Event, Opcode, Reader, write_close, write_frame};

use super::engine::{Desk, Protocol};

type EchoDesk = Desk<(), ()>;

/// A connection's stage.
#[derive(Debug)]
enum Stage {
    /// A request is read: what came of it.
    Handshake(Vec<u8>),
    Open(Reader),
    /// A close frame is queued.
    Closing,
}

/// Largest message that comes back, in bytes: the suite's largest.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// See the module's doc.
#[derive(Debug, Default)]
pub struct WebSocketEcho {
    stages: HashMap<Slot, Stage>,
}

impl Protocol for WebSocketEcho {
    type Mesh = ();
    type Control = ();
    type Answer = ();

    fn accept(&mut self, _desk: &mut EchoDesk, slot: Slot, _listener: u16, _now: Now) {
        self.stages.insert(slot, Stage::Handshake(Vec::new()));
    }

    fn input(&mut self, desk: &mut EchoDesk, slot: Slot, chunk: &mut [u8], _now: Now) {
        let stage = self.stages.get_mut(&slot).expect("accepted");
        match stage {
            Stage::Handshake(head) => {
                head.extend_from_slice(chunk);
                let mut bytes = std::mem::take(head);
                match upgrade(desk, slot, &bytes) {
                    None => *head = bytes,
                    Some(Err(())) => *stage = Stage::Closing,
                    Some(Ok(used)) => {
                        let mut reader = Reader::new();
                        let open = frames(desk, slot, &mut reader, &mut bytes[used..]);
                        *stage = if open { Stage::Open(reader) } else { Stage::Closing };
                    }
                }
            }
            Stage::Open(reader) => {
                if !frames(desk, slot, reader, chunk) {
                    *stage = Stage::Closing;
                }
            }
            Stage::Closing => {}
        }
    }

    fn released(&mut self, _desk: &mut EchoDesk, slot: Slot) {
        self.stages.remove(&slot);
    }
}

/// Answers a request once its head is whole; gives the head's length, or an error where it was refused.
fn upgrade(desk: &mut EchoDesk, slot: Slot, bytes: &[u8]) -> Option<Result<usize, ()>> {
    let answer = match parse_head(bytes) {
        Ok(Head::Incomplete) => return None,
        Ok(Head::Done { consumed, request }) => {
            let mut out = Vec::new();
            let checked = check_upgrade(&request, &AllowedOrigins::new(["*"]));
            let used = match &checked {
                Ok(upgrade) => {
                    upgrade.write_response(&mut out);
                    Ok(consumed)
                }
                Err(error) => {
                    error.write_response(&mut out);
                    Err(())
                }
            };
            desk.outbox.push(slot, &out);
            used
        }
        Err(_) => Err(()),
    };
    if answer.is_err() {
        desk.outbox.finish(slot);
    }
    Some(answer)
}

/// Echoes what is whole. Returns whether the connection goes on.
fn frames(desk: &mut EchoDesk, slot: Slot, reader: &mut Reader, bytes: &mut [u8]) -> bool {
    let mut chunk = Chunk::new(bytes);
    let mut out = Vec::new();
    let end = loop {
        match reader.next(&mut chunk, MESSAGE_BYTES_MAX) {
            Ok(None) => break None,
            Ok(Some(Event::Text(text))) => write_frame(&mut out, Opcode::Text, text.as_bytes()),
            Ok(Some(Event::Binary(payload))) => write_frame(&mut out, Opcode::Binary, &payload),
            Ok(Some(Event::Ping(payload))) => write_frame(&mut out, Opcode::Pong, &payload),
            Ok(Some(Event::Pong(_))) => {}
            Ok(Some(Event::Close { code, .. })) => {
                write_close(&mut out, code, "");
                break Some(true);
            }
            Err(error) => {
                let reason = error.close_reason();
                write_close(&mut out, Some(reason.code()), reason.text());
                break Some(false);
            }
        }
    };
    desk.outbox.push(slot, &out);
    // As the node does: who closes has said its last word, who broke the protocol may go on talking.
    match end {
        Some(true) => desk.outbox.finish_after_peer(slot),
        Some(false) => desk.outbox.finish(slot),
        None => {}
    }
    end.is_none()
}
