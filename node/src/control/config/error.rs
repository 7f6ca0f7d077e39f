//! What can be wrong with a configuration.
//!
//! Every variant is the operator's to mend and keeps the node from starting. `Display` is one line
//! that names the key, the value (never a secret's) and where it came from; [`ConfigError::help`] is
//! the remedy.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

/// Where a value came from; the later ones win.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The configuration file.
    File(PathBuf),
    /// `--demo`.
    Demo,
    /// A variable of the environment.
    Variable(String),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Demo => f.write_str("--demo"),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in bytes.
        column: usize,
        /// What the parser says.
        message: String,
    },
    /// No such key or section.
    #[error("unknown key `{key}` ({origin})")]
    UnknownKey {
        /// Its dotted path.
        key: String,
        /// The nearest known path.
        nearest: Option<String>,
        /// Where it was.
        origin: Origin,
    },
    /// A `RINGMAIN_*` variable that sets nothing.
    #[error("unknown variable {name}")]
    UnknownVariable {
        /// Its name.
        name: String,
        /// The nearest known variable.
        nearest: Option<String>,
    },
    /// The value has another type, or is out of its range.
    #[error("{key} = {value}: expected {expected} ({origin})")]
    Value {
        /// The key's dotted path.
        key: String,
        /// The value as it was written; `***` for a secret.
        value: String,
        /// Type and range.
        expected: String,
        /// Where it was.
        origin: Origin,
    },
    /// A value that its own type refuses.
    #[error("{message}")]
    Form {
        /// What the type says.
        message: String,
    },
    /// Two values that do not go together.
    #[error("{message}")]
    Relation {
        /// Both, with their values.
        message: String,
        /// What to change.
        help: String,
    },
}

impl ConfigError {
    /// What to do about it, in one line.
    pub fn help(&self) -> String {
        match self {
            Self::Unreadable { .. } => "`ringmain genconfig` prints a file to start from".to_owned(),
            Self::Syntax { .. } => "the file is TOML; `ringmain genconfig` prints an example".to_owned(),
            Self::UnknownKey { nearest: Some(nearest), .. } => format!("did you mean `{nearest}`?"),
            Self::UnknownVariable { nearest: Some(nearest), .. } => format!("did you mean {nearest}?"),
            Self::UnknownKey { .. } | Self::UnknownVariable { .. } => {
                "`ringmain genconfig` lists every key".to_owned()
            }
            Self::Value { key, .. } => format!("`ringmain genconfig` describes {key}"),
            Self::Form { .. } => "`ringmain genconfig` describes every key".to_owned(),
            Self::Relation { help, .. } => help.clone(),
        }
    }
}
