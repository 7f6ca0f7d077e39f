//! Connection tokens, minted here: HS256 JWTs whose size does not depend on the user.

use jsonwebtoken::{EncodingKey, Header, encode};
use serde::Serialize;
use thiserror::Error;

/// The digits of a user's number, so that all tokens of a run have the same size.
pub(crate) const USER_DIGITS: usize = 7;

/// Signing failed: the secret cannot be used. Our own fault, and no retry helps.
#[derive(Debug, Error)]
#[error("cannot mint a token: {0}")]
pub(crate) struct TokenError(#[from] jsonwebtoken::errors::Error);

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    exp: u64,
}

/// Mints tokens for `bench-NNNNNNN` users with one secret and one expiry.
pub(crate) struct Mint {
    key: EncodingKey,
    expires_unix_s: u64,
}

impl Mint {
    pub(crate) fn new(secret: &str, expires_unix_s: u64) -> Mint {
        Mint { key: EncodingKey::from_secret(secret.as_bytes()), expires_unix_s }
    }

    /// The token of user number `user`.
    pub(crate) fn token(&self, user: u64) -> Result<String, TokenError> {
        let sub = user_name(user);
        Ok(encode(&Header::default(), &Claims { sub: &sub, exp: self.expires_unix_s }, &self.key)?)
    }
}

/// The name of user number `user`; its personal channel is `user:` and this.
pub(crate) fn user_name(user: u64) -> String {
    format!("bench-{user:0USER_DIGITS$}")
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation, decode};

    use super::*;

    #[derive(serde::Deserialize)]
    struct Claimed {
        sub: String,
        exp: u64,
    }

    #[test]
    fn tokens_verify_and_have_one_size() {
        let mint = Mint::new("secret", 4_000_000_000);
        let tokens: Vec<String> = [0, 5, 9_999_999].map(|user| mint.token(user).expect("minted")).into();
        assert!(tokens.iter().all(|token| token.len() == tokens[0].len()));
        let key = DecodingKey::from_secret(b"secret");
        let claims = decode::<Claimed>(&tokens[1], &key, &Validation::default()).expect("valid").claims;
        assert_eq!((claims.sub.as_str(), claims.exp), ("bench-0000005", 4_000_000_000));
        assert!(
            decode::<Claimed>(&tokens[1], &DecodingKey::from_secret(b"x"), &Validation::default()).is_err()
        );
    }
}
