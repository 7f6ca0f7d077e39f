//! Who is in a channel.
//!
//! Owns the members of one channel, by client id. Most channels have one member or none: it lies in place;
//! beyond that they are in a table until the channel is empty.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use ringmain_proto::client::ClientId;

use super::mesh::Identity;

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) enum Presence {
    #[default]
    Nobody,
    One(Identity),
    Many(Box<HashTable<Identity>>),
}

/// Client ids are random already.
fn hash(client: ClientId) -> u64 {
    client.0 as u64 ^ (client.0 >> 64) as u64
}

impl Presence {
    /// Adds a member, or renews it. Returns what it was before.
    pub(crate) fn insert(&mut self, identity: &Identity) -> Option<Identity> {
        match self {
            Self::Nobody => *self = Self::One(identity.clone()),
            Self::One(member) if member.client() == identity.client() => {
                return Some(std::mem::replace(member, identity.clone()));
            }
            Self::One(_) => {
                let Self::One(member) = std::mem::take(self) else { unreachable!("it was one") };
                let mut table = HashTable::with_capacity(2);
                for member in [member, identity.clone()] {
                    table.insert_unique(hash(member.client()), member, |member| hash(member.client()));
                }
                *self = Self::Many(Box::new(table));
            }
            Self::Many(table) => {
                let client = identity.client();
                let entry = table.entry(
                    hash(client),
                    |member| member.client() == client,
                    |member| hash(member.client()),
                );
                match entry {
                    Entry::Occupied(mut entry) => {
                        return Some(std::mem::replace(entry.get_mut(), identity.clone()));
                    }
                    Entry::Vacant(entry) => entry.insert(identity.clone()),
                };
            }
        }
        None
    }

    /// Removes a member, if it is one. Returns what it was.
    pub(crate) fn remove(&mut self, client: ClientId) -> Option<Identity> {
        match self {
            Self::One(member) if member.client() == client => match std::mem::take(self) {
                Self::One(member) => Some(member),
                Self::Nobody | Self::Many(_) => unreachable!("it was one"),
            },
            Self::Nobody | Self::One(_) => None,
            Self::Many(table) => {
                let entry = table.find_entry(hash(client), |member| member.client() == client).ok()?;
                let (member, _) = entry.remove();
                if table.is_empty() {
                    *self = Self::Nobody;
                } else if table.capacity() > CAPACITY_MAX * table.len() {
                    table.shrink_to_fit(|member| hash(member.client()));
                }
                Some(member)
            }
        }
    }

    /// Members.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Nobody => 0,
            Self::One(_) => 1,
            Self::Many(table) => table.len(),
        }
    }

    /// Whether there is nobody.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Nobody)
    }

    /// The members, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Identity> {
        let (one, many) = match self {
            Self::Nobody => (None, None),
            Self::One(member) => (Some(member), None),
            Self::Many(table) => (None, Some(table.iter())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

/// Places for one member at the most: a table with more is shrunk. ([`super::infos::MEMBER_BYTES`] rests
/// on it.)
const CAPACITY_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(client: u128) -> Identity {
        Identity::new(ClientId(client), "u", None, None)
    }

    #[test]
    fn members_are_there_once_and_until_they_leave() {
        let mut presence = Presence::default();
        for client in 0..1000 {
            assert_eq!(presence.insert(&identity(client)), None);
            assert_eq!(presence.insert(&identity(client)), Some(identity(client)));
            assert_eq!(presence.len(), client as usize + 1);
            assert_eq!(presence.iter().count(), presence.len());
        }
        for client in 0..1000 {
            assert!(!presence.is_empty());
            assert_eq!(presence.remove(ClientId(client)), Some(identity(client)));
            assert_eq!(presence.remove(ClientId(client)), None);
            if let Presence::Many(table) = &presence {
                assert!(
                    table.capacity() <= CAPACITY_MAX * table.len(),
                    "{} of {}",
                    table.len(),
                    table.capacity()
                );
            }
            assert!(presence.iter().all(|member| member.client().0 > client));
            assert_eq!(presence.len(), 999 - client as usize);
        }
        assert!(presence.is_empty());
    }

    #[test]
    fn one_member_costs_its_identity_alone() {
        assert!(size_of::<Presence>() <= 24, "{}", size_of::<Presence>());
    }
}
