//! What a Redis backend is told by its operator: servers, credentials, TLS, limits.
//!
//! Owns: the URL's grammar and the defaults. Must not know: connections.
//! Invariant: no `Debug` or error of this module shows a password or a key.
//!
//! | URL | is |
//! |---|---|
//! | `redis://[user:password@]host[:port][/db]` | one server, with or without replicas |
//! | `redis+cluster://[user:password@]host[:port],host[:port]…` | a cluster; one node that answers is enough |
//! | `redis+sentinel://[user:password@]host[:port],…/name[/db]` | the master that the Sentinels name |
//!
//! `rediss`, `rediss+cluster` and `rediss+sentinel` are the same over TLS. Parameters after `?`: `ca=FILE`,
//! `cert=FILE`, `key=FILE` (PEM), `password_file=FILE`, `sentinel_password_file=FILE`, `prefix=TEXT`. What the URL
//! does not name comes from the environment: `RINGMAIN_BUS_USERNAME`, `RINGMAIN_BUS_PASSWORD`,
//! `RINGMAIN_BUS_SENTINEL_PASSWORD`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::backend::{AddressMap, Interest};
use crate::url::percent_decoded;

/// Port of a server that names none.
pub const REDIS_PORT: u16 = 6379;

/// Port of a Sentinel that names none.
pub const SENTINEL_PORT: u16 = 26379;

/// Most servers named in a URL.
pub const SERVERS_MAX: usize = 64;

/// A host and a port.
pub type Address = (String, u16);

/// How the servers stand together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deployment {
    /// One server.
    Single,
    /// Redis Cluster: sharded pub/sub, several masters.
    Cluster,
    /// Sentinels, and the name under which they know the master.
    Sentinel {
        /// The master's name.
        master: String,
    },
}

/// What a publish waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The master's answer. What a failover takes is published again by the node that passed the ack on, or told.
    Master,
    /// So many replicas besides: it survives the publishing node too.
    Replicas(usize),
}

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Who we are to the servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The user; `default` where there is only a password.
    pub username: Option<String>,
    /// The password.
    pub password: Option<Secret>,
}

/// TLS towards servers and Sentinels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// Who may sign the servers' certificates; the system's roots if none.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, where the servers ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Options of a Redis backend.
#[derive(Clone)]
pub struct RedisOptions {
    /// How the servers stand together.
    pub deployment: Deployment,
    /// Servers or Sentinels to ask first; at least one.
    pub servers: Vec<Address>,
    /// Database of a single server; 0 in a cluster.
    pub db: u32,
    /// Credentials for the servers.
    pub credentials: Credentials,
    /// Credentials for the Sentinels; theirs are their own.
    pub sentinel_credentials: Credentials,
    /// TLS, if the scheme asked for it.
    pub tls: Option<Tls>,
    /// First part of all keys and channels: several systems can share a server.
    pub prefix: String,
    /// What a subscription is of. The same on all nodes.
    pub interest: Interest,
    /// What a publish waits for.
    pub durability: Durability,
    /// Replicas that must confirm before a kept ack is let go. If none, what a cluster or the Sentinels know of that is
    /// not down; of a single server those that are connected, so name the number there if one may take over.
    pub replicas: Option<usize>,
    /// How long an id is remembered.
    pub ids_window: Duration,
    /// Most ids remembered for a channel.
    pub ids_max: u32,
    /// Where to dial; for servers behind address translation.
    pub addresses: Option<AddressMap>,
}

impl fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisOptions")
            .field("deployment", &self.deployment)
            .field("servers", &self.servers)
            .field("tls", &self.tls)
            .field("prefix", &self.prefix)
            .field("interest", &self.interest)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}

/// Why a URL is not taken. The operator's fault; shown at the start, before anything runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not one of ours.
    #[error("`{0}` is no scheme of Redis: redis, redis+cluster, redis+sentinel, or the same with rediss")]
    Scheme(String),
    /// No server, a port that is none, or too many.
    #[error("`{0}` is no list of up to {SERVERS_MAX} servers (host or host:port)")]
    Servers(String),
    /// What follows the servers.
    #[error("`{0}` is not what follows the servers here: {1}")]
    Path(String, &'static str),
    /// An unknown parameter, or one without a value.
    #[error("`{0}` is no parameter: ca, cert, key, password_file, sentinel_password_file, prefix")]
    Parameter(String),
    /// A percent sign without two hexadecimal digits behind it, or bytes that are no text.
    #[error("user or password is not percent-encoded text")]
    Encoding,
    /// A file that a parameter names.
    #[error("{0} cannot be read: {1}")]
    File(PathBuf, String),
    /// `cert` without `key`, or the other way.
    #[error("`cert` and `key` come together")]
    Identity,
}

