//! Who is master of what: asked of the servers or Sentinels again and again.
//!
//! Owns: the addresses known and the connections over which they are asked. Must not know: channels, sessions.
//! Invariant: of two claims to a slot the one with the higher configuration epoch counts, so a node that was cut off
//! and speaks of the past convinces nobody. What a topology says is a hint: a session asks its server itself
//! (`ROLE`), and the lineage judges what it says.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use redis::Value;

use crate::redis::context::Context;
use crate::redis::names::HASH_SLOTS;
use crate::redis::options::{Address, Deployment};
use crate::redis::wire::{Connection, Dialer};

/// Time between two looks, unless somebody asks for one.
pub(super) const REFRESH_EVERY: Duration = Duration::from_millis(500);

/// The same while something is lost.
const REFRESH_URGENT: Duration = Duration::from_millis(100);

/// Least time between two looks.
const REFRESH_PAUSE: Duration = Duration::from_millis(30);

/// Longest wait for one server's view.
const VIEW_MAX: Duration = Duration::from_millis(300);

/// Most servers asked.
const ASKED_MAX: usize = 64;

/// A master and what it owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Master {
    pub(super) address: Address,
    /// Hash slots, from and to.
    pub(super) ranges: Vec<(u16, u16)>,
    /// Replicas that are not known to be down; `None` where only the master itself can say.
    pub(super) replicas: Option<usize>,
}

impl Master {
    pub(super) fn owns(&self, slot: u16) -> bool {
        self.ranges.iter().any(|(from, to)| (*from..=*to).contains(&slot))
    }
}

/// All masters that own something.
pub(super) type Topology = Vec<Master>;

/// Looks again and again, and passes on what it saw. Ends with the receiver.
pub(super) async fn watch(
    context: Rc<Context>,
    dialer: Dialer,
    seen: tokio::sync::mpsc::UnboundedSender<Topology>,
) {
    let mut asked = Asked { dialer, connections: HashMap::new(), known: BTreeSet::new() };
    asked.known.extend(context.options.servers.iter().cloned());
    loop {
        if let Some(topology) = asked.look(&context).await
            && seen.send(topology).is_err()
        {
            return;
        }
        tokio::time::sleep(REFRESH_PAUSE).await;
        let pause = if context.urgent.get() { REFRESH_URGENT } else { REFRESH_EVERY };
        let _ = tokio::time::timeout(pause, context.refresh.notified()).await;
    }
}

struct Asked {
    dialer: Dialer,
    connections: HashMap<Address, Connection>,
    known: BTreeSet<Address>,
}

impl Asked {
    async fn look(&mut self, context: &Context) -> Option<Topology> {
        match &context.options.deployment {
            Deployment::Single => {
                let address = context.options.servers.first()?.clone();
                let replicas = context.options.replicas;
                Some(vec![Master { address, ranges: vec![(0, HASH_SLOTS - 1)], replicas }])
            }
            Deployment::Cluster => {
                let views = self.views(false, async |asked| {
                    match asked.ask(redis::cmd("CLUSTER").arg("NODES")).await.ok()? {
                        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
                        Value::VerbatimString { text, .. } => Some(text),
                        _ => None,
                    }
                });
                let views = views.await;
                let (topology, nodes) = merged(&views);
                self.known.extend(nodes.into_iter().take(ASKED_MAX));
                while self.known.len() > ASKED_MAX {
                    self.known.pop_last();
                }
                let fixed = context.options.replicas;
                let with = |master: Master| Master { replicas: fixed.or(master.replicas), ..master };
                (!topology.is_empty()).then(|| topology.into_iter().map(with).collect())
            }
            Deployment::Sentinel { master } => {
                let views = self.views(true, async |asked| named_by_sentinel(asked, master).await).await;
                let newest = views.into_iter().map(|(_, view)| view).max_by_key(|view| view.0);
                let (_, address, replicas) = newest?;
                let replicas = Some(context.options.replicas.unwrap_or(replicas));
                Some(vec![Master { address, ranges: vec![(0, HASH_SLOTS - 1)], replicas }])
            }
        }
    }

