//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::io::board::{IN_FLIGHT_MAX, WORKERS_MAX};
use crate::plan::Pace;

/// The most connections of a run; also what the digits of their numbers allow.
const CONNECTIONS_MAX: u64 = 2_000_000;
/// The largest payload of a request, in bytes.
const SIZE_MAX: u64 = 60_000;
/// Requests in flight on one connection, at most.
const WINDOW_MAX: i64 = 4096;
const _: () = assert!(WINDOW_MAX as usize <= IN_FLIGHT_MAX);

/// Load generator and reports for Ringmain.
///
/// Measures a server that it starts itself (--spawn) or that runs already (--url, --pid): memory per connection, and
/// server CPU per unit of work, latency beside it. `limit` runs bare TCP servers with the same bytes in between, and
/// says how far from them the server is.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Idle(IdleArgs),
    Echo(EchoArgs),
    Fanout(FanoutArgs),
    Churn(ChurnArgs),
    Limit(LimitArgs),
    Cross(CrossArgs),
    /// A bare server, for `limit`: reads its script from standard input.
    #[command(hide = true)]
    Bare {
        engine: BareEngine,
    },
    /// A load process: reads its plan from standard input.
    #[command(hide = true)]
    Worker {
        index: usize,
        board: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BareEngine {
    Epoll,
    Uring,
}

/// The server to measure.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// Start this `ringmain` on free ports, and stop it at the end: `serve --demo --shards 1`, with joins and leaves
    /// in `room:` off unless its settings are among ARGUMENTS.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["url", "pid", "admin"])]
    pub(crate) spawn: Option<PathBuf>,
    /// Measure a server that runs already.
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Its process, for CPU and memory; repeat for several.
    #[arg(long)]
    pub(crate) pid: Vec<u32>,
    /// Its API, as http://127.0.0.1:8001.
    #[arg(long, value_name = "URL")]
    pub(crate) admin: Option<String>,
    /// The key of its API.
    #[arg(long, env = "RINGMAIN_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Connect with HS256 tokens signed with this secret; anonymously without. A server that is started gets it too.
    #[arg(long, env = "RINGMAIN_TOKEN_HMAC_SECRET", hide_env_values = true)]
    pub(crate) token_secret: Option<String>,
    /// The server's core: a server that is started is pinned to it, and its ksoftirqd counts.
    #[arg(long, default_value_t = 0)]
    pub(crate) server_core: usize,
    /// Let the server's messages through.
    #[arg(long)]
    pub(crate) verbose: bool,
    /// More arguments for the server that is started.
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub(crate) arguments: Vec<String>,
}

/// How a run is done.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Run")]
pub(crate) struct RunArgs {
    /// The core of the load processes [default: the last one].
    #[arg(long)]
    pub(crate) client_core: Option<usize>,
    /// Load processes [default: as many as the limit of open files asks for].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=WORKERS_MAX as u64))]
    pub(crate) workers: Option<u64>,
    /// Connections being opened at the same time.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub(crate) connect_window: u64,
    /// Seconds of load before the measurement.
    #[arg(long, default_value = "1", value_parser = seconds)]
    pub(crate) warmup: Duration,
    /// Seconds of measurement.
    #[arg(long, default_value = "5", value_parser = seconds)]
    pub(crate) duration: Duration,
    /// Seconds that opening all connections may take.
    #[arg(long, default_value = "120", value_parser = seconds)]
    pub(crate) setup: Duration,
    /// Write the result here as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// No progress line.
    #[arg(long)]
    pub(crate) quiet: bool,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct PaceArgs {
    /// Closed loop: requests in flight.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=WINDOW_MAX))]
    pub(crate) window: u32,
    /// Open loop: requests a second, latency counted from the time that was meant.
    #[arg(long, conflicts_with = "window", value_parser = rate)]
    pub(crate) rate: Option<f64>,
}

impl PaceArgs {
    pub(crate) fn pace(self) -> Pace {
        self.rate.map_or(Pace::Window(self.window), Pace::PerSecond)
    }
}

/// Memory of connections that wait.
///
/// Opens the connections, sends one publication to each, waits, and reports the server's private memory for each of
/// them, less what it had before.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ringmain-bench idle --connections 18000 --token-secret secret --spawn target/release/ringmain\n  \
                        ringmain-bench idle --connections 18000 --own --token-secret secret --spawn target/release/ringmain"
)]
pub(crate) struct IdleArgs {
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=CONNECTIONS_MAX))]
    pub(crate) connections: u64,
    /// The channel that all subscribe to.
    #[arg(long, default_value = "room:bench")]
    pub(crate) channel: String,
    /// Each subscribes to a channel of its own instead, named with --own-prefix and a number.
    #[arg(long)]
    pub(crate) own: bool,
    #[arg(long, default_value = "room:own-")]
    pub(crate) own_prefix: String,
    /// Bytes of the publication's data.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(2..=SIZE_MAX))]
    pub(crate) size: u64,
    /// The connections publish, also where the server's API could.
    #[arg(long)]
    pub(crate) publish_by_connections: bool,
    /// Seconds to wait before memory is read.
    #[arg(long, default_value = "3", value_parser = seconds)]
    pub(crate) settle: Duration,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EchoModeArg {
    /// WebSocket ping and pong.
    Ping,
    /// Publish to a channel of one's own; acknowledgement and publication both come back.
    Publish,
}

