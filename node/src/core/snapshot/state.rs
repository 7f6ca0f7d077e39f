//! A connection as plain data, and its versioned encoding.
//!
//! Owns the form alone: a version in two bytes, little-endian, then bincode of [`ConnectionState`]. It must
//! not know how a connection is taken apart nor put together, and it holds nothing that means something
//! in one process only: times are spans, channels have names, codecs and opcodes are numbers.
//!
//! Invariant: bytes from anywhere are decoded to a state or to an error, in bounded memory.

use bincode::{Decode, Encode};
use ringmain_proto::codec::Codec;
use ringmain_proto::ws::{FrameState, ReaderState};

use super::ImportError;

/// Version of the encoding: any change of a field is another one.
pub const SNAPSHOT_VERSION: u16 = 1;

/// Bytes of one encoded connection at the most.
pub(super) const SNAPSHOT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// See the module's doc.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(super) struct ConnectionState {
    pub(super) client: u128,
    pub(super) user: String,
    /// See [`codec_number`].
    pub(super) codec: u8,
    /// WebSocket pings instead of the protocol's.
    pub(super) frame_pings: bool,
    /// A ping is out and unanswered.
    pub(super) awaits_pong: bool,
    /// Milliseconds until the next ping.
    pub(super) ping_in_ms: u64,
    /// When the connection's token expires, in seconds since 1970 (0: never).
    pub(super) expire_at: u32,
    pub(super) conn_info: Option<Vec<u8>>,
    /// In the order in which they were made.
    pub(super) subs: Vec<SubscriptionState>,
    /// Bytes to send first: the rest of a frame that was begun, then whole frames.
    pub(super) unsent: Vec<u8>,
    /// For how many milliseconds the socket has taken nothing; `None`: it takes bytes.
    pub(super) blocked_for_ms: Option<u64>,
    /// What came of an unfinished frame or message.
    pub(super) partial: Option<PartialState>,
}

/// One subscription, and what was sent of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(super) struct SubscriptionState {
    pub(super) channel: String,
    /// Joins and leaves are sent to it.
    pub(super) join_leave: bool,
    pub(super) flags: u8,
    /// In seconds since 1970.
    pub(super) expire_at: Option<u64>,
    pub(super) chan_info: Option<Vec<u8>>,
    /// Position after what was sent and what is in `unsent`.
    pub(super) epoch: u64,
    pub(super) offset: u64,
    /// Its place among those that are behind; `None`: it is caught up.
    pub(super) behind: Option<u32>,
    /// What follows its position is in no log any more.
    pub(super) fallen: bool,
}

/// An unfinished frame or message of the client; see [`ReaderState`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(super) struct PartialState {
    /// For how many milliseconds it has been unfinished.
    pub(super) for_ms: u64,
    header: Vec<u8>,
    frame: Option<PartialFrame>,
    message_opcode: Option<u8>,
    message: Vec<u8>,
    control: Vec<u8>,
}

/// See [`FrameState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct PartialFrame {
    opcode: u8,
    fin: bool,
    mask: [u8; 4],
    remaining: u64,
    unmasked: u64,
}

impl PartialState {
    pub(super) fn new(state: ReaderState, for_ms: u64) -> Self {
        let ReaderState { header, frame, message_opcode, message, control } = state;
        let frame = frame.map(|FrameState { opcode, fin, mask, remaining, unmasked }| PartialFrame {
            opcode,
            fin,
            mask,
            remaining,
            unmasked,
        });
        Self { for_ms, header, frame, message_opcode, message, control }
    }

    pub(super) fn into_reader_state(self) -> ReaderState {
        let Self { header, frame, message_opcode, message, control, .. } = self;
        let frame = frame.map(|PartialFrame { opcode, fin, mask, remaining, unmasked }| FrameState {
            opcode,
            fin,
            mask,
            remaining,
            unmasked,
        });
        ReaderState { header, frame, message_opcode, message, control }
    }
}

/// A codec's number in the encoding.
pub(super) fn codec_number(codec: Codec) -> u8 {
    match codec {
        Codec::Json => 0,
    }
}

/// The codec of a number.
pub(super) fn codec_of(number: u8) -> Option<Codec> {
    (number == codec_number(Codec::Json)).then_some(Codec::Json)
}

fn format() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<SNAPSHOT_BYTES_MAX>()
}

impl ConnectionState {
    /// The bytes; `None`: there would be more than [`SNAPSHOT_BYTES_MAX`].
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = SNAPSHOT_VERSION.to_le_bytes().to_vec();
        bytes.extend(bincode::encode_to_vec(self, format()).ok()?);
        (bytes.len() <= SNAPSHOT_BYTES_MAX).then_some(bytes)
    }

    /// The state that `bytes` are, all of them.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ImportError> {
        let (version, bytes) = bytes.split_first_chunk::<2>().ok_or(ImportError::Malformed)?;
        let version = u16::from_le_bytes(*version);
        if version != SNAPSHOT_VERSION {
            return Err(ImportError::Version(version));
        }
        let (state, len) = bincode::decode_from_slice(bytes, format()).map_err(|_| ImportError::Malformed)?;
        if len < bytes.len() {
            return Err(ImportError::Malformed);
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ConnectionState {
        let sub = SubscriptionState {
            channel: "room:a".into(),
            flags: 6,
            expire_at: Some(1_790_000_000),
            epoch: 7,
            offset: 300,
            behind: Some(1),
            ..SubscriptionState::default()
        };
        let reader =
            ReaderState { message_opcode: Some(1), message: b"abc".to_vec(), ..ReaderState::default() };
        ConnectionState {
            client: 5,
            user: "u".into(),
            subs: vec![sub.clone(), SubscriptionState { chan_info: Some(b"{}".to_vec()), ..sub }],
            unsent: b"rest".to_vec(),
            blocked_for_ms: Some(12),
            partial: Some(PartialState::new(reader, 3)),
            ..ConnectionState::default()
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for state in [ConnectionState::default(), sample()] {
            let bytes = state.encode().expect("it is small");
            assert_eq!(ConnectionState::decode(&bytes).expect("our own bytes"), state);
        }
    }

    /// The first version as it is written, for those who read it later.
    #[test]
    fn the_encoding_is_that_of_its_version() {
        let bytes =
            ConnectionState { user: "u".into(), ping_in_ms: 300, ..ConnectionState::default() }.encode();
        assert_eq!(bytes.expect("it is small"), [1, 0, 0, 1, b'u', 0, 0, 0, 251, 44, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn bytes_from_anywhere_are_an_error_or_a_state() {
        let bytes = sample().encode().expect("it is small");
        for len in 0..bytes.len() {
            assert!(ConnectionState::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
        let more = [&bytes[..], b"x"].concat();
        assert!(matches!(ConnectionState::decode(&more), Err(ImportError::Malformed)));
        for at in 2..bytes.len() {
            for value in 0..=255 {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = ConnectionState::decode(&changed);
            }
        }
        // A list longer than memory.
        let endless = [&bytes[..4], &[253], &[0xff; 8]].concat();
        assert!(matches!(ConnectionState::decode(&endless), Err(ImportError::Malformed)));
    }

    #[test]
    fn another_version_is_told() {
        let mut bytes = sample().encode().expect("it is small");
        bytes[0] = 2;
        assert!(matches!(ConnectionState::decode(&bytes), Err(ImportError::Version(2))));
    }
}
