//! The first message of a connection: connect, with a token of its own where there is a secret, and subscribe.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::plan::Channels;
use crate::wire::centrifuge::{opening, own_channel};
use crate::wire::frame::{Opcode, push_client_frame};
use crate::wire::token::{Mint, TokenError};

/// Tokens live longer than any run.
const TOKEN_TTL_S: u64 = 24 * 3600;

/// Prepares openings. Sizes depend on the kind only, never on the connection.
pub(crate) struct Openings {
    mint: Option<Mint>,
}

impl Openings {
    /// Checks the secret by minting a token with it.
    pub(crate) fn new(secret: Option<&str>) -> Result<Openings, TokenError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mint = secret.map(|secret| Mint::new(secret, now + TOKEN_TTL_S));
        if let Some(mint) = &mint {
            mint.token(0)?;
        }
        Ok(Openings { mint })
    }

    /// Appends the frame that opens connection number `number` (among all of the run); returns the replies to expect.
    pub(crate) fn append(&self, number: u64, channel: Option<&str>, out: &mut Vec<u8>) -> u32 {
        // `new` has minted with this secret; should it fail now all the same, the server refuses the empty token.
        let token = self.mint.as_ref().map(|mint| mint.token(number).unwrap_or_default());
        push_client_frame(out, Opcode::Text, &opening(token.as_deref(), channel));
        1 + u32::from(channel.is_some())
    }
}

impl Channels {
    /// The channel of connection number `number`.
    pub(crate) fn of(&self, number: u64) -> Option<String> {
        match self {
            Channels::Shared(channel) => Some(channel.clone()),
            Channels::Own(prefix) => Some(own_channel(prefix, number)),
            Channels::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_openings_of_a_kind_have_one_size() {
        let own = Channels::Own("room:own-".into());
        for secret in [None, Some("secret")] {
            let openings = Openings::new(secret).expect("a usable secret");
            let sizes: Vec<usize> = [0, 17, 999_999]
                .map(|number| {
                    let mut out = Vec::new();
                    assert_eq!(openings.append(number, own.of(number).as_deref(), &mut out), 2);
                    out.len()
                })
                .into();
            assert!(sizes.iter().all(|&size| size == sizes[0]), "{sizes:?}");
        }
        let mut out = Vec::new();
        assert_eq!(
            Openings::new(None).expect("none").append(0, Channels::None.of(0).as_deref(), &mut out),
            1
        );
    }
}
