//! One contestant, once: the load, what it cost the processes, the sockets and the broker.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Bench, Contestant, client_core, scheme, stored};
use crate::command::CommandError;
use crate::io::board::{Counter, Phase};
use crate::measure::broker::BrokerCounts;
use crate::measure::cpu::{CoreTicks, CpuMeter, CpuSample};
use crate::measure::latency::Percentiles;
use crate::measure::sockets::{self, Traffic};
use crate::plan::{BusPlan, CrossPlan, Load, Pace, Plan, Target};
use crate::run::{Fleet, RunError};

/// What is asked of both contestants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) pace: Pace,
    /// Without subscribers, publications count when they are acknowledged.
    pub(super) subscribe: bool,
}

/// What was measured. "Per publication" everywhere, whoever many subscribers it has.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Trial {
    pub(super) publications: f64,
    pub(super) per_second: f64,
    pub(super) latency: Percentiles,
    /// CPU in microseconds: of the node that publishes and the one that subscribes; of the bare client's process.
    pub(super) cpu_us: Vec<f64>,
    /// What part of all cores was used, by whomever, 0 to 1.
    pub(super) busy: Option<f64>,
    pub(super) sent_bytes: Option<f64>,
    pub(super) received_bytes: Option<f64>,
    pub(super) sent_segments: Option<f64>,
    pub(super) broker_in_bytes: Option<f64>,
    pub(super) broker_out_bytes: Option<f64>,
    pub(super) broker_operations: Option<f64>,
    pub(super) broker_by_kind: BTreeMap<String, f64>,
    pub(super) problems: Vec<(String, u64)>,
}

/// Counters at one moment.
struct Sample {
    at: Instant,
    units: u64,
    cpu: Vec<CpuSample>,
    machine: Option<CoreTicks>,
    traffic: Option<Traffic>,
    broker: Option<BrokerCounts>,
}

impl Bench<'_> {
    pub(super) fn trial(&mut self, contestant: Contestant, setting: Setting) -> Result<Trial, CommandError> {
        self.trials += 1;
        let (plan, expected_open) = self.plan(contestant, setting);
        let mut fleet = Fleet::start(&plan, expected_open, self.progress.clone())?;
        fleet.await_open(self.args.run.setup)?;
        let pids: Vec<u32> = match contestant {
            Contestant::Nodes => self.nodes.iter().flat_map(|node| node.pids.clone()).collect(),
            Contestant::Bare => fleet.pids(),
        };
        fleet.set_phase(Phase::Warmup);
        fleet.wait("warming up", self.args.run.warmup, |_| false)?;
        let before = self.sample(&fleet, &pids)?;
        fleet.set_phase(Phase::Measure);
        fleet.wait("measuring", self.args.run.duration, |fleet| fleet.counter(Counter::Failed) > 0)?;
        let after = self.sample(&fleet, &pids)?;
        let findings = fleet.finish()?;
        if fleet.counter(Counter::Failed) > 0 {
            let why = findings.problems.first().map_or("unknown".into(), |(what, _)| what.clone());
            let failed = fleet.counter(Counter::Failed);
            return Err(RunError::Setup { failed, wanted: expected_open, why }.into());
        }
        let each = match contestant {
            Contestant::Nodes if setting.subscribe => self.args.subscribers,
            _ => 1,
        };
        Ok(after.since(&before, each, findings.latencies.percentiles(), findings.problems))
    }

    fn plan(&self, contestant: Contestant, setting: Setting) -> (Plan, u64) {
        let (args, Setting { pace, subscribe }) = (self.args, setting);
        let (channels, size, trial) = (args.channels, args.size as usize, self.trials);
        let (connections, expected, load) = match contestant {
            Contestant::Nodes => {
                let connections = if subscribe { channels * args.subscribers } else { 0 };
                let publishers = args.publishers;
                let dense = scheme(args).starts_with("redis");
                let publish_to = self.nodes[0].target.clone();
                let prefix = format!("room:cross-{trial}-");
                let load =
                    Load::Cross(CrossPlan { publish_to, publishers, channels, dense, prefix, pace, size });
                (connections, connections + publishers, load)
            }
            Contestant::Bare => {
                let load = Load::Bus(BusPlan {
                    url: args.bus.clone(),
                    stored: stored(args),
                    subscribe,
                    channels,
                    prefix: format!("bench-{trial}-"),
                    pace,
                    size,
                    publish_core: args.publish_core,
                });
                (0, 1, load)
            }
        };
        let target: Target = self.nodes[1].target.clone();
        let plan = Plan {
            target,
            token_secret: None,
            connections,
            workers: 1,
            connect_window: args.run.connect_window as usize,
            client_core: client_core(&args.run),
            load,
        };
        (plan, expected)
    }

    fn sample(&self, fleet: &Fleet, pids: &[u32]) -> Result<Sample, CommandError> {
        let served: Vec<u16> = self.nodes.iter().flat_map(crate::server::Server::ports).collect();
        let traffic = sockets::outward(pids, &served).map(|by_pid| {
            by_pid.values().fold(Traffic::default(), |mut sum, &traffic| {
                sum.add(traffic);
                sum
            })
        });
        let broker = self.broker.counts();
        let cpu = pids.iter().map(|&pid| CpuMeter::new(vec![pid], None).sample());
        let cpu = cpu.collect::<Result<Vec<_>, _>>().map_err(RunError::from)?;
        let (at, units, machine) = (Instant::now(), fleet.counter(Counter::Units), CoreTicks::of_machine());
        Ok(Sample { at, units, cpu, machine, traffic, broker })
    }
}

impl Sample {
    fn since(&self, before: &Sample, each: u64, latency: Percentiles, problems: Vec<(String, u64)>) -> Trial {
        let publications = (self.units - before.units) as f64 / each as f64;
        let seconds = (self.at - before.at).max(Duration::from_millis(1)).as_secs_f64();
        let per = |amount: u64| amount as f64 / publications;
        let traffic = self.traffic.zip(before.traffic).map(|(after, before)| after.since(&before));
        let broker =
            self.broker.as_ref().zip(before.broker.as_ref()).map(|(after, before)| after.since(before));
        let by_kind = broker.iter().flat_map(|counts| &counts.by_kind);
        Trial {
            publications,
            per_second: publications / seconds,
            latency,
            cpu_us: self
                .cpu
                .iter()
                .zip(&before.cpu)
                .map(|(after, before)| per(after.since(before).total_ns()) / 1e3)
                .collect(),
            busy: self.machine.zip(before.machine).and_then(|(after, before)| after.busy_since(before)),
            sent_bytes: traffic.map(|traffic| per(traffic.sent_bytes)),
            received_bytes: traffic.map(|traffic| per(traffic.received_bytes)),
            sent_segments: traffic.map(|traffic| per(traffic.sent_segments)),
            broker_in_bytes: broker.as_ref().map(|counts| per(counts.in_bytes)),
            broker_out_bytes: broker.as_ref().map(|counts| per(counts.out_bytes)),
            broker_operations: broker.as_ref().map(|counts| per(counts.operations)),
            broker_by_kind: by_kind.map(|(kind, &count)| (kind.clone(), per(count))).collect(),
            problems,
        }
    }
}
