//! The keys of the configuration file, read off the structs.
//!
//! Owns the tree of sections and keys with their types, ranges and doc comments, made once from the
//! structs' JSON schema. Everything mechanical starts here: unknown keys, wrong types, ranges, flags,
//! `RINGMAIN_*` variables and the documented file. It knows no values and no files.
//!
//! Invariant: a field of a type that this module cannot describe fails at the first use of [`tree`],
//! so the tests of any command see it.

use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::sections::NodeConfig;
use crate::core::config::CoreConfig;

/// The prefix of every variable.
pub const VARIABLE_PREFIX: &str = "RINGMAIN_";

/// A table of the file.
#[derive(Debug)]
pub struct Section {
    /// Dotted path; a map's entry has `*` for its name. Empty for the whole file.
    pub path: String,
    /// The doc comment.
    pub doc: String,
    /// May be absent altogether.
    pub optional: bool,
    /// In the order of the struct.
    pub children: Vec<(String, Node)>,
}

/// What a name in a table stands for.
#[derive(Debug)]
pub enum Node {
    /// A value.
    Key(Key),
    /// A table.
    Section(Section),
    /// A table of tables that the operator names.
    Map(Section),
}

/// A value of the file.
#[derive(Debug)]
pub struct Key {
    /// Dotted path, `*` for a name that the operator chooses.
    pub path: String,
    /// The doc comment.
    pub doc: String,
    /// Type and range.
    pub kind: Kind,
    /// Must never be shown.
    pub secret: bool,
    /// May be absent.
    pub optional: bool,
    /// A short name for its flag and variable.
    pub alias: Option<String>,
}

/// The type of a value, with its range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number in this range.
    Integer {
        /// Smallest.
        min: i64,
        /// Largest.
        max: i64,
    },
    /// Any text.
    Text,
    /// One of these texts, each with its doc comment.
    Choice(Vec<(String, String)>),
    /// A list of texts.
    Texts,
    /// A list of whole numbers in this range.
    Integers {
        /// Smallest.
        min: i64,
        /// Largest.
        max: i64,
    },
}

impl Kind {
    /// What the value must be, for error messages and for the documented file.
    pub fn expected(&self) -> String {
        match self {
            Self::Bool => "true or false".to_owned(),
            Self::Integer { min, max } => format!("a whole number from {min} to {max}"),
            Self::Text => "a text".to_owned(),
            Self::Choice(choices) => {
                let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
                format!("one of {}", names.join(", "))
            }
            Self::Texts => "a list of texts".to_owned(),
            Self::Integers { min, max } => format!("a list of whole numbers from {min} to {max}"),
        }
    }
}

impl Key {
    /// The variable that sets it, from its path: `client.ping_interval_ms` is
    /// `RINGMAIN_CLIENT_PING_INTERVAL_MS`.
    pub fn variable(&self) -> String {
        variable_of(&self.path)
    }

    /// The variable of its short name.
    pub fn short_variable(&self) -> Option<String> {
        self.alias.as_deref().map(variable_of)
    }
}

fn variable_of(path: &str) -> String {
    let name = path.replace(|c: char| !c.is_ascii_alphanumeric(), "_").to_ascii_uppercase();
    format!("{VARIABLE_PREFIX}{name}")
}

impl Section {
    /// The child of this name.
    pub fn child(&self, name: &str) -> Option<&Node> {
        self.children.iter().find(|(child, _)| child == name).map(|(_, node)| node)
    }

    /// Every key below, in the order of the file.
    pub fn keys(&self) -> Vec<&Key> {
        let mut keys = Vec::new();
        for (_, node) in &self.children {
            match node {
                Node::Key(key) => keys.push(key),
                Node::Section(section) | Node::Map(section) => keys.extend(section.keys()),
            }
        }
        keys
    }

    /// The key that a dotted path names, and whether it goes through a map.
    pub fn find(&self, path: &str) -> Option<&Key> {
        let (name, rest) = match path.split_once('.') {
            Some((name, rest)) => (name, Some(rest)),
            None => (path, None),
        };
        match (self.child(name)?, rest) {
            (Node::Key(key), None) => Some(key),
            (Node::Section(section), Some(rest)) => section.find(rest),
            (Node::Map(entry), Some(rest)) => entry.find(rest.split_once('.')?.1),
            _ => None,
        }
    }
}

/// The whole file.
pub fn tree() -> &'static Section {
    static TREE: LazyLock<Section> = LazyLock::new(|| {
        let mut root = section("", "", &schema_of::<NodeConfig>());
        root.children.extend(section("", "", &schema_of::<CoreConfig>()).children);
        root
    });
    &TREE
}

/// Names of the sections that the core reads.
pub fn core_sections() -> impl Iterator<Item = &'static str> {
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
        let core = section("", "", &schema_of::<CoreConfig>());
        core.children.into_iter().map(|(name, _)| name).collect()
    });
    NAMES.iter().map(String::as_str)
}

fn schema_of<T: schemars::JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

