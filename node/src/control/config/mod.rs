//! Configuration: from a file, variables and flags to resolved values.
//!
//! Owns the precedence (flag over variable over `--demo` over file over default) and the resolved
//! [`Config`]. Sources are texts handed in: nothing here opens a file or reads the environment, so
//! that every case is a table in a test.
//!
//! Invariants: a [`Config`] that [`resolve`] returned is of the right types, in its ranges and
//! consistent in itself; no error or listing shows a secret.

pub mod demo;
pub mod document;
pub mod error;
pub mod listen;
pub mod relations;
pub mod schema;
pub mod sections;
pub mod settings;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

pub use error::{ConfigError, Origin};
pub use sections::{
    AdminConfig, BusConfig, BusUrl, ClusterConfig, LogConfig, LogFormat, LogLevel, NodeConfig, ServerConfig,
};
pub use settings::Setting;

use crate::core::config::CoreConfig;

/// Resolved values of the whole file.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// What the control plane and the wire read.
    pub node: NodeConfig,
    /// What the core reads.
    pub core: CoreConfig,
}

/// What a configuration is made from.
#[derive(Debug, Default)]
pub struct Sources {
    /// The file's path and text.
    pub file: Option<(PathBuf, String)>,
    /// The environment; what does not start with `RINGMAIN_` is left alone.
    pub variables: Vec<(String, String)>,
    /// Flags, read with [`settings::from_flag`].
    pub flags: Vec<Setting>,
    /// `--demo`.
    pub demo: bool,
}

/// A configuration and where its values came from.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// The values.
    pub config: Config,
    /// Dotted path to origin, for values that are not the default.
    pub origins: BTreeMap<String, Origin>,
    /// `--demo`.
    pub demo: bool,
}

impl Resolved {
    /// Whether the operator gave this key a value.
    pub fn is_set(&self, path: &str) -> bool {
        self.origins.contains_key(path)
    }
}

/// Reads all sources, merges them and checks the result.
pub fn resolve(sources: Sources) -> Result<Resolved, ConfigError> {
    let mut settings = Vec::new();
    if let Some((path, text)) = &sources.file {
        settings.extend(settings::from_file(path, text)?);
    }
    if sources.demo {
        settings.extend(demo::settings(&settings)?);
    }
    let mut table = defaults();
    let mut origins = BTreeMap::new();
    apply_all(settings, &mut table, &mut origins);
    let namespaces: Vec<String> =
        table["namespaces"].as_table().into_iter().flat_map(Table::keys).cloned().collect();
    apply_all(settings::from_variables(sources.variables, &namespaces)?, &mut table, &mut origins);
    apply_all(sources.flags, &mut table, &mut origins);

    let mut resolved = Resolved { config: from_table(table)?, origins, demo: sources.demo };
    relations::settle(&mut resolved)?;
    relations::check(&resolved)?;
    Ok(resolved)
}

/// The defaults as the file would write them.
pub fn defaults() -> Table {
    to_table(&Config::default())
}

/// The values as the file would write them.
pub fn to_table(config: &Config) -> Table {
    let table = |result: Result<Table, toml::ser::Error>| result.expect("the sections are plain tables");
    let mut whole = table(Table::try_from(&config.node));
    whole.extend(table(Table::try_from(&config.core)));
    whole
}

fn apply_all(settings: Vec<Setting>, table: &mut Table, origins: &mut BTreeMap<String, Origin>) {
    for setting in settings {
        let is_key = !setting.value.is_table();
        apply(table, &setting.path, setting.value);
        if is_key {
            origins.insert(setting.path, setting.origin);
        }
    }
}

/// Puts a value at a dotted path, making the tables on the way. An empty table only makes its place.
fn apply(table: &mut Table, path: &str, value: Value) {
    let (name, rest) = match path.split_once('.') {
        Some((name, rest)) => (name, Some(rest)),
        None => (path, None),
    };
    match (rest, value) {
        (None, Value::Table(_)) => {
            table.entry(name).or_insert_with(|| Value::Table(Table::new()));
        }
        (None, value) => {
            table.insert(name.to_owned(), value);
        }
        (Some(rest), value) => {
            let child = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            apply(child.as_table_mut().expect("checked against the schema"), rest, value);
        }
    }
}

fn from_table(mut table: Table) -> Result<Config, ConfigError> {
    let mut core = Table::new();
    for name in schema::core_sections() {
        if let Some(section) = table.remove(name) {
            core.insert(name.to_owned(), section);
        }
    }
    Ok(Config { node: read(table)?, core: read(core)? })
}

