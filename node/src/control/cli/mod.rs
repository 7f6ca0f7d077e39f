//! The command line.
//!
//! Owns the commands, their flags and help, and the exit codes. What the commands do is elsewhere;
//! here they are only told where their configuration comes from.

mod flags;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand};

use self::flags::KeyFlags;
use super::config::{self, ConfigError, Resolved, Sources};
use super::failure::Failure;
use super::token::{self, TokenRequest};
use super::{check, serve};

const EXIT_CODES: &str = "\
Exit codes:
  0    done; for `serve`: drained after SIGTERM or SIGINT
  1    refused: the configuration, a limit, the kernel or a held port; the message names the remedy
  2    the command line was not understood
  70   a bug: a shard failed and took the node down
  130  a second SIGINT cut a drain short (143: SIGTERM)";

/// An edge node for realtime messaging: WebSocket connections, channels, history and presence.
#[derive(Debug, Parser)]
#[command(name = "ringmain", version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node.
    #[command(after_help = "\
Examples:
  ringmain serve --demo
  ringmain serve --config /etc/ringmain.toml
  RINGMAIN_API_KEY=… RINGMAIN_TOKEN_HMAC_SECRET=… ringmain serve --listen 0.0.0.0:8000 --shards 4

Every key of the file is a flag too: `--help` lists them. A flag wins over a RINGMAIN_* variable, a
variable over the file.")]
    Serve(ConfigArgs),
    /// Show the resolved configuration, the memory it may take, and what the kernel refuses.
    #[command(after_help = "\
Example:
  ringmain check --config /etc/ringmain.toml

Exits with 1 where `serve` would refuse to start.")]
    Check(ConfigArgs),
    /// Print a documented configuration file with the defaults.
    #[command(after_help = "Example:\n  ringmain genconfig > ringmain.toml")]
    Genconfig,
    /// Mint a JWT to try things with: for a connection, or with --channel for a subscription.
    #[command(after_help = "\
Examples:
  RINGMAIN_TOKEN_HMAC_SECRET=… ringmain token --user alice --ttl 3600
  ringmain token --config ringmain.toml --user alice --channel room:general --info '{\"name\":\"Alice\"}'")]
    Token(TokenArgs),
    /// Print the version.
    #[command(after_help = "Example:\n  ringmain version")]
    Version,
}

/// Where a configuration comes from.
#[derive(Debug, Args)]
struct ConfigArgs {
    /// Configuration file (see `ringmain genconfig`)
    #[arg(long, value_name = "FILE", env = "RINGMAIN_CONFIG")]
    config: Option<PathBuf>,
    /// Let anyone in: no tokens, `room:` open to all, the API without a key on loopback
    #[arg(long, env = "RINGMAIN_DEMO", value_parser = FalseyValueParser::new())]
    demo: bool,
    #[command(flatten)]
    keys: KeyFlags,
}

#[derive(Debug, Args)]
struct TokenArgs {
    /// User id (claim `sub`); empty: the anonymous user
    #[arg(long, default_value = "")]
    user: String,
    /// Seconds until the token expires; without it and --exp it never does
    #[arg(long, value_name = "SECONDS", conflicts_with = "exp")]
    ttl: Option<u64>,
    /// Expiry in seconds since 1970
    #[arg(long, value_name = "SECONDS")]
    exp: Option<u64>,
    /// Make a subscription token for this channel
    #[arg(long)]
    channel: Option<String>,
    /// JSON shown to others as the user's info
    #[arg(long, value_name = "JSON")]
    info: Option<String>,
    /// HMAC secret; by default the one of the configuration
    #[arg(long)]
    secret: Option<String>,
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "RINGMAIN_CONFIG")]
    config: Option<PathBuf>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args = flags::expand_namespaces(std::env::args_os());
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // A closed standard output is no reason to fail differently.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {failure}");
            if let Some(help) = failure.help() {
                eprintln!("help: {help}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve(args) => serve::run(resolve(args)?),
        Command::Check(args) => check::run(resolve(args)?),
        Command::Genconfig => {
            say(&config::document::generate());
            Ok(ExitCode::SUCCESS)
        }
        Command::Token(args) => {
            say(&format!("{}\n", mint(args)?));
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => {
            say(&format!("ringmain {}\n", super::VERSION));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Writes to standard output. A reader that has gone (`| head`) is no error.
pub(super) fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn resolve(args: ConfigArgs) -> Result<Resolved, ConfigError> {
    let flags = args.keys.settings()?;
    config::resolve(Sources { file: read_file(args.config)?, variables: variables(), flags, demo: args.demo })
}

fn read_file(path: Option<PathBuf>) -> Result<Option<(PathBuf, String)>, ConfigError> {
    let Some(path) = path else { return Ok(None) };
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some((path, text))),
        Err(source) => Err(ConfigError::Unreadable { path, source }),
    }
}

/// The environment, as far as it is text.
fn variables() -> Vec<(String, String)> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    std::env::vars_os().filter_map(text).collect()
}

fn mint(args: TokenArgs) -> Result<String, Failure> {
    let sources = Sources { file: read_file(args.config)?, variables: variables(), ..Sources::default() };
    let resolved = config::resolve(sources)?;
    let request = TokenRequest {
        user: args.user,
        ttl_s: args.ttl,
        expire_at_s: args.exp,
        channel: args.channel,
        info: args.info,
        secret: args.secret,
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(token::mint(&request, &resolved.config.core, now.as_secs())?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("ringmain "), "{} has no example", command.get_name());
        }
    }
}