fn section(path: &str, doc: &str, schema: &Value) -> Section {
    let properties = schema["properties"].as_object().expect("a section is a struct");
    let children = properties
        .iter()
        .map(|(name, schema)| {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            (name.clone(), node(path, schema))
        })
        .collect();
    Section { path: path.to_owned(), doc: doc.to_owned(), optional: is_optional(schema), children }
}

fn node(path: String, schema: &Value) -> Node {
    let doc = schema["description"].as_str().unwrap_or_default().to_owned();
    if schema.get("properties").is_some() {
        return Node::Section(section(&path, &doc, schema));
    }
    if schema["additionalProperties"].is_object() {
        return Node::Map(section(&format!("{path}.*"), &doc, &schema["additionalProperties"]));
    }
    Node::Key(Key {
        kind: kind(&path, schema),
        secret: schema["writeOnly"].as_bool().unwrap_or(false),
        optional: is_optional(schema),
        alias: schema["x-alias"].as_str().map(str::to_owned),
        path,
        doc,
    })
}

/// The schema's type without the `null` of an `Option`.
fn type_of(schema: &Value) -> &str {
    match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).find(|name| *name != "null"),
        other => other.as_str(),
    }
    .unwrap_or_default()
}

fn is_optional(schema: &Value) -> bool {
    schema["type"].as_array().is_some_and(|types| types.iter().any(|name| name == "null"))
}

fn kind(path: &str, schema: &Value) -> Kind {
    if let Some(choices) = schema["oneOf"].as_array() {
        let choice = |schema: &Value| {
            let name = schema["const"].as_str().expect("a plain enum");
            (name.to_owned(), schema["description"].as_str().unwrap_or_default().to_owned())
        };
        return Kind::Choice(choices.iter().map(choice).collect());
    }
    let range = |schema: &Value| {
        let bound = |name: &str| schema[name].as_i64().unwrap_or_else(|| panic!("{path}: no {name}"));
        (bound("minimum"), bound("maximum"))
    };
    match type_of(schema) {
        "boolean" => Kind::Bool,
        "string" => Kind::Text,
        "integer" => {
            let (min, max) = range(schema);
            Kind::Integer { min, max }
        }
        "array" => match type_of(&schema["items"]) {
            "string" => Kind::Texts,
            "integer" => {
                let (min, max) = range(&schema["items"]);
                Kind::Integers { min, max }
            }
            other => panic!("{path}: a list of `{other}` has no description here"),
        },
        other => panic!("{path}: the type `{other}` has no description here"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn keys_have_their_path_type_range_and_variable() {
        let check = |path: &str, kind: Kind, variable: &str| {
            let key = tree().find(path).unwrap_or_else(|| panic!("{path} is not known"));
            assert_eq!(key.kind, kind, "{path}");
            assert_eq!(key.variable(), variable, "{path}");
        };
        check(
            "client.ping_interval_ms",
            Kind::Integer { min: 1_000, max: 3_600_000 },
            "RINGMAIN_CLIENT_PING_INTERVAL_MS",
        );
        check("server.listen", Kind::Texts, "RINGMAIN_SERVER_LISTEN");
        check("server.cpus", Kind::Integers { min: 0, max: 4_095 }, "RINGMAIN_SERVER_CPUS");
        check("token.hmac_secret", Kind::Text, "RINGMAIN_TOKEN_HMAC_SECRET");
        check("channel.presence", Kind::Bool, "RINGMAIN_CHANNEL_PRESENCE");
        check(
            "namespaces.room.history_size",
            Kind::Integer { min: 0, max: 1_000_000 },
            "RINGMAIN_NAMESPACES___HISTORY_SIZE",
        );
        assert!(tree().find("namespaces.room").is_none());
        assert!(tree().find("namespaces.room.history_sizes").is_none());
        assert!(tree().find("client").is_none());
    }

    #[test]
    fn every_key_is_documented_and_every_number_has_a_range() {
        for key in tree().keys() {
            assert!(key.doc.len() > 10, "{} has no doc comment", key.path);
            if let Kind::Choice(choices) = &key.kind {
                assert!(choices.iter().all(|(_, doc)| !doc.is_empty()), "{}", key.path);
            }
            if let Kind::Integer { min, max } | Kind::Integers { min, max } = key.kind {
                assert!(min < max, "{}", key.path);
            }
        }
    }

    #[test]
    fn no_two_keys_share_a_variable() {
        let mut seen = BTreeSet::new();
        for key in tree().keys() {
            for variable in [Some(key.variable()), key.short_variable()].into_iter().flatten() {
                assert!(seen.insert(variable.clone()), "{variable} is taken twice");
            }
        }
    }

    #[test]
    fn secrets_are_known_as_such() {
        let secrets: Vec<_> = tree().keys().into_iter().filter(|key| key.secret).map(|k| &k.path).collect();
        assert_eq!(
            secrets,
            ["admin.api_key", "cluster.ticket_key", "token.hmac_secret", "subscription_token.hmac_secret"]
        );
    }
}