fn read<T: DeserializeOwned>(table: Table) -> Result<T, ConfigError> {
    table.try_into().map_err(|error: toml::de::Error| ConfigError::Form {
        message: error.message().lines().next().unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::core::config::SlowConsumer;

    /// Resolves a file's text, variables and flags (`path=value`).
    pub(crate) fn resolved(
        file: &str,
        variables: &[(&str, &str)],
        flags: &[&str],
        demo: bool,
    ) -> Result<Resolved, ConfigError> {
        let flag = |flag: &&str| {
            let (path, text) = flag.split_once('=').expect("path=value");
            settings::from_flag(path, text, &format!("--{path}"))
        };
        resolve(Sources {
            file: Some((PathBuf::from("r.toml"), file.to_owned())),
            variables: variables.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect(),
            flags: flags.iter().map(flag).collect::<Result<_, _>>()?,
            demo,
        })
    }

    #[test]
    fn nothing_given_is_the_default() {
        let resolved = resolve(Sources::default()).unwrap();
        assert_eq!(to_table(&resolved.config), defaults());
        assert!(resolved.origins.is_empty());
        assert_eq!(resolved.config.node.server.listen[0].to_string(), "127.0.0.1:8000");
        assert_eq!(resolved.config.node.admin.listen.0.to_string(), "127.0.0.1:8001");
        for name in ["user", "broadcast"] {
            let namespace = &resolved.config.core.namespaces[name];
            assert!(namespace.history_size > 0 && namespace.force_recovery, "{name} is positioned");
            assert!(!namespace.allow_publish_for_client && !namespace.allow_publish_for_subscriber);
        }
    }

    #[test]
    fn flag_beats_variable_beats_file_beats_default() {
        let file = "[client]\nchannel_limit = 1";
        let variable = [("RINGMAIN_CLIENT_CHANNEL_LIMIT", "2")];
        let flag = ["client.channel_limit=3"];
        let check =
            |file: &str, variables: &[(&str, &str)], flags: &[&str], limit: u32, origin: Option<&str>| {
                let resolved = resolved(file, variables, flags, false).unwrap();
                assert_eq!(resolved.config.core.client.channel_limit, limit);
                assert_eq!(
                    resolved.origins.get("client.channel_limit").map(ToString::to_string).as_deref(),
                    origin
                );
            };
        check("", &[], &[], 128, None);
        check(file, &[], &[], 1, Some("r.toml"));
        check(file, &variable, &[], 2, Some("RINGMAIN_CLIENT_CHANNEL_LIMIT"));
        check(file, &variable, &flag, 3, Some("--client.channel_limit"));
        check("", &[], &flag, 3, Some("--client.channel_limit"));
    }

    #[test]
    fn namespaces_are_added_to_and_made_anew() {
        let file = "[namespaces.user]\nhistory_size = 5\n[namespaces.chat]\n[namespaces.feed]\nslow_consumer = \"latest\"";
        let resolved = resolved(
            file,
            &[("RINGMAIN_NAMESPACES_LOG_PRESENCE", "true")],
            &["namespaces.chat.history_size=7"],
            false,
        );
        let namespaces = resolved.unwrap().config.core.namespaces;
        let names: Vec<_> = namespaces.keys().map(String::as_str).collect();
        assert_eq!(names, ["broadcast", "chat", "feed", "log", "user"]);
        assert_eq!(namespaces["user"].history_size, 5);
        assert_eq!(namespaces["user"].history_ttl_ms, 300_000);
        assert_eq!(namespaces["chat"].history_size, 7);
        assert_eq!(namespaces["feed"].slow_consumer, SlowConsumer::Latest);
        assert!(namespaces["log"].presence);
    }

    #[test]
    fn a_section_that_may_be_absent_appears_with_its_first_key() {
        let check = |file: &str, flags: &[&str], present: bool| {
            let resolved = resolved(file, &[], flags, false).unwrap();
            assert_eq!(resolved.config.core.subscription_token.is_some(), present);
        };
        check("", &[], false);
        check("[subscription_token]", &[], true);
        check("", &["subscription_token.issuer=me"], true);
    }

    #[test]
    fn values_that_their_type_refuses_are_one_line() {
        let check = |flag: &str, error: &str| {
            let found = resolved("", &[], &[flag], false).expect_err(flag);
            assert_eq!(found.to_string(), error);
        };
        check(
            "server.listen=8000",
            "\"8000\" is not an address: write 127.0.0.1:8000, [::1]:8000, 0.0.0.0:8000-8003 or unix:/path",
        );
        check("admin.listen=unix:/a", "admin address `unix:/a`: expected IP:PORT or localhost:PORT");
        check(
            "bus.url=amqp://:hunter2@h:5672",
            "bus `amqp://…` is none of redis, rediss, redis+cluster, rediss+cluster, redis+sentinel, rediss+sentinel, \
             nats, tls, kafka, kafkas, memory",
        );
        check("bus.url=nats", "bus: expected `memory` or an address as redis://127.0.0.1:6379");
    }
}
