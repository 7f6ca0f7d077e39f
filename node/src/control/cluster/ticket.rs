//! Tickets: that a user belongs to a node, signed.
//!
//! Owns the claims. A ticket is a JWT (HS256) under a key of the cluster's configuration, so that a proxy in front
//! can verify it with what it has. It must not know the ring, nor who asks; a ticket permits nothing: who connects
//! still needs a token.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::core::config::Secret;

/// How long a ticket is valid, in seconds: long enough to connect, short enough that the ring may change.
pub const TICKET_TTL_S: u64 = 60;

/// What a ticket says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The user.
    pub sub: String,
    /// The node's name.
    pub node: String,
    /// Where clients reach it.
    pub address: String,
    /// When it expires, in seconds since 1970.
    pub exp: u64,
}

/// Why a ticket is not good.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TicketError {
    /// It is no ticket of this cluster: broken, or signed with another key.
    #[error("it is no ticket of this cluster")]
    Invalid,
    /// Its time is over; ask for a new one.
    #[error("the ticket has expired")]
    Expired,
}

/// Signs a ticket.
pub fn sign(ticket: &Ticket, key: &Secret) -> Result<String, jsonwebtoken::errors::Error> {
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), ticket, &EncodingKey::from_secret(key.0.as_bytes()))
}

/// Reads a ticket that was signed with `key` and has not expired at `now_s`, in seconds since 1970.
pub fn verify(text: &str, key: &Secret, now_s: u64) -> Result<Ticket, TicketError> {
    let mut validation = Validation::new(Algorithm::HS256);
    validation.set_required_spec_claims::<&str>(&[]);
    // By the caller's clock, not by the system's.
    validation.validate_exp = false;
    let key = DecodingKey::from_secret(key.0.as_bytes());
    let data = jsonwebtoken::decode::<Ticket>(text, &key, &validation).map_err(|_| TicketError::Invalid)?;
    if data.claims.exp <= now_s { Err(TicketError::Expired) } else { Ok(data.claims) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_good_until_it_expires_and_under_its_key_alone() {
        let key = Secret("key".to_owned());
        let ticket =
            Ticket { sub: "7".to_owned(), node: "a".to_owned(), address: "a:8000".to_owned(), exp: 100 };
        let text = sign(&ticket, &key).unwrap();
        assert_eq!(verify(&text, &key, 99), Ok(ticket.clone()));
        assert_eq!(verify(&text, &key, 100), Err(TicketError::Expired));
        assert_eq!(verify(&text, &Secret("other".to_owned()), 99), Err(TicketError::Invalid));
        let changed = sign(&Ticket { node: "b".to_owned(), ..ticket }, &Secret("other".to_owned())).unwrap();
        assert_eq!(verify(&changed, &key, 99), Err(TicketError::Invalid));
        let (head, rest) = text.split_once('.').unwrap();
        let (_, signature) = rest.split_once('.').unwrap();
        let (_, forged) = changed.split_once('.').unwrap();
        let forged = format!("{head}.{}.{signature}", forged.split_once('.').unwrap().0);
        assert_eq!(verify(&forged, &key, 99), Err(TicketError::Invalid));
        assert_eq!(verify("", &key, 0), Err(TicketError::Invalid));
    }
}
