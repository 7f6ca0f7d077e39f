//! How a node uses Kafka: from a URL, files and the environment.
//!
//! Owns: the options and what a URL may say. Must not know: the client.
//! Invariant: secrets are in no `Debug` output and in no error.

use std::fmt;

use super::log::LogLimits;
use crate::url::percent_decoded;

/// Most partitions of the topic: each in use costs a node a canary every 250 ms and memory of its own.
pub const PARTITIONS_MAX: u32 = 1_024;

/// Where the environment may have user and password.
pub const USER_VARIABLE: &str = "RINGMAIN_KAFKA_USER";
/// See [`USER_VARIABLE`].
pub const PASSWORD_VARIABLE: &str = "RINGMAIN_KAFKA_PASSWORD";

/// How a node uses Kafka.
#[derive(Clone, Debug)]
pub struct KafkaOptions {
    /// The brokers to ask first, each `host:port`.
    pub brokers: Vec<String>,
    /// The one topic of all channels. Made if it is missing.
    pub topic: String,
    /// Its partitions. A channel's partition follows from its name and this number, so a topic that has another
    /// number is refused. More of them give more and smaller requests, and each has its canary; one carries some ten
    /// thousand messages a second. The first is for what every node hears. Users are placed by the others, so some ten
    /// for each node spread them evenly and let a node read only its own.
    pub partitions: u32,
    /// One broker is enough: one copy of everything, and what that broker's disk loses is lost. Without it, three
    /// copies, two of which confirm each publish, and no election of a replica that is behind, or the topic is refused.
    pub small: bool,
    /// How long a topic that we make keeps messages, in milliseconds: how far back positions and histories can reach.
    pub retention_ms: u64,
    /// Largest record of one publication, in bytes.
    pub record_bytes_max: usize,
    /// History in this node's memory, all partitions together, in bytes. Above it the oldest goes.
    pub cache_bytes_max: usize,
    /// Messages of a partition read before its end when a node begins to read it.
    pub scan_messages_max: u64,
    /// The same in bytes. A publication further back is not recovered by this node.
    pub scan_bytes_max: u64,
    /// Channels of a partition whose positions a node remembers although nobody here is subscribed.
    pub channels_max: usize,
    /// Idempotency keys remembered per partition; as many ids of nodes' own publications.
    pub ids_max: usize,
    /// How long they are remembered, in milliseconds.
    pub ids_window_ms: u64,
    /// How long a publish waits for others to go with it, in milliseconds. Those that come while one is on its way go
    /// together in any case.
    pub linger_ms: f64,
    /// Produce requests on their way to one broker, 1 to 5. While so many are, publishes are grouped: fewer give fewer
    /// and larger requests under load, and add at most their round trip.
    pub in_flight_max: u32,
    /// How long the broker holds a fetch that finds nothing, in milliseconds.
    pub fetch_wait_ms: u32,
    /// A partition that no channel has needed for so long is read no more, in milliseconds.
    pub detach_after_ms: u64,
    /// Encryption; `None` is plain TCP.
    pub tls: Option<TlsOptions>,
    /// Who we are.
    pub credentials: Option<Credentials>,
}

/// Encryption of connections. Files are PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Authorities that may have signed the brokers' certificates; `None`: the system's.
    pub ca_file: Option<String>,
    /// Our certificate.
    pub certificate_file: Option<String>,
    /// Its key.
    pub key_file: Option<String>,
}

/// User, password and how they are shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    pub mechanism: String,
    /// The user.
    pub user: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}, user and password not shown)", self.mechanism)
    }
}

/// Why a URL is refused. Never carries its user or password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Another scheme.
    #[error("a Kafka URL begins with kafka:// or kafkas://")]
    Scheme,
    /// No host, or a port that is none.
    #[error("a Kafka URL names its brokers: kafka://host:9092,host:9092[/topic]")]
    Brokers,
    /// Not a name that Kafka takes.
    #[error("a topic has 1 to 249 characters of a-z, A-Z, 0-9, '.', '_' and '-'")]
    Topic,
    /// An option that does not exist.
    #[error("a Kafka URL has no option {0:?}")]
    Option(String),
    /// An option with a value that it cannot have.
    #[error("the option {0:?} of a Kafka URL cannot have this value")]
    Value(String),
    /// A file with a secret cannot be read.
    #[error("the file named by {0:?} cannot be read")]
    File(String),
    /// A user without a password, or the other way round.
    #[error("a user and a password are given together")]
    Credentials,
    /// This build's client has no TLS.
    #[error("this build has no TLS for Kafka: build with --features kafka-tls")]
    NoTls,
}

