//! Random commands and faults against the simulated broker, for many seeds. The suite's probe checks the
//! clauses that hold at all times; at the end everything is mended, and then every open channel must stand
//! at its top, every command be answered, and every ephemeral publication have come or be told as lost.
//!
//! A failure prints its seed: put it into `SEEDS_OF_BUGS`, where it stays.
//! `RINGMAIN_SIM_SEEDS=1000..9000` runs others.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::Simulated;
use ringmain_bus::nonce::Nonces;
use ringmain_bus::sim::SimOptions;
use ringmain_bus::suite::{Answer, Faults, Probe};
use ringmain_bus::{ChannelOptions, Health, HistoryQuery, PublicationId, Since, Token};

/// Seeds that found a bug once.
const SEEDS_OF_BUGS: [u64; 2] = [2946, 7509];

const SEEDS: std::ops::Range<u64> = 0..300;
const STEPS: usize = 250;
const NODES: u64 = 3;

const CHANNELS: [(&str, ChannelOptions); 4] = [
    ("long", ChannelOptions { history_size: 1000, history_ttl_ms: 600_000, meta_ttl_ms: 900_000 }),
    ("short", ChannelOptions { history_size: 3, history_ttl_ms: 600_000, meta_ttl_ms: 900_000 }),
    ("brief", ChannelOptions { history_size: 20, history_ttl_ms: 700, meta_ttl_ms: 1500 }),
    ("ephemeral", ChannelOptions::EPHEMERAL),
];

/// An ephemeral publication, and under which open each node listened when it was sent.
struct Sent {
    node: usize,
    token: Token,
    data: String,
    listening: [Option<Token>; NODES as usize],
}

struct Run {
    probe: Probe<Simulated>,
    dice: Nonces,
    ephemeral: Vec<Sent>,
    /// Under which token each node has opened the ephemeral channel.
    opened: [Option<Token>; NODES as usize],
    down: bool,
}

impl Run {
    fn new(seed: u64) -> Run {
        let options = SimOptions {
            retries: seed.is_multiple_of(2),
            latency_ms: if seed.is_multiple_of(3) { (0, 2) } else { (1, 40) },
            pushes_max: 40,
            commands_max: 30,
            ..SimOptions::new(seed)
        };
        let probe = Probe::new(Simulated::new(options));
        Run { probe, dice: Nonces::new(!seed), ephemeral: Vec::new(), opened: [None; 3], down: false }
    }

    fn step(&mut self) {
        let node = self.dice.below(NODES) as usize;
        let (label, options) = CHANNELS[self.dice.below(4) as usize];
        let name = self.probe.name(label);
        match self.dice.below(100) {
            0..40 => self.publish(node, &name, &options),
            40..52 => self.open(node, &name, &options),
            52..57 => self.close(node, &name, &options),
            57..64 => self.read(node, &name, &options),
            64..66 => {
                let _ = self.probe.send_clear(node, &name, &options);
            }
            66..80 => {
                let ms = self.dice.below(200);
                self.probe.run_for(ms);
            }
            80..83 => self.probe.run_for(1200),
            _ => self.fault(node),
        }
    }

    fn publish(&mut self, node: usize, name: &str, options: &ChannelOptions) {
        if !options.is_positioned() {
            let data = self.probe.data(node, name);
            let token = self.probe.send_publish(node, name, options);
            let mut listening = self.opened;
            for (node, open) in listening.iter_mut().enumerate() {
                *open = open.filter(|_| self.probe.cursor(node, name).is_some());
            }
            self.ephemeral.push(Sent { node, token, data, listening });
        } else if self.dice.below(5) == 0 {
            // The key tells the data, so that a repeat names the same publication.
            let key = self.dice.below(1000).to_string();
            let data = format!("{name}/key/{key}");
            let _ = self.probe.send_publish_as(node, name, options, PublicationId::Key(&key), &data);
        } else {
            for _ in 0..=self.dice.below(4) {
                let _ = self.probe.send_publish(node, name, options);
            }
        }
    }

    fn open(&mut self, node: usize, name: &str, options: &ChannelOptions) {
        let was_open = self.probe.cursor(node, name).is_some();
        let token = self.probe.send_open(node, name, options);
        if !options.is_positioned() && !was_open {
            self.opened[node] = Some(token);
        }
    }

