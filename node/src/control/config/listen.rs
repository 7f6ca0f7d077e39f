//! An address to listen on, as the configuration writes it.
//!
//! Owns the text form `ADDRESS [proxy_protocol]`; ADDRESS is a [`ListenSpec`], with `localhost` for
//! 127.0.0.1. It opens no socket.
//!
//! Source: the words after the address follow nginx's `listen` directive.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::io::{ListenSpec, ParseListenError};

/// One entry of `server.listen`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Listen {
    /// Where.
    pub address: ListenSpec,
    /// Every connection begins with a PROXY protocol header, v1 or v2; one without it is closed.
    pub proxy_protocol: bool,
}

/// What is wrong with the text. The operator's fault.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ListenTextError {
    /// Nothing there.
    #[error("an address to listen on is empty")]
    Empty,
    /// No address.
    #[error(transparent)]
    Address(#[from] ParseListenError),
    /// A word after the address that means nothing.
    #[error("`{0}` is not known after an address to listen on; only `proxy_protocol` is")]
    Word(String),
}

/// How many sockets an address makes.
pub fn sockets_of(address: &ListenSpec) -> usize {
    match address {
        ListenSpec::Tcp { first, last, .. } => usize::from(last - first) + 1,
        ListenSpec::Unix(_) => 1,
    }
}

fn parse_address(text: &str) -> Result<ListenSpec, ParseListenError> {
    match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}").parse(),
        None => text.parse(),
    }
}

impl FromStr for Listen {
    type Err = ListenTextError;

    fn from_str(text: &str) -> Result<Self, ListenTextError> {
        let mut words = text.split_whitespace();
        let address = parse_address(words.next().ok_or(ListenTextError::Empty)?)?;
        let mut proxy_protocol = false;
        for word in words {
            match word {
                "proxy_protocol" => proxy_protocol = true,
                _ => return Err(ListenTextError::Word(word.to_owned())),
            }
        }
        Ok(Self { address, proxy_protocol })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.proxy_protocol { " proxy_protocol" } else { "" };
        write!(f, "{}{suffix}", self.address)
    }
}

/// The admin port's address: one TCP address and port (0: one that the kernel picks).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct AdminListen(pub SocketAddr);

impl TryFrom<String> for AdminListen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match parse_address(&text) {
            Ok(ListenSpec::Tcp { ip, first, last }) if first == last => Ok(Self(SocketAddr::new(ip, first))),
            _ => Err(format!("admin address `{text}`: expected IP:PORT or localhost:PORT")),
        }
    }
}

impl From<AdminListen> for String {
    fn from(listen: AdminListen) -> Self {
        listen.0.to_string()
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|error: ListenTextError| error.to_string())
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        listen.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_back() {
        let check = |text: &str, sockets: usize, proxy_protocol: bool| {
            let listen: Listen = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(sockets_of(&listen.address), sockets, "{text}");
            assert_eq!(listen.proxy_protocol, proxy_protocol, "{text}");
            assert_eq!(listen.to_string().parse(), Ok(listen), "{text}");
        };
        check("127.0.0.1:8000", 1, false);
        check("0.0.0.0:0", 1, false);
        check("localhost:8000", 1, false);
        check("[::]:8000-8015 proxy_protocol", 16, true);
        check("unix:/run/ringmain.sock", 1, false);
        check("unix:/run/ringmain.sock  proxy_protocol", 1, true);
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let check = |text: &str, part: &str| {
            let error = text.parse::<Listen>().expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        };
        check("", "empty");
        check("8000", "8000");
        check("127.0.0.1:9000-8999", "range");
        check("127.0.0.1:8000 ssl", "`ssl`");
    }

    #[test]
    fn the_admin_port_is_one_tcp_address() {
        let check = |text: &str, ok: bool| {
            assert_eq!(AdminListen::try_from(text.to_owned()).is_ok(), ok, "{text}");
        };
        check("127.0.0.1:8001", true);
        check("[::1]:0", true);
        check("localhost:8001", true);
        check("127.0.0.1:8001-8002", false);
        check("unix:/run/admin.sock", false);
        check("8001", false);
    }
}
