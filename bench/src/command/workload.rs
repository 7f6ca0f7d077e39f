//! Workloads: what the arguments of echo, fan-out and churn ask for, independent of the server.

use super::CommandError;
use crate::bare::script::Exchange;
use crate::cli::{ChurnArgs, EchoArgs, EchoModeArg, FanoutArgs, RunArgs};
use crate::io::board::WORKERS_MAX;
use crate::load::openings::Openings;
use crate::load::worker::connections_per_worker;
use crate::plan::{Channels, ChurnPlan, EchoMode, EchoPlan, FanoutPlan, Heard, Load, Pace, Plan, Target};
use crate::wire::centrifuge::{data, own_channel, publish_own_template, publish_template};
use crate::wire::frame::{Opcode, client_header_bytes, push_server_frame};
use crate::wire::upgrade;

/// The longest payload of a ping (RFC 6455 section 5.5).
const PING_BYTES_MAX: u64 = 125;

/// A kind of traffic and its size.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    pub(crate) title: String,
    /// What is counted.
    pub(crate) unit: &'static str,
    pub(crate) connections: u64,
    pub(crate) load: Load,
}

impl Workload {
    /// The plan of a run against `target`.
    pub(crate) fn plan(&self, target: &Target, secret: Option<&str>, run: &RunArgs) -> Plan {
        let needed = self.connections.div_ceil(connections_per_worker()).max(1);
        let workers = run.workers.unwrap_or(needed).max(needed).min(self.connections).min(WORKERS_MAX as u64);
        Plan {
            target: target.clone(),
            token_secret: secret.map(str::to_owned),
            connections: self.connections,
            workers: workers as usize,
            connect_window: run.connect_window as usize,
            client_core: client_core(run),
            load: self.load.clone(),
        }
    }

    /// Connections that are open when everything is.
    pub(crate) fn expected_open(&self) -> u64 {
        match self.load {
            Load::Idle(_) | Load::Echo(_) => self.connections,
            Load::Fanout(_) => self.connections + 1,
            Load::Cross(ref cross) => self.connections + cross.publishers,
            Load::Bus(_) => 1,
            Load::Churn(_) => 0,
        }
    }

    pub(crate) fn is_fanout(&self) -> bool {
        matches!(self.load, Load::Fanout(_))
    }

    /// The same with one request in flight: what the bytes of a single answer are learned from.
    pub(crate) fn at_window_one(&self) -> Workload {
        let mut workload = self.clone();
        match &mut workload.load {
            Load::Echo(EchoPlan { pace, .. }) | Load::Fanout(FanoutPlan { pace, .. }) => {
                *pace = Pace::Window(1);
            }
            Load::Idle(_) | Load::Churn(_) | Load::Cross(_) | Load::Bus(_) => {}
        }
        workload
    }

    /// The same against a bare server, which repeats one offset.
    pub(crate) fn unchecked(&self) -> Workload {
        let mut workload = self.clone();
        match &mut workload.load {
            Load::Echo(EchoPlan { check, .. }) | Load::Fanout(FanoutPlan { check, .. }) => *check = false,
            Load::Idle(_) | Load::Churn(_) | Load::Cross(_) | Load::Bus(_) => {}
        }
        workload
    }

