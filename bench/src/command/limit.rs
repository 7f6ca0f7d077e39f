//! `limit`: the server under test and bare servers in alternating rounds, with the same bytes and the same load.

use std::time::Duration;

use comfy_table::Table;
use indicatif::ProgressBar;
use serde_json::json;

use super::workload::Workload;
use super::{CommandError, meter, prepare, start, timing};
use crate::bare::script::Script;
use crate::cli::{LimitOptions, RunArgs, ServerArgs};
use crate::io::board::{Counter, Phase};
use crate::measure::cpu::CpuMeter;
use crate::measure::machine::Machine;
use crate::measure::series::Series;
use crate::plan::{Heard, Target};
use crate::report;
use crate::run::{self, Findings, Fleet, Outcome, RunError, Timing, progress_line};
use crate::server::{Server, WEBSOCKET_PATH, parse_url};

/// How long the answers are learned for, so that offsets have about as many digits as later: at least this…
const LEARN_MIN: Duration = Duration::from_secs(1);
/// …and until every connection has been answered a few times, but no longer than this.
const LEARN_MAX: Duration = Duration::from_secs(20);
const LEARN_UNITS_PER_CONNECTION: u64 = 3;

/// Who is measured in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    Subject,
    Epoll,
    Uring,
    /// The cheaper of the two bare servers once more: what differs is noise.
    Control,
}

const CONTESTANTS: [Contestant; 4] =
    [Contestant::Subject, Contestant::Epoll, Contestant::Uring, Contestant::Control];

/// Everything that stays the same from round to round.
struct Comparison<'a> {
    workload: &'a Workload,
    server: &'a ServerArgs,
    run: &'a RunArgs,
    timing: Timing,
    script: Script,
    path: String,
    progress: ProgressBar,
    /// By contestant, one for each round.
    outcomes: [Vec<Outcome>; 4],
}

pub(super) fn run(
    name: &str,
    workload: &Workload,
    server: &ServerArgs,
    run: &RunArgs,
    options: LimitOptions,
) -> Result<(), CommandError> {
    let machine = Machine::look();
    prepare(run)?;
    let progress = progress_line(run.quiet);
    progress.set_prefix(format!("{name}: learning"));
    let path = server.url.as_deref().and_then(parse_url).map_or(WEBSOCKET_PATH.into(), |target| target.path);
    let heard = if options.bare_only {
        let target = Target {
            address: std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 1),
            path: path.clone(),
        };
        workload.imagined(&target, server.token_secret.as_deref())?
    } else {
        learn(workload, server, run, &progress)?
    };
    let script = heard.script(workload.is_fanout());
    script.check().map_err(|error| CommandError::Script(error.to_string()))?;
    let outcomes = Default::default();
    let timing = timing(run);
    let mut comparison = Comparison { workload, server, run, timing, script, path, progress, outcomes };
    comparison.rounds(name, options)?;
    comparison.progress.finish_and_clear();
    comparison.report(name, &machine)
}

/// One short run against the server under test, at window 1.
fn learn(
    workload: &Workload,
    server: &ServerArgs,
    run: &RunArgs,
    progress: &ProgressBar,
) -> Result<Heard, CommandError> {
    let subject = start(server)?;
    let workload = workload.at_window_one();
    let plan = workload.plan(&subject.server.target, subject.secret.as_deref(), run);
    let mut fleet = Fleet::start(&plan, workload.expected_open(), progress.clone())?;
    fleet.await_open(run.setup)?;
    fleet.set_phase(Phase::Warmup);
    fleet.wait("learning", LEARN_MIN, |_| false)?;
    let enough = workload.connections * LEARN_UNITS_PER_CONNECTION;
    fleet.wait("learning", LEARN_MAX, |fleet| fleet.counter(Counter::Units) >= enough)?;
    let Findings { heard, problems, .. } = fleet.finish()?;
    let answered =
        [&heard.reply, &heard.publication, &heard.both, &heard.pong].iter().any(|bytes| !bytes.is_empty());
    if heard.opening.is_empty() || (workload.unit != "cycle" && !answered) {
        let problems: Vec<String> = problems.into_iter().map(|(what, _)| what).collect();
        let why = format!("nothing could be learned from the server: {}", problems.join("; "));
        return Err(CommandError::Usage(why));
    }
    Ok(heard)
}