impl KafkaOptions {
    /// Groups of slots that a node reads as one: slot `s` is of group `s` modulo this, at least 1.
    pub fn slot_groups(&self) -> u32 {
        super::wire::slot_partitions(self.partitions)
    }

    /// The defaults, for these brokers.
    pub fn new(brokers: Vec<String>) -> KafkaOptions {
        KafkaOptions {
            brokers,
            topic: "ringmain".into(),
            partitions: 6,
            small: false,
            retention_ms: 86_400_000,
            record_bytes_max: 1_000_000,
            cache_bytes_max: 256 << 20,
            scan_messages_max: 100_000,
            scan_bytes_max: 16 << 20,
            channels_max: 65_536,
            ids_max: 16_384,
            ids_window_ms: 300_000,
            linger_ms: 0.0,
            in_flight_max: 2,
            fetch_wait_ms: 5,
            detach_after_ms: 60_000,
            tls: None,
            credentials: None,
        }
    }

    /// Reads `kafka://[user:password@]host[:9092][,host…][/topic][?option=value&…]`; `kafkas://` encrypts.
    ///
    /// Options: `partitions`, `small` (true, false), `mechanism`, `password_file`, `ca`, `certificate`, `key` (files).
    /// User and password may be percent-encoded, or stand in [`USER_VARIABLE`] and [`PASSWORD_VARIABLE`], which
    /// `environment` is asked for where the URL has none.
    pub fn from_url(
        url: &str,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<KafkaOptions, UrlError> {
        let (is_tls, rest) = match (url.strip_prefix("kafka://"), url.strip_prefix("kafkas://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(UrlError::Scheme),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, topic) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let mut options = KafkaOptions::new(brokers(hosts)?);
        if !topic.is_empty() {
            options.topic = checked_topic(topic)?;
        }
        if is_tls {
            options.tls = Some(TlsOptions::default());
        }
        let mut login = Login::new(login)?;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decoded(value).ok_or_else(|| UrlError::Value(name.into()))?;
            options.set(name, &value, &mut login)?;
        }
        options.credentials = login.credentials(environment, is_tls)?;
        if options.tls.is_some() && !cfg!(feature = "kafka-tls") {
            return Err(UrlError::NoTls);
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str, login: &mut Login) -> Result<(), UrlError> {
        let wrong = || UrlError::Value(name.into());
        match name {
            "partitions" => {
                let partitions = value.parse().ok().filter(|count| (1..=PARTITIONS_MAX).contains(count));
                self.partitions = partitions.ok_or_else(wrong)?;
            }
            "small" => self.small = value.parse().map_err(|_| wrong())?,
            "mechanism" if ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"].contains(&value) => {
                login.mechanism = Some(value.into());
            }
            "mechanism" => return Err(wrong()),
            "password_file" => {
                let text = std::fs::read_to_string(value).map_err(|_| UrlError::File(name.into()))?;
                login.password = Some(text.trim_end_matches(['\r', '\n']).into());
            }
            "ca" | "certificate" | "key" => {
                let tls = self.tls.as_mut().ok_or_else(wrong)?;
                let file = match name {
                    "ca" => &mut tls.ca_file,
                    "certificate" => &mut tls.certificate_file,
                    _ => &mut tls.key_file,
                };
                *file = Some(value.into());
            }
            _ => return Err(UrlError::Option(name.into())),
        }
        Ok(())
    }

    /// Bounds of one partition's memory.
    pub(super) fn log_limits(&self) -> LogLimits {
        LogLimits {
            bytes_max: self.cache_bytes_max / self.partitions.max(1) as usize,
            channels_max: self.channels_max,
            ids_max: self.ids_max,
            ids_window_ms: self.ids_window_ms,
        }
    }
}

#[derive(Default)]
struct Login {
    user: Option<String>,
    password: Option<String>,
    mechanism: Option<String>,
}

impl Login {
    fn new(text: &str) -> Result<Login, UrlError> {
        let (user, password) = text.split_once(':').unwrap_or((text, ""));
        let part = |text: &str| match text {
            "" => Ok(None),
            text => percent_decoded(text).map(Some).ok_or(UrlError::Credentials),
        };
        Ok(Login { user: part(user)?, password: part(password)?, mechanism: None })
    }

    fn credentials(
        self,
        environment: impl Fn(&str) -> Option<String>,
        is_tls: bool,
    ) -> Result<Option<Credentials>, UrlError> {
        let user = self.user.or_else(|| environment(USER_VARIABLE));
        let password = self.password.or_else(|| environment(PASSWORD_VARIABLE));
        let default = if is_tls { "SCRAM-SHA-512" } else { "PLAIN" };
        let mechanism = self.mechanism.unwrap_or_else(|| default.into());
        match (user, password) {
            (None, None) => Ok(None),
            (Some(user), Some(password)) => Ok(Some(Credentials { mechanism, user, password })),
            _ => Err(UrlError::Credentials),
        }
    }
}

fn brokers(hosts: &str) -> Result<Vec<String>, UrlError> {
    let broker = |host: &str| {
        let is_plain = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte))
        };
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
        match host.rsplit_once(':').filter(|_| has_port) {
            Some((name, port)) if is_plain(name) && port.parse::<u16>().is_ok_and(|port| port > 0) => {
                Ok(host.to_owned())
            }
            None if is_plain(host) => Ok(format!("{host}:9092")),
            _ => Err(UrlError::Brokers),
        }
    };
    hosts.split(',').map(broker).collect()
}

