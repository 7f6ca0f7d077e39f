//! What an operator chooses for the NATS bus, from a URL, files and the environment.
//!
//! Owns: options, their defaults and limits; credentials. Must not know: connections.
//! Invariant: `Debug` and errors never show a credential.

use std::fmt;
use std::path::PathBuf;

use crate::backend::{AddressMap, Interest};
use crate::url::percent_decoded;

/// Servers in a URL.
pub const SERVERS_MAX: usize = 64;

/// Streams of a bus.
pub const STREAMS_MAX: u16 = 64;

/// The port of a server that names none.
pub const PORT: u16 = 4222;

/// How a node shows who it is.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum Login {
    /// Not at all.
    #[default]
    None,
    /// User and password.
    Password(String, String),
    /// A token.
    Token(String),
    /// An nkey's seed.
    Nkey(String),
    /// A file of credentials (a JWT and its seed).
    Credentials(PathBuf),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Login::None => "none",
            Login::Password(..) => "user and password",
            Login::Token(_) => "token",
            Login::Nkey(_) => "nkey",
            Login::Credentials(_) => "credentials file",
        })
    }
}

/// Options of the NATS bus.
#[derive(Clone)]
pub struct NatsOptions {
    /// Hosts and ports, at most [`SERVERS_MAX`]. A node uses one at a time.
    pub servers: Vec<(String, u16)>,
    /// Speak TLS, whatever the server offers.
    pub tls: bool,
    /// Certificates of authorities to trust beside the system's: a PEM file.
    pub tls_ca: Option<PathBuf>,
    /// This node's certificate and key: PEM files.
    pub tls_identity: Option<(PathBuf, PathBuf)>,
    /// Who this node is.
    pub login: Login,
    /// First token of all subjects and the beginning of the streams' names: letters, digits, `-`, `_`. Buses of
    /// different prefixes on one server do not meet.
    pub prefix: String,
    /// Streams that channels are spread over by slot, at most [`STREAMS_MAX`]. A server works on one after the other of
    /// a stream, so two take more; in a cluster each has its own leader. The same on all nodes: one that is set
    /// otherwise than the streams that are there does not get ready.
    pub streams: u16,
    /// Copies of a stream; `None`: three in a cluster, one on a single server.
    pub replicas: Option<u8>,
    /// Keep streams in memory instead of files: a power cut or a full restart of the brokers loses them (told).
    pub in_memory: bool,
    /// Publications kept of any one channel: the largest `history_size` in use. Smaller ones are kept when read.
    pub history_size_max: u32,
    /// How long a stream keeps a message, in milliseconds: the largest `meta_ttl_ms` in use, for a channel's last
    /// publication is its position.
    pub retention_ms: u64,
    /// The window of idempotency, in milliseconds.
    pub idempotency_ms: u64,
    /// Largest record of one publication, in bytes; the server's `max_payload` may be less.
    pub record_bytes_max: usize,
    /// How channels are subscribed.
    pub interest: Interest,
    /// Believe a stream that no living node has watched. Off: its positions are void when the first node starts.
    pub trust_unwatched: bool,
    /// Where to dial instead.
    pub addresses: Option<AddressMap>,
}

impl Default for NatsOptions {
    fn default() -> Self {
        NatsOptions {
            servers: vec![("127.0.0.1".to_owned(), PORT)],
            tls: false,
            tls_ca: None,
            tls_identity: None,
            login: Login::None,
            prefix: "ringmain".to_owned(),
            streams: 2,
            replicas: None,
            in_memory: false,
            history_size_max: 1_024,
            retention_ms: 7 * 24 * 3_600_000,
            idempotency_ms: 120_000,
            record_bytes_max: 512 << 10,
            interest: Interest::Channels,
            trust_unwatched: false,
            addresses: None,
        }
    }
}

impl fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsOptions")
            .field("servers", &self.servers)
            .field("tls", &self.tls)
            .field("login", &self.login)
            .field("prefix", &self.prefix)
            .field("streams", &self.streams)
            .field("replicas", &self.replicas)
            .field("in_memory", &self.in_memory)
            .field("history_size_max", &self.history_size_max)
            .field("retention_ms", &self.retention_ms)
            .field("idempotency_ms", &self.idempotency_ms)
            .field("interest", &self.interest)
            .finish_non_exhaustive()
    }
}

/// Why a URL or what it refers to is not usable. The operator's mistake; shows no credential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not `nats://` or `tls://`.
    #[error("a NATS URL begins with nats:// or tls://")]
    Scheme,
    /// A host is missing or a port is none.
    #[error("server {0} of the URL is not HOST or HOST:PORT")]
    Server(usize),
    /// Too many.
    #[error("the URL names more than {SERVERS_MAX} servers")]
    TooManyServers,
    /// A parameter is not known.
    #[error("the URL's parameter {0:?} is unknown")]
    Parameter(String),
    /// A parameter's value is not usable.
    #[error("the URL's parameter {0:?} has a value that cannot be used")]
    Value(&'static str),
    /// Percent encoding.
    #[error("the URL's user or password is not percent-encoded UTF-8")]
    Encoding,
    /// A file cannot be read.
    #[error("{what} cannot be read: {kind}")]
    File {
        /// Which.
        what: &'static str,
        /// Why.
        kind: std::io::ErrorKind,
    },
}