impl RedisOptions {
    /// Defaults for a deployment: no TLS, no credentials, per channel, the master's ack, ids for 60 s.
    pub fn new(deployment: Deployment, servers: Vec<Address>) -> RedisOptions {
        RedisOptions {
            deployment,
            servers,
            db: 0,
            credentials: Credentials::default(),
            sentinel_credentials: Credentials::default(),
            tls: None,
            prefix: "rm".to_owned(),
            interest: Interest::Channels,
            durability: Durability::Master,
            replicas: None,
            ids_window: Duration::from_mins(1),
            ids_max: 16_384,
            addresses: None,
        }
    }

    /// Reads a URL; see the module. `environment` gives variables, as [`std::env::var`] does.
    pub fn from_url(
        url: &str,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<RedisOptions, UrlError> {
        let scheme_end = url.find("://").ok_or_else(|| UrlError::Scheme(scheme_of(url)))?;
        let (scheme, rest) = (&url[..scheme_end], &url[scheme_end + 3..]);
        let (kind, tls) = match scheme.strip_prefix("rediss") {
            Some(kind) => (kind, true),
            None => (scheme.strip_prefix("redis").unwrap_or("?"), false),
        };
        let (rest, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        // A password may hold anything but what ends it, percent-encoded.
        let (user, rest) = rest.rsplit_once('@').map_or(("", rest), |(user, rest)| (user, rest));
        let (servers, path) = rest.split_once('/').unwrap_or((rest, ""));
        let port = if kind == "+sentinel" { SENTINEL_PORT } else { REDIS_PORT };
        let servers = servers.split(',').map(|server| parse_server(server, port)).collect::<Option<Vec<_>>>();
        let servers = servers
            .filter(|servers| servers.len() <= SERVERS_MAX)
            .ok_or_else(|| UrlError::Servers(rest.to_owned()))?;
        let (deployment, db) = deployment(scheme, kind, path, servers.len())?;
        let mut options = RedisOptions::new(deployment, servers);
        options.db = db;
        options.tls = tls.then(Tls::default);
        options.credentials = parse_credentials(user)?;
        for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
            options.take_parameter(parameter)?;
        }
        options.take_environment(environment);
        options.validate()?;
        Ok(options)
    }

    fn take_parameter(&mut self, parameter: &str) -> Result<(), UrlError> {
        let unknown = || UrlError::Parameter(parameter.split('=').next().unwrap_or_default().to_owned());
        let (name, value) = parameter.split_once('=').ok_or_else(unknown)?;
        let value = decoded(value)?;
        match (name, &mut self.tls) {
            ("ca", Some(tls)) => tls.ca = Some(value.into()),
            ("cert" | "key", Some(tls)) => {
                let (cert, key) = tls.identity.get_or_insert_default();
                *(if name == "cert" { cert } else { key }) = value.into();
            }
            ("password_file", _) => self.credentials.password = Some(read_secret(value.into())?),
            ("sentinel_password_file", _) => {
                self.sentinel_credentials.password = Some(read_secret(value.into())?);
            }
            ("prefix", _) => self.prefix = value,
            _ => return Err(unknown()),
        }
        Ok(())
    }

    fn take_environment(&mut self, environment: impl Fn(&str) -> Option<String>) {
        let secret = |name: &str| environment(name).map(Secret);
        let Credentials { username, password } = &mut self.credentials;
        if username.is_none() && password.is_none() {
            *username = environment("RINGMAIN_BUS_USERNAME");
        }
        *password = password.take().or_else(|| secret("RINGMAIN_BUS_PASSWORD"));
        let theirs = &mut self.sentinel_credentials.password;
        *theirs = theirs.take().or_else(|| secret("RINGMAIN_BUS_SENTINEL_PASSWORD"));
    }

    /// Checks what only together makes sense.
    fn validate(&self) -> Result<(), UrlError> {
        let halves = self.tls.as_ref().and_then(|tls| tls.identity.as_ref());
        match halves {
            Some((cert, key)) if cert.as_os_str().is_empty() != key.as_os_str().is_empty() => {
                Err(UrlError::Identity)
            }
            _ => Ok(()),
        }
    }

    /// Whether this is a cluster.
    pub(super) fn is_cluster(&self) -> bool {
        self.deployment == Deployment::Cluster
    }

    /// Where to dial a server.
    pub(super) fn dialed(&self, address: &Address) -> Address {
        match &self.addresses {
            Some(map) => map(&address.0, address.1),
            None => address.clone(),
        }
    }
}

fn scheme_of(url: &str) -> String {
    url.split(':').next().unwrap_or_default().to_owned()
}

fn deployment(scheme: &str, kind: &str, path: &str, servers: usize) -> Result<(Deployment, u32), UrlError> {
    let wrong = |why| UrlError::Path(path.to_owned(), why);
    let db = |text: &str| match text {
        "" => Ok(0),
        text => text.parse().map_err(|_| wrong("the number of a database")),
    };
    match kind {
        "" if servers == 1 => Ok((Deployment::Single, db(path)?)),
        "" => Err(wrong("one server; a cluster is redis+cluster")),
        "+cluster" if path.is_empty() => Ok((Deployment::Cluster, 0)),
        "+cluster" => Err(wrong("nothing: a cluster has one database")),
        "+sentinel" => {
            let (master, number) = path.split_once('/').unwrap_or((path, ""));
            if master.is_empty() {
                return Err(wrong("the master's name"));
            }
            Ok((Deployment::Sentinel { master: master.to_owned() }, db(number)?))
        }
        _ => Err(UrlError::Scheme(scheme.to_owned())),
    }
}

fn parse_server(text: &str, port: u16) -> Option<Address> {
    // An IPv6 address stands in brackets.
    let (host, after) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let port = match after.strip_prefix(':') {
        Some(port) => port.parse().ok()?,
        None if after.is_empty() => port,
        None => return None,
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

fn parse_credentials(text: &str) -> Result<Credentials, UrlError> {
    let (username, password) = match text.split_once(':') {
        Some((username, password)) => (username, Some(Secret(decoded(password)?))),
        None => (text, None),
    };
    let username = (!username.is_empty()).then(|| decoded(username)).transpose()?;
    Ok(Credentials { username, password })
}

fn decoded(text: &str) -> Result<String, UrlError> {
    percent_decoded(text).ok_or(UrlError::Encoding)
}

fn read_secret(path: PathBuf) -> Result<Secret, UrlError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Secret(text.trim_end_matches(['\r', '\n']).to_owned())),
        Err(error) => Err(UrlError::File(path, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<RedisOptions, UrlError> {
        RedisOptions::from_url(url, |_| None)
    }

    #[test]
    fn urls_name_servers() {
        let one = |host: &str, port| (host.to_owned(), port);
        let sentinel = Deployment::Sentinel { master: "mymaster".to_owned() };
        for (url, deployment, servers, db, tls) in [
            ("redis://h", Deployment::Single, vec![one("h", 6379)], 0, false),
            ("rediss://h:1/2", Deployment::Single, vec![one("h", 1)], 2, true),
            ("redis://[::1]:7", Deployment::Single, vec![one("::1", 7)], 0, false),
            ("redis+cluster://a:1,b", Deployment::Cluster, vec![one("a", 1), one("b", 6379)], 0, false),
            (
                "rediss+sentinel://a,b:2/mymaster",
                sentinel.clone(),
                vec![one("a", 26379), one("b", 2)],
                0,
                true,
            ),
            ("redis+sentinel://a/mymaster/3", sentinel, vec![one("a", 26379)], 3, false),
        ] {
            let read = parse(url).unwrap();
            assert_eq!((read.deployment, read.servers, read.db), (deployment, servers, db), "{url}");
            assert_eq!(read.tls.is_some(), tls, "{url}");
        }
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for url in [
            "redis:h",
            "http://h",
            "redis+x://h",
            "redis://",
            "redis://h:x",
            "redis://h:70000",
            "redis://a,b",
            "redis://h/x",
            "redis+cluster://h/1",
            "redis+sentinel://h",
            "redis://u:%zz@h",
            "redis://h?what=1",
            "redis://h?ca=x",
            "redis://h?prefix",
            "redis://h?password_file=/nowhere/at/all",
            "rediss://h?cert=x",
        ] {
            assert!(parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn credentials_come_from_url_file_and_environment_and_are_not_shown() {
        let options = parse("redis://me:p%40ss%3a@h").unwrap();
        assert_eq!(options.credentials.username.as_deref(), Some("me"));
        assert_eq!(options.credentials.password, Some(Secret("p@ss:".to_owned())));
        assert!(!format!("{options:?} {:?}", options.credentials).contains("p@ss"));

        let from_environment = RedisOptions::from_url("redis://h", |name| Some(name.to_lowercase())).unwrap();
        assert_eq!(from_environment.credentials.username.as_deref(), Some("ringmain_bus_username"));
        assert_eq!(from_environment.credentials.password, Some(Secret("ringmain_bus_password".to_owned())));
        // What the URL names stays.
        let both = RedisOptions::from_url("redis://:mine@h", |_| Some("theirs".to_owned())).unwrap();
        assert_eq!(
            both.credentials,
            Credentials { username: None, password: Some(Secret("mine".to_owned())) }
        );
    }
}
