//! Where users belong: 4,096 slots over the nodes, by consistent hashing with bounded load.
//!
//! Where the bus gives a node several slots or none of them (Kafka: those of a partition), they are placed together: as
//! many *groups* as the bus has. With so few groups that a node might have too much, slots are placed one by one.
//!
//! Owns the assignment as a pure function of the nodes' names and capacities. It must not know users (a slot is
//! [`slot_of`](crate::core::cluster::slot_of) a user), nor whether anybody follows it: nodes may disagree for a
//! while, and then users are only spread less well.
//!
//! Invariants:
//! * no node has more than [`LOAD_MAX_PERCENT`] of its share, rounded up to a slot or a group, and in groups no more
//!   than [`GROUPED_LOAD_MAX_PERCENT`] of it;
//! * the same nodes give the same ring everywhere, in every release;
//! * when a node goes, few slots move beside its own.

use crate::core::cluster::SLOTS;

/// Points on the ring of a node with an average share. Enough that shares differ by some percent before loads are
/// bounded; a ring is made in a few milliseconds.
const POINTS: u64 = 160;

/// Slots of one node at the most, in percent of its share by capacity.
pub const LOAD_MAX_PERCENT: u64 = 110;

/// Slots of one node at the most where they are placed in groups, in percent of its share.
pub const GROUPED_LOAD_MAX_PERCENT: u64 = 125;

/// A node on the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingNode {
    /// What it is placed by; different for each.
    pub key: String,
    /// Its share, relative to the others; 0: none.
    pub capacity: u32,
}

/// The node of every slot, as an index into the nodes that the ring was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// By slot modulo their number.
    groups: Vec<u16>,
}

impl Ring {
    /// The ring of these nodes, with slots in so many groups (at least 1; [`SLOTS`] or more: each by itself).
    pub fn new(nodes: &[RingNode], groups: u32) -> Ring {
        let groups = groups.clamp(1, u32::from(SLOTS)) as u16;
        let total: u64 = nodes.iter().map(|node| u64::from(node.capacity)).sum();
        if total == 0 {
            return Ring::default();
        }
        let average = total.div_ceil(nodes.iter().filter(|node| node.capacity > 0).count() as u64);
        let mut points: Vec<(u64, u16)> = Vec::new();
        for (index, node) in nodes.iter().enumerate().filter(|(_, node)| node.capacity > 0) {
            let count = (POINTS * u64::from(node.capacity) / average).clamp(1, 16 * POINTS);
            points.extend((0..count).map(|point| (hash(node.key.as_bytes(), point), index as u16)));
        }
        // Where two points meet, the key decides, not the order of the nodes.
        points.sort_by(|a, b| {
            a.0.cmp(&b.0).then_with(|| nodes[usize::from(a.1)].key.cmp(&nodes[usize::from(b.1)].key))
        });
        let share = |node: &RingNode, groups: u16| u128::from(groups) * u128::from(node.capacity);
        let most = |node: &RingNode, groups: u16| {
            (share(node, groups) * u128::from(LOAD_MAX_PERCENT)).div_ceil(100 * u128::from(total))
        };
        let is_even = |node: &RingNode| {
            let most = most(node, groups) * u128::from(total) * 100;
            most <= share(node, groups) * u128::from(GROUPED_LOAD_MAX_PERCENT)
        };
        let groups = if nodes.iter().all(is_even) { groups } else { SLOTS };
        let mut room: Vec<u128> = nodes.iter().map(|node| most(node, groups)).collect();
        let groups = (0..groups).map(|group| {
            let at = hash(b"slot", u64::from(group));
            let start = points.partition_point(|(point, _)| *point < at);
            let mut clockwise = points[start..].iter().chain(&points[..start]).map(|(_, node)| *node);
            let node = clockwise.find(|node| room[usize::from(*node)] > 0);
            let node = node.expect("there is room for more than all slots");
            room[usize::from(node)] -= 1;
            node
        });
        Ring { groups: groups.collect() }
    }

    /// The node of a slot; `None`: there is no node with a capacity.
    pub fn node_of(&self, slot: u16) -> Option<usize> {
        let group = usize::from(slot).checked_rem(self.groups.len())?;
        Some(usize::from(self.groups[group]))
    }
}

