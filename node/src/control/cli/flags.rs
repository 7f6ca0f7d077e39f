//! A flag for every key of the configuration file, made from the schema.
//!
//! Owns the mapping between the command line and [`Setting`]s. The keys of namespaces have names that
//! only the operator knows: `--namespaces.NAME.KEY=VALUE` is turned into `--set` before clap looks.

use std::ffi::OsString;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

use crate::control::config::schema::{Key, Kind, tree};
use crate::control::config::settings::from_flag;
use crate::control::config::{ConfigError, Setting};

/// The flags that set keys, as given.
#[derive(Clone, Debug, Default)]
pub(super) struct KeyFlags {
    /// Dotted path, text and the flag as the operator knows it.
    given: Vec<(String, String, String)>,
}

impl KeyFlags {
    /// Reads the texts by the keys' types.
    pub(super) fn settings(&self) -> Result<Vec<Setting>, ConfigError> {
        self.given.iter().map(|(path, text, flag)| from_flag(path, text, flag)).collect()
    }
}

const SET: &str = "set";

impl clap::Args for KeyFlags {
    fn augment_args(command: Command) -> Command {
        let set = Arg::new(SET)
            .long(SET)
            .value_name("KEY=VALUE")
            .action(ArgAction::Append)
            .value_parser(key_and_value)
            .help("Sets any key of the file; --namespaces.NAME.KEY=VALUE does so for a namespace");
        let keys = tree().keys().into_iter().filter(|key| !key.path.contains('*'));
        command.args(keys.map(arg)).arg(set)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KeyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for key in tree().keys() {
            let Ok(Some(texts)) = matches.try_get_many::<String>(&key.path) else { continue };
            let texts: Vec<_> = texts.map(String::as_str).collect();
            given.push((key.path.clone(), texts.join(","), format!("--{}", long_name(key))));
        }
        for (path, text) in matches.get_many::<(String, String)>(SET).into_iter().flatten() {
            given.push((path.clone(), text.clone(), format!("--{path}")));
        }
        Ok(Self { given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The flag's name: the alias if the key has one, else its path.
fn long_name(key: &Key) -> String {
    key.alias.as_ref().map_or_else(|| key.path.clone(), |alias| alias.replace('_', "-"))
}

fn arg(key: &'static Key) -> Arg {
    let section = key.path.split('.').next().unwrap_or_default();
    let doc = key.doc.lines().collect::<Vec<_>>().join(" ");
    let first_sentence = doc.split_inclusive(". ").next().unwrap_or_default().trim().trim_end_matches('.');
    let arg = Arg::new(key.path.as_str()).help(first_sentence.to_owned()).long_help(doc.clone());
    let arg = match &key.alias {
        // A leaked name lives as long as the static schema it comes from.
        Some(_) => arg.long(&*long_name(key).leak()).visible_alias(key.path.as_str()),
        None => arg.long(key.path.as_str()).help_heading(section).hide_short_help(true),
    };
    match &key.kind {
        Kind::Bool => arg
            .value_name("true|false")
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .action(ArgAction::Set),
        Kind::Integer { .. } => arg.value_name("N").action(ArgAction::Set),
        Kind::Texts | Kind::Integers { .. } => arg.value_name("LIST").action(ArgAction::Append),
        Kind::Text | Kind::Choice(_) => arg.value_name("TEXT").action(ArgAction::Set),
    }
}

/// Turns `--namespaces.NAME.KEY=VALUE`, or the same in two arguments, into `--set`.
pub(super) fn expand_namespaces(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut expanded = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_str().and_then(|text| text.strip_prefix("--namespaces."));
        let Some(rest) = text else {
            expanded.push(arg);
            continue;
        };
        let mut setting = OsString::from(format!("namespaces.{rest}"));
        if !rest.contains('=') {
            setting.push("=");
            setting.push(args.next().unwrap_or_default());
        }
        expanded.push("--set".into());
        expanded.push(setting);
    }
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<KeyFlags, clap::Error> {
        let command = <KeyFlags as clap::Args>::augment_args(Command::new("test").no_binary_name(true));
        let matches = command.try_get_matches_from(expand_namespaces(args.iter().map(OsString::from)))?;
        KeyFlags::from_arg_matches(&matches)
    }

    #[test]
    fn every_key_has_its_flag() {
        for key in tree().keys() {
            let path = key.path.replace('*', "room");
            let text = match &key.kind {
                Kind::Bool => "true".to_owned(),
                Kind::Integer { min, .. } | Kind::Integers { min, .. } => min.to_string(),
                Kind::Choice(choices) => choices[0].0.clone(),
                Kind::Text | Kind::Texts => "some".to_owned(),
            };
            let flag = format!("--{path}={text}");
            let flags = parse(&[&flag]).unwrap_or_else(|error| panic!("{flag}: {error}"));
            let settings = flags.settings().unwrap_or_else(|error| panic!("{flag}: {error}"));
            assert_eq!(settings.len(), 1, "{flag}");
            assert_eq!(settings[0].path, path);
        }
    }

    #[test]
    fn flags_become_settings() {
        let check = |args: &[&str], expected: &[&str]| {
            let settings = parse(args).unwrap_or_else(|error| panic!("{error}")).settings().unwrap();
            let shown: Vec<_> =
                settings.iter().map(|setting| format!("{}={}", setting.path, setting.value)).collect();
            assert_eq!(shown, expected, "{args:?}");
        };
        check(&[], &[]);
        check(&["--shards", "2"], &["server.shards=2"]);
        check(
            &["--listen", "127.0.0.1:1", "--listen=127.0.0.1:2"],
            &["server.listen=[\"127.0.0.1:1\", \"127.0.0.1:2\"]"],
        );
        check(&["--admin", "127.0.0.1:1"], &["admin.listen=\"127.0.0.1:1\""]);
        check(&["--api-key", "k"], &["admin.api_key=\"k\""]);
        check(&["--client.personal_channel"], &["client.personal_channel=true"]);
        check(&["--client.personal_channel=false"], &["client.personal_channel=false"]);
        check(&["--set", "channel.presence=true"], &["channel.presence=true"]);
        check(&["--namespaces.a.presence=true"], &["namespaces.a.presence=true"]);
        check(
            &["--namespaces.a.presence", "true", "--shards", "1"],
            &["server.shards=1", "namespaces.a.presence=true"],
        );
    }

    #[test]
    fn what_is_wrong_says_so() {
        let check = |args: &[&str], part: &str| {
            let error = match parse(args) {
                Err(error) => error.to_string(),
                Ok(flags) => flags.settings().expect_err(part).to_string(),
            };
            assert!(error.contains(part), "{error}");
        };
        check(&["--client.ping_intervall_ms=1"], "--client.ping_interval_ms");
        check(&["--set", "presence"], "expected KEY=VALUE");
        check(&["--shards", "0"], "server.shards = 0: expected a whole number from 1 to 1024 (--shards)");
        check(
            &["--namespaces.a.presense=true"],
            "unknown key `namespaces.a.presense` (--namespaces.a.presense)",
        );
        check(&["--namespaces.a.presence"], "expected true or false");
    }
}
