//! What a canary carries: whose it is, and how far the channels are that its node has moved.
//!
//! Owns: the payload's form. Must not know: what marks mean to a subscriber.
//! Invariant: a payload of another release is read as far as it is known, or not at all; it never panics.

use std::sync::Arc;

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use crate::epoch::Epoch;
use crate::lineage::{Branch, Lineage};

/// Marks of one canary; the rest rides on the next.
pub(super) const MARKS_MAX: usize = 1024;

/// Largest payload read, in bytes.
const PAYLOAD_BYTES_MAX: usize = 4 << 20;

const VERSION: u8 = 1;

/// How far a channel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) epoch: Epoch,
    pub(super) top: u64,
    pub(super) lineage: Lineage,
    pub(super) ephemeral: bool,
}

#[derive(Encode, BorrowDecode)]
struct Payload<'a> {
    incarnation: u64,
    sequence: u64,
    #[allow(clippy::type_complexity, reason = "name, epoch, top, ephemeral, branches: a form on the wire")]
    marks: Vec<(&'a str, u64, u64, bool, Vec<(u64, u64)>)>,
}

/// The payload of a node's canary with what `marks` holds, up to [`MARKS_MAX`].
pub(super) fn encode<'a>(
    incarnation: u64,
    sequence: u64,
    marks: impl Iterator<Item = (&'a Arc<str>, &'a Mark)>,
) -> Bytes {
    let marks = marks.take(MARKS_MAX).map(|(name, mark)| {
        let branches = mark.lineage.branches().iter().map(|branch| (branch.epoch.get(), branch.top));
        (&**name, mark.epoch.get(), mark.top, mark.ephemeral, branches.collect())
    });
    let payload = Payload { incarnation, sequence, marks: marks.collect() };
    let mut bytes = vec![VERSION];
    // Only a writer that fails makes this fail, and a Vec does not.
    let _ = bincode::encode_into_std_write(payload, &mut bytes, bincode::config::standard());
    bytes.into()
}

/// Incarnation, sequence and marks of a canary.
type Canary<'a> = (u64, u64, Vec<(&'a str, Mark)>);

/// Reads a payload.
pub(super) fn decode(bytes: &[u8]) -> Option<Canary<'_>> {
    let (version, rest) = bytes.split_first()?;
    let config = bincode::config::standard().with_limit::<PAYLOAD_BYTES_MAX>();
    let (payload, _): (Payload<'_>, usize) =
        (*version == VERSION).then(|| bincode::borrow_decode_from_slice(rest, config).ok())??;
    let marks = payload.marks.into_iter().map(|(name, epoch, top, ephemeral, branches)| {
        let mut lineage = Lineage::EMPTY;
        for (epoch, top) in branches {
            lineage.push(Branch { epoch: Epoch::new(epoch), top });
        }
        (name, Mark { epoch: Epoch::new(epoch), top, lineage, ephemeral })
    });
    Some((payload.incarnation, payload.sequence, marks.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn marks_are_read_back_and_bounded() {
        let mut lineage = Lineage::EMPTY;
        lineage.push(Branch { epoch: Epoch::new(1), top: 2 });
        let mark = Mark { epoch: Epoch::new(3), top: 4, lineage, ephemeral: true };
        let name: Arc<str> = "news".into();
        for (count, kept) in [(0, 0), (1, 1), (MARKS_MAX, MARKS_MAX), (MARKS_MAX + 1, MARKS_MAX)] {
            let bytes = encode(5, 6, std::iter::repeat_n((&name, &mark), count));
            let (incarnation, sequence, marks) = decode(&bytes).unwrap();
            assert_eq!((incarnation, sequence, marks.len()), (5, 6, kept));
            assert!(marks.iter().all(|read| *read == ("news", mark)));
        }
    }

    proptest! {
        #[test]
        fn no_payload_panics(mut bytes: Vec<u8>) {
            let _ = decode(&bytes);
            bytes.insert(0, VERSION);
            let _ = decode(&bytes);
        }
    }
}
