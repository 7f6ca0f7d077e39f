//! Settings: single values on their way from a file, a variable or a flag to the configuration.
//!
//! Owns reading each source into a flat list of [`Setting`]s, checked against the schema: unknown
//! keys, types and ranges. It does not know which source wins; [`super::resolve`] does.

use std::path::Path;

use toml::{Table, Value};

use super::error::{ConfigError, Origin};
use super::schema::{Key, Kind, Node, Section, VARIABLE_PREFIX, tree};

/// Namespaces of one configuration at the most.
pub const NAMESPACES_MAX: usize = 1_000;

/// The longest name of a namespace, in bytes.
pub const NAMESPACE_BYTES_MAX: usize = 64;

/// Variables that are no keys: read elsewhere.
pub const OTHER_VARIABLES: [&str; 2] = ["RINGMAIN_CONFIG", "RINGMAIN_DEMO"];

/// The least likeness of a name that is suggested, from 0 to 1. Picked so that two typing errors in a
/// short name still find it, and another word does not.
const LIKENESS_MIN: f64 = 0.6;

/// One value for one key, already of the right type and in its range.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Dotted path.
    pub path: String,
    /// The value; an empty table makes a section exist.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

/// Reads a file's text.
pub fn from_file(path: &Path, text: &str) -> Result<Vec<Setting>, ConfigError> {
    let table: Table = text.parse().map_err(|error| syntax_error(path, text, &error))?;
    let mut settings = Vec::new();
    from_table(&table, tree(), "", &Origin::File(path.to_owned()), &mut settings)?;
    Ok(settings)
}

fn syntax_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let before = &text[..error.span().map_or(0, |span| span.start.min(text.len()))];
    let line_start = before.rfind('\n').map_or(0, |index| index + 1);
    ConfigError::Syntax {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before.len() - line_start + 1,
        message: error.message().lines().collect::<Vec<_>>().join("; "),
    }
}

fn from_table(
    table: &Table,
    section: &Section,
    path: &str,
    origin: &Origin,
    into: &mut Vec<Setting>,
) -> Result<(), ConfigError> {
    for (name, value) in table {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let node = section.child(name).ok_or_else(|| unknown_key(&path, origin))?;
        match (node, value) {
            (Node::Key(key), value) => into.push(checked(key, path, value.clone(), origin)?),
            (Node::Section(section), Value::Table(table)) => {
                into.push(presence(&path, origin));
                from_table(table, section, &path, origin, into)?;
            }
            (Node::Map(entry), Value::Table(table)) => from_map(table, entry, &path, origin, into)?,
            (_, value) => return Err(wrong(&path, value, "a table of keys", origin)),
        }
    }
    Ok(())
}

fn from_map(
    table: &Table,
    entry: &Section,
    path: &str,
    origin: &Origin,
    into: &mut Vec<Setting>,
) -> Result<(), ConfigError> {
    for (name, value) in table {
        let path = format!("{path}.{name}");
        check_namespace(name, origin)?;
        let Value::Table(table) = value else { return Err(wrong(&path, value, "a table of keys", origin)) };
        into.push(presence(&path, origin));
        from_table(table, entry, &path, origin, into)?;
    }
    Ok(())
}

fn presence(path: &str, origin: &Origin) -> Setting {
    Setting { path: path.to_owned(), value: Value::Table(Table::new()), origin: origin.clone() }
}

fn check_namespace(name: &str, origin: &Origin) -> Result<(), ConfigError> {
    let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.len() <= NAMESPACE_BYTES_MAX && name.chars().all(known) {
        return Ok(());
    }
    Err(ConfigError::Relation {
        message: format!("the namespace name `{name}` is not possible ({origin})"),
        help: format!("use 1 to {NAMESPACE_BYTES_MAX} letters, digits, `_` and `-`"),
    })
}

