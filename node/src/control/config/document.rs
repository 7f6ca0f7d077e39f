//! The configuration as a documented file: `ringmain genconfig`, and the listing of `ringmain check`.
//!
//! Owns the rendering only; comments, types, ranges and defaults come from the structs.

use std::fmt::Write as _;

use toml::{Table, Value};

use super::schema::{Key, Kind, Node, Section, tree};
use super::{Resolved, defaults, to_table};
use crate::core::config::NamespaceConfig;

/// Width of a comment's text, in characters.
const COMMENT_COLUMNS: usize = 96;

const HEAD: &str = "\
# Configuration of Ringmain, with its defaults. Every key may be left out.
#
# A key `section.key` may also be given as the flag `--section.key=VALUE` or as the variable
# `RINGMAIN_SECTION_KEY`; a flag wins over a variable, a variable over this file. Lists are separated by
# commas there. An unknown key or variable is an error. `ringmain check` shows what a node would run with.
";

/// The documented file with the defaults.
pub fn generate() -> String {
    let mut out = HEAD.to_owned();
    write_sections(tree(), &defaults(), &mut out);
    out
}

fn write_sections(root: &Section, values: &Table, out: &mut String) {
    for (name, node) in &root.children {
        match node {
            Node::Section(section) => write_section(name, section, values.get(name), out),
            Node::Map(entry) => write_map(name, entry, values.get(name), out),
            Node::Key(key) => write_key(key, values.get(name), "", out),
        }
    }
}

fn write_section(name: &str, section: &Section, values: Option<&Value>, out: &mut String) {
    let prefix = if values.is_none() { "# " } else { "" };
    out.push('\n');
    comment(&section.doc, out);
    let _ = writeln!(out, "{prefix}[{name}]");
    for (name, node) in &section.children {
        let Node::Key(key) = node else { continue };
        write_key(key, values.and_then(|values| values.get(name)), prefix, out);
    }
}

/// The entries that exist by default, and one that shows how to make another. Their keys are those of
/// `[channel]` and not repeated.
fn write_map(name: &str, entry: &Section, values: Option<&Value>, out: &mut String) {
    out.push('\n');
    comment(&entry.doc, out);
    comment("Each has the keys of `[channel]`, with the same defaults.", out);
    for (entry, _) in values.and_then(Value::as_table).into_iter().flatten() {
        let _ = writeln!(out, "[{name}.{entry}]");
    }
    let _ = writeln!(out, "# [{name}.room]");
    for key in ["presence", "join_leave", "allow_subscribe_for_client", "allow_publish_for_subscriber"] {
        let _ = writeln!(out, "# {key} = true");
    }
}

fn write_key(key: &Key, value: Option<&Value>, prefix: &str, out: &mut String) {
    out.push('\n');
    comment(&key.doc, out);
    if let Kind::Choice(choices) = &key.kind {
        for (name, doc) in choices {
            comment(&format!("- \"{name}\": {doc}"), out);
        }
    }
    if let Kind::Integer { .. } | Kind::Integers { .. } = key.kind {
        let expected = key.kind.expected();
        comment(&format!("{}{}.", expected[..1].to_uppercase(), &expected[1..]), out);
    }
    let name = key.path.rsplit('.').next().unwrap_or_default();
    match value {
        Some(value) => {
            let _ = writeln!(out, "{prefix}{name} = {value}");
        }
        None => {
            let _ = writeln!(out, "# {name} = {}", sample(key));
        }
    }
}

/// What an absent value might be.
fn sample(key: &Key) -> String {
    match &key.kind {
        Kind::Bool => "true".to_owned(),
        Kind::Integer { min, .. } => min.to_string(),
        Kind::Text => "\"…\"".to_owned(),
        Kind::Choice(choices) => format!("\"{}\"", choices[0].0),
        Kind::Texts | Kind::Integers { .. } => "[]".to_owned(),
    }
}