    /// What each known server answers in time.
    async fn views<T>(
        &mut self,
        sentinels: bool,
        ask: impl AsyncFn(&mut Connection) -> Option<T>,
    ) -> Vec<(Address, T)> {
        let mut connections = std::mem::take(&mut self.connections);
        let (dialer, ask) = (&self.dialer, &ask);
        let views = self.known.iter().map(|address| {
            let connection = connections.remove(address);
            async move {
                let view = async {
                    let mut connection = match connection {
                        Some(connection) => connection,
                        None if sentinels => dialer.sentinel(address).await.ok()?,
                        None => dialer.server(address).await.ok()?,
                    };
                    let view = ask(&mut connection).await?;
                    Some((connection, view))
                };
                let (connection, view) = tokio::time::timeout(VIEW_MAX, view).await.ok()??;
                Some((address.clone(), connection, view))
            }
        });
        let mut seen = Vec::new();
        for (address, connection, view) in join_all(views).await.into_iter().flatten() {
            self.connections.insert(address.clone(), connection);
            seen.push((address, view));
        }
        seen
    }
}

/// The masters of some views, each of them what `CLUSTER NODES` says to whom it was asked; and all nodes named.
fn merged(views: &[(Address, String)]) -> (Topology, BTreeSet<Address>) {
    let mut owners: Vec<Option<(u64, Address)>> = vec![None; usize::from(HASH_SLOTS)];
    let (mut nodes, mut replicas) = (BTreeSet::new(), HashMap::new());
    for (asked, view) in views {
        for node in view.lines().filter_map(|line| Node::parse(line, asked)) {
            nodes.insert(node.address.clone());
            let followers = followers(view, node.id);
            replicas
                .entry(node.address.clone())
                .and_modify(|most: &mut usize| *most = followers.max(*most))
                .or_insert(followers);
            for slot in node.ranges.iter().flat_map(|(from, to)| *from..=*to) {
                let owner = &mut owners[usize::from(slot)];
                if owner.as_ref().is_none_or(|(epoch, _)| *epoch < node.epoch) {
                    *owner = Some((node.epoch, node.address.clone()));
                }
            }
        }
    }
    let mut masters: BTreeMap<Address, Vec<(u16, u16)>> = BTreeMap::new();
    for (slot, owner) in (0..).zip(owners) {
        let Some((_, address)) = owner else { continue };
        let ranges = masters.entry(address).or_default();
        match ranges.last_mut() {
            Some((_, to)) if *to + 1 == slot => *to = slot,
            _ => ranges.push((slot, slot)),
        }
    }
    let master = |(address, ranges)| {
        let replicas = Some(replicas.get(&address).copied().unwrap_or(0));
        Master { address, ranges, replicas }
    };
    (masters.into_iter().map(master).collect(), nodes)
}

/// One line of `CLUSTER NODES`.
struct Node<'a> {
    id: &'a str,
    address: Address,
    epoch: u64,
    ranges: Vec<(u16, u16)>,
}

