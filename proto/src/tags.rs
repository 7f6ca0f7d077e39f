//! Tags of a publication: a packed list of (key, value) pairs in one byte slice.
//!
//! Owns the packing only: per pair `key_len: u16 LE, value_len: u16 LE, key, value`. The list is
//! neutral to every codec and is stored in records as it is. Must not know what tags mean.
//! Invariant: a [`TagsBuf`] holds valid UTF-8 pairs, at most
//! [`TAGS_BYTES_MAX`] packed bytes; a [`Tags`] read from elsewhere was walked once and is as valid.

use crate::limits::TAGS_BYTES_MAX;

const PAIR_HEADER_BYTES: usize = 4;

/// A borrowed list of tags; empty by default.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Tags<'a>(&'a [u8]);

impl<'a> Tags<'a> {
    /// Takes packed bytes as they stand in a record. `None` when they are not a packed list of UTF-8
    /// pairs.
    pub fn from_packed(packed: &'a [u8]) -> Option<Self> {
        let mut rest = packed;
        while !rest.is_empty() {
            let (_, _, next) = split_pair(rest)?;
            rest = next;
        }
        Some(Self(packed))
    }

    /// The packed bytes.
    pub fn packed(self) -> &'a [u8] {
        self.0
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// The pairs, in the order in which they were added.
    pub fn iter(self) -> TagsIter<'a> {
        TagsIter(self.0)
    }

    /// The value of the last pair with this key.
    pub fn get(self, key: &str) -> Option<&'a str> {
        self.iter().filter(|(k, _)| *k == key).last().map(|(_, value)| value)
    }
}

impl<'a> IntoIterator for Tags<'a> {
    type Item = (&'a str, &'a str);
    type IntoIter = TagsIter<'a>;

    fn into_iter(self) -> TagsIter<'a> {
        self.iter()
    }
}

impl std::fmt::Debug for Tags<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Iterator over [`Tags`].
#[derive(Clone, Debug)]
pub struct TagsIter<'a>(&'a [u8]);

impl<'a> Iterator for TagsIter<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        let (key, value, rest) = split_pair(self.0)?;
        self.0 = rest;
        Some((key, value))
    }
}

fn split_pair(packed: &[u8]) -> Option<(&str, &str, &[u8])> {
    let (header, rest) = packed.split_first_chunk::<PAIR_HEADER_BYTES>()?;
    let key_len = usize::from(u16::from_le_bytes([header[0], header[1]]));
    let value_len = usize::from(u16::from_le_bytes([header[2], header[3]]));
    let (key, rest) = rest.split_at_checked(key_len)?;
    let (value, rest) = rest.split_at_checked(value_len)?;
    Some((std::str::from_utf8(key).ok()?, std::str::from_utf8(value).ok()?, rest))
}

/// The pair would make the list larger than [`TAGS_BYTES_MAX`]: the publisher's fault, nothing was
/// added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tags exceed {TAGS_BYTES_MAX} bytes")]
pub struct TagsFull;

/// An owned list of tags under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TagsBuf(Vec<u8>);

impl TagsBuf {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a pair. Keys are not made unique: the caller's map already is.
    pub fn push(&mut self, key: &str, value: &str) -> Result<(), TagsFull> {
        let packed_len = self.0.len() + PAIR_HEADER_BYTES + key.len() + value.len();
        let (Ok(key_len), Ok(value_len)) = (u16::try_from(key.len()), u16::try_from(value.len())) else {
            return Err(TagsFull);
        };
        if packed_len > TAGS_BYTES_MAX {
            return Err(TagsFull);
        }
        self.0.extend_from_slice(&key_len.to_le_bytes());
        self.0.extend_from_slice(&value_len.to_le_bytes());
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(value.as_bytes());
        Ok(())
    }

    /// The list, borrowed.
    pub fn as_tags(&self) -> Tags<'_> {
        Tags(&self.0)
    }

    /// Forgets all pairs, keeps the memory.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_come_back_in_order() {
        let mut tags = TagsBuf::new();
        assert!(tags.as_tags().is_empty());
        for (key, value) in [("b", "1"), ("", ""), ("ä", "2"), ("b", "3")] {
            tags.push(key, value).unwrap();
        }
        let tags = tags.as_tags();
        let pairs: Vec<_> = tags.iter().collect();
        assert_eq!(pairs, [("b", "1"), ("", ""), ("ä", "2"), ("b", "3")]);
        assert_eq!((tags.get("b"), tags.get("c")), (Some("3"), None));
        assert_eq!(Tags::from_packed(tags.packed()), Some(tags));
    }

    #[test]
    fn the_limit_is_exact() {
        let mut tags = TagsBuf::new();
        let most = "x".repeat(TAGS_BYTES_MAX - PAIR_HEADER_BYTES - 1);
        assert_eq!(tags.push("kk", &most), Err(TagsFull));
        assert!(tags.as_tags().is_empty(), "nothing was added");
        assert_eq!(tags.push("k", &most), Ok(()));
        assert_eq!(tags.push("", ""), Err(TagsFull));
        assert_eq!(TagsBuf::new().push("k", &"x".repeat(70_000)), Err(TagsFull));
    }

    #[test]
    fn what_is_not_a_packed_list_is_refused() {
        for packed in [&[1u8, 0, 0][..], &[1, 0, 0, 0], &[1, 0, 0, 0, 0xff], &[0, 0, 1, 0, 0xff]] {
            assert_eq!(Tags::from_packed(packed), None, "{packed:?}");
        }
    }
}