/// Writes a comment, broken between words.
fn comment(text: &str, out: &mut String) {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > COMMENT_COLUMNS {
            let _ = writeln!(out, "# {line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        let _ = writeln!(out, "# {line}");
    }
}

/// The resolved configuration as a file, secrets hidden, each value that is not the default with its
/// origin. Namespaces show only what differs from the defaults of a namespace.
pub fn listing(resolved: &Resolved) -> String {
    let mut out = String::new();
    let values = to_table(&resolved.config);
    for (name, node) in &tree().children {
        match (node, values.get(name).and_then(Value::as_table)) {
            (Node::Section(section), Some(values)) => {
                list_section(name, section, values, None, resolved, &mut out);
            }
            (Node::Map(entry), Some(values)) => {
                let defaults = Table::try_from(NamespaceConfig::default()).expect("a plain table");
                for (namespace, values) in values {
                    let values = values.as_table().expect("a namespace is a table");
                    let path = format!("{name}.{namespace}");
                    list_section(&path, entry, values, Some(&defaults), resolved, &mut out);
                }
            }
            _ => {}
        }
    }
    out
}

fn list_section(
    path: &str,
    section: &Section,
    values: &Table,
    unless: Option<&Table>,
    resolved: &Resolved,
    out: &mut String,
) {
    let _ = writeln!(out, "[{path}]");
    for (name, node) in &section.children {
        let (Node::Key(key), Some(value)) = (node, values.get(name)) else { continue };
        let origin = resolved.origins.get(&format!("{path}.{name}"));
        if origin.is_none() && unless.is_some_and(|defaults| defaults.get(name) == Some(value)) {
            continue;
        }
        let value = if key.secret { "\"***\"".to_owned() } else { value.to_string() };
        let origin = origin.map(|origin| format!("  # {origin}")).unwrap_or_default();
        let _ = writeln!(out, "{name} = {value}{origin}");
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::super::tests::resolved;
    use super::*;

    #[test]
    fn the_generated_file_is_the_default() {
        let text = generate();
        let resolved = resolved(&text, &[], &[], false).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(to_table(&resolved.config), defaults());
    }

    #[test]
    fn the_generated_file_shows_every_key_with_its_comment() {
        let text = generate();
        for key in tree().keys() {
            let shared = key.path.starts_with("namespaces.*");
            let name = key.path.rsplit('.').next().unwrap();
            assert!(shared || text.contains(&format!("{name} = ")), "{} is missing", key.path);
            let words: Vec<_> = key.doc.split_whitespace().take(4).collect();
            assert!(text.contains(&words.join(" ")), "{} has no comment", key.path);
        }
    }

    #[test]
    fn what_is_commented_out_is_right_too() {
        let keys = |line: &str| {
            line.strip_prefix("# ").is_some_and(|rest| rest.contains(" = ") && !rest.contains('`'))
        };
        let uncommented: String = generate()
            .lines()
            .map(|line| if keys(line) || line.starts_with("# [") { &line[2..] } else { line })
            .flat_map(|line| [line, "\n"])
            .collect();
        let resolved = resolved(&uncommented, &[], &[], false).unwrap_or_else(|error| panic!("{error}"));
        assert!(resolved.config.core.subscription_token.is_some_and(|token| token.hmac_secret.is_some()));
        assert!(resolved.config.core.namespaces["room"].presence);
        assert_eq!(resolved.config.node.server.shards, Some(1));
    }

    #[test]
    fn comments_are_broken_between_words() {
        let mut out = String::new();
        comment(&"word ".repeat(40), &mut out);
        assert_eq!(out.lines().count(), 3);
        assert!(out.lines().all(|line| line.len() <= COMMENT_COLUMNS + 2 && line.starts_with("# word")));
    }

    #[test]
    fn a_listing_hides_secrets_and_names_origins() {
        let variables = [("RINGMAIN_API_KEY", "hunter2"), ("RINGMAIN_TOKEN_HMAC_SECRET", "hunter3")];
        let flags = ["namespaces.chat.history_size=7"];
        let text = listing(&resolved("[client]\nchannel_limit = 5", &variables, &flags, false).unwrap());
        assert!(!text.contains("hunter"), "{text}");
        for line in [
            "api_key = \"***\"  # RINGMAIN_API_KEY",
            "hmac_secret = \"***\"  # RINGMAIN_TOKEN_HMAC_SECRET",
            "channel_limit = 5  # r.toml",
            "[namespaces.chat]\nhistory_size = 7  # --namespaces.chat.history_size\n\n",
            "[namespaces.user]\n\n",
            "ping_interval_ms = 25000\n",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
        let again = resolved(&text, &[], &[], false).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(again.config.core.client.channel_limit, 5, "a listing is a file");
    }
}