impl NatsOptions {
    /// Where to dial a server.
    pub(super) fn dialed(&self, host: &str, port: u16) -> String {
        let (host, port) = match &self.addresses {
            Some(map) => map(host, port),
            None => (host.to_owned(), port),
        };
        format!("{}://{host}:{port}", if self.tls { "tls" } else { "nats" })
    }

    /// Reads `nats://[USER:PASSWORD@|TOKEN@]HOST[:PORT],HOST[:PORT]…[?PARAMETER=VALUE&…]`; `tls://` demands TLS.
    ///
    /// Parameters: `prefix`, `streams`, `replicas`, `storage` (`file`, `memory`), `interest` (`channels`, `slots`),
    /// `creds`, `nkey`, `ca`, `cert`, `key` (paths of files). `environment` is asked for `NATS_USER` with
    /// `NATS_PASSWORD`, `NATS_TOKEN`, `NATS_NKEY` (a path), `NATS_CREDS` (a path) and `NATS_CA` where the URL says
    /// nothing.
    pub fn from_url(url: &str, environment: impl Fn(&str) -> Option<String>) -> Result<Self, UrlError> {
        let (tls, rest) = match (url.strip_prefix("nats://"), url.strip_prefix("tls://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(UrlError::Scheme),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let rest = rest.trim_end_matches('/');
        let (login, servers) = match rest.rsplit_once('@') {
            Some((login, servers)) => (login_of(login)?, servers),
            None => (Login::None, rest),
        };
        let mut options = NatsOptions { tls, login, servers: servers_of(servers)?, ..NatsOptions::default() };
        let (mut certificate, mut key) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decoded(value).ok_or(UrlError::Encoding)?;
            match name {
                "cert" => certificate = Some(PathBuf::from(value)),
                "key" => key = Some(PathBuf::from(value)),
                _ => options.set(name, value)?,
            }
        }
        options.tls_identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err(UrlError::Value("cert")),
        };
        options.complete(environment)?;
        Ok(options)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), UrlError> {
        match name {
            "prefix" => {
                let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                if value.is_empty() || value.len() > 64 || !value.chars().all(allowed) {
                    return Err(UrlError::Value("prefix"));
                }
                self.prefix = value;
            }
            "streams" => {
                let streams = value.parse().ok().filter(|streams| (1..=STREAMS_MAX).contains(streams));
                self.streams = streams.ok_or(UrlError::Value("streams"))?;
            }
            "replicas" => {
                let replicas = value.parse().ok().filter(|replicas| (1..=5).contains(replicas));
                self.replicas = Some(replicas.ok_or(UrlError::Value("replicas"))?);
            }
            "storage" => {
                self.in_memory = one_of(&value, ["file", "memory"]).ok_or(UrlError::Value("storage"))?;
            }
            "interest" => {
                let by_slot = one_of(&value, ["channels", "slots"]).ok_or(UrlError::Value("interest"))?;
                self.interest = if by_slot { Interest::Slots } else { Interest::Channels };
            }
            "creds" => self.login = Login::Credentials(value.into()),
            "nkey" => self.login = Login::Nkey(secret_of(&value, "the nkey's file")?),
            "ca" => self.tls_ca = Some(value.into()),
            _ => return Err(UrlError::Parameter(name.to_owned())),
        }
        Ok(())
    }

    fn complete(&mut self, environment: impl Fn(&str) -> Option<String>) -> Result<(), UrlError> {
        if self.tls_ca.is_none() {
            self.tls_ca = environment("NATS_CA").map(PathBuf::from);
        }
        if self.login != Login::None {
            return Ok(());
        }
        if let Some(user) = environment("NATS_USER") {
            self.login = Login::Password(user, environment("NATS_PASSWORD").unwrap_or_default());
        } else if let Some(token) = environment("NATS_TOKEN") {
            self.login = Login::Token(token);
        } else if let Some(path) = environment("NATS_NKEY") {
            self.login = Login::Nkey(secret_of(&path, "the nkey's file")?);
        } else if let Some(path) = environment("NATS_CREDS") {
            self.login = Login::Credentials(path.into());
        }
        Ok(())
    }
}

/// Whether it is the second; `None` for neither.
fn one_of(value: &str, [first, second]: [&str; 2]) -> Option<bool> {
    if value == second { Some(true) } else { (value == first).then_some(false) }
}