    fn close(&mut self, node: usize, name: &str, options: &ChannelOptions) {
        if self.dice.below(2) == 0 {
            self.probe.close(node, name);
        } else {
            self.probe.forget(node, name);
        }
        if !options.is_positioned() {
            self.opened[node] = None;
        }
    }

    fn read(&mut self, node: usize, name: &str, options: &ChannelOptions) {
        let epoch = self.probe.cursor(node, name).map(|cursor| cursor.epoch).filter(|epoch| !epoch.is_none());
        let since = Some(Since { offset: self.dice.below(60), epoch });
        let query =
            HistoryQuery { since, limit: self.dice.below(20) as u32, reverse: self.dice.below(2) == 0 };
        let _ = self.probe.send_read(node, name, options, &query);
    }

    fn fault(&mut self, node: usize) {
        match self.dice.below(12) {
            0 | 1 => self.probe.cluster.lose_arrivals(node, 1 + node as u32),
            2 => self.probe.cluster.lose_answers(node, 1),
            3 => self.probe.cluster.cut(node),
            4 => self.probe.cluster.isolate(node),
            5 => self.probe.cluster.rejoin(node),
            6 if !self.down => {
                self.down = true;
                self.probe.cluster.kill_broker();
            }
            7 if !self.down => {
                self.down = true;
                self.probe.cluster.pause_broker();
            }
            8 if !self.down => self.probe.cluster.wipe(),
            9 if !self.down => self.probe.cluster.stop_replication(),
            10 if !self.down => self.probe.cluster.fail_over(),
            11 => {
                let deaf = self.dice.below(2) == 0;
                self.probe.set_deaf(node, deaf);
            }
            _ => {
                self.down = false;
                self.probe.cluster.restore_broker();
            }
        }
    }

    fn mend(&mut self) {
        self.probe.cluster.restore_broker();
        for node in 0..NODES as usize {
            self.probe.cluster.rejoin(node);
            self.probe.set_deaf(node, false);
        }
        // Long enough for what nobody has noticed yet to be noticed.
        self.probe.run_for(5_000);
        self.probe.settle_arrivals();
        assert!((0..NODES as usize).all(|node| self.probe.health(node) == Health::Up));
    }

    fn check_end(&mut self) {
        for (label, options) in CHANNELS.iter().filter(|(_, options)| options.is_positioned()) {
            let name = self.probe.name(label);
            self.probe.check_accepted(0, &name, options);
            let open: Vec<usize> =
                (0..NODES as usize).filter(|node| self.probe.cursor(*node, &name).is_some()).collect();
            let top = self.probe.publish(0, &name, options).position;
            for node in open {
                self.probe.settle("the last one", |probe| probe.cursor(node, &name) == Some(top));
            }
        }
        let name = self.probe.name("ephemeral");
        for node in 0..NODES as usize {
            let Some(open) = self.opened[node].filter(|_| !self.probe.was_told(node, &name)) else {
                continue;
            };
            // E3: nothing was told, so everything accepted after the open is there.
            let arrived = self.probe.arrivals(node, &name);
            for sent in self.ephemeral.iter().filter(|sent| sent.listening[node] == Some(open)) {
                let accepted = self.probe.answered(sent.node, sent.token);
                if matches!(accepted, Some(Answer::Published(Ok(_)))) {
                    assert!(arrived.contains(&sent.data.as_str()), "E3: {} is missing", sent.data);
                }
            }
        }
    }
}

fn run(seed: u64) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut run = Run::new(seed);
        for _ in 0..STEPS {
            run.step();
        }
        run.mend();
        run.check_end();
    }));
    if let Err(panic) = result {
        eprintln!("the seed is {seed}");
        resume_unwind(panic);
    }
}

fn seeds() -> std::ops::Range<u64> {
    let Ok(given) = std::env::var("RINGMAIN_SIM_SEEDS") else { return SEEDS };
    let (first, end) = given.split_once("..").expect("RINGMAIN_SIM_SEEDS=first..end");
    first.parse().expect("a number")..end.parse().expect("a number")
}

#[test]
fn random_faults_break_no_clause() {
    SEEDS_OF_BUGS.into_iter().chain(seeds()).for_each(run);
}
