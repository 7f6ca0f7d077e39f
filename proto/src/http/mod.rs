//! HTTP/1.x on the traffic port: request heads, the WebSocket upgrade, short answers.
//!
//! Owns parsing a request head out of received bytes, the checks of the opening handshake
//! (RFC 6455 section 4.2) with origin and subprotocol, and writing responses. Must not know routes,
//! sockets, or timeouts; it reads no request bodies: a request with one is answered and the
//! connection closed.

mod origin;
mod request;
mod response;
mod upgrade;

pub use origin::AllowedOrigins;
pub use request::{Head, HttpError, Request, parse_head};
pub use response::Response;
pub use upgrade::{Upgrade, UpgradeError, check_upgrade};
