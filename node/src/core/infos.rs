//! The bytes of what users show of themselves: infos in sessions, members in presence.
//!
//! Owns the account of a shard and its maximum, `limits.info_pool_bytes`. Each info is at most
//! [`INFO_BYTES_MAX`] long, but there may be one for every subscription, and presence holds a copy of
//! two: thousands of members with long infos would be memory without a bound. It must not know who is
//! refused, nor how.
//!
//! Invariants:
//! * what is held is counted, from before it is stored until it is dropped;
//! * what nobody shows costs nothing, also where the pool is full.

use ringmain_proto::close::ErrorCode;
use ringmain_proto::limits::INFO_BYTES_MAX;

use super::engine::Slot;
use super::mesh::Identity;
use super::shard::Core;

/// What a member of presence takes beside its identity, in bytes: at most 4.6 places of 17 bytes in the
/// channel's table, that table's share, the counts of the shared identity and the allocator's rounding.
pub const MEMBER_BYTES: usize = 128;

/// See the module's doc.
#[derive(Debug)]
pub(crate) struct Infos {
    bytes: usize,
    bytes_max: usize,
}

impl Infos {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self { bytes: 0, bytes_max: usize::try_from(bytes_max).unwrap_or(usize::MAX) }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts bytes that are about to be held. Full: error 111, for others leave, and the client may try again.
    pub(crate) fn admit(&mut self, bytes: usize) -> Result<(), ErrorCode> {
        if bytes > 0 && self.bytes + bytes > self.bytes_max {
            return Err(ErrorCode::TooManyRequests);
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Counts an info that takes another's place.
    pub(crate) fn replace(&mut self, old: Option<&[u8]>, new: Option<&[u8]>) -> Result<(), ErrorCode> {
        let (old, new) = (len(old), len(new));
        self.admit(new.saturating_sub(old))?;
        self.release(old.saturating_sub(new));
        Ok(())
    }

    /// Bytes that were held.
    pub(crate) fn release(&mut self, bytes: usize) {
        debug_assert!(self.bytes >= bytes, "more infos are dropped than were held");
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// Bytes of an info.
pub(crate) fn len(info: Option<&[u8]>) -> usize {
    info.map_or(0, <[u8]>::len)
}

/// Whether an info is short enough to be shown.
pub(crate) fn is_short(info: Option<&[u8]>) -> bool {
    len(info) <= INFO_BYTES_MAX
}

/// Bytes of a member of presence.
pub(crate) fn member_bytes(identity: &Identity) -> usize {
    MEMBER_BYTES + identity.bytes()
}

impl Core {
    /// Drops what a session rarely has, and its infos from the account.
    pub(crate) fn drop_extra(&mut self, slot: Slot) {
        let Some(extra) = self.sessions.get_mut(slot).extra.take() else { return };
        let subs = extra.subs.iter().map(|sub| len(sub.chan_info.as_deref()));
        self.infos.release(len(extra.conn_info.as_deref()) + subs.sum::<usize>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_holds_its_maximum_and_not_a_byte_more() {
        let mut infos = Infos::new(100);
        assert_eq!(infos.admit(60), Ok(()));
        assert_eq!(infos.admit(41), Err(ErrorCode::TooManyRequests));
        assert_eq!(infos.admit(40), Ok(()));
        assert_eq!((infos.bytes(), infos.admit(0)), (100, Ok(())), "what is empty always fits");
        assert_eq!(infos.replace(Some(&[0; 40]), Some(&[0; 41])), Err(ErrorCode::TooManyRequests));
        assert_eq!(infos.replace(Some(&[0; 40]), Some(&[0; 39])), Ok(()));
        assert_eq!(infos.replace(None, Some(b"x")), Ok(()));
        assert_eq!(infos.replace(Some(&[0; 39]), None), Ok(()));
        infos.release(61);
        assert_eq!(infos.bytes(), 0);
    }
}
