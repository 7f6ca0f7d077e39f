//! Who is in a channel.
//!
//! Owns the members of one channel, by client id. Most channels have one member or a few: those lie in
//! a list; beyond [`FEW_MAX`] they move to a table, and stay there until the channel is empty.

use std::collections::HashMap;
use std::sync::Arc;

use super::mesh::{Identity, IdentityInfo};

/// Members of the list at the most: a search of so many is as quick as a hash.
const FEW_MAX: usize = 8;

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    few: Vec<(u128, Arc<IdentityInfo>)>,
    #[expect(clippy::box_collection, reason = "most channels have no table: one null pointer")]
    many: Option<Box<HashMap<u128, Arc<IdentityInfo>>>>,
}

impl Presence {
    /// Adds a member, or renews it.
    pub(crate) fn insert(&mut self, identity: &Identity) {
        let (client, info) = (identity.client, Arc::clone(&identity.info));
        if let Some(many) = &mut self.many {
            many.insert(client, info);
        } else if let Some(member) = self.few.iter_mut().find(|(known, _)| *known == client) {
            member.1 = info;
        } else if self.few.len() < FEW_MAX {
            self.few.reserve_exact(1);
            self.few.push((client, info));
        } else {
            let mut many: HashMap<_, _> = std::mem::take(&mut self.few).into_iter().collect();
            many.insert(client, info);
            self.many = Some(Box::new(many));
        }
    }

    /// Removes a member, if it is one.
    pub(crate) fn remove(&mut self, client: u128) {
        match &mut self.many {
            Some(many) => {
                many.remove(&client);
                if many.is_empty() {
                    self.many = None;
                }
            }
            None => self.few.retain(|(known, _)| *known != client),
        }
    }

    /// Members.
    pub(crate) fn len(&self) -> usize {
        self.many.as_ref().map_or(self.few.len(), |many| many.len())
    }

    /// Whether there is nobody.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The members, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u128, &IdentityInfo)> {
        let few = self.few.iter().map(|(client, info)| (*client, &**info));
        let many = self.many.iter().flat_map(|many| many.iter());
        few.chain(many.map(|(client, info)| (*client, &**info)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(client: u128) -> Identity {
        Identity { client, info: Arc::default() }
    }

    #[test]
    fn members_come_and_go_across_the_limit() {
        let mut presence = Presence::default();
        for client in 0..=FEW_MAX as u128 {
            presence.insert(&identity(client));
            presence.insert(&identity(client));
            assert_eq!(presence.len(), client as usize + 1);
            assert_eq!(presence.many.is_some(), client == FEW_MAX as u128, "a table from max + 1 on");
        }
        for client in 0..=FEW_MAX as u128 {
            presence.remove(client);
            assert!(presence.iter().all(|(known, _)| known > client));
        }
        assert!(presence.is_empty() && presence.many.is_none());
    }
}
