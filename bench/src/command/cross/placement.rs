//! How many nodes a direct message reaches: users where `GET /v1/place` puts them, and users anywhere.
//!
//! Every user has two connections. A message to a user is larger than all else that is said meanwhile and does not
//! compress, so what nodes receive from the broker, by the size of the messages, is how often a message reached a node.
//! Anywhere means that each connection is on a node of its own choice, as behind a balancer that knows nothing. On some
//! brokers a node hears what it publishes, so messages are published by one node, and by all in turn.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::time::{Duration, Instant};

use comfy_table::Table;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Value, json};

use super::node;
use crate::cli::CrossArgs;
use crate::command::CommandError;
use crate::load::openings::Openings;
use crate::measure::sockets;
use crate::server::{Server, WEBSOCKET_PATH, parse_url};
use crate::wire::centrifuge::{Message, messages};
use crate::wire::frame::{Opcode, next_frame};
use crate::wire::token::user_name;
use crate::wire::upgrade;

/// Signs the users' tokens and the nodes' tickets. The nodes are ours and end with the run.
pub(super) const SECRET: &str = "ringmain-bench";
const NODES: usize = 3;
/// Connections of a user.
const DEVICES: u64 = 2;
/// Characters of a message's data.
const MESSAGE_BYTES: usize = 32 << 10;
/// How long a connection may take to open, or a message to arrive.
const ARRIVAL_MAX: Duration = Duration::from_secs(20);
/// Until every node knows the others and says where users belong.
const MEMBERS_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

#[derive(Serialize)]
struct Reach {
    users: &'static str,
    /// Nodes that publish, in turn.
    publishers: usize,
    messages: u64,
    /// Messages that arrived at connections.
    deliveries: u64,
    /// Nodes reached by a message, on average.
    nodes_per_message: f64,
    /// Bytes that the nodes received from the broker for each message.
    bytes_per_message: f64,
}

pub(super) fn run(args: &CrossArgs, progress: &ProgressBar) -> Result<(Table, Value), CommandError> {
    let nodes = start(args)?;
    let openings = Openings::new(Some(SECRET)).map_err(|error| CommandError::Usage(error.to_string()))?;
    // Others each time, for a node stays interested in those who have left, for a while.
    let rounds =
        [("placed", true, 1), ("anywhere", false, 1), ("placed", true, NODES), ("anywhere", false, NODES)];
    let placed = await_places(&nodes, rounds.len() as u64 * args.users)?;
    let mut table = Table::new();
    table.set_header([
        "users",
        "published by",
        "messages",
        "deliveries",
        "nodes per message",
        "bus bytes received per message",
    ]);
    let mut results = Vec::new();
    for ((users, is_placed, publishers), first) in rounds.into_iter().zip((0..).step_by(args.users as usize))
    {
        progress.set_message(format!("users {users}"));
        let at = |user: u64, device: u64| match is_placed {
            true => placed[user as usize],
            false => anywhere(user, device),
        };
        let reach = measure(&nodes, &openings, (users, publishers), first..first + args.users, at)?;
        table.add_row([
            users.to_owned(),
            format!("{publishers} of {NODES}"),
            reach.messages.to_string(),
            reach.deliveries.to_string(),
            format!("{:.2}", reach.nodes_per_message),
            format!("{:.0}", reach.bytes_per_message),
        ]);
        results.push(reach);
    }
    Ok((table, json!({ "nodes": NODES, "devices": DEVICES, "placement": results })))
}

/// A node by chance, the same in every run.
fn anywhere(user: u64, device: u64) -> usize {
    let mixed = (user * DEVICES + device + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 33) as usize % NODES
}

fn start(args: &CrossArgs) -> Result<Vec<Server>, CommandError> {
    let one = |number: usize| {
        // The address is only a name here: whoever is placed gets it back, and we know whose it is.
        let more = [
            format!("--cluster.address=ws://127.0.0.1:{}{WEBSOCKET_PATH}", number + 1),
            format!("--cluster.ticket_key={SECRET}-ticket-key-of-nodes-that-end-with-the-run"),
            "--client.personal_channel=true".to_owned(),
        ];
        node(args, number, None, &more)
    };
    (0..NODES).map(one).collect()
}

/// The node of each user, once all nodes have some: until then not all of them know each other.
fn await_places(nodes: &[Server], users: u64) -> Result<Vec<usize>, CommandError> {
    let started = Instant::now();
    loop {
        let places: Option<Vec<usize>> = (0..users).map(|user| place(&nodes[0], user)).collect();
        let all = (0..NODES).all(|node| places.as_ref().is_some_and(|places| places.contains(&node)));
        match places {
            Some(places) if all => return Ok(places),
            _ if started.elapsed() > MEMBERS_MAX => {
                let why = "the nodes do not place users on all of them: do they know each other, are there enough users?";
                return Err(CommandError::Usage(why.into()));
            }
            _ => std::thread::sleep(POLL),
        }
    }
}