impl Comparison<'_> {
    fn rounds(&mut self, name: &str, options: LimitOptions) -> Result<(), CommandError> {
        for round in 0..options.rounds {
            // The control repeats the cheaper bare server, which the first round has to find out.
            let mut order = CONTESTANTS.to_vec();
            if round % 2 == 1 {
                order.reverse();
            }
            order.retain(|contestant| *contestant != Contestant::Subject || !options.bare_only);
            for contestant in order {
                self.progress.set_prefix(format!(
                    "{name}: round {}/{} {}",
                    round + 1,
                    options.rounds,
                    self.title(contestant)
                ));
                let outcome = match self.one(contestant) {
                    Err(CommandError::Run(RunError::Interrupted)) => return Ok(()),
                    other => other?,
                };
                // Half a measurement is better than none, but not beside whole ones.
                if !outcome.interrupted || self.outcomes[contestant as usize].is_empty() {
                    self.outcomes[contestant as usize].push(outcome);
                }
                if crate::io::signals::interrupted() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn one(&self, contestant: Contestant) -> Result<Outcome, CommandError> {
        let engine = match contestant {
            Contestant::Subject => {
                let subject = start(self.server)?;
                let plan = self.workload.plan(&subject.server.target, subject.secret.as_deref(), self.run);
                let meter = meter(&subject);
                let expected = self.workload.expected_open();
                return Ok(run::measure(&plan, expected, &self.timing, meter.as_ref(), &self.progress)?);
            }
            Contestant::Epoll => "epoll",
            Contestant::Uring => "uring",
            Contestant::Control => self.cheaper().1,
        };
        let core = self.server.server_core;
        let server = Server::spawn_bare(engine, &self.script, Some(core))?;
        let meter = CpuMeter::new(server.pids.clone(), Some(core));
        let target = Target { path: self.path.clone(), ..server.target.clone() };
        let workload = self.workload.unchecked();
        let plan = workload.plan(&target, self.server.token_secret.as_deref(), self.run);
        Ok(run::measure(&plan, workload.expected_open(), &self.timing, Some(&meter), &self.progress)?)
    }

    /// CPU for each unit, round by round.
    fn cpu(&self, contestant: Contestant) -> Vec<f64> {
        self.outcomes[contestant as usize]
            .iter()
            .map(|outcome| outcome.cpu_us_per_unit.unwrap_or(f64::NAN))
            .collect()
    }

    /// The bare server with the lower median so far: the limit.
    fn cheaper(&self) -> (Contestant, &'static str) {
        let median =
            |contestant| Series::of(&self.cpu(contestant)).map_or(f64::INFINITY, |series| series.median);
        if median(Contestant::Uring) < median(Contestant::Epoll) {
            (Contestant::Uring, "uring")
        } else {
            (Contestant::Epoll, "epoll")
        }
    }

    fn title(&self, contestant: Contestant) -> String {
        match contestant {
            Contestant::Subject => "server".into(),
            Contestant::Epoll => "bare epoll".into(),
            Contestant::Uring => "bare io_uring".into(),
            Contestant::Control => format!("control ({})", self.cheaper().1),
        }
    }

    fn report(&self, name: &str, machine: &Machine) -> Result<(), CommandError> {
        let (limit, _) = self.cheaper();
        let mut table = Table::new();
        let unit = self.workload.unit;
        table.set_header([
            format!("{name}: {}", self.workload.title),
            format!("CPU us per {unit}"),
            format!("x limit ({})", self.title(limit)),
            "busy / client".into(),
            format!("1000 {unit}/s"),
            "p50 us".into(),
            "p99 us".into(),
            "B in / out".into(),
        ]);
        let mut notes = vec![format!(
            "median (min–max) of {} rounds; x limit: round by round; control: the same bare server measured again",
            self.outcomes[limit as usize].len()
        )];
        let mut servers = Vec::new();
        for contestant in CONTESTANTS {
            let outcomes = &self.outcomes[contestant as usize];
            if outcomes.is_empty() {
                continue;
            }
            let title = self.title(contestant);
            let ratio = Series::of_ratios(&self.cpu(contestant), &self.cpu(limit));
            table.add_row(self.row(contestant, &title, ratio));
            outcomes.iter().for_each(|outcome| notes.extend(report::problem_notes(&title, outcome)));
            servers.push(json!({
                "server": title,
                "cpu_us_per_unit": Series::of(&self.cpu(contestant)),
                "ratio_to_limit": ratio,
                "rounds": outcomes,
            }));
        }
        notes.sort();
        notes.dedup();
        let all: Vec<&Outcome> = self.outcomes.iter().flatten().collect();
        notes.extend(report::noise_note(&all));
        let result = json!({
            "load": name, "workload": self.workload.title, "unit": unit,
            "limit": self.title(limit), "servers": servers,
        });
        Ok(report::publish(machine, &[table], &notes, &result, self.run.json.as_deref())?)
    }

    fn row(&self, contestant: Contestant, title: &str, ratio: Option<Series>) -> Vec<String> {
        let outcomes = &self.outcomes[contestant as usize];
        let median = |value: &dyn Fn(&Outcome) -> f64| {
            let values: Vec<f64> = outcomes.iter().map(value).collect();
            Series::of(&values).map_or(f64::NAN, |series| series.median)
        };
        let text = |series: Option<Series>| series.map_or("unknown".into(), |series| series.text());
        vec![
            title.to_owned(),
            text(Series::of(&self.cpu(contestant))),
            text(ratio),
            format!(
                "{:.0} / {:.0} %",
                median(&|outcome| outcome.server_busy.unwrap_or(f64::NAN) * 100.0),
                median(&|outcome| outcome.client_busy * 100.0)
            ),
            format!("{:.1}", median(&|outcome| outcome.units as f64 / outcome.seconds / 1e3)),
            format!("{:.0}", median(&|outcome| outcome.latency.p50_us)),
            format!("{:.0}", median(&|outcome| outcome.latency.p99_us)),
            format!(
                "{:.1} / {:.1}",
                median(&|outcome| outcome.bytes_in_per_unit),
                median(&|outcome| outcome.bytes_out_per_unit)
            ),
        ]
    }
}
