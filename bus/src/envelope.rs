//! The envelope: a publication as the bytes that lie on a broker and travel between nodes.
//!
//! Owns: the layout, its version, compression. Must not know: any broker; epochs and offsets are not in it, the
//! broker gives them.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version ([`VERSION`]) |
//! | 4 | length of the head, little endian |
//! | … | the head: `Head` as bincode, then fields of later releases, which are skipped |
//! | … | the canonical record ([`ringmain_proto::record`]), as lz4 where the head gives its raw length |
//!
//! Invariants: what [`encode`] wrote, [`decode`] reads back equal; no input panics or takes more memory than
//! [`RECORD_BYTES_MAX`]; a head may grow at its end without a new version, so a release reads what the release
//! before and after it writes. A new version is for what must not be skipped.

use std::borrow::Cow;

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use crate::backend::OwnedId;
use crate::types::IDEMPOTENCY_KEY_BYTES_MAX;

/// The first byte of every envelope.
pub const VERSION: u8 = 1;

/// Records above this many bytes are compressed if that makes them smaller.
pub const COMPRESS_ABOVE_BYTES: usize = 1024;

/// Largest record read, in bytes, uncompressed.
pub const RECORD_BYTES_MAX: usize = 16 << 20;

/// Largest head, in bytes: the channel's name, an id and what a backend adds.
pub const HEAD_BYTES_MAX: usize = 16 << 10;

/// Bytes before the head.
const PREFIX_BYTES: usize = 5;

const _: () = assert!(IDEMPOTENCY_KEY_BYTES_MAX < HEAD_BYTES_MAX / 4);

#[derive(Encode, BorrowDecode)]
struct Head<'a> {
    channel: &'a str,
    id: HeadId<'a>,
    extra: &'a [u8],
    /// Length of the record where it is compressed, else 0.
    raw_bytes: u32,
}

#[derive(Encode, BorrowDecode)]
enum HeadId<'a> {
    None,
    Node(u64, u64),
    Key(&'a str),
}

/// What a backend sends along with a record.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meta<'a> {
    /// The publication's id, for those who drop repeats.
    pub id: Option<&'a OwnedId>,
    /// Bytes that mean something to this backend alone.
    pub extra: &'a [u8],
}

/// An envelope read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// The channel's name.
    pub channel: &'a str,
    /// The publication's id, if it was sent.
    pub id: Option<OwnedId>,
    /// The backend's bytes.
    pub extra: &'a [u8],
    /// The canonical record; not looked into.
    pub record: Cow<'a, [u8]>,
}

/// Why an envelope is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// A release that is not ours wrote it. Nobody's fault while nodes are being replaced: count it, drop it, and
    /// doubt its channel.
    #[error("an envelope of version {0}, not {VERSION}")]
    Version(u8),
    /// Not an envelope, or cut short. Something else writes where we read: count it and drop it.
    #[error("not an envelope")]
    Malformed,
}

/// The envelope of a record. The channel's name and `meta` are at most [`HEAD_BYTES_MAX`] together, which their
/// own limits ensure.
pub fn encode(channel: &str, record: &[u8], meta: Meta<'_>) -> Bytes {
    let compressed = (record.len() > COMPRESS_ABOVE_BYTES && record.len() <= RECORD_BYTES_MAX)
        .then(|| lz4_flex::block::compress(record))
        .filter(|compressed| compressed.len() < record.len());
    let head = Head {
        channel,
        id: match meta.id {
            None => HeadId::None,
            Some(OwnedId::Node(incarnation, sequence)) => HeadId::Node(*incarnation, *sequence),
            Some(OwnedId::Key(key)) => HeadId::Key(key),
        },
        extra: meta.extra,
        raw_bytes: if compressed.is_some() { record.len() as u32 } else { 0 },
    };
    let body = compressed.as_deref().unwrap_or(record);
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + channel.len() + meta.extra.len() + 64 + body.len());
    bytes.extend([VERSION, 0, 0, 0, 0]);
    // Only a writer that fails makes this fail, and a Vec does not.
    let written = bincode::encode_into_std_write(head, &mut bytes, bincode::config::standard());
    let head_bytes = written.unwrap_or(0) as u32;
    bytes[1..PREFIX_BYTES].copy_from_slice(&head_bytes.to_le_bytes());
    bytes.extend(body);
    bytes.into()
}

/// Reads an envelope.
pub fn decode(bytes: &[u8]) -> Result<Envelope<'_>, EnvelopeError> {
    let version = *bytes.first().ok_or(EnvelopeError::Malformed)?;
    if version != VERSION {
        return Err(EnvelopeError::Version(version));
    }
    parts(bytes).ok_or(EnvelopeError::Malformed)
}