impl<'a> Node<'a> {
    fn parse(line: &'a str, asked: &Address) -> Option<Node<'a>> {
        let mut fields = line.split(' ');
        let (id, address, flags) = (fields.next()?, fields.next()?, fields.next()?);
        if flags.contains("noaddr") || flags.contains("handshake") {
            return None;
        }
        let (host, port) = address.split(['@', ',']).next()?.rsplit_once(':')?;
        // A node that does not know its own address yet is where it was asked.
        let host = if host.is_empty() { &asked.0 } else { host };
        let epoch = fields.nth(3)?.parse().ok()?;
        let ranges = fields.skip(1).filter(|field| !field.starts_with('[')).map(parse_range);
        let is_master = flags.split(',').any(|flag| flag == "master");
        let ranges = if is_master { ranges.collect::<Option<Vec<_>>>()? } else { Vec::new() };
        Some(Node { id, address: (host.to_owned(), port.parse().ok()?), epoch, ranges })
    }
}

fn parse_range(field: &str) -> Option<(u16, u16)> {
    let (from, to) = field.split_once('-').unwrap_or((field, field));
    let (from, to) = (from.parse().ok()?, to.parse().ok()?);
    (from <= to && to < HASH_SLOTS).then_some((from, to))
}

/// Replicas of a node that are not known to be down.
fn followers(view: &str, id: &str) -> usize {
    let follows = |line: &&str| {
        let mut fields = line.split(' ');
        let (Some(flags), Some(master)) = (fields.nth(2), fields.next()) else { return false };
        master == id && !flags.split(',').any(|flag| flag == "fail" || flag == "noaddr")
    };
    view.lines().filter(follows).count()
}

/// The configuration epoch, the master's address, and its replicas that are not down.
async fn named_by_sentinel(asked: &mut Connection, master: &str) -> Option<(u64, Address, usize)> {
    let named = asked.ask(redis::cmd("SENTINEL").arg("MASTER").arg(master)).await.ok()?;
    let replicas = asked.ask(redis::cmd("SENTINEL").arg("REPLICAS").arg(master)).await.ok()?;
    let address = (field(&named, "ip")?, field(&named, "port")?.parse().ok()?);
    let Value::Array(replicas) = replicas else { return None };
    let is_up = |replica: &&Value| !field(replica, "flags").is_some_and(|flags| flags.contains("down"));
    Some((field(&named, "config-epoch")?.parse().ok()?, address, replicas.iter().filter(is_up).count()))
}

/// A text of a map, or of an array of names and values.
pub(super) fn field(map: &Value, name: &str) -> Option<String> {
    let pairs: Vec<(&Value, &Value)> = match map {
        Value::Map(pairs) => pairs.iter().map(|(name, value)| (name, value)).collect(),
        Value::Array(items) => items.chunks_exact(2).map(|pair| (&pair[0], &pair[1])).collect(),
        _ => return None,
    };
    let (_, value) = pairs.into_iter().find(|(key, _)| text(key).as_deref() == Some(name))?;
    text(value)
}

/// A value as text.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text.clone()),
        Value::Int(number) => Some(number.to_string()),
        Value::Okay => Some("OK".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: &str = "\
aa 10.0.0.1:1@11 myself,master - 0 0 1 connected 0-8000 8002
bb 10.0.0.2:2@12,host master - 0 0 2 connected 8001 8003-16383 [5->-aa]
cc 10.0.0.3:3@13 slave aa 0 0 1 connected
dd 10.0.0.4:4@14 slave,fail aa 0 0 1 disconnected
ee :0@0 master,noaddr - 0 0 0 disconnected";

    fn at(host: &str, port: u16) -> Address {
        (host.to_owned(), port)
    }

    #[test]
    fn a_view_names_masters_slots_and_replicas() {
        let (masters, nodes) = merged(&[(at("10.0.0.1", 1), VIEW.to_owned())]);
        let first =
            Master { address: at("10.0.0.1", 1), ranges: vec![(0, 8000), (8002, 8002)], replicas: Some(1) };
        assert_eq!(masters[0], first);
        assert_eq!((masters[1].replicas, masters.len(), nodes.len()), (Some(0), 2, 4));
        assert!(masters[1].owns(8001) && masters[1].owns(16383) && !masters[1].owns(8002));
    }

    #[test]
    fn the_higher_epoch_owns_whoever_speaks_first() {
        let promoted = "cc 10.0.0.3:3@13 myself,master - 0 0 7 connected 0-8000 8002";
        let views = [(at("10.0.0.1", 1), VIEW.to_owned()), (at("10.0.0.3", 3), promoted.to_owned())];
        let reversed: Vec<_> = views.iter().rev().cloned().collect();
        for views in [&views[..], &reversed] {
            let (masters, _) = merged(views);
            let owner = masters.iter().find(|master| master.owns(0)).map(|master| &master.address);
            assert_eq!(owner, Some(&at("10.0.0.3", 3)));
        }
    }

    #[test]
    fn what_is_no_view_names_nobody() {
        for view in [
            "",
            "x",
            "a b c d e f g h i",
            "aa :7@1 master - 0 0 x connected 0-1",
            "aa h:1@1 master - 0 0 1 c 9-70000",
        ] {
            assert!(merged(&[(at("h", 1), view.to_owned())]).0.is_empty(), "{view}");
        }
        // A node asked before it knows its address.
        let (masters, _) = merged(&[(at("h", 1), "aa :7@1 myself,master - 0 0 1 connected 0".to_owned())]);
        assert_eq!(masters[0].address, at("h", 7));
    }
}
