//! How a command fails: one line of what is wrong, one of what to do, and an exit code.

use thiserror::Error;

use super::check::CheckError;
use super::config::ConfigError;
use super::serve::ServeError;
use super::token::TokenError;

/// The configuration, a limit, the kernel or the outside refused; nothing is broken.
pub const EXIT_REFUSED: u8 = 1;
/// The node is broken: sysexits(3) calls it an internal software error.
pub const EXIT_BUG: u8 = 70;

/// Why a command ends without success.
#[derive(Debug, Error)]
pub enum Failure {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The machine cannot give what the configuration asks for.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// No token could be made.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The node did not start or did not go on.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl Failure {
    /// What to do about it, in one line.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Config(error) => Some(error.help()),
            Self::Check(error) => error.help(),
            Self::Token(error) => error.help(),
            Self::Serve(error) => error.help(),
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Serve(error) if error.is_bug() => EXIT_BUG,
            _ => EXIT_REFUSED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bug_exits_as_one_and_everything_has_a_remedy() {
        let check = |failure: Failure, code: u8| {
            assert_eq!(failure.exit_code(), code, "{failure}");
            assert!(failure.help().is_some_and(|help| !help.contains('\n')), "{failure}");
            assert!(!failure.to_string().contains('\n'), "{failure}");
        };
        check(ServeError::Shard { shard: 3, message: "boom".to_owned() }.into(), EXIT_BUG);
        check(TokenError::NoSecret.into(), EXIT_REFUSED);
        check(
            ConfigError::UnknownVariable { name: "RINGMAIN_X".to_owned(), nearest: None }.into(),
            EXIT_REFUSED,
        );
        let over = CheckError::OverBudget { total_bytes: 2, budget_bytes: 1, budget_source: "x".to_owned() };
        check(over.into(), EXIT_REFUSED);
    }
}
