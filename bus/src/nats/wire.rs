//! What nodes say to each other on a NATS server beside publications: canaries, hearts, questions, epoch records.
//!
//! Owns: their bytes. Must not know: connections.
//! Invariants: a version byte stands first; what follows a known message's fields is of a later release and skipped;
//! no input panics.

use bincode::{Decode, Encode};

use crate::nats::barrier::Witness;

/// First byte of all of these.
const VERSION: u8 = 1;

/// Largest of these messages read, in bytes.
const BYTES_MAX: usize = 1 << 20;

/// A node's canary in a stream: stored, said again, and heard by all nodes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Canary {
    pub(super) incarnation: u64,
    pub(super) number: u64,
    /// Channels that this node published on since its last canary (by hash), and how far.
    pub(super) tops: Vec<(u64, u64)>,
}

/// A node's sign of life to all nodes, and its ephemeral canary.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Heart {
    pub(super) incarnation: u64,
    pub(super) number: u64,
    /// The node ends: nobody is to wait for it.
    pub(super) closing: bool,
    /// Ephemeral channels that this node published on a moment ago (by hash), and the number of the last publication.
    pub(super) said: Vec<(u64, u64)>,
}

/// A question to all nodes; whoever hears it answers. So the one who asks knows that its interest has reached the
/// servers of all who answer, and what they have seen of the streams.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Ask {
    pub(super) incarnation: u64,
    pub(super) number: u64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Told {
    pub(super) incarnation: u64,
    /// Of the question.
    pub(super) number: u64,
    /// How many ephemeral publications the node has sent.
    pub(super) spoken: u64,
    /// What the node has seen of each stream.
    pub(super) witnesses: Vec<Witness>,
}

/// A stream's epoch, stored in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Record {
    pub(super) generation: u64,
    pub(super) nonce: u64,
}

/// Beside a channel's publications: where it stands, and what of it is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Mark {
    /// The channel's last publication before the mark.
    pub(super) top: u64,
    /// What has a lower sequence is cleared; `None`: what has a lower one than the mark itself.
    pub(super) cleared: Option<u64>,
}

/// The bytes of a message.
pub(super) fn write(message: &impl Encode) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    // Only a writer that fails makes this fail, and a Vec does not.
    let _ = bincode::encode_into_std_write(message, &mut bytes, bincode::config::standard());
    bytes
}

/// Reads a message; `None` for another version, or for what is none.
pub(super) fn read<T: Decode<()>>(bytes: &[u8]) -> Option<T> {
    let (&version, rest) = bytes.split_first()?;
    let config = bincode::config::standard().with_limit::<BYTES_MAX>();
    (version == VERSION).then(|| bincode::decode_from_slice(rest, config).ok())?.map(|(message, _)| message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_read_back() {
        let canary = Canary { incarnation: 1, number: 2, tops: vec![(u64::MAX, 3)] };
        let mut bytes = write(&canary);
        assert_eq!(read(&bytes), Some(canary.clone()));
        bytes.push(9);
        assert_eq!(read(&bytes), Some(canary), "of a later release");
        bytes[0] = 2;
        assert_eq!(read::<Canary>(&bytes), None);
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes: Vec<u8>) {
            let _ = (read::<Canary>(&bytes), read::<Heart>(&bytes), read::<Told>(&bytes));
        }
    }
}
