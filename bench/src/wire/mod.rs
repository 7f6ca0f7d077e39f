//! What the load generator says and hears: client-side WebSocket frames, the upgrade, Centrifuge JSON, tokens.
//!
//! Owns the bytes of both directions. Must not know sockets, clocks or the server's code: the bench judges the
//! server from outside, so it shares no parser with it. Nothing here allocates per message once a template is built.

pub(crate) mod centrifuge;
pub(crate) mod frame;
pub(crate) mod template;
pub(crate) mod token;
pub(crate) mod upgrade;