/// Round trips on each connection.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ringmain-bench echo --mode publish --window 8 --spawn target/release/ringmain\n  \
                        ringmain-bench echo --mode ping --rate 20000 --url ws://127.0.0.1:8000/connection/websocket --pid 4242"
)]
pub(crate) struct EchoArgs {
    #[arg(long, value_enum, default_value_t = EchoModeArg::Ping)]
    pub(crate) mode: EchoModeArg,
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=CONNECTIONS_MAX))]
    pub(crate) connections: u64,
    /// Bytes of a ping's payload (at most 125), or of a publication's data.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(2..=SIZE_MAX))]
    pub(crate) size: u64,
    #[command(flatten)]
    pub(crate) pace: PaceArgs,
    /// What the channels' names begin with; a number follows.
    #[arg(long, default_value = "room:own-")]
    pub(crate) own_prefix: String,
    /// Ping without a session: any WebSocket server.
    #[arg(long)]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// One publisher, many subscribers; every offset is checked.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ringmain-bench fanout --connections 10000 --size 128 --window 8 --spawn target/release/ringmain\n  \
                        ringmain-bench fanout --connections 1000 --rate 100 --stopped 10 --spawn target/release/ringmain"
)]
pub(crate) struct FanoutArgs {
    /// Subscribers.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=CONNECTIONS_MAX))]
    pub(crate) connections: u64,
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(2..=SIZE_MAX))]
    pub(crate) size: u64,
    #[command(flatten)]
    pub(crate) pace: PaceArgs,
    #[arg(long, default_value = "room:bench")]
    pub(crate) channel: String,
    /// So many of the subscribers never read.
    #[arg(long, default_value_t = 0)]
    pub(crate) stopped: u64,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Connections that open, subscribe and close.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ringmain-bench churn --concurrency 64 --token-secret secret --spawn target/release/ringmain"
)]
pub(crate) struct ChurnArgs {
    /// Connections at the same time.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) concurrency: u64,
    /// WebSocket handshake and close only: no connect, no subscribe.
    #[arg(long)]
    pub(crate) bare: bool,
    #[arg(long, default_value = "room:bench")]
    pub(crate) channel: String,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// The server beside bare epoll and bare io_uring servers, in alternating rounds.
///
/// First learns the bytes that the server answers with, at window 1; then the bare servers say the same bytes to the
/// same load processes. Server CPU for each unit of work is compared round by round. The control is the cheaper bare
/// server measured twice: what differs there is noise.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ringmain-bench limit echo --mode publish --window 8 --spawn target/release/ringmain\n  \
                        ringmain-bench limit fanout --connections 10000 --bare-only"
)]
pub(crate) struct LimitArgs {
    #[command(subcommand)]
    pub(crate) load: LimitLoad,
    #[command(flatten)]
    pub(crate) options: LimitOptions,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LimitOptions {
    /// How often each server is measured.
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// No server under test: only what this machine's limit is, with bytes made up to be like a server's.
    #[arg(long, id = "bare_only", global = true)]
    pub(crate) bare_only: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LimitLoad {
    Echo(EchoArgs),
    Fanout(FanoutArgs),
    Churn(ChurnArgs),
}

/// From one node to another over a bus, beside the bare client library of its broker.
///
/// Starts nodes that share the bus: publishers connect to one, subscribers to another. Latency is end to end, counted
/// from the time that was meant. In the same run and in alternating rounds the client library of the broker alone
/// carries the same traffic, so that the difference is what the nodes add. The broker has to run already.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ringmain-bench cross --bus $(deploy/local/up redis-single --bus-only) --spawn target/release/ringmain\n  \
                        ringmain-bench cross --bus nats://127.0.0.1:4222 --monitor 127.0.0.1:8222 --rates 1000,10000 --spawn target/release/ringmain\n  \
                        ringmain-bench cross --bus redis://127.0.0.1:6379 --rates 10000 --busy-max 70 --spawn target/release/ringmain\n  \
                        ringmain-bench cross --placement --bus redis://127.0.0.1:6379 --spawn target/release/ringmain"
)]
pub(crate) struct CrossArgs {
    /// The bus, as `ringmain serve --bus` takes it: redis://, redis+cluster://, nats://, kafka://.
    #[arg(long, value_name = "URL")]
    pub(crate) bus: String,
    /// The `ringmain` to start.
    #[arg(long, value_name = "PATH")]
    pub(crate) spawn: PathBuf,
    /// Monitoring ports of NATS servers, as 127.0.0.1:8222: what a publication costs the broker is read there.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    pub(crate) monitor: Vec<String>,
    /// Publications a second, over all channels.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,50000", value_parser = rate)]
    pub(crate) rates: Vec<f64>,
    /// Also measure latency at the highest rate, up to those named, at which nodes, broker and load keep all cores of the
    /// machine at most so busy, in percent: above it, waiting for a core is most of what is measured.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) busy_max: Option<u32>,
    /// Publications in flight where throughput is measured: 1 is without batches.
    #[arg(long, value_delimiter = ',', default_value = "1,16,256", value_parser = clap::value_parser!(u32).range(1..=WINDOW_MAX))]
    pub(crate) windows: Vec<u32>,
    /// How often each is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Channels, published to in turn.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) channels: u64,
    /// Connections that publish.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) publishers: u64,
    /// Subscribers of each channel.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) subscribers: u64,
    /// Bytes of a publication's data, and of the bare client's messages.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(8..=SIZE_MAX))]
    pub(crate) size: u64,
    /// Channels without history; the bare client publishes without storing.
    #[arg(long)]
    pub(crate) ephemeral: bool,
    /// The bare client publishes without storing, although the channels have history.
    #[arg(long)]
    pub(crate) plain: bool,
    /// Instead: how many nodes a direct message reaches, with users placed and with users anywhere. Three nodes.
    #[arg(long)]
    pub(crate) placement: bool,
    /// Users of --placement.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) users: u64,
    /// The core of the node that publishes, and of the bare publisher.
    #[arg(long, default_value_t = 0)]
    pub(crate) publish_core: usize,
    /// The core of the node with the subscribers [default: that of the load process].
    #[arg(long)]
    pub(crate) subscribe_core: Option<usize>,
    /// Let the nodes' messages through.
    #[arg(long)]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// More arguments for the nodes.
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub(crate) arguments: Vec<String>,
}