fn secret_of(path: &str, what: &'static str) -> Result<String, UrlError> {
    let text = std::fs::read_to_string(path).map_err(|error| UrlError::File { what, kind: error.kind() })?;
    Ok(text.trim().to_owned())
}

fn login_of(text: &str) -> Result<Login, UrlError> {
    let decoded = |part: &str| percent_decoded(part).ok_or(UrlError::Encoding);
    Ok(match text.split_once(':') {
        Some((user, password)) => Login::Password(decoded(user)?, decoded(password)?),
        None => Login::Token(decoded(text)?),
    })
}

fn servers_of(text: &str) -> Result<Vec<(String, u16)>, UrlError> {
    let mut servers = Vec::new();
    for (n, server) in text.split(',').enumerate() {
        if n == SERVERS_MAX {
            return Err(UrlError::TooManyServers);
        }
        let bad = UrlError::Server(n + 1);
        // An IPv6 address stands in brackets.
        let (host, port) = match server.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| bad.clone())?),
            _ => (server, PORT),
        };
        let is_plain = !host.is_empty() && !host.contains(['/', '@', ' ']);
        let is_bracketed = host.starts_with('[') && host.ends_with(']');
        if !is_plain || port == 0 || (host.contains(':') && !is_bracketed) {
            return Err(bad);
        }
        servers.push((host.to_owned(), port));
    }
    Ok(servers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<NatsOptions, UrlError> {
        NatsOptions::from_url(url, |_| None)
    }

    #[test]
    fn urls_are_read() {
        let options =
            read("nats://h1:4222,h2,[::1]:14222/?prefix=x&streams=2&replicas=3&storage=memory").unwrap();
        let servers = [("h1".to_owned(), 4222), ("h2".to_owned(), PORT), ("[::1]".to_owned(), 14222)];
        assert_eq!(options.servers, servers);
        assert_eq!((options.prefix.as_str(), options.streams, options.replicas), ("x", 2, Some(3)));
        assert!(options.in_memory && !options.tls && options.login == Login::None);
        let options = read("tls://us%40er:p%3Aw@h?interest=slots&ca=/ca.pem&cert=/c&key=/k").unwrap();
        assert!(options.tls && options.interest == Interest::Slots);
        assert_eq!(options.login, Login::Password("us@er".into(), "p:w".into()));
        assert_eq!(options.tls_identity, Some(("/c".into(), "/k".into())));
        assert_eq!(read("nats://secret@h").unwrap().login, Login::Token("secret".into()));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for (url, expected) in [
            ("redis://h", UrlError::Scheme),
            ("nats://", UrlError::Server(1)),
            ("nats://h:0", UrlError::Server(1)),
            ("nats://a,b:x", UrlError::Server(2)),
            ("nats://::1", UrlError::Server(1)),
            ("nats://h?streams=0", UrlError::Value("streams")),
            ("nats://h?streams=65", UrlError::Value("streams")),
            ("nats://h?replicas=6", UrlError::Value("replicas")),
            ("nats://h?storage=disk", UrlError::Value("storage")),
            ("nats://h?prefix=a.b", UrlError::Value("prefix")),
            ("nats://h?colour=red", UrlError::Parameter("colour".into())),
            ("nats://h?cert=/c", UrlError::Value("cert")),
            ("nats://%zz@h", UrlError::Encoding),
        ] {
            assert_eq!(read(url).unwrap_err(), expected, "{url}");
        }
        let many = |count: usize| read(&format!("nats://{}", vec!["h"; count].join(",")));
        assert_eq!(many(SERVERS_MAX).unwrap().servers.len(), SERVERS_MAX);
        assert_eq!(many(SERVERS_MAX + 1).unwrap_err(), UrlError::TooManyServers);
        assert!(matches!(read("nats://h?nkey=/does/not/exist"), Err(UrlError::File { .. })));
    }

    #[test]
    fn the_environment_fills_in_and_the_url_wins() {
        let environment = |name: &str| match name {
            "NATS_USER" => Some("u".to_owned()),
            "NATS_PASSWORD" => Some("hidden".to_owned()),
            "NATS_CA" => Some("/ca".to_owned()),
            _ => None,
        };
        let options = NatsOptions::from_url("nats://h", environment).unwrap();
        assert_eq!(options.login, Login::Password("u".into(), "hidden".into()));
        assert_eq!(options.tls_ca, Some("/ca".into()));
        let options = NatsOptions::from_url("nats://t@h", environment).unwrap();
        assert_eq!(options.login, Login::Token("t".into()));
    }

    #[test]
    fn no_secret_is_printed() {
        for login in [
            Login::Password("user".into(), "secret".into()),
            Login::Token("secret".into()),
            Login::Nkey("secret".into()),
        ] {
            let options = NatsOptions { login, ..NatsOptions::default() };
            assert!(!format!("{options:?}").contains("secret"));
        }
    }
}