/// A value of the right type and range, or the error that says what was expected.
fn checked(key: &Key, path: String, value: Value, origin: &Origin) -> Result<Setting, ConfigError> {
    let in_range = |value: &Value, min: i64, max: i64| {
        value.as_integer().is_some_and(|number| (min..=max).contains(&number))
    };
    let fits = match &key.kind {
        Kind::Bool => value.is_bool(),
        Kind::Text => value.is_str(),
        Kind::Integer { min, max } => in_range(&value, *min, *max),
        Kind::Choice(choices) => choices.iter().any(|(name, _)| value.as_str() == Some(name)),
        Kind::Texts => value.as_array().is_some_and(|items| items.iter().all(Value::is_str)),
        Kind::Integers { min, max } => {
            value.as_array().is_some_and(|items| items.iter().all(|item| in_range(item, *min, *max)))
        }
    };
    if fits {
        return Ok(Setting { path, value, origin: origin.clone() });
    }
    let shown = if key.secret { Value::String("***".to_owned()) } else { value };
    Err(wrong(&path, &shown, &key.kind.expected(), origin))
}

fn wrong(path: &str, value: &Value, expected: &str, origin: &Origin) -> ConfigError {
    let value = match value {
        Value::Table(_) => "{…}".to_owned(),
        Value::String(text) if text == "***" => text.clone(),
        value => value.to_string(),
    };
    ConfigError::Value { key: path.to_owned(), value, expected: expected.to_owned(), origin: origin.clone() }
}

/// Reads the value of a flag: `path` as in the file, `text` as in a shell. Lists are separated by
/// commas, or written as in the file.
pub fn from_flag(path: &str, text: &str, flag: &str) -> Result<Setting, ConfigError> {
    let origin = Origin::Flag(flag.to_owned());
    if let Some(name) = path.strip_prefix("namespaces.").and_then(|rest| rest.split('.').next()) {
        check_namespace(name, &origin)?;
    }
    let key = tree().find(path).ok_or_else(|| unknown_key(path, &origin))?;
    from_text(key, path.to_owned(), text, &origin)
}

fn from_text(key: &Key, path: String, text: &str, origin: &Origin) -> Result<Setting, ConfigError> {
    let list = |parse: &dyn Fn(&str) -> Value| match text.trim_start().starts_with('[') {
        true => text.parse::<Value>().unwrap_or_else(|_| Value::String(text.to_owned())),
        false => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Value::Array(items.map(parse).collect())
        }
    };
    let number = |text: &str| match text.trim().parse() {
        Ok(number) => Value::Integer(number),
        Err(_) => Value::String(text.to_owned()),
    };
    let value = match &key.kind {
        Kind::Bool => match text.trim() {
            "true" | "1" => Value::Boolean(true),
            "false" | "0" => Value::Boolean(false),
            _ => Value::String(text.to_owned()),
        },
        Kind::Integer { .. } => number(text),
        Kind::Text | Kind::Choice(_) => Value::String(text.to_owned()),
        Kind::Texts => list(&|item| Value::String(item.to_owned())),
        Kind::Integers { .. } => list(&number),
    };
    checked(key, path, value, origin)
}

/// Reads the `RINGMAIN_*` variables among `variables`. `namespaces` are the names known so far: a
/// variable's name cannot tell `my-room` from `my_room`.
pub fn from_variables(
    variables: impl IntoIterator<Item = (String, String)>,
    namespaces: &[String],
) -> Result<Vec<Setting>, ConfigError> {
    let mut settings = Vec::new();
    for (name, text) in variables {
        let other = !name.starts_with(VARIABLE_PREFIX) || OTHER_VARIABLES.contains(&name.as_str());
        if other || is_service_link(&name, &text) {
            continue;
        }
        let origin = Origin::Variable(name.clone());
        let (key, path) = key_of_variable(&name, namespaces)
            .ok_or_else(|| ConfigError::UnknownVariable { nearest: nearest_variable(&name), name })?;
        settings.push(from_text(key, path, &text, &origin)?);
    }
    Ok(settings)
}