    /// Answers made up to be like a server's, for runs without one.
    pub(crate) fn imagined(&self, target: &Target, secret: Option<&str>) -> Result<Heard, CommandError> {
        let openings = Openings::new(secret).map_err(|error| CommandError::Usage(error.to_string()))?;
        let mut heard = Heard {
            opening: vec![Exchange {
                request_bytes: upgrade::request(&target.path).len(),
                reply: upgrade::canned_response(),
            }],
            close: server_frame(Opcode::Close, &1000u16.to_be_bytes()),
            reply: text_frame(r#"{"id":1000000000,"publish":{}}"#),
            ..Heard::default()
        };
        let channel = match &self.load {
            Load::Echo(echo) => imagine_echo(echo, &mut heard),
            Load::Fanout(fanout) => {
                heard.request_bytes = publish_template(&fanout.channel, fanout.size).wire_bytes();
                heard.publication = publication(&fanout.channel, fanout.size);
                Some(fanout.channel.clone())
            }
            Load::Churn(churn) => Some(churn.channel.clone()).filter(|_| !churn.bare),
            Load::Idle(_) | Load::Cross(_) | Load::Bus(_) => None,
        };
        if let Some(channel) = channel {
            let mut frame = Vec::new();
            openings.append(0, Some(&channel), &mut frame);
            heard.opening.push(Exchange { request_bytes: frame.len(), reply: imagined_opening_reply() });
        }
        Ok(heard)
    }
}

fn imagine_echo(echo: &EchoPlan, heard: &mut Heard) -> Option<String> {
    match &echo.mode {
        EchoMode::Ping { session } => {
            heard.request_bytes = client_header_bytes(echo.size) + echo.size;
            heard.pong = server_frame(Opcode::Pong, "x".repeat(echo.size).as_bytes());
            heard.reply.clear();
            session.as_ref().and_then(|channels| channels.of(0))
        }
        EchoMode::Publish { prefix } => {
            let channel = own_channel(prefix, 0);
            heard.request_bytes = publish_own_template(prefix, echo.size).wire_bytes();
            heard.publication = publication(&channel, echo.size);
            Some(channel)
        }
    }
}

fn publication(channel: &str, size: usize) -> Vec<u8> {
    let text =
        format!(r#"{{"push":{{"channel":"{channel}","pub":{{"data":{},"offset":10000}}}}}}"#, data(size));
    text_frame(&text)
}

fn imagined_opening_reply() -> Vec<u8> {
    text_frame(concat!(
        r#"{"id":1,"connect":{"client":"00000000-0000-0000-0000-000000000000","version":"0.1.0","ping":25,"pong":true}}"#,
        "\n",
        r#"{"id":2,"subscribe":{"recoverable":true,"positioned":true,"epoch":"0000000000000","offset":10000}}"#,
    ))
}

fn text_frame(text: &str) -> Vec<u8> {
    server_frame(Opcode::Text, text.as_bytes())
}

fn server_frame(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    push_server_frame(&mut frame, opcode, payload);
    frame
}

/// The core of the load processes: as told, or the last one.
pub(crate) fn client_core(run: &RunArgs) -> usize {
    let last = core_affinity::get_core_ids().and_then(|cores| cores.last().map(|core| core.id));
    run.client_core.or(last).unwrap_or(0)
}

fn pace_text(pace: Pace) -> String {
    match pace {
        Pace::Window(window) => format!("window {window}"),
        Pace::PerSecond(rate) => format!("{rate} per s"),
    }
}

pub(crate) fn echo(args: &EchoArgs) -> Result<Workload, CommandError> {
    let mode = match args.mode {
        EchoModeArg::Ping if args.size > PING_BYTES_MAX => {
            return Err(CommandError::Usage(format!(
                "--size: a ping carries at most {PING_BYTES_MAX} bytes"
            )));
        }
        EchoModeArg::Ping if args.raw => EchoMode::Ping { session: None },
        EchoModeArg::Ping => EchoMode::Ping { session: Some(Channels::Own(args.own_prefix.clone())) },
        EchoModeArg::Publish if args.raw => {
            return Err(CommandError::Usage("--raw has no session that could publish".into()));
        }
        EchoModeArg::Publish => EchoMode::Publish { prefix: args.own_prefix.clone() },
    };
    let name = if args.mode == EchoModeArg::Ping { "ping/pong" } else { "publish to oneself" };
    let pace = args.pace.pace();
    Ok(Workload {
        title: format!("{name}, {} connections, {} B, {}", args.connections, args.size, pace_text(pace)),
        unit: "message",
        connections: args.connections,
        load: Load::Echo(EchoPlan { mode, pace, size: args.size as usize, check: true }),
    })
}

pub(crate) fn fanout(args: &FanoutArgs) -> Result<Workload, CommandError> {
    let at_end = args.channel.chars().next_back().filter(char::is_ascii_alphanumeric);
    let Some(last) = at_end else {
        return Err(CommandError::Usage("--channel must end in a letter or a digit".into()));
    };
    if args.stopped >= args.connections {
        return Err(CommandError::Usage("--stopped must leave a subscriber that reads".into()));
    }
    let other = if last == 'p' { 'q' } else { 'p' };
    let publisher_channel = format!("{}{other}", &args.channel[..args.channel.len() - 1]);
    let pace = args.pace.pace();
    let stopped = if args.stopped > 0 { format!(", {} stopped", args.stopped) } else { String::new() };
    Ok(Workload {
        title: format!("{} subscribers{stopped}, {} B, {}", args.connections, args.size, pace_text(pace)),
        unit: "delivery",
        connections: args.connections,
        load: Load::Fanout(FanoutPlan {
            channel: args.channel.clone(),
            publisher_channel,
            pace,
            size: args.size as usize,
            stopped: args.stopped,
            check: true,
        }),
    })
}

pub(crate) fn churn(args: &ChurnArgs) -> Result<Workload, CommandError> {
    let kind = if args.bare { "handshake and close" } else { "connect, subscribe, close" };
    Ok(Workload {
        title: format!("{kind}, {} at once", args.concurrency),
        unit: "cycle",
        connections: args.concurrency,
        load: Load::Churn(ChurnPlan { bare: args.bare, channel: args.channel.clone() }),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn workload(line: &str) -> Result<Workload, CommandError> {
        let line = format!("b {line} --spawn x");
        match Cli::try_parse_from(line.split_whitespace()).expect("a valid line").command {
            Command::Echo(args) => echo(&args),
            Command::Fanout(args) => fanout(&args),
            Command::Churn(args) => churn(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_publisher_has_a_channel_of_the_same_size() {
        for channel in ["room:bench", "room:p"] {
            let Ok(Workload { load: Load::Fanout(plan), .. }) =
                workload(&format!("fanout --channel {channel}"))
            else {
                panic!("not a fan-out");
            };
            assert_eq!(plan.channel.len(), plan.publisher_channel.len());
            assert_ne!(plan.channel, plan.publisher_channel);
        }
        assert!(workload("fanout --connections 5 --stopped 5").is_err());
        assert!(workload("fanout --connections 5 --stopped 4").is_ok());
    }

    #[test]
    fn pings_are_control_frames() {
        assert!(workload("echo --size 125").is_ok());
        assert!(workload("echo --size 126").is_err());
        assert!(workload("echo --mode publish --size 126").is_ok());
        assert!(workload("echo --mode publish --raw").is_err());
    }

    #[test]
    fn imagined_answers_make_a_script() {
        let target = Target {
            address: "127.0.0.1:1".parse().expect("an address"),
            path: "/connection/websocket".into(),
        };
        for (line, exchanges) in [
            ("echo", 2),
            ("echo --raw", 1),
            ("echo --mode publish", 2),
            ("fanout", 2),
            ("churn", 2),
            ("churn --bare", 1),
        ] {
            let workload = workload(line).expect("a workload");
            let heard = workload.imagined(&target, Some("secret")).expect("bytes");
            let script = heard.script(workload.is_fanout());
            assert_eq!(script.check(), Ok(()), "{line}");
            assert_eq!(script.opening.len(), exchanges, "{line}");
            assert_eq!(script.delivery.is_some(), workload.is_fanout(), "{line}");
        }
    }
}