/// Seconds, fractions allowed, up to a day.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.0..=86_400.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!("{text} is not between 0 and 86400 seconds"))
    }
}

/// Operations a second, above 0 and up to ten million.
fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| format!("{text:?} is no rate"))?;
    if rate > 0.0 && rate <= 1e7 {
        Ok(rate)
    } else {
        Err(format!("{text} is not above 0 and up to 10000000"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, String> {
        Cli::try_parse_from(line.split_whitespace()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_consistent_and_every_help_has_an_example() {
        Cli::command().debug_assert();
        let mut command = Cli::command();
        for name in ["idle", "echo", "fanout", "churn", "limit", "cross"] {
            let sub = command.find_subcommand_mut(name).expect("a subcommand");
            assert!(sub.render_long_help().to_string().contains("ringmain-bench "), "{name}");
        }
    }

    #[test]
    fn reads_what_the_examples_say() {
        let Ok(Cli { command: Command::Echo(echo) }) =
            parse("b echo --mode publish --window 8 --spawn target/x -- --shards 2")
        else {
            panic!("not an echo");
        };
        assert_eq!((echo.mode, echo.pace.pace()), (EchoModeArg::Publish, Pace::Window(8)));
        assert_eq!(echo.server.arguments, ["--shards", "2"]);
        let Ok(Cli { command: Command::Limit(limit) }) =
            parse("b limit fanout --bare-only --rounds 3 --rate 10")
        else {
            panic!("not a limit");
        };
        assert!(limit.options.bare_only && limit.options.rounds == 3);
        let LimitLoad::Fanout(fanout) = limit.load else { panic!("not a fan-out") };
        assert_eq!(fanout.pace.pace(), Pace::PerSecond(10.0));
        assert_eq!((fanout.run.duration, fanout.size), (Duration::from_secs(5), 128));
    }

    #[test]
    fn refuses_what_cannot_be() {
        fn check(line: &str, part: &str) {
            let error = parse(line).expect_err(line);
            assert!(error.contains(part), "{line}: {error}");
        }
        check("b echo --spawn x --url ws://127.0.0.1:1/", "cannot be used with");
        check("b echo --spawn x --window 0", "0 is not in");
        check("b echo --spawn x --window 4097", "4097 is not in");
        check("b echo --spawn x --rate 0", "not above 0");
        check("b echo --spawn x --rate 5 --window 2", "cannot be used with");
        check("b echo --spawn x --duration=-1", "seconds");
        check("b idle --spawn x --connections 2000001", "2000001 is not in");
        check("b churn --spawn x --concurrency 0", "0 is not in");
        check("b cross --spawn x", "--bus");
        check("b cross --spawn x --bus y --rates 5,0", "not above 0");
        check("b cross --spawn x --bus y --busy-max 101", "101 is not in");
        check("b cross --spawn x --bus y --windows 0", "0 is not in");
        check("b cross --spawn x --bus y --size 7", "7 is not in");
    }
}