fn parts(bytes: &[u8]) -> Option<Envelope<'_>> {
    let head_bytes = u32::from_le_bytes(bytes.get(1..PREFIX_BYTES)?.try_into().ok()?) as usize;
    if head_bytes > HEAD_BYTES_MAX {
        return None;
    }
    let (head, body) = bytes[PREFIX_BYTES..].split_at_checked(head_bytes)?;
    let config = bincode::config::standard().with_limit::<HEAD_BYTES_MAX>();
    // What follows in the head is of a later release.
    let (head, _): (Head<'_>, usize) = bincode::borrow_decode_from_slice(head, config).ok()?;
    let record = match head.raw_bytes as usize {
        0 => Cow::Borrowed(body),
        raw_bytes if raw_bytes > RECORD_BYTES_MAX => return None,
        raw_bytes => {
            let record = lz4_flex::block::decompress(body, raw_bytes).ok()?;
            Cow::Owned(Some(record).filter(|record| record.len() == raw_bytes)?)
        }
    };
    let id = match head.id {
        HeadId::None => None,
        HeadId::Node(incarnation, sequence) => Some(OwnedId::Node(incarnation, sequence)),
        HeadId::Key(key) => Some(OwnedId::Key(key.into())),
    };
    Some(Envelope { channel: head.channel, id, extra: head.extra, record })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(channel: &str, record: &[u8], id: Option<OwnedId>, extra: &[u8]) -> usize {
        let bytes = encode(channel, record, Meta { id: id.as_ref(), extra });
        let read = decode(&bytes).unwrap();
        assert_eq!((read.channel, &*read.record), (channel, record));
        assert_eq!((read.id, read.extra), (id, extra));
        bytes.len()
    }

    #[test]
    fn an_envelope_is_read_back() {
        check("", b"", None, b"");
        check("news", b"record", Some(OwnedId::Node(u64::MAX, 1)), b"x");
        check("user:#42", b"record", Some(OwnedId::Key("k".into())), b"");
    }

    #[test]
    fn large_records_are_compressed_if_smaller() {
        let at = check("c", &[7; COMPRESS_ABOVE_BYTES], None, b"");
        assert!(at > COMPRESS_ABOVE_BYTES);
        assert!(check("c", &[7; COMPRESS_ABOVE_BYTES + 1], None, b"") < 100);
        let mut nonces = crate::nonce::Nonces::new(1);
        let noise: Vec<u8> = (0..1000).flat_map(|_| nonces.draw().to_le_bytes()).collect();
        assert!(check("c", &noise, None, b"") > noise.len());
    }

    /// Version 1 as it was first written: later releases must read it.
    const FIRST: &[u8] = b"\x01\x07\0\0\0\x01c\x01\x05\x06\0\0record";

    #[test]
    fn the_release_before_and_after_is_read() {
        let read = decode(FIRST).unwrap();
        assert_eq!((read.channel, read.id, &*read.record), ("c", Some(OwnedId::Node(5, 6)), &b"record"[..]));
        assert_eq!(encode("c", b"record", Meta { id: Some(&OwnedId::Node(5, 6)), extra: b"" }), FIRST);
        // A later release has more in its head.
        let mut later = FIRST.to_vec();
        later[1] += 3;
        later.splice(12..12, *b"new");
        assert_eq!(decode(&later).unwrap(), decode(FIRST).unwrap());
        later[0] = 2;
        assert_eq!(decode(&later), Err(EnvelopeError::Version(2)));
    }

    #[test]
    fn what_is_no_envelope_is_refused() {
        for length in 1..12 {
            assert_eq!(decode(&FIRST[..length]), Err(EnvelopeError::Malformed), "{length}");
        }
        assert_eq!(decode(b""), Err(EnvelopeError::Malformed));
        let mut bomb = encode("c", &[0; 5000], Meta::default()).to_vec();
        let raw = bomb.windows(2).position(|pair| pair == 5000u16.to_le_bytes()).unwrap();
        bomb[raw] += 1;
        assert_eq!(decode(&bomb), Err(EnvelopeError::Malformed));
    }

    proptest! {
        #[test]
        fn no_input_panics(mut bytes: Vec<u8>, as_ours: bool) {
            if let (true, Some(version)) = (as_ours, bytes.first_mut()) {
                *version = VERSION;
            }
            let _ = decode(&bytes);
        }
    }
}
