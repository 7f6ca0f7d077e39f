//! The canonical publication record: one publication as bytes, neutral to every client protocol.
//!
//! Owns the layout in which publications lie in history rings and travel between shards and nodes.
//! Must not know channels, epochs' meaning, or client codecs. Reading is zero-copy; a record tells
//! its own length, so that records are walked in a contiguous buffer.
//!
//! Layout, little endian: the fixed part
//!
//! | bytes | field |
//! |---|---|
//! | 4 | total length of the record, these four included |
//! | 4 | length of `data` |
//! | 8 | offset |
//! | 8 | time in milliseconds |
//! | 2 | length of the packed tags |
//! | 1 | flags: 1 info, 2 conn_info, 4 chan_info, 8 epoch |
//! | 1 | zero |
//!
//! then `data`, the packed tags, and what the flags announce, texts with their length before them: user
//! (u16) and client id (16 bytes, big endian), conn_info (u32), chan_info (u32), epoch (u16).
//!
//! Invariant: whatever [`Publication::write_record`] wrote, [`Publication::read_record`] reads back
//! equal, whatever follows it in the buffer.

use std::borrow::Cow;

use crate::client::ClientId;
use crate::message::{ClientInfo, Publication};
use crate::tags::Tags;

/// Bytes of the fixed part.
pub const RECORD_HEADER_BYTES: usize = 28;

const CLIENT_ID_BYTES: usize = 16;

const FLAG_INFO: u8 = 1;
const FLAG_CONN_INFO: u8 = 2;
const FLAG_CHAN_INFO: u8 = 4;
const FLAG_EPOCH: u8 = 8;

impl<'a> Publication<'a> {
    /// Exact length of this publication's record, in bytes.
    pub fn record_len(&self) -> usize {
        let info = self.info.map_or(0, |info| {
            2 + cut_text(info.user).len()
                + CLIENT_ID_BYTES
                + info.conn_info.map_or(0, |bytes| 4 + bytes.len())
                + info.chan_info.map_or(0, |bytes| 4 + bytes.len())
        });
        let epoch = self.epoch.as_ref().map_or(0, |epoch| 2 + cut_text(epoch).len());
        RECORD_HEADER_BYTES + self.data.len() + self.tags.packed().len() + info + epoch
    }

    /// Appends the record to `out`; returns its length.
    ///
    /// Lengths beyond the layout's fields (4 GiB of data, 64 KiB of user or epoch) are
    /// excluded by the limits in force long before; user and epoch are cut at a character
    /// boundary rather than written wrong.
    pub fn write_record(&self, out: &mut Vec<u8>) -> usize {
        let (start, len) = (out.len(), self.record_len());
        out.resize(start + len, 0);
        self.write_record_at(self.offset, &mut out[start..]);
        len
    }

    /// Writes the record of this publication at `offset` into `out`, which is [`record_len`](Self::record_len)
    /// long.
    pub fn write_record_at(&self, offset: u64, out: &mut [u8]) {
        let total = out.len() as u32;
        let mut header = [0u8; RECORD_HEADER_BYTES];
        header[..4].copy_from_slice(&total.to_le_bytes());
        header[4..8].copy_from_slice(&len_u32(self.data).to_le_bytes());
        header[8..16].copy_from_slice(&offset.to_le_bytes());
        header[16..24].copy_from_slice(&self.time_ms.to_le_bytes());
        header[24..26].copy_from_slice(&(self.tags.packed().len() as u16).to_le_bytes());
        header[26] = self.record_flags();
        let out = put(out, &header);
        let out = put(out, self.data);
        let mut out = put(out, self.tags.packed());
        if let Some(info) = &self.info {
            out = put_text(out, info.user);
            out = put(out, &info.client.0.to_be_bytes());
            for bytes in [info.conn_info, info.chan_info].into_iter().flatten() {
                out = put(out, &len_u32(bytes).to_le_bytes());
                out = put(out, bytes);
            }
        }
        if let Some(epoch) = &self.epoch {
            out = put_text(out, epoch);
        }
        debug_assert!(out.is_empty(), "a record is as long as it said");
    }