/// Kubernetes puts variables such as `RINGMAIN_SERVICE_HOST` and `RINGMAIN_ADMIN_PORT_8001_TCP` into
/// every pod beside a Service whose name starts with `ringmain`: they are not ours.
fn is_service_link(name: &str, text: &str) -> bool {
    let link = text.starts_with("tcp://") || text.starts_with("udp://");
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.contains("_TCP_")
        || name.contains("_UDP_")
        || (link && (name.ends_with("_PORT") || name.ends_with("_TCP") || name.ends_with("_UDP")))
}

fn key_of_variable(name: &str, namespaces: &[String]) -> Option<(&'static Key, String)> {
    let keys = tree().keys();
    let named = |key: &&&Key| key.variable() == name || key.short_variable().as_deref() == Some(name);
    if let Some(key) = keys.iter().find(named).copied() {
        return Some((key, key.path.clone())).filter(|(_, path)| !path.contains('*'));
    }
    // RINGMAIN_NAMESPACES_<NAME>_<KEY>: the longest key that fits, for one may end in another.
    let rest = name.strip_prefix("RINGMAIN_NAMESPACES_")?;
    let entry = keys.into_iter().filter_map(|key| {
        let leaf = key.path.strip_prefix("namespaces.*.")?;
        let namespace = rest.strip_suffix(&leaf.to_ascii_uppercase())?.strip_suffix('_')?;
        (!namespace.is_empty()).then_some((key, leaf, namespace))
    });
    let (key, leaf, namespace) = entry.max_by_key(|(_, leaf, _)| leaf.len())?;
    let upper = |name: &String| name.replace('-', "_").to_ascii_uppercase() == namespace;
    let namespace = namespaces.iter().find(|name| upper(name)).cloned();
    let namespace = namespace.unwrap_or_else(|| rest[..rest.len() - leaf.len() - 1].to_ascii_lowercase());
    Some((key, format!("namespaces.{namespace}.{leaf}")))
}

fn unknown_key(path: &str, origin: &Origin) -> ConfigError {
    ConfigError::UnknownKey { key: path.to_owned(), nearest: nearest_key(path), origin: origin.clone() }
}

/// The known path that looks most like this one: as a whole, or by its last name, for a key in the
/// wrong section.
fn nearest_key(path: &str) -> Option<String> {
    let namespace =
        path.strip_prefix("namespaces.").and_then(|rest| rest.split_once('.')).map(|(name, _)| name);
    let mut known: Vec<String> = tree().children.iter().map(|(name, _)| name.clone()).collect();
    known.extend(tree().keys().iter().map(|key| match namespace {
        Some(name) => key.path.replace('*', name),
        None => key.path.clone(),
    }));
    let leaf = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &str| {
        let by_leaf = strsim::normalized_damerau_levenshtein(&leaf(path), &leaf(known)) * 0.9;
        strsim::normalized_damerau_levenshtein(path, known).max(by_leaf)
    };
    nearest(known, likeness)
}

fn nearest_variable(name: &str) -> Option<String> {
    let known = tree().keys().into_iter().flat_map(|key| [Some(key.variable()), key.short_variable()]);
    let known = known.flatten().filter(|name| !name.contains("___"));
    nearest(known, |known| strsim::normalized_damerau_levenshtein(name, known) - 0.15)
}