fn checked_topic(topic: &str) -> Result<String, UrlError> {
    let is_taken = topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    let is_name = is_taken && topic.len() <= 249 && topic != "." && topic != "..";
    if is_name { Ok(topic.into()) } else { Err(UrlError::Topic) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<KafkaOptions, UrlError> {
        KafkaOptions::from_url(url, |_| None)
    }

    #[test]
    fn a_url_names_brokers_topic_and_options() {
        let options = read("kafka://a:9093,b,[::1]:9092/bus.x?partitions=4&small=true").unwrap();
        assert_eq!(options.brokers, ["a:9093", "b:9092", "[::1]:9092"]);
        assert_eq!((options.topic.as_str(), options.partitions, options.small), ("bus.x", 4, true));
        let options = read("kafka://a").unwrap();
        assert_eq!((options.topic.as_str(), options.partitions, options.small), ("ringmain", 6, false));
        assert!(options.credentials.is_none());
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for (url, error) in [
            ("http://a", UrlError::Scheme),
            ("kafka://", UrlError::Brokers),
            ("kafka://a:0", UrlError::Brokers),
            ("kafka://a:x", UrlError::Brokers),
            ("kafka://a,,b", UrlError::Brokers),
            ("kafka://a/b/c", UrlError::Topic),
            ("kafka://a?partitions=0", UrlError::Value("partitions".into())),
            ("kafka://a?partitions=1025", UrlError::Value("partitions".into())),
            ("kafka://a?mechanism=GSSAPI", UrlError::Value("mechanism".into())),
            ("kafka://a?ca=/x", UrlError::Value("ca".into())),
            ("kafka://a?what=1", UrlError::Option("what".into())),
            ("kafka://user@a", UrlError::Credentials),
            ("kafka://a?password_file=/nowhere/at/all", UrlError::File("password_file".into())),
        ] {
            assert_eq!(read(url).unwrap_err(), error, "{url}");
        }
        assert!(read(&format!("kafka://a?partitions={PARTITIONS_MAX}")).is_ok());
    }

    #[test]
    fn secrets_come_from_url_or_environment_and_are_not_shown() {
        let from_url = read("kafka://us%40er:s%3Aecret@a?mechanism=SCRAM-SHA-256").unwrap();
        let credentials = from_url.credentials.clone().unwrap();
        assert_eq!((credentials.user.as_str(), credentials.password.as_str()), ("us@er", "s:ecret"));
        assert_eq!(credentials.mechanism, "SCRAM-SHA-256");
        let shown = format!("{from_url:?}");
        assert!(!shown.contains("ecret") && !shown.contains("us@er"), "{shown}");
        let environment = |name: &str| match name {
            USER_VARIABLE => Some("u".to_owned()),
            PASSWORD_VARIABLE => Some("p".to_owned()),
            _ => None,
        };
        let options = KafkaOptions::from_url("kafka://a", environment).unwrap();
        assert_eq!(options.credentials.unwrap().mechanism, "PLAIN");
    }

    #[test]
    fn tls_needs_a_build_that_has_it() {
        let tls = read("kafkas://a?ca=/ca.pem").map(|options| options.tls);
        if cfg!(feature = "kafka-tls") {
            let expected = TlsOptions { ca_file: Some("/ca.pem".into()), ..TlsOptions::default() };
            assert_eq!(tls.unwrap(), Some(expected));
        } else {
            assert_eq!(tls.unwrap_err(), UrlError::NoTls);
        }
    }
}