    /// Reads the record at the start of `bytes`; returns it with its total length, where the next one
    /// begins. `None`: cut short or not a record.
    pub fn read_record(bytes: &'a [u8]) -> Option<(Publication<'a>, usize)> {
        let header = bytes.first_chunk::<RECORD_HEADER_BYTES>()?;
        let total = u32_at(header, 0) as usize;
        let record = bytes.get(RECORD_HEADER_BYTES..total)?;
        let flags = header[26];
        let (data, rest) = record.split_at_checked(u32_at(header, 4) as usize)?;
        let tags_len = usize::from(u16::from_le_bytes([header[24], header[25]]));
        let (tags, rest) = rest.split_at_checked(tags_len)?;
        let mut rest = rest;
        let info = if flags & FLAG_INFO == 0 { None } else { Some(take_info(&mut rest, flags)?) };
        let epoch = if flags & FLAG_EPOCH == 0 { None } else { Some(take_text(&mut rest)?) };
        if !rest.is_empty() {
            return None;
        }
        let publication = Publication {
            offset: u64_at(header, 8),
            data,
            info,
            tags: Tags::from_packed(tags)?,
            time_ms: u64_at(header, 16).cast_signed(),
            epoch: epoch.map(Cow::Borrowed),
        };
        Some((publication, total))
    }

    fn record_flags(&self) -> u8 {
        let mut flags = 0;
        if let Some(info) = &self.info {
            flags |= FLAG_INFO;
            flags |= if info.conn_info.is_some() { FLAG_CONN_INFO } else { 0 };
            flags |= if info.chan_info.is_some() { FLAG_CHAN_INFO } else { 0 };
        }
        flags | if self.epoch.is_some() { FLAG_EPOCH } else { 0 }
    }
}

/// Offset of the record at the start of `bytes`, without reading the rest of it.
pub fn record_offset(bytes: &[u8]) -> Option<u64> {
    bytes.first_chunk::<RECORD_HEADER_BYTES>().map(|header| u64_at(header, 8))
}

/// Total length of the record at the start of `bytes`; `None` when `bytes` does not hold all of it.
pub fn record_total(bytes: &[u8]) -> Option<usize> {
    let total = u32_at(bytes.first_chunk::<RECORD_HEADER_BYTES>()?, 0) as usize;
    (total >= RECORD_HEADER_BYTES && total <= bytes.len()).then_some(total)
}

/// Walks the records of a contiguous buffer; ends at its end, or at the first thing that is not a
/// record.
pub fn records(bytes: &[u8]) -> Records<'_> {
    Records(bytes)
}

/// Iterator of [`records`].
#[derive(Clone, Debug)]
pub struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Publication<'a>;

    fn next(&mut self) -> Option<Publication<'a>> {
        let (publication, total) = Publication::read_record(self.0)?;
        self.0 = &self.0[total..];
        Some(publication)
    }
}

fn take_info<'a>(rest: &mut &'a [u8], flags: u8) -> Option<ClientInfo<'a>> {
    let user = take_text(rest)?;
    let (client, tail) = rest.split_first_chunk::<CLIENT_ID_BYTES>()?;
    *rest = tail;
    let client = ClientId(u128::from_be_bytes(*client));
    let conn_info = if flags & FLAG_CONN_INFO == 0 { None } else { Some(take_bytes(rest)?) };
    let chan_info = if flags & FLAG_CHAN_INFO == 0 { None } else { Some(take_bytes(rest)?) };
    Some(ClientInfo { user, client, conn_info, chan_info })
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, tail) = rest.split_first_chunk::<4>()?;
    let (bytes, tail) = tail.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    *rest = tail;
    Some(bytes)
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let (len, tail) = rest.split_first_chunk::<2>()?;
    let (text, tail) = tail.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
    *rest = tail;
    std::str::from_utf8(text).ok()
}

/// Puts `bytes` at the start of `out`; returns what is behind them.
#[inline]
fn put<'o>(out: &'o mut [u8], bytes: &[u8]) -> &'o mut [u8] {
    let (place, rest) = out.split_at_mut(bytes.len());
    place.copy_from_slice(bytes);
    rest
}