fn place(node: &Server, user: u64) -> Option<usize> {
    let address = node.api.as_ref()?.place(&user_name(user)).ok()?;
    let number = usize::from(parse_url(&address)?.address.port());
    number.checked_sub(1).filter(|&number| number < NODES)
}

fn measure(
    nodes: &[Server],
    openings: &Openings,
    (title, publishers): (&'static str, usize),
    users: Range<u64>,
    at: impl Fn(u64, u64) -> usize,
) -> Result<Reach, CommandError> {
    let failed = |error: std::io::Error| CommandError::Usage(format!("a user's connection: {error}"));
    let mut connections = Vec::new();
    for user in users.clone() {
        for device in 0..DEVICES {
            let opened = Connection::open(&nodes[at(user, device)], openings, user);
            connections.push(opened.map_err(failed)?);
        }
    }
    let pids: Vec<u32> = nodes.iter().flat_map(|node| node.pids.clone()).collect();
    let served: Vec<u16> = nodes.iter().flat_map(Server::ports).collect();
    let unknown = || CommandError::Usage("`ss` (iproute2) is needed to see what nodes receive".into());
    let received = || sockets::outward(&pids, &served).ok_or_else(unknown);
    let before = received()?;
    for user in users.clone() {
        if let Some(api) = &nodes[user as usize % publishers].api {
            api.publish(&format!("user:{}", user_name(user)), &noise(user))?;
        }
    }
    let mut deliveries = 0;
    for connection in &mut connections {
        deliveries += connection.await_publication().map_err(failed)?;
    }
    let after = received()?;
    let of = |pid: &u32| after[pid].since(&before[pid]).received_bytes as f64;
    let by_node: BTreeMap<u32, f64> = pids.iter().map(|pid| (*pid, of(pid))).collect();
    let bytes: f64 = by_node.values().sum();
    let count = users.end - users.start;
    Ok(Reach {
        users: title,
        publishers,
        messages: count,
        deliveries,
        nodes_per_message: bytes / (count as f64 * MESSAGE_BYTES as f64),
        bytes_per_message: bytes / count as f64,
    })
}

/// Letters in which nothing repeats that a compressor could use.
fn noise(seed: u64) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let letter = |_| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(LETTERS[(state >> 58) as usize])
    };
    (0..MESSAGE_BYTES).map(letter).collect()
}

/// A user's connection, subscribed to the user's channel by the server.
struct Connection {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Connection {
    fn open(node: &Server, openings: &Openings, user: u64) -> std::io::Result<Connection> {
        let mut stream = TcpStream::connect(node.target.address)?;
        stream.set_read_timeout(Some(ARRIVAL_MAX))?;
        stream.write_all(&upgrade::request(WEBSOCKET_PATH))?;
        let mut connection = Connection { stream, unread: Vec::new() };
        loop {
            match upgrade::response_bytes(&connection.unread) {
                Ok(Some(head)) => {
                    connection.unread.drain(..head);
                    break;
                }
                Ok(None) => connection.read()?,
                Err(error) => return Err(std::io::Error::other(error)),
            }
        }
        let mut opening = Vec::new();
        openings.append(user, None, &mut opening);
        connection.stream.write_all(&opening)?;
        connection.await_message(|message| matches!(message, Message::Reply { error: None, .. }))?;
        Ok(connection)
    }

    /// Reads until the message is here; how many came on the way, at least one.
    fn await_publication(&mut self) -> std::io::Result<u64> {
        self.await_message(|message| matches!(message, Message::Publication { .. }))
    }

    fn await_message(&mut self, is_wanted: impl Fn(&Message) -> bool) -> std::io::Result<u64> {
        loop {
            let frame = next_frame(&self.unread).map_err(std::io::Error::other)?;
            let Some(frame) = frame else {
                self.read()?;
                continue;
            };
            let text = frame.opcode == Opcode::Text;
            let found = if text { messages(frame.payload).filter(&is_wanted).count() as u64 } else { 0 };
            let used = frame.wire_bytes;
            self.unread.drain(..used);
            if found > 0 {
                return Ok(found);
            }
        }
    }

    fn read(&mut self) -> std::io::Result<()> {
        let mut piece = [0; 4096];
        match self.stream.read(&mut piece)? {
            0 => Err(std::io::Error::other("the server closed it")),
            bytes => {
                self.unread.extend_from_slice(&piece[..bytes]);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_uses_all_nodes_and_noise_does_not_repeat() {
        let mut by_node = [0u64; NODES];
        (0..300).for_each(|user| by_node[anywhere(user, 0)] += 1);
        assert!(by_node.iter().all(|&count| count > 60), "{by_node:?}");
        let text = noise(7);
        assert_eq!(text.len(), MESSAGE_BYTES);
        assert_ne!(text, noise(8));
        let first = &text.as_bytes()[..8];
        assert_eq!(text.as_bytes().windows(8).filter(|window| window == &first).count(), 1);
    }
}