fn nearest(known: impl IntoIterator<Item = String>, likeness: impl Fn(&str) -> f64) -> Option<String> {
    let scored = known.into_iter().map(|name| (likeness(&name), name));
    let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (best.0 >= LIKENESS_MIN).then_some(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<Vec<Setting>, ConfigError> {
        from_file(Path::new("r.toml"), text)
    }

    #[test]
    fn a_files_errors_name_key_value_and_remedy() {
        let check = |text: &str, error: &str, help: &str| {
            let found = file(text).expect_err(text);
            assert_eq!(found.to_string(), error, "{text}");
            assert!(found.help().contains(help), "{text}: {}", found.help());
        };
        check(
            "[client]\nping_intervall_ms = 1",
            "unknown key `client.ping_intervall_ms` (r.toml)",
            "`client.ping_interval_ms`",
        );
        check("[clinet]\n", "unknown key `clinet` (r.toml)", "`client`");
        check("api_key = \"k\"", "unknown key `api_key` (r.toml)", "`admin.api_key`");
        check("[server]\nhistory_size = 1", "unknown key `server.history_size` (r.toml)", "history_size`");
        check(
            "[namespaces.room]\nprecense = true",
            "unknown key `namespaces.room.precense` (r.toml)",
            "`namespaces.room.presence`",
        );
        check("[client]\nqqqqqq = 1", "unknown key `client.qqqqqq` (r.toml)", "lists every key");
        check(
            "[client]\nping_interval_ms = \"fast\"",
            "client.ping_interval_ms = \"fast\": expected a whole number from 1000 to 3600000 (r.toml)",
            "client.ping_interval_ms",
        );
        check(
            "[client]\nping_interval_ms = 999",
            "client.ping_interval_ms = 999: expected a whole number from 1000 to 3600000 (r.toml)",
            "",
        );
        check(
            "[client]\nping_interval_ms = 2.5",
            "client.ping_interval_ms = 2.5: expected a whole number from 1000 to 3600000 (r.toml)",
            "",
        );
        check("[channel]\npresence = 1", "channel.presence = 1: expected true or false (r.toml)", "");
        check(
            "[channel]\nslow_consumer = \"drop\"",
            "channel.slow_consumer = \"drop\": expected one of \"replay\", \"latest\", \"close\" (r.toml)",
            "",
        );
        check(
            "[server]\nlisten = \"127.0.0.1:1\"",
            "server.listen = \"127.0.0.1:1\": expected a list of texts (r.toml)",
            "",
        );
        check(
            "[server]\ncpus = [0, 4096]",
            "server.cpus = [0, 4096]: expected a list of whole numbers from 0 to 4095 (r.toml)",
            "",
        );
        check("client = 1", "client = 1: expected a table of keys (r.toml)", "");
        check("[namespaces]\nroom = 1", "namespaces.room = 1: expected a table of keys (r.toml)", "");
        check("[namespaces.\"a:b\"]", "the namespace name `a:b` is not possible (r.toml)", "letters");
        check(
            "[client]\nping_interval_ms = \n",
            "r.toml:2:20: string values must be quoted, expected literal string",
            "TOML",
        );
    }

    #[test]
    fn a_secret_never_shows_in_an_error() {
        let error = file("[token]\nhmac_secret = 12345").unwrap_err();
        assert_eq!(error.to_string(), "token.hmac_secret = ***: expected a text (r.toml)");
    }

    #[test]
    fn flags_and_variables_are_read_by_the_keys_type() {
        let check = |path: &str, text: &str, expected: &str| {
            let setting = from_flag(path, text, "--f").unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(setting.value.to_string(), expected, "{path}={text}");
            assert_eq!(setting.path, path);
        };
        check("client.channel_limit", "10", "10");
        check("client.personal_channel", "false", "false");
        check("client.personal_channel", "1", "true");
        check("channel.slow_consumer", "latest", "\"latest\"");
        check("server.cpus", "0, 2", "[0, 2]");
        check("server.cpus", "[1]", "[1]");
        check(
            "server.listen",
            "127.0.0.1:1 proxy_protocol,unix:/a",
            "[\"127.0.0.1:1 proxy_protocol\", \"unix:/a\"]",
        );
        check("client.allowed_origins", "[\"https://a\", \"https://b\"]", "[\"https://a\", \"https://b\"]");
        check("namespaces.room.history_size", "0", "0");
        check("token.hmac_secret", "0123", "\"0123\"");

        let refused = |path: &str, text: &str, error: &str| {
            assert_eq!(from_flag(path, text, "--f").unwrap_err().to_string(), error);
        };
        refused(
            "client.channel_limit",
            "0",
            "client.channel_limit = 0: expected a whole number from 1 to 100000 (--f)",
        );
        refused(
            "client.channel_limit",
            "ten",
            "client.channel_limit = \"ten\": expected a whole number from 1 to 100000 (--f)",
        );
        refused(
            "client.personal_channel",
            "yes",
            "client.personal_channel = \"yes\": expected true or false (--f)",
        );
        refused("namespaces.a b.presence", "true", "the namespace name `a b` is not possible (--f)");
        refused("client", "1", "unknown key `client` (--f)");
    }

    #[test]
    fn variables_find_their_keys() {
        let namespaces = ["my-room".to_owned()];
        let check = |name: &str, text: &str, path: &str| {
            let variables = [(name.to_owned(), text.to_owned())];
            let settings = from_variables(variables, &namespaces).unwrap_or_else(|error| panic!("{error}"));
            let paths: Vec<_> = settings.iter().map(|setting| setting.path.as_str()).collect();
            assert_eq!(paths, path.split_terminator(' ').collect::<Vec<_>>(), "{name}");
        };
        check("RINGMAIN_CLIENT_CHANNEL_LIMIT", "5", "client.channel_limit");
        check("RINGMAIN_API_KEY", "k", "admin.api_key");
        check("RINGMAIN_ADMIN_API_KEY", "k", "admin.api_key");
        check("RINGMAIN_TOKEN_HMAC_SECRET", "k", "token.hmac_secret");
        check("RINGMAIN_SUBSCRIPTION_TOKEN_HMAC_SECRET", "k", "subscription_token.hmac_secret");
        check("RINGMAIN_LISTEN", "127.0.0.1:1", "server.listen");
        check("RINGMAIN_ADMIN", "127.0.0.1:1", "admin.listen");
        check("RINGMAIN_SHARDS", "2", "server.shards");
        check("RINGMAIN_BUS", "memory", "bus.url");
        check("RINGMAIN_NAMESPACES_CHAT_HISTORY_SIZE", "1", "namespaces.chat.history_size");
        check("RINGMAIN_NAMESPACES_MY_ROOM_PRESENCE", "true", "namespaces.my-room.presence");
        check(
            "RINGMAIN_NAMESPACES_A_B_ALLOW_PRESENCE_FOR_CLIENT",
            "true",
            "namespaces.a_b.allow_presence_for_client",
        );
        check("RINGMAIN_CONFIG", "/etc/r.toml", "");
        check("PATH", "/bin", "");
        check("RINGMAIN_SERVICE_HOST", "10.0.0.1", "");
        check("RINGMAIN_SERVICE_PORT_HTTP", "80", "");
        check("RINGMAIN_PORT", "tcp://10.0.0.1:8000", "");
        check("RINGMAIN_ADMIN_PORT_8001_TCP", "tcp://10.0.0.1:8001", "");
        check("RINGMAIN_PORT_8000_TCP_ADDR", "10.0.0.1", "");
    }

    #[test]
    fn an_unknown_variable_names_the_nearest() {
        let check = |name: &str, help: &str| {
            let error = from_variables([(name.to_owned(), "1".to_owned())], &[]).unwrap_err();
            assert_eq!(error.to_string(), format!("unknown variable {name}"));
            assert_eq!(error.help(), help, "{name}");
        };
        check("RINGMAIN_APIKEY", "did you mean RINGMAIN_API_KEY?");
        check("RINGMAIN_CLIENT_PING_INTERVAL", "did you mean RINGMAIN_CLIENT_PING_INTERVAL_MS?");
        check("RINGMAIN_NAMESPACES_", "`ringmain genconfig` lists every key");
        check("RINGMAIN_WHATEVER_ELSE", "`ringmain genconfig` lists every key");
    }
}