#[inline]
fn put_text<'o>(out: &'o mut [u8], text: &str) -> &'o mut [u8] {
    let text = cut_text(text);
    put(put(out, &(text.len() as u16).to_le_bytes()), text.as_bytes())
}

/// As much of a text as its length field can tell.
#[inline]
fn cut_text(text: &str) -> &str {
    match text.len() {
        0..=TEXT_BYTES_MAX => text,
        _ => &text[..text.floor_char_boundary(TEXT_BYTES_MAX)],
    }
}

const TEXT_BYTES_MAX: usize = u16::MAX as usize;

fn len_u32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("payloads are bounded far below 4 GiB")
}

fn u32_at(header: &[u8; RECORD_HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

fn u64_at(header: &[u8; RECORD_HEADER_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tags::TagsBuf;

    fn write(publications: &[Publication<'_>]) -> Vec<u8> {
        let mut out = Vec::new();
        for publication in publications {
            let start = out.len();
            let written = publication.write_record(&mut out);
            assert_eq!(written, publication.record_len());
            assert_eq!(out.len() - start, written);
        }
        out
    }

    #[test]
    fn records_are_walked_in_one_buffer() {
        let mut tags = TagsBuf::new();
        tags.push("key", "gold").unwrap();
        let bare = Publication { offset: 1, data: b"{}", ..Publication::default() };
        let full = Publication {
            offset: u64::MAX,
            data: br#"{"text":"hi"}"#,
            info: Some(ClientInfo {
                user: "ünal",
                client: ClientId(1 << 90),
                conn_info: Some(b"{\"a\":1}"),
                chan_info: Some(b""),
            }),
            tags: tags.as_tags(),
            time_ms: -5,
            epoch: Some("epoch".into()),
        };
        let last = Publication { offset: 3, ..Publication::default() };
        let buffer = write(&[bare.clone(), full.clone(), last.clone()]);
        assert_eq!(records(&buffer).collect::<Vec<_>>(), [bare.clone(), full, last]);
        assert_eq!(record_offset(&buffer), Some(1));
        assert_eq!(record_total(&buffer), Some(bare.record_len()));
        assert_eq!(record_total(&buffer[..20]), None);
    }

    #[test]
    fn what_is_cut_short_is_no_record() {
        let info = ClientInfo { user: "u", client: ClientId(7), conn_info: Some(b"1"), chan_info: None };
        let publication =
            Publication { data: b"1", info: Some(info), epoch: Some("e".into()), ..Publication::default() };
        let record = write(&[publication]);
        for cut in 0..record.len() {
            assert_eq!(Publication::read_record(&record[..cut]), None, "cut at {cut}");
        }
    }

    prop_compose! {
        fn any_info()(
            user in ".{0,20}", client: u128,
            conn_info in prop::option::of(prop::collection::vec(any::<u8>(), 0..30)),
            chan_info in prop::option::of(prop::collection::vec(any::<u8>(), 0..30)),
        ) -> (String, u128, Option<Vec<u8>>, Option<Vec<u8>>) { (user, client, conn_info, chan_info) }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            offset: u64, time_ms: i64,
            data in prop::collection::vec(any::<u8>(), 0..200),
            info in prop::option::of(any_info()),
            pairs in prop::collection::vec((".{0,10}", ".{0,10}"), 0..4),
            epoch in prop::option::of(".{0,20}"),
            after in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut tags = TagsBuf::new();
            for (key, value) in &pairs {
                tags.push(key, value).unwrap();
            }
            let info = info.as_ref().map(|(user, client, conn_info, chan_info)| ClientInfo {
                user, client: ClientId(*client), conn_info: conn_info.as_deref(), chan_info: chan_info.as_deref(),
            });
            let epoch = epoch.as_deref().map(Cow::Borrowed);
            let publication =
                Publication { offset, data: &data, info, tags: tags.as_tags(), time_ms, epoch };
            let mut buffer = write(std::slice::from_ref(&publication));
            let total = buffer.len();
            buffer.extend_from_slice(&after);
            prop_assert_eq!(Publication::read_record(&buffer), Some((publication, total)));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            if let Some((publication, total)) = Publication::read_record(&bytes) {
                prop_assert!(total <= bytes.len());
                prop_assert!(publication.data.len() <= total);
            }
        }
    }
}
