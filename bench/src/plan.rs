//! What one run is to do: the parent writes a plan, each load process reads it from its standard input.

use std::net::SocketAddrV4;

use serde::{Deserialize, Serialize};

use crate::bare::script::{Exchange, Script};
use crate::measure::latency::Recorded;

/// One run against one server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) target: Target,
    /// Signs a token for every connection; anonymous without one.
    pub(crate) token_secret: Option<String>,
    /// Connections of all load processes together, the publisher of a fan-out not counted.
    pub(crate) connections: u64,
    /// Load processes, at most [`crate::io::board::WORKERS_MAX`].
    pub(crate) workers: usize,
    /// Connections that all processes together open at the same time.
    pub(crate) connect_window: usize,
    /// The core that all load processes are pinned to.
    pub(crate) client_core: usize,
    pub(crate) load: Load,
}

/// Where the server is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) address: SocketAddrV4,
    /// The path of the upgrade request.
    pub(crate) path: String,
}

/// The kind of traffic.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Load {
    Idle(IdlePlan),
    Echo(EchoPlan),
    Fanout(FanoutPlan),
    Churn(ChurnPlan),
    Cross(CrossPlan),
    Bus(BusPlan),
}

/// How fast requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Pace {
    /// Closed loop: so many in flight.
    Window(u32),
    /// Open loop: so many a second, over all connections, whatever comes back.
    PerSecond(f64),
}

impl Pace {
    /// The pace of a process that has `part` of all connections, 0 to 1: windows are per connection, a rate is shared.
    pub(crate) fn of_part(self, part: f64) -> Pace {
        match self {
            Pace::Window(window) => Pace::Window(window),
            Pace::PerSecond(rate) => Pace::PerSecond(rate * part),
        }
    }
}

/// Connections that wait, and receive one publication each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct IdlePlan {
    pub(crate) channels: Channels,
    /// The load processes publish; otherwise the parent does, through the server's API.
    pub(crate) publish: bool,
    pub(crate) size: usize,
}

/// Which channel a connection subscribes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Channels {
    /// All to this one.
    Shared(String),
    /// Each to one of its own, whose name begins with this.
    Own(String),
    /// To none.
    None,
}

/// Each connection is answered what it sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EchoPlan {
    pub(crate) mode: EchoMode,
    pub(crate) pace: Pace,
    /// Bytes of a ping's payload or of a publication's data.
    pub(crate) size: usize,
    /// Offsets are checked to be without gaps; a bare server repeats one and the same.
    pub(crate) check: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EchoMode {
    /// WebSocket ping and pong; with `session` on connections that have connected and subscribed.
    Ping { session: Option<Channels> },
    /// Publish to a channel of one's own and wait for both the acknowledgement and the publication.
    Publish { prefix: String },
}

/// One publisher, many subscribers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FanoutPlan {
    pub(crate) channel: String,
    /// What the publisher is subscribed to, so that its opening has the same shape; as long as `channel`.
    pub(crate) publisher_channel: String,
    pub(crate) pace: Pace,
    pub(crate) size: usize,
    /// So many of the connections never read once they are subscribed.
    pub(crate) stopped: u64,
    pub(crate) check: bool,
}

/// Connections that open and close, over and over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ChurnPlan {
    /// No Centrifuge session: upgrade and close only.
    pub(crate) bare: bool,
    pub(crate) channel: String,
}

/// Publishers on one server, subscribers on another. The plan's target is the subscribers', its connections are they.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CrossPlan {
    /// The publishers' server; on the same path.
    pub(crate) publish_to: Target,
    pub(crate) publishers: u64,
    pub(crate) channels: u64,
    /// Offsets of a channel follow each other without holes; otherwise they only grow, as those of NATS and Kafka do.
    pub(crate) dense: bool,
    /// What the channels' names begin with; a number follows.
    pub(crate) prefix: String,
    /// A window is that of all publishers together, counted by acknowledgements.
    pub(crate) pace: Pace,
    pub(crate) size: usize,
}

/// The same traffic through a broker by its bare client library.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BusPlan {
    /// The broker's URL, which may hold a password.
    pub(crate) url: String,
    /// The broker also stores every message, as it does for channels with history.
    pub(crate) stored: bool,
    /// Without a subscriber only confirmations are counted.
    pub(crate) subscribe: bool,
    pub(crate) channels: u64,
    /// What the channels' names begin with: letters, digits and `-`, new for each run.
    pub(crate) prefix: String,
    pub(crate) pace: Pace,
    pub(crate) size: usize,
    /// The core of the publishing thread; the subscribing one is on the plan's.
    pub(crate) publish_core: usize,
}

/// What a load process says at its end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct WorkerReport {
    pub(crate) latencies: Recorded,
    /// What went wrong, and how often.
    pub(crate) problems: Vec<(String, u64)>,
    /// What one connection heard: material for a bare server's script.
    pub(crate) heard: Heard,
}

/// The bytes of a server's answers, whole, as one watched connection received them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Heard {
    /// Requests of the opening by size: the upgrade and, unless it is bare, connect and subscribe.
    pub(crate) opening: Vec<Exchange>,
    /// The size of one steady request.
    pub(crate) request_bytes: usize,
    /// The last frame that carried a reply, a publication, both, or a pong.
    pub(crate) reply: Vec<u8>,
    pub(crate) publication: Vec<u8>,
    pub(crate) both: Vec<u8>,
    pub(crate) pong: Vec<u8>,
    /// The server's close frame.
    pub(crate) close: Vec<u8>,
}

impl Heard {
    /// The script that makes a bare server answer with the same bytes. `fanout`: a request is answered with its reply
    /// and delivered to all others; otherwise all that was heard goes back to the sender.
    pub(crate) fn script(&self, fanout: bool) -> Script {
        let reply = match (fanout, self.both.is_empty()) {
            (true, _) => self.reply.clone(),
            (false, false) => self.both.clone(),
            (false, true) => [&self.reply[..], &self.publication, &self.pong].concat(),
        };
        Script {
            opening: self.opening.clone(),
            steady: Exchange { request_bytes: self.request_bytes.max(1), reply },
            delivery: fanout.then(|| self.publication.clone()),
            close_reply: self.close.clone(),
        }
    }
}