/// FNV-1a over the key, mixed with a number (the finalizer of SplitMix64). Part of what nodes agree on.
fn hash(key: &[u8], number: u64) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let mut mixed = key.iter().fold(0xcbf2_9ce4_8422_2325, fnv);
    mixed = mixed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No groups.
    const ALONE: u32 = SLOTS as u32;

    fn nodes(capacities: &[u32]) -> Vec<RingNode> {
        let node =
            |(index, capacity): (usize, &u32)| RingNode { key: format!("node-{index}"), capacity: *capacity };
        capacities.iter().enumerate().map(node).collect()
    }

    fn shares(ring: &Ring, count: usize) -> Vec<u64> {
        let mut shares = vec![0; count];
        (0..SLOTS).filter_map(|slot| ring.node_of(slot)).for_each(|node| shares[node] += 1);
        shares
    }

    #[test]
    fn every_node_has_about_its_share_and_none_more_than_it_may() {
        for capacities in
            [&[1][..], &[1, 1, 1], &[100, 200, 300, 0], &[1; 50], &[1, 1000], &[u32::MAX, u32::MAX]]
        {
            let nodes = nodes(capacities);
            let shares = shares(&Ring::new(&nodes, ALONE), nodes.len());
            assert_eq!(shares.iter().sum::<u64>(), u64::from(SLOTS));
            let total: u64 = capacities.iter().map(|capacity| u64::from(*capacity)).sum();
            for (share, capacity) in shares.iter().zip(capacities) {
                let fair = u64::from(SLOTS) as f64 * f64::from(*capacity) / total as f64;
                assert!(*share as f64 <= (fair * 1.1).ceil(), "{capacities:?}: {shares:?}");
                assert!(*share as f64 >= (fair * 0.4).floor(), "{capacities:?}: {shares:?}");
            }
        }
    }

    #[test]
    fn groups_stay_together_unless_a_node_would_have_too_much() {
        let whole = |capacities: &[u32], groups: u16| {
            let nodes = nodes(capacities);
            let ring = Ring::new(&nodes, u32::from(groups));
            let shares = shares(&ring, nodes.len());
            let total: u64 = capacities.iter().map(|capacity| u64::from(*capacity)).sum();
            for (share, capacity) in shares.iter().zip(capacities) {
                let fair = u64::from(SLOTS) as f64 * f64::from(*capacity) / total as f64;
                // A group may have one slot more than another.
                assert!(
                    *share as f64 <= fair * 1.25 + f64::from(SLOTS / groups),
                    "{capacities:?}: {shares:?}"
                );
            }
            (groups..SLOTS).all(|slot| ring.node_of(slot) == ring.node_of(slot % groups))
        };
        for (capacities, groups) in
            [(&[1, 1, 1][..], 5), (&[1; 3], 63), (&[1; 10], 127), (&[1, 2], 40), (&[7], 1)]
        {
            assert!(whole(capacities, groups), "{capacities:?} in {groups}");
        }
        for (capacities, groups) in [(&[1, 1, 1, 1][..], 5), (&[1; 3], 1), (&[1, 100], 40)] {
            assert!(!whole(capacities, groups), "{capacities:?} in {groups}");
        }
    }

    #[test]
    fn nobody_has_a_place_where_nobody_has_a_capacity() {
        assert_eq!(Ring::new(&[], ALONE).node_of(0), None);
        assert_eq!(Ring::new(&nodes(&[0, 0]), ALONE).node_of(0), None);
    }

    #[test]
    fn when_a_node_goes_few_slots_of_others_move() {
        let all = nodes(&[1; 10]);
        let before = Ring::new(&all, ALONE);
        for gone in 0..10 {
            let mut left = all.clone();
            left.remove(gone);
            let after = Ring::new(&left, ALONE);
            let key = |nodes: &[RingNode], ring: &Ring, slot| nodes[ring.node_of(slot).unwrap()].key.clone();
            let moved = (0..SLOTS)
                .filter(|slot| before.node_of(*slot) != Some(gone))
                .filter(|slot| key(&all, &before, *slot) != key(&left, &after, *slot))
                .count();
            assert!(moved < usize::from(SLOTS) / 6, "{moved} slots moved that had no need to");
        }
    }

    #[test]
    fn the_order_of_the_nodes_does_not_matter() {
        let forward = nodes(&[3, 1, 2]);
        let mut backward = forward.clone();
        backward.reverse();
        let (one, other) = (Ring::new(&forward, ALONE), Ring::new(&backward, ALONE));
        for slot in 0..SLOTS {
            assert_eq!(forward[one.node_of(slot).unwrap()], backward[other.node_of(slot).unwrap()]);
        }
    }

    #[test]
    fn releases_agree_on_it() {
        // Changing any of these numbers moves every user of a cluster while it is upgraded.
        assert_eq!(hash(b"node-0", 0), 4967219672878982036);
        let ring = Ring::new(&nodes(&[1, 1, 1]), ALONE);
        let first: Vec<usize> = (0..16).filter_map(|slot| ring.node_of(slot)).collect();
        assert_eq!(first, [0, 2, 0, 2, 0, 2, 0, 1, 0, 1, 0, 0, 1, 2, 1, 2]);
    }
}
