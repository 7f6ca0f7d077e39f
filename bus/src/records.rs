//! A run of canonical publication records, decoded one by one as it is read.
//!
//! Owns: iterating. Must not know: what a record looks like (`ringmain_proto::record` does).
//! Invariant: never panics on bytes that are no records; it ends there.

use ringmain_proto::message::Publication;

/// Publications as contiguous canonical records: what histories hold, and what travels between shards and
/// from the control thread without being encoded again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Records<'a> {
    bytes: &'a [u8],
}

impl<'a> Records<'a> {
    /// Nothing.
    pub const EMPTY: Records<'static> = Records { bytes: &[] };

    /// Over whole records, one behind the other.
    pub const fn new(bytes: &'a [u8]) -> Records<'a> {
        Records { bytes }
    }

    /// What has not been read yet.
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Publication<'a>;

    fn next(&mut self) -> Option<Publication<'a>> {
        match Publication::read_record(self.bytes) {
            Some((publication, length)) => {
                self.bytes = &self.bytes[length..];
                Some(publication)
            }
            None => {
                self.bytes = &[];
                None
            }
        }
    }
}
